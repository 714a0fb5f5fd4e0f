"""Life, calls and limits of one session, over a conversation whose policy is a function of the test."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from areal_like.errors import EngineError, EpisodeBudgetError, EpisodeError, SessionGoneError
from areal_like.runtime.metrics import Metrics
from areal_like.trajectory import FinishReason
from rollout_server.conversation.turns import SampledTurn, Turn
from rollout_server.environments.base import Reply
from rollout_server.leases.held_leases import Place
from rollout_server.metrics import ServerStats
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.claimants import NUM_FREE, Claimant
from rollout_server.sessions.open_session import Call, OpenSession, SessionOutcome, SessionState
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.waiting import HANG_LIMIT_S

Say = Callable[[str], Awaitable[FinishReason]]
NONE = np.empty(0, np.int32)


class Talk:
    """In place of a Conversation: a turn for each answer."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.turns: list[Turn] = []
        self.finish_reason = FinishReason.STOP
        self.num_sampling = 0
        self.max_tokens = 100

    @property
    def is_sampling(self) -> bool:
        return self.num_sampling > 0

    @property
    def turn_lengths(self) -> list[int]:
        return [1] * len(self.turns)

    async def sample_turn(self, messages: list[dict[str, Any]]) -> SampledTurn:
        text = messages[-1]["content"]
        self.num_sampling += 1
        try:
            reason = await self.say(text)
        finally:
            self.num_sampling -= 1
        logprobs = np.zeros(1, np.float32)
        turn = Turn(
            parent=None,
            context=NONE,
            sampled=NONE,
            logprobs=logprobs,
            versions=NONE,
            messages=messages,
            end=1,
        )
        self.turns.append(turn)
        reply = Reply(
            text=text, raw_text=text, reasoning="", tool_calls=(), finish_reason=reason, num_tokens=1
        )
        return SampledTurn(reply=reply, prompt_ids=NONE, token_ids=NONE, logprobs=logprobs, turn=turn)

    def forget(self, turn: Turn) -> None:
        self.turns.remove(turn)


async def at_once(text: str) -> FinishReason:
    return FinishReason.STOP


def make(say: Say = at_once, *, places: list[Place] | None = None, **more: Any) -> OpenSession:
    moves = [] if places is None else places
    settings = {"id": "7-0-3", "api_key": "k", "max_turns": 4, "group": 7, "sample": 0, "split": "train"}
    return OpenSession(
        **(settings | {"index": 1, "conversation": Talk(say), "on_move": moves.append} | more)  # type: ignore[arg-type]
    )


def ask(session: OpenSession, text: str, *, again: bool = False) -> Call:
    messages = [{"role": "user", "content": text}]
    return session.begin(text.encode(), lambda: session.sample_turn(messages), is_repetition=again)


async def delivered(session: OpenSession, text: str) -> Call:
    call = ask(session, text)
    await call.turn()
    call.is_delivered = True
    return call


