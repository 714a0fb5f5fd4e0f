"""What an environment's process may send: everything else is refused with a text that says what to return."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.errors import EpisodeError
from areal_like.trajectory import FinishReason
from rollout_server.environments.base import Reply, Step, ToolCall
from rollout_server.environments.exchange import (
    awaitable,
    checked_start,
    checked_step,
    reply_fields,
    reply_of,
    step_fields,
)

HELLO = {"role": "user", "content": "hello"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
NESTED: Any = []
for _ in range(50):
    NESTED = [NESTED]


def test_good_values_pass_unchanged() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    messages = [HELLO, parts, call]
    assert checked_start([messages, [TOOL]]) == (messages, [TOOL])
    step = checked_step([[HELLO], 1, False, {"moves": 2}])
    assert (step.messages, step.reward, step.done, step.metrics) == ([HELLO], 1.0, False, {"moves": 2.0})
    assert checked_step([[], 0.0, True, {}]).done


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "reset() returned no messages"),
        ([[], []], "reset() returned no messages"),
        (["hello", []], "reset() returned no list of messages"),
        ([["hello"], []], "a message is"),
        ([[{"role": 1, "content": ""}], []], "a message is"),
        ([[{"role": "user"}], []], "content is None"),
        ([[{"role": "user", "content": b"raw"}], []], "use a text"),
        ([[HELLO | {"name": math.inf}], []], "use JSON values"),
        ([[HELLO | {"name": NESTED}], []], "nested more than 32 deep"),
        ([[HELLO], None], "must be a list of OpenAI function schemas"),
        ([[HELLO], [{"name": "add"}]], "is not an OpenAI function schema"),
    ],
)
def test_bad_starts_are_refused(value: Any, problem: str) -> None:
    with pytest.raises(EpisodeError) as refused:
        checked_start(value)
    assert problem in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (7, "no valid step"),
        ([[HELLO], 0.0, 1, {}], "no valid step"),
        ([[], 0.0, False, {}], "done=False without messages"),
        ([[HELLO], math.nan, False, {}], "the reward nan: return a finite number"),
        ([[HELLO], 1e300, False, {}], "the reward 1e+300: return a finite number of at most 1e+09 in size"),
        ([[HELLO], -2e9, True, {}], "the reward -2000000000.0: return a finite number of at most 1e+09"),
        ([[HELLO], "1", False, {}], "the reward '1': return a finite number"),
        ([[HELLO], 0.0, True, {"speed": math.inf}], "the metric 'speed' inf: return a finite number"),
        ([[HELLO], 0.0, True, {"x" * 65: 1.0}], "names of at most 64 characters"),
    ],
)
def test_bad_steps_are_refused(value: Any, problem: str) -> None:
    with pytest.raises(EpisodeError) as refused:
        checked_step(value)
    assert problem in str(refused.value)


def test_what_a_method_returned_is_named() -> None:
    with pytest.raises(EpisodeError, match="returned list: write it as `async def reset`"):
        awaitable([HELLO], call="reset")
    for returned, problem in ((1.0, "step() returned float: return a Step"), (None, "NoneType")):
        with pytest.raises(EpisodeError) as refused:
            step_fields(returned)
        assert problem in str(refused.value)
    with pytest.raises(EpisodeError, match="reward='1': return a number"):
        step_fields(Step(reward="1", done=True))  # type: ignore[arg-type]
    numpy_step = Step(reward=np.float32(0.5), done=True, metrics={"speed": np.int64(2)})  # type: ignore[arg-type, dict-item]
    assert checked_step(step_fields(numpy_step)).reward == 0.5


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(value=_ANYTHING | st.tuples(_ANYTHING, _ANYTHING, st.booleans(), _ANYTHING).map(list))
def test_anything_else_is_an_episode_error(value: Any) -> None:
    for check in (checked_start, checked_step):
        with contextlib.suppress(EpisodeError):
            check(value)


def test_a_reply_crosses_whole() -> None:
    reply = Reply(
        text="a\ud800",
        raw_text="a<call>",
        reasoning="because",
        tool_calls=(ToolCall(id="1", name="add", arguments="{"),),
        finish_reason=FinishReason.STOP,
        num_tokens=3,
    )
    assert reply_of(reply_fields(reply)) == reply
    packed = msgpack.packb(reply_fields(reply), unicode_errors="replace")
    assert reply_of(msgpack.unpackb(packed)).text == "a?"
