"""The scripted policy of the tests of sessions: its tokens are the script's, all else is the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from areal_like.errors import EngineError, EngineTimeoutError
from areal_like.trajectory import FinishReason
from rollout_server.policy.client import EngineClient
from tests.support.engine_harness import Engine, Pusher, load_model, weights_of
from tests.support.scripted_policy import (
    Plane,
    Say,
    Script,
    check_logprobs,
    finished,
    segments,
    serving_plane,
    tool_call,
)

USER = [{"role": "user", "content": "go"}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]


@asynccontextmanager
async def planes(engine: Engine) -> AsyncIterator[tuple[EngineClient, Plane]]:
    async with engine.client() as client, serving_plane() as plane:
        yield client, plane


def test_script_is_sampled_with_real_logprobs(engine: Engine, models: tuple[Path, Path]) -> None:
    async def body() -> None:
        async with planes(engine) as (client, plane):
            # "abc" is one token; the ids spell it with two.
            ids = tuple(plane.renderer.tokenizer.convert_tokens_to_ids(["ab", "c"]))
            session = plane.script(client, [tool_call("add", a=1), Say(token_ids=ids), "x" * 300])
            first = await session.sample_turn(USER, tools=TOOLS)
            assert [call.name for call in first.reply.tool_calls] == ["add"]
            messages = [*USER, first.reply.message, {"role": "tool", "content": "1"}]
            second = await session.sample_turn(messages, tools=TOOLS)
            end = plane.renderer.stop_token_ids[0]
            assert second.token_ids.tolist() == [*ids, end] and second.reply.text == "abc"
            third = await session.sample_turn(
                [*messages, second.reply.message, *USER], tools=TOOLS, max_new_tokens=50
            )
            assert third.reply.text == "x" * 50 and third.reply.finish_reason is FinishReason.LENGTH
            trajectory = finished(session)
            assert len(list(segments(trajectory))) == 1 and trajectory.num_turns == 3
            check_logprobs(trajectory, load_model(models[0]))

    asyncio.run(body())


def test_script_follows_the_prompt(engine: Engine) -> None:
    def script(prompt: list[int], text: str) -> str:
        return f"{len(prompt)} {text.count('go')}"

    async def body() -> None:
        async with planes(engine) as (client, plane):
            answer = await plane.script(client, script).sample_turn([*USER, *USER])
            assert answer.reply.text == f"{len(answer.prompt_ids)} 2"
            stopped = await plane.script(client, ["one two three"]).sample_turn(USER, stop=["wo"])
            assert stopped.reply.raw_text == "one two"

    asyncio.run(body())


def test_aborted_turn_goes_on_under_new_weights(engine: Engine, models: tuple[Path, Path]) -> None:
    async def body() -> None:
        async with planes(engine) as (client, plane):

            async def push(model: Path = models[1], version: int = 1) -> None:
                async with Pusher(engine, client) as pusher:
                    await pusher.push(weights_of(model), version=version)

            session = plane.script(client, [Say(text="abcd efgh", abort_after=4, on_abort=push)])
            answer = await session.sample_turn(USER)
            assert answer.reply.text == "abcd efgh"
            trajectory = finished(session)
            sampled = trajectory.versions[trajectory.loss_mask == 1]
            assert sampled.tolist() == [0] * 4 + [1] * (len(sampled) - 4)
            for version, path in enumerate(models):
                check_logprobs(trajectory, load_model(path), version=version)
            with pytest.raises(AssertionError):
                check_logprobs(trajectory, load_model(models[0]))
            await push(models[0], 2)

    asyncio.run(body())


@pytest.mark.parametrize(
    ("script", "error"),
    [([Say(error="broken")], EngineError), ([], EngineError), ([Say(after_s=9)], EngineTimeoutError)],
)
def test_engine_fails_as_scripted(script: Script, error: type[Exception], engine: Engine) -> None:
    async def body() -> None:
        async with planes(engine) as (client, plane):
            session = plane.script(client, script, timeout_s=0.05)
            with pytest.raises(error):
                await session.sample_turn(USER)
            assert isinstance(session.failure, error)

    asyncio.run(body())


def test_held_answer_waits(engine: Engine) -> None:
    async def body() -> None:
        async with planes(engine) as (client, plane):
            hold = asyncio.Event()
            session = plane.script(client, [Say(text="late", hold=hold)])
            asking = asyncio.create_task(session.sample_turn(USER))
            while not session.num_pending:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert not asking.done() and session.num_pending == 1
            hold.set()
            answer = await asking
            assert answer.reply.text == "late" and np.isfinite(answer.logprobs).all()

    asyncio.run(body())
