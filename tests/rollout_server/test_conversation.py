"""Conversations: which tokens a turn follows, segments of branches and rewritten histories, budgets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_like.errors import EngineTimeoutError, EpisodeBudgetError, EpisodeError, PromptRefusedError
from areal_like.trajectory import NOT_SAMPLED, TOKEN_REWARDS, FinishReason
from areal_like.wire.routes import Routes
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.turns import SampleRewards
from rollout_server.environments.base import Message
from rollout_server.policy.generation import Generation, Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.rendering.jinja import JinjaRenderer
from tests.support.chat_models import (
    APPENDING,
    NEVER_ENDING,
    STRIPPING,
    TOOLLESS,
    WITH_BOS,
    jinja_renderer,
    tokens_in,
)

TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]


class Scripted:
    """Answers each request with the next text, tokenized one character at a time, and an end-of-turn token
    unless the text ends with a backslash. The log-prob of a token is its index in the request, negated."""

    cache_salt = ""

    def __init__(self, renderer: JinjaRenderer, texts: Sequence[str]) -> None:
        self.renderer, self.texts = renderer, list(texts)
        self.requests: list[tuple[list[int], Sampling]] = []
        self.delay_s = 0.0
        self.interrupt_after: int | None = None

    async def generate(self, input_ids: Sequence[int], *, sampling: Sampling, **options: Any) -> Generation:
        self.requests.append((list(input_ids), sampling))
        if not self.texts:
            raise EngineTimeoutError("nothing is left to say")
        text = self.texts.pop(0)
        await asyncio.sleep(self.delay_s)
        ids = tokens_in(self.renderer, text.removesuffix("\\"))
        if not text.endswith("\\"):
            ids.append(self.renderer.stop_token_ids[0])
        reason = FinishReason.STOP
        if self.interrupt_after is not None:
            self.texts.insert(0, self.renderer.decode(ids[self.interrupt_after : -1]))
            ids, reason, self.interrupt_after = ids[: self.interrupt_after], FinishReason.ABORT, None
        elif len(ids) > sampling.max_new_tokens:
            ids, reason = ids[: sampling.max_new_tokens], FinishReason.LENGTH
        first = len(input_ids)
        # Each token names its position and the request in which the model has seen it.
        experts_TK = np.full((first + len(ids) - 1, 2), len(self.requests), np.uint8)
        experts_TK[:, 0] = np.arange(len(experts_TK)) % 256
        return Generation(
            routes=Routes(experts_TK[:, None], 256) if ids else None,
            output_ids=np.array(ids, np.int32),
            logprobs=-np.arange(first, first + len(ids)).astype(np.float32),
            versions=np.full(len(ids), len(self.requests), np.int32),
            finish_reason=reason,
        )


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def talk(
    texts: Sequence[str],
    body: Callable[[Conversation, Scripted], Awaitable[None]],
    *,
    template: str = APPENDING,
    max_new_tokens: int = 64,
    context_tokens: int = 4096,
    max_tokens: int = 4096,
) -> None:
    """Runs `body` with a conversation whose policy says `texts`."""

    async def run() -> None:
        renderer = jinja_renderer(template)
        engine = Scripted(renderer, texts)
        policy = PolicyClient(
            engine,
            sampling=Sampling(max_new_tokens=max_new_tokens, sampling_seed=1),
            rid="1",
            gate=GenerationGate(),
        )
        conversation = Conversation(renderer, policy, context_tokens=context_tokens, max_tokens=max_tokens)
        await body(conversation, engine)
        check_export(conversation)

    asyncio.run(run())


def check_export(conversation: Conversation) -> None:
    """Every sampled token is trained once, at the place in its segment where it was sampled."""
    trajectory = conversation.to_trajectory(SampleRewards())
    assert trajectory.num_sampled == sum(conversation.turn_lengths)
    assert trajectory.segment_routes is not None
    for segment, routes in zip(trajectory.segment_slices, trajectory.segment_routes, strict=True):
        position_T, request_T = routes.experts_TLK[:, 0].T
        assert (position_T == np.arange(len(position_T)) % 256).all()
        # The routes of a token are those of the request that sampled the next one.
        next_T = trajectory.versions[segment][1:]
        assert (request_T[next_T >= 0] == next_T[next_T >= 0]).all()
    first = 0
    for length in trajectory.segments or (trajectory.num_tokens,):
        sampled = np.flatnonzero(trajectory.loss_mask[first : first + length])
        assert (trajectory.logprobs[first : first + length][sampled] == -sampled).all()
        first += length
    assert trajectory.num_turns == len(conversation.turn_lengths)


def test_turns_extend_the_sampled_tokens() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        messages = [user("hi")]
        for text in ("abc 7", "the second", "third"):
            reply = await conversation.say(messages)
            assert (reply.text, reply.finish_reason) == (text, FinishReason.STOP)
            assert reply.raw_text == f"{text}<|end|>"
            messages = [*messages, reply.message, user("and?")]
        renderer = engine.renderer
        for before, after in zip(engine.requests, engine.requests[1:], strict=False):
            assert after[0][: len(before[0])] == before[0]
        assert renderer.decode(engine.requests[-1][0]) == renderer.decode(renderer.render(messages[:-2]))
        # "abc" is one token to the tokenizer, and was sampled as three: it was not tokenized again.
        assert engine.requests[-1][0] != renderer.render(messages[:-2])
        trajectory = conversation.to_trajectory(SampleRewards(turn_rewards=(0.25, 0.5, 0.0)))
        assert trajectory.segments == () and [value for _, value in trajectory.turns] == [0.25, 0.5, 0.0]
        assert trajectory.tokens[trajectory.loss_mask == 1].tolist() == conversation.token_ids.tolist()
        assert conversation.turn_lengths == [6, 11, 6]

    talk(["abc 7", "the second", "third"], body)


@pytest.mark.parametrize("template", [APPENDING, WITH_BOS])
def test_tool_calls_are_parsed_and_bridged(template: str) -> None:
    said = '<think>hm</think>I add.<tool_call>{"name": "add", "arguments": {"a":1}}</tool_call>'

    async def body(conversation: Conversation, engine: Scripted) -> None:
        messages = [user("1+1")]
        reply = await conversation.say(messages, tools=TOOLS)
        [call] = reply.tool_calls
        assert (reply.text, reply.reasoning) == ("I add.", "hm")
        assert (call.name, call.arguments, call.id) == ("add", '{"a": 1}', "call00000")
        assert reply.raw_text == said + "<|end|>"
        answer = {"role": "tool", "tool_call_id": call.id, "content": "2"}
        # Clients send the reply back in other forms, and without its reasoning.
        message = {key: value for key, value in reply.message.items() if key != "reasoning_content"}
        message |= {"refusal": None, "content": [{"type": "text", "text": "I add."}]}
        await conversation.say([*messages, message, answer], tools=TOOLS)
        text = engine.renderer.decode(engine.requests[1][0])
        assert text.endswith(f"<|assistant|>{said}<|end|>\n<|tool|>2<|end|>\n<|assistant|>")
        assert '"name": "add"' in text.partition("<|user|>")[0]

    talk([said, "2"], body, template=template)


@pytest.mark.parametrize(
    ("said", "name", "arguments"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": }}</tool_call>', "add", None),
        ("<tool_call>add 1 1</tool_call>", "", "add 1 1"),
        ('<tool_call>{"name": 7}</tool_call>', "", None),
        ("<tool_call>[1]</tool_call>", "", "[1]"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "add", "[1]"),
        ('<tool_call>{"name": "add"', "", '{"name": "add"'),
        (f"<tool_call>{'[' * 5000}</tool_call>", "", "[" * 5000),
        (r'<tool_call>{"name": "add", "arguments": {"a": "\ud83d"}}</tool_call>', "add", '{"a": "?"}'),
    ],
)
def test_malformed_calls_reach_the_environment(said: str, name: str, arguments: str | None) -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        reply = await conversation.say([user("1+1")], tools=TOOLS)
        [call] = reply.tool_calls
        assert call.name == name
        assert arguments is None or call.arguments == arguments
        answer = {"role": "tool", "tool_call_id": call.id, "content": "no such call"}
        await conversation.say([user("1+1"), reply.message, answer], tools=TOOLS)
        assert engine.renderer.decode(engine.requests[1][0]).endswith(
            f"{said}<|end|>\n<|tool|>no such call<|end|>\n<|assistant|>"
        )

    talk([said, "oh"], body, max_new_tokens=9999, context_tokens=99999, max_tokens=99999)


def test_stripped_reasoning_begins_a_segment() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        messages = [user("a")]
        messages.append((await conversation.say(messages)).message)
        messages.append({"role": "tool", "content": "t"})
        messages.append((await conversation.say(messages)).message)
        messages.append(user("b"))
        await conversation.say(messages)
        trajectory = conversation.to_trajectory(SampleRewards())
        assert len(trajectory.segments) == 2  # the tool's answer leaves the reasoning, the user's strips it
        text = engine.renderer.decode(trajectory.tokens[trajectory.segments[0] :].tolist())
        assert "<think>" not in text.partition("<|user|>b")[0]
        assert text == engine.renderer.decode(engine.renderer.render(messages)) + "<think>3</think>z<|end|>"

    talk(["<think>1</think>x", "<think>2</think>y", "<think>3</think>z"], body, template=STRIPPING)


def test_reasoning_stays_where_the_template_does_not_know_it() -> None:
    """There it is a part of the text: in the sampled tokens, and in a list that is rendered again."""

    async def body(conversation: Conversation, engine: Scripted) -> None:
        messages = [user("a")]
        for text in "xyz":
            reply = await conversation.say(messages)
            assert reply.text == text
            messages = [*messages, reply.message, user("b")]
        assert conversation.to_trajectory(SampleRewards()).segments == ()
        assert engine.renderer.decode(engine.renderer.render(messages[1:3])) == (
            "[assistant]<think>\n1\n</think>\n\nx<|end|>[user]b<|end|>[assistant]"
        )

    talk(["<think>1</think>x", "<think>\n2\n</think>\n\ny", "z"], body, template=TOOLLESS)


def test_a_template_without_ends_of_turns_begins_segments() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        reply = await conversation.say([user("a")])
        await conversation.say([user("a"), reply.message, user("b")])
        assert len(conversation.to_trajectory(SampleRewards()).segments) == 2

    talk(["x", "y"], body, template=NEVER_ENDING)


def test_a_template_that_ends_with_no_reply_begins_segments() -> None:
    refusing = APPENDING.replace(
        "{%- if add_generation_prompt %}",
        "{%- if not add_generation_prompt and messages | length > 2 %}{{ raise_exception('no') }}"
        "{%- endif %}{%- if add_generation_prompt %}",
    )

    async def body(conversation: Conversation, engine: Scripted) -> None:
        system = {"role": "system", "content": "be brief"}
        reply = await conversation.say([system, user("a")])
        await conversation.say([system, user("a"), reply.message, user("b")])
        # The policy said "abc" in three tokens, and the whole conversation is rendered with one.
        assert len(conversation.to_trajectory(SampleRewards()).segments) == 2

    talk(["abc", "y"], body, template=refusing)


def test_branches_share_tokens_and_train_them_once() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        one = [user("a"), (await conversation.say([user("a")])).message]
        left = [*one, user("left")]
        left.append((await conversation.say(left)).message)
        await conversation.say([*one, user("right")])
        await conversation.say([*left, user("more")])
        trajectory = conversation.to_trajectory(
            SampleRewards(
                turn_rewards=(1.0, 2.0, 3.0, 4.0),
                token_rewards=np.arange(len(conversation.token_ids), dtype=np.float32),
            )
        )
        # Segments are in the order of their last turns: the right branch ended before the left one.
        right_T = slice(0, trajectory.segments[0])
        left_T = slice(trajectory.segments[0], None)
        decode = engine.renderer.decode
        assert decode(trajectory.tokens[right_T].tolist()).endswith(
            "root<|end|>\n<|user|>right<|end|>\n<|assistant|>R<|end|>"
        )
        masked = [
            decode(trajectory.tokens[part][trajectory.loss_mask[part] == 1].tolist())
            for part in (right_T, left_T)
        ]
        assert masked == ["root<|end|>R<|end|>", "L<|end|>LL<|end|>"]
        assert [value for _, value in trajectory.turns] == [1, 3, 2, 4]
        rewards = trajectory.arrays[TOKEN_REWARDS]
        assert rewards[trajectory.loss_mask == 1].tolist() == [0, 1, 2, 3, 4, 7, 8, 5, 6, 9, 10, 11]
        assert not rewards[trajectory.loss_mask == 0].any()

    talk(["root", "L", "R", "LL"], body)


def test_hostile_lists_begin_segments() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        messages = [user("a")]
        messages.append((await conversation.say(messages)).message)
        messages.append(user("b"))
        messages.append((await conversation.say(messages)).message)
        reply = messages[1]
        for rewritten in (
            [user("a"), {**reply, "content": "y"}, user("c")],
            [user("a"), {**reply, "reasoning_content": "no"}, user("c")],
            [reply, user("a"), user("c")],
            [user("A"), *messages[1:], user("c")],
            [*messages[2:], user("c")],
        ):
            prompt = engine.renderer.render(rewritten)
            await conversation.say(rewritten)
            assert engine.requests[-1][0] == prompt
        await conversation.say([*messages, user("c")], tools=TOOLS)
        assert engine.requests[-1][0] == engine.renderer.render([*messages, user("c")], tools=TOOLS)
        assert len(conversation.to_trajectory(SampleRewards()).segments) == 7

    talk(["x", "y", *"123456"], body)


def test_a_render_that_begins_with_known_tokens_extends_them() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        await conversation.say([user("a")])
        # The same text in another message: no message of ours, but the same tokens.
        await conversation.say([user("a<|end|>\n<|assistant|>x"), user("b")])
        trajectory = conversation.to_trajectory(SampleRewards())
        assert trajectory.segments == () and trajectory.num_turns == 2

    talk(["x", "y"], body)


def test_two_branches_at_once() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        engine.delay_s = 0.01
        first, second = await asyncio.gather(conversation.say([user("a")]), conversation.say([user("a")]))
        assert (first.text, second.text) == ("x", "y")
        await asyncio.gather(
            conversation.say([user("a"), first.message, user("b")]),
            conversation.say([user("a"), first.message, user("c")]),
            conversation.say([user("a"), second.message, user("b")]),
        )
        trajectory = conversation.to_trajectory(SampleRewards())
        assert len(trajectory.segments) == 3 and trajectory.num_turns == 5
        seeds = [sampling.sampling_seed for _, sampling in engine.requests]
        assert len(set(seeds)) == len(seeds)

    talk(["x", "y", "1", "2", "3"], body)


def test_cut_and_stopped_turns_are_closed() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        messages = [user("a")]
        cut = await conversation.say(messages)
        assert (cut.text, cut.finish_reason) == ("0123456", FinishReason.LENGTH)
        messages += [cut.message, user("b")]
        stopped = await conversation.say(messages, stop=["XY"])
        assert engine.requests[1][1].stop == ("XY",) and engine.requests[0][1].stop == ()
        assert (stopped.text, stopped.raw_text) == ("..XY", "..XY")
        messages += [stopped.message, user("c")]
        await conversation.say(messages)
        assert engine.renderer.decode(engine.requests[-1][0]) == (
            "<|user|>a<|end|>\n<|assistant|>0123456<|end|>\n<|user|>b<|end|>\n"
            "<|assistant|>..XY<|end|>\n<|user|>c<|end|>\n<|assistant|>"
        )
        trajectory = conversation.to_trajectory(SampleRewards())
        assert trajectory.segments == ()
        assert trajectory.num_sampled == 7 + 4 + 2  # the end of a cut turn was not sampled

    talk(["0123456789", "..XY\\", "z"], body, max_new_tokens=7)


def test_interrupted_turns_are_one_turn() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        engine.interrupt_after = 3
        reply = await conversation.say([user("a")])
        assert reply.text == "0123456" and len(engine.requests) == 2
        trajectory = conversation.to_trajectory(SampleRewards())
        assert trajectory.versions[trajectory.loss_mask == 1].tolist() == [1] * 3 + [2] * 5
        assert engine.requests[1][1].max_new_tokens == 64 - 3

    talk(["0123456"], body)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [({"context_tokens": 15}, FinishReason.CONTEXT), ({"max_tokens": 15}, FinishReason.TOKENS)],
)
def test_budgets_cut_turns_and_end_episodes(limits: dict[str, int], reason: FinishReason) -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        first = await conversation.say([user("a")])
        assert first.finish_reason is FinishReason.STOP  # 5 tokens of prompt, 3 of the turn
        second = await conversation.say([user("a"), first.message, user("b")])
        assert second.finish_reason is reason and second.num_tokens == 1
        with pytest.raises(EpisodeBudgetError) as caught:
            await conversation.say([user("a"), first.message, user("b"), second.message, user("c")])
        assert caught.value.reason is reason
        trajectory = conversation.to_trajectory(SampleRewards())
        assert trajectory.num_tokens == 15 and trajectory.finish_reason is reason

    talk(["xy", "0123456789"], body, **limits)


def test_branches_count_their_tokens_in_the_budget() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        engine.delay_s = 0.01
        first = await conversation.say([user("a")])
        longer = [[user("a"), first.message, user(text)] for text in "bcd"]
        replies = await asyncio.gather(
            *(conversation.say(messages) for messages in longer), return_exceptions=True
        )
        assert [getattr(reply, "reason", None) for reply in replies] == [None, None, FinishReason.TOKENS]
        assert conversation.to_trajectory(SampleRewards()).num_tokens <= 40

    talk(["xy", "b", "c", "d"], body, max_tokens=40, max_new_tokens=5)


def test_first_prompts_without_room_are_refused() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        with pytest.raises(PromptRefusedError, match=r"15 tokens.*rollout\.max_context"):
            await conversation.say([user("0123456789a")])
        with pytest.raises(ValueError, match="nothing"):
            conversation.to_trajectory(SampleRewards())
        await conversation.say([user("a")])

    talk(["x"], body, context_tokens=15)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "no message"),
        ([{"content": "x"}], "role"),
        (["x"], "role"),
        ([{"role": "user", "content": 7}], "want text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "want text"),
        ([{"role": "user", "content": float("nan")}], "want text"),
        ([{"role": "user", "content": b"x"}], "want text"),
        ([{"role": "user", "content": "x", "more": {1, 2}}], "types of JSON"),
        ([{"role": "user", "content": "\ud800"}], "types of JSON"),
        ([{"role": "user", "content": "x", "more": {1: 2}}], "types of JSON"),
        ([{"role": "assistant", "tool_calls": [{"name": "x"}]}], "function"),
        ([{"role": "assistant", "tool_calls": {"name": "x"}}], "not a list"),
    ],
)
def test_bad_messages_are_episode_errors(messages: list[Any], problem: str) -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        with pytest.raises(EpisodeError, match=problem):
            await conversation.say(messages)
        await conversation.say([user("a")])

    talk(["x"], body)


def test_templates_without_tools_refuse_tools() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        with pytest.raises(EpisodeError, match="does not render them"):
            await conversation.say([user("a")], tools=TOOLS)
        await conversation.say([user("a")])

    talk(["x"], body, template=TOOLLESS)


def test_a_turn_without_tokens_leaves_the_earlier_ones() -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        with pytest.raises(EngineTimeoutError):
            engine.texts.clear()
            await conversation.say([user("a")])
        engine.texts.append("x")
        first = await conversation.say([user("a")])
        last = await conversation.say([user("a"), first.message, user("b")])
        assert (last.finish_reason, last.num_tokens) == (FinishReason.TIMEOUT, 0)
        trajectory = conversation.to_trajectory(SampleRewards(turn_rewards=(1.0,)))
        assert trajectory.finish_reason is FinishReason.TIMEOUT and trajectory.num_turns == 1
        assert trajectory.versions[-1] != NOT_SAMPLED

    talk([""], body)


PLAIN = st.text(alphabet="abc7\n {}", max_size=8)


@settings(max_examples=40, derandomize=True, database=None)
@given(
    turns=st.lists(st.tuples(PLAIN, PLAIN, st.sampled_from(["user", "tool"])), min_size=2, max_size=5),
    template=st.sampled_from([APPENDING, STRIPPING, WITH_BOS]),
)
def test_prompts_are_the_texts_of_the_template(turns: list[tuple[str, str, str]], template: str) -> None:
    async def body(conversation: Conversation, engine: Scripted) -> None:
        messages = [user("hi")]
        for said, heard, role in turns:
            reply = await conversation.say(messages)
            prompt = engine.requests[-1][0]
            assert engine.renderer.decode(prompt) == engine.renderer.decode(engine.renderer.render(messages))
            assert reply.text == said
            messages = [*messages, reply.message, {"role": role, "content": heard}]
        assert conversation.to_trajectory(SampleRewards()).segments == ()

    talk([said for said, _, _ in turns], body, template=template)