def run(body: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(HANG_LIMIT_S):
            await body

    asyncio.run(limited())


def test_the_key_of_a_session_is_not_printed() -> None:
    async def body() -> None:
        assert "a-live-key" not in repr(make(api_key="a-live-key"))

    run(body())


def test_an_end_answers_every_pending_call() -> None:
    async def body() -> None:
        forever = asyncio.Event()

        async def hang(text: str) -> FinishReason:
            await forever.wait()
            return FinishReason.STOP

        for close in (OpenSession.end, lambda one: one.close("its lease was cancelled")):
            places: list[Place] = []
            session = make(hang, places=places)
            first = ask(session, "a")
            waiting = asyncio.create_task(first.turn())
            await asyncio.sleep(0)
            assert session.num_pending == 1 and places == [Place.ENGINE]
            not_begun = asyncio.create_task(ask(session, "b").turn())
            close(session)
            close(session)  # a second time changes nothing
            for one in (waiting, not_begun):
                with pytest.raises(SessionGoneError, match=r"has ended|lease was cancelled"):
                    await one
            with pytest.raises(SessionGoneError):
                ask(session, "c")
            assert session.num_pending == 0 and session.finish() == [] and places == [Place.ENGINE]
            assert not session._calls._by_id and not session._calls._by_digest

    run(body())


def test_a_repetition_gets_the_answer_of_its_call() -> None:
    async def body() -> None:
        session = make()
        lost = ask(session, "a")
        await asyncio.wait({lost.task})
        assert ask(session, "a") is lost, "its client has gone without the answer"
        lost.is_delivered = True
        assert ask(session, "a", again=True) is lost
        other = await delivered(session, "a")
        assert other is not lost, "an equal request wants a sample of its own"
        # A cancelled reader cancels neither the call nor the other readers.
        third = ask(session, "b")
        readers = [asyncio.create_task(third.turn()) for _ in range(2)]
        await asyncio.sleep(0)
        readers[0].cancel()
        assert (await readers[1]).reply.text == "b" and third.num_readers == 0

    run(body())


def test_turns_that_nobody_has_read_are_left_out() -> None:
    async def body() -> None:
        async def say(text: str) -> FinishReason:
            return FinishReason.TIMEOUT if text == "cut" else FinishReason.STOP

        session = make(say)
        read = await delivered(session, "read")
        for text in ("unread", "rewarded", "cut"):
            await ask(session, text).turn()
        session.set_reward(0.5, completion_id=f"chatcmpl-{read.id}")
        session.set_reward(0.25, completion_id=f"cmpl-{list(session._calls._by_id)[2]}")
        session.end()
        assert session.finish() == [0.5, 0.25, 0.0]
        texts = [turn.messages[-1]["content"] for turn in session.conversation.turns]
        assert texts == ["read", "rewarded", "cut"]
        assert session.last_sampled is not None and session.last_sampled.reply.text == "cut"

    run(body())


def test_an_unread_turn_gives_no_finish_reason() -> None:
    async def body() -> None:
        async def say(text: str) -> FinishReason:
            reason = FinishReason.LENGTH if text == "long" else FinishReason.STOP
            session.conversation.finish_reason = reason
            return reason

        session = make(say)
        await delivered(session, "read")
        await ask(session, "long").turn()
        session.end()
        assert session.finish() == [0.0]
        assert session.conversation.finish_reason is FinishReason.STOP

    run(body())


def test_refused_requests_keep_no_session_alive() -> None:
    async def body() -> None:
        session = make(max_turns=1)
        await delivered(session, "a")
        ended = asyncio.create_task(session.wait_ended(idle_timeout_s=0.1, deadline_s=lambda: None))
        while not ended.done():
            with pytest.raises(EpisodeBudgetError, match=r"episode\.max_turns"):
                await ask(session, "b").turn()
            await asyncio.sleep(0.005)
        assert ended.result() == "idle" and session.budget is FinishReason.TURNS
        assert len(session._calls._by_id) == 1, "failed calls are not kept"

    run(body())


def test_limits_of_a_session() -> None:
    async def body() -> None:
        answered = asyncio.Event()

        async def slow(text: str) -> FinishReason:
            await answered.wait()
            return FinishReason.TIMEOUT

        session = make(slow)
        call = ask(session, "a")
        end_s = asyncio.get_running_loop().time() + 10
        ended = asyncio.create_task(session.wait_ended(idle_timeout_s=1, deadline_s=lambda: end_s))
        await asyncio.sleep(0)
        advance(11)
        await asyncio.sleep(0.02)
        assert not ended.done(), "the engine cuts a request whose time is over"
        answered.set()
        assert await ended == "deadline" and call.task.done()
        # Nothing limits the time that a session waits for an agent.
        waiting = make(is_waiting=True)
        ended = asyncio.create_task(waiting.wait_ended(idle_timeout_s=20, deadline_s=lambda: None))
        await asyncio.sleep(0)
        advance(60)
        await asyncio.sleep(0.02)
        assert not ended.done() and waiting.idle_s >= 60
        waiting.claim()
        await asyncio.sleep(0.02)
        assert not ended.done()
        advance(20)
        assert await ended == "idle"

    moved_clock.run(body())


def test_heartbeats_keep_a_session_for_a_while() -> None:
    async def body() -> None:
        session = make()
        session.heartbeat_limit_s = 100.0
        book = SessionBook()
        book.add(session)
        ended = asyncio.create_task(session.wait_ended(idle_timeout_s=50.0, deadline_s=lambda: None))
        for age_s in (40.0, 80.0, 120.0):  # a long tool; the clock is moved by moving the past
            before = book.progress
            session._last_activity_s -= 40.0
            session._served_s -= 40.0
            session._changed.set()
            await asyncio.sleep(0)
            assert not ended.done()
            session.hear()
            assert (book.progress != before) == (age_s < 100.0)
        session._last_activity_s -= 40.0
        session._changed.set()
        assert await ended == "idle", "the last one was too late to count"
        session.end()
        with pytest.raises(SessionGoneError):
            session.hear()

    run(body())


def test_an_engine_failure_ends_the_session() -> None:
    async def body() -> None:
        async def fail(text: str) -> FinishReason:
            raise EngineError("out of order")

        session = make(fail)
        ended = asyncio.create_task(session.wait_ended(idle_timeout_s=math.inf, deadline_s=lambda: None))
        with pytest.raises(EngineError, match="out of order"):
            await ask(session, "a").turn()
        assert await ended == "" and session.state is SessionState.ENDED
        assert str(session.failure) == "out of order"

    run(body())


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e39, 3e38, -1.1e9])
def test_rewards_are_bounded(value: float) -> None:
    async def body() -> None:
        session = make()
        with pytest.raises(ValueError, match="finite number"):
            session.set_reward(value)
        with pytest.raises(ValueError, match="names no completion"):
            session.set_reward(1.0, completion_id="chatcmpl-0")
        session.set_reward(1.0)
        session.set_reward(2.0)
        assert session.reward == 2.0, "the last one counts"

    run(body())


