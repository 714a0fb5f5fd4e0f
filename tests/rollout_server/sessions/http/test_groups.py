"""Claims of groups, rewards of groups, and what is posted with a reward."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from areal_like.client.areal_like_client import (
    ClaimedGroup,
    ClaimedSession,
    RefusedError,
    SessionOverError,
    claim,
    claim_group,
)
from areal_like.errors import EngineError
from areal_like.trajectory import LARGEST_METRIC
from rollout_server.sessions.http.rewards import ranked
from rollout_server.sessions.open_session import MAX_METRICS, OpenSession, SessionOutcome, SessionState
from rollout_server.tasks.base import Example
from tests.support.session_server import SessionServer
from tests.support.waiting import HANG_LIMIT_S

EXAMPLE = Example(prompt="2+2", answer="4")
ASK = {"messages": [{"role": "user", "content": "2+2"}]}


def claimed_group(server: SessionServer, num: int, **more: Any) -> tuple[ClaimedGroup, list[OpenSession]]:
    """A claimed group of open sessions."""
    sessions = [server.add(example=EXAMPLE, group=7, **more) for _ in range(num)]
    group = claim_group(server.url)
    assert group is not None
    server.wait(lambda: all(one.state is SessionState.OPEN for one in sessions))
    return group, sessions


def test_a_group_is_claimed_as_a_whole(server: SessionServer) -> None:
    first = server.add(example=EXAMPLE, group=3)
    whole = [server.add(example=EXAMPLE, group=7) for _ in range(3)]
    server.add(example=EXAMPLE, group=8)
    assert claim(server.url) is not None
    group = claim_group(server.url)
    assert group is not None and (group.group, group.example["index"]) == (7, 7)
    assert [one.id for one in group.sessions] == [one.id for one in whole]
    assert [one.sample for one in group.sessions] == [1, 2, 3]
    server.wait(lambda: first.state is SessionState.OPEN)
    assert first.members == [first]
    assert len({one.api_key for one in group.sessions}) == 3
    rest = claim_group(server.url)
    assert rest is not None and len(rest.sessions) == 1
    assert claim_group(server.url) is None


def test_a_group_that_was_not_delivered_waits_again(server: SessionServer) -> None:
    sessions = [server.add(example=EXAMPLE, group=7) for _ in range(2)]
    keys = [one.api_key for one in sessions]
    offered = server.call(server.book.offer_group)
    assert offered == sessions and sessions[0].members == sessions
    server.call(lambda: server.book.take_back(sessions[0]))
    assert sessions[0].members == [sessions[0]] and sessions[1].members == [sessions[1]]
    assert sessions[0].api_key != keys[0]
    one = claim(server.url)
    assert one is not None and one.id == sessions[0].id


def test_a_ranking_rewards_a_group(server: SessionServer) -> None:
    group, sessions = claimed_group(server, 4)
    best, second, tied, worst = group.sessions
    assert group.rank([worst, [second, tied], best]) == []
    assert [one.reward for one in sessions] == [0.0, 0.5, 0.5, 1.0]
    assert group.reward({one.id: -1.5 for one in group.sessions}) == []
    assert [one.reward for one in sessions] == [-1.5] * 4


def test_places_become_rewards() -> None:
    assert ranked([["a"], ["b"], ["c"]]) == {"a": 1.0, "b": 0.5, "c": 0.0}
    assert ranked([["a", "b", "c"]]) == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert ranked([["a"], ["b", "c"]]) == {"a": 1.0, "b": 0.25, "c": 0.25}
    assert ranked([["a"]]) == {"a": 0.5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "either rewards"),
        ({"rewards": {"A": 1, "B": 1}, "ranking": ["A", "B"]}, "either rewards"),
        ({"rewards": {"A": 1}}, "not over"),
        ({"rewards": {"A": 1, "B": 1, "x": 1}}, "at most 2 numbers"),
        ({"rewards": {"A": 1, "x": 1}}, "'x' is no session of this group"),
        ({"rewards": {"A": 1, "B": 1e10}}, "at most 1e"),
        ({"rewards": {"A": 1, "B": True}}, "must be a number"),
        ({"rewards": [1, 2]}, "must be an object"),
        ({"ranking": ["A"]}, "not over"),
        ({"ranking": ["A", "A", "B"]}, "twice"),
        ({"ranking": ["", "A", "B"]}, "'' is no session of this group"),
        ({"ranking": ["A", ["B", "x"]]}, "'x' is no session"),
        ({"ranking": ["A", []]}, "must be a list"),
        ({"ranking": ["A", [["B"]]]}, "must be a list"),
        ({"ranking": "AB"}, "must be a list"),
    ],
)
def test_a_wrong_group_reward_sets_nothing(server: SessionServer, body: Any, message: str) -> None:
    group, sessions = claimed_group(server, 2)
    names = dict(zip("AB", (one.id for one in group.sessions), strict=True))

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {names.get(key, key): named(one) for key, one in value.items()}
        if isinstance(value, list):
            return [named(one) for one in value]
        return names.get(value, value) if isinstance(value, str) else value

    body = {key: named(value) for key, value in body.items()}
    with pytest.raises(RefusedError, match=message):
        group.sessions[0]._post("group/reward", body)
    assert [one.reward for one in sessions] == [None, None]


def test_a_lost_session_does_not_hold_up_its_group(server: SessionServer) -> None:
    group, sessions = claimed_group(server, 3)
    server.call(lambda: server.book.remove(sessions[0], SessionOutcome.ENGINE))
    assert group.rank(group.sessions) == [sessions[0].id]
    assert [one.reward for one in sessions] == [None, 0.5, 0.0]
    assert group.reward({sessions[1].id: 1.0, sessions[2].id: 2.0}) == [sessions[0].id]
    alone = server.add(example=EXAMPLE)
    other = claim(server.url)
    assert other is not None
    with pytest.raises(RefusedError, match="no session of this group"):
        other._post("group/reward", {"rewards": {sessions[1].id: 9.0}})
    other._post("group/reward", {"ranking": [alone.id]})
    assert alone.reward == 0.5 and sessions[1].reward == 1.0


def test_a_group_ends(server: SessionServer, caplog: pytest.LogCaptureFixture) -> None:
    group, sessions = claimed_group(server, 3, needs_reward=True)
    for session in group.sessions[1:]:
        session._post("chat/completions", ASK)
    group.sessions[1].reward(1.0)
    assert group.end() == [sessions[0].id, sessions[2].id]
    assert "no request to the model was answered" in caplog.text and "no reward was posted" in caplog.text
    assert all(one.state is SessionState.ENDED for one in sessions)
    with pytest.raises(SessionOverError):
        group.heartbeat()
    for session in sessions:
        server.call(partial(server.book.remove, session))
    assert group.end() == [sessions[0].id, sessions[2].id], "a repetition is told the same"


def test_the_end_names_samples_that_were_lost_before(server: SessionServer) -> None:
    group, sessions = claimed_group(server, 6, needs_reward=True)
    lost, idle, failing, made, unmade, last = sessions
    for session in group.sessions[3:]:
        session._post("chat/completions", ASK)
    server.call(lambda: server.book.remove(lost, SessionOutcome.CANCELLED))
    server.call(lambda: server.book.remove(idle, SessionOutcome.IDLE, "no request for too long"))
    server.call(lambda: failing.fail(EngineError("it died")))
    group.sessions[3].reward(1.0)
    assert group.sessions[3].end() and not group.sessions[4].end()
    server.call(lambda: server.book.remove(made))
    group.sessions[5].reward(1.0)
    assert group.end() == [one.id for one in (lost, idle, failing, unmade)]
    assert (idle.problem, failing.problem) == ("no request for too long", "the engine failed: it died")
    assert last.state is SessionState.ENDED and not last.problem


def test_one_session_keeps_its_group_open(server: SessionServer) -> None:
    group, sessions = claimed_group(server, 2)
    server.policy.open.clear()

    async def both() -> list[str]:
        waits = (one.wait_ended(idle_timeout_s=100.0, deadline_s=lambda: None) for one in sessions)
        return list(await asyncio.gather(*waits))

    waiting = asyncio.run_coroutine_threadsafe(both(), server._loop)
    asking = asyncio.run_coroutine_threadsafe(
        asyncio.to_thread(group.sessions[0]._post, "chat/completions", ASK), server._loop
    )
    server.wait(lambda: sessions[0].conversation.is_sampling)
    server.advance(150.0)  # longer than the limit, and the first session's request is pending
    server.run(asyncio.sleep(0.05))
    assert not waiting.done()
    server.policy.open.set()
    asking.result(HANG_LIMIT_S)
    server.advance(60.0)
    group.heartbeat()
    server.advance(60.0)
    server.run(asyncio.sleep(0.05))
    assert not waiting.done()
    server.advance(60.0)
    assert waiting.result(HANG_LIMIT_S) == ["idle", "idle"]


def test_a_reward_has_turns_metrics_and_a_label(server: SessionServer) -> None:
    session = server.add(example=EXAMPLE)
    claimed = claim(server.url)
    assert claimed is not None
    ids = [claimed._post("chat/completions", {**ASK, "user": str(i)})["id"] for i in range(2)]
    claimed.reward(1.0, turns={ids[0]: 0.25}, metrics={"steps": 3}, label="hard")
    claimed.reward(turns={ids[1]: -0.5}, metrics={"errors": 1})
    assert (session.reward, session.label) == (1.0, "hard")
    assert session.metrics == {"steps": 3.0, "errors": 1.0}
    server.call(session.end)
    assert server.call(session.finish) == [0.25, -0.5]


@pytest.mark.parametrize(
    "more",
    [
        {"metrics": {"steps": LARGEST_METRIC * 2}},
        {"metrics": {"steps": "3"}},
        {"metrics": {"s" * 65: 1}},
        {"metrics": {"a\nb": 1}},
        {"metrics": {"": 1}},
        {"metrics": {str(number): 1 for number in range(MAX_METRICS)}},
        {"metrics": [1]},
        {"label": "l" * 65},
        {"label": "a\x1bb"},
        {"label": 3},
        {"turns": {"chatcmpl-x": 1}},
        {"turns": {"chatcmpl-x": None}},
        {"reward": None, "completion_id": "chatcmpl-x"},
    ],
)
def test_what_is_posted_is_bounded(server: SessionServer, more: dict[str, Any]) -> None:
    session = server.add(example=EXAMPLE)
    claimed = claim(server.url)
    assert isinstance(claimed, ClaimedSession)
    claimed.reward(0.5, metrics={"kept": 1})
    with pytest.raises(RefusedError, match="400"):
        claimed._post("reward", {"reward": 1.0, **more})
    assert (session.reward, session.metrics, session.label) == (0.5, {"kept": 1.0}, "")