def test_progress_of_the_book() -> None:
    async def body() -> None:
        async def say(text: str) -> FinishReason:
            if text == "wrong":
                raise EpisodeError("no")
            return FinishReason.STOP

        book = SessionBook()
        session = make(say, is_waiting=True)
        seen = [book.progress]
        book.add(session)
        assert book.progress == seen[0], "a session that waits for an agent is none"
        session.claim()
        seen.append(book.progress)
        await delivered(session, "a")
        seen.append(book.progress)
        with pytest.raises(EpisodeError):
            await ask(session, "wrong").turn()
        assert book.progress == seen[-1], "a refused request is none"
        book.remove(session)
        seen.append(book.progress)
        assert len(set(seen)) == len(seen)

    run(body())


def test_answers_are_progress_of_the_server() -> None:
    async def body() -> None:
        # Between two heartbeats the engine answers, and nothing is at it when a heartbeat looks.
        idle: Any = SimpleNamespace(client=SimpleNamespace(is_held=False, num_generating=0))
        others: Any = SimpleNamespace(num_pushes=0, num_done=0)
        book = SessionBook()
        stats = ServerStats(
            Metrics(),
            buffers=others,
            runner=others,
            rewards=[],
            environments=[],
            receiver=others,
            engine=others,
            gate=others,
            supervisor=idle,
            starvation=others,
            book=book,
        )
        session = make()
        book.add(session)
        before = stats._num_changes(now_s=0.0)
        assert stats._num_changes(now_s=1.0) == before
        await delivered(session, "a")
        assert stats._num_changes(now_s=2.0) == before + 1
        # A job waits for its agents as long as they stay away.
        book.remove(session)
        changes = stats._num_changes(now_s=3.0)
        book.add(make(id="waiting", is_waiting=True))
        assert changes < stats._num_changes(now_s=4.0) < stats._num_changes(now_s=5.0)
        offered = book.offer()
        assert offered is not None
        offered.claim()
        changes = stats._num_changes(now_s=6.0)
        assert stats._num_changes(now_s=7.0) == changes, "an agent has it, and its limits count"

    run(body())


@pytest.mark.parametrize(("num_good", "is_slowed"), [(0, True), (1, True), (2, False), (4, False)])
@pytest.mark.parametrize("comes_first", ["good", "failed"])
def test_a_group_is_good_if_half_of_it_is(num_good: int, is_slowed: bool, comes_first: str) -> None:
    async def body() -> None:
        book, who = SessionBook(), Claimant(address="1.2.3.4", name="a")
        for number in range(NUM_FREE + 1):
            for place in range(5):
                book.add(make(id=f"{number}-{place}-1", is_waiting=True))
            group = book.offer_group()
            for session in group:
                session.claimant = who
                session.claim()
            advance(1.0)
            book.remove(group.pop(), SessionOutcome.CANCELLED)  # says nothing about the agent
            failing = group[num_good:]
            order = [*group] if comes_first == "good" else [*failing, *group[:num_good]]
            for session in order:
                advance(1.0)
                if session in failing:
                    book.remove(session, SessionOutcome.FAILED, "no request")
                else:
                    book.remove(session)
                    book.credit(session)
        assert len(book.claimants.troubles(now_s=0.0)) == is_slowed

    moved_clock.run(body())


def test_what_the_server_cancels_does_not_count_against_a_group() -> None:
    async def body() -> None:
        book, who = SessionBook(), Claimant(address="1.2.3.4", name="a")
        for place in range(4):
            book.add(make(id=f"7-{place}-1", is_waiting=True))
        group = book.offer_group()
        for session in group:
            session.claimant = who
            session.claim()
        book.claimants.fail(who, "no request", claimed_s=0.0, now_s=0.0)
        book.remove(group[0])
        book.credit(group[0])
        assert book.claimants._records[who].row == 1, "one of four"
        for session in group[1:]:
            book.remove(session, SessionOutcome.CANCELLED)
        assert book.claimants._records[who].row == 0, "one of one"

    run(body())


def test_the_book_says_what_sessions_wait_for() -> None:
    async def body() -> None:
        book = SessionBook()
        sessions = [make(id=f"7-{n}-3", is_waiting=n > 0) for n in range(3)]
        for session in sessions:
            book.add(session)
            session._last_activity_s -= 5
        assert list(book.waits()) == [
            "sessions: 2 wait for an agent (POST /sessions)",
            "sessions: the next request to 7-0-3, of 1 open",
        ]
        assert book.offer() is sessions[1], "in the order of the leases"
        sessions[1].claim()
        book.remove(sessions[0], SessionOutcome.IDLE)
        assert book.num_ended == {SessionOutcome.IDLE: 1} and book.num_waiting == 1
        with pytest.raises(SessionGoneError):
            book.find("7-0-3")

    run(body())
