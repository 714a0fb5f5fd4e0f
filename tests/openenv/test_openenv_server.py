"""Environments of the real OpenEnv SDK, on its own server."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

import pytest

from areal_like.errors import ConfigError, EpisodeError
from rollout_server.environments.base import Environment
from rollout_server.environments.scripted import call, play, say
from rollout_server.tasks.base import Task, make_task
from tests.openenv.conftest import Serve
from tests.support.waiting import HANG_LIMIT_S


def task_of(url: str, **settings: Any) -> Task:
    return make_task({"name": "openenv", "url": url, "timeout_s": HANG_LIMIT_S, **settings}, seed=0)


def environment_of(task: Task, index: int = 0) -> Environment:
    environment = task.environment(task.example("train", index))
    assert environment is not None
    return environment


def digit_of(task: Task, index: int = 0) -> int:
    """The digit to be guessed."""
    return random.Random(task.example("train", index).answer).randrange(10)


def test_text_is_the_action(serve: Serve) -> None:
    url = serve("guess")
    task = task_of(url)
    digit = digit_of(task)
    wrong = (digit + 1) % 10
    episode = play(environment_of(task), [say("?"), say("x" * 9), say(str(wrong)), say(str(digit))])
    texts = [message["content"] for message in episode.messages if message["role"] == "user"]
    hint = "Higher" if wrong < digit else "Lower"
    assert texts == [
        "hint: Guess a digit.\nleft: 3",
        "hint: No digit.\nleft: 2",
        "This is not a valid action: guess: String should have at most 8 characters",
        f"hint: {hint}.\nleft: 1",
        "hint: Right.",
    ]
    assert episode.turn_rewards == [0.0, 0.0, 0.1, 1.0] and episode.is_done
    assert episode.metrics == {"invalid_actions": 1.0}
    lost = play(environment_of(task_of(url, observation_fields=["hint"])), [say("?")] * 3)
    assert lost.is_done and lost.reward == 0.0 and lost.messages[0]["content"] == "Guess a digit."


def test_sessions_share_no_state(serve: Serve) -> None:
    task = task_of(serve("guess"))
    first = 0
    second = next(index for index in range(100) if digit_of(task, index) != digit_of(task, first))

    async def body() -> None:
        games = [environment_of(task, index) for index in (first, first, second)]
        for game in games:
            await game.reset()
        right = str(digit_of(task, first))
        steps = [await game.step(say("?")) for game in games]
        assert {step.messages[0]["content"] for step in steps} == {"hint: No digit.\nleft: 2"}
        steps = await asyncio.gather(*(game.step(say(right)) for game in games))
        assert [step.reward for step in steps] == [1.0, 1.0, 0.1]
        assert [step.done for step in steps] == [True, True, False]
        for game in games:
            await game.close()

    asyncio.run(body())


def test_an_environment_that_raises_fails_its_sample(serve: Serve) -> None:
    task = task_of(serve("guess"))
    with pytest.raises(EpisodeError, match=r"EXECUTION_ERROR\): the environment has crashed"):
        play(environment_of(task), [say("crash")])
    assert play(environment_of(task), [say(str(digit_of(task)))]).reward == 1.0


def test_an_episode_waits_for_a_session(serve: Serve) -> None:
    task = task_of(serve("guess", max_sessions=1))

    async def body() -> None:
        first, second = environment_of(task), environment_of(task)
        await first.reset()
        waiting = asyncio.create_task(second.reset())
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await first.close()
        await waiting
        await second.close()

    asyncio.run(body())


def test_tools_of_an_mcp_environment(serve: Serve) -> None:
    task = task_of(serve("total"), system_prompt="Use the tools.")
    replies = [say(calls=[("add", {"amount": 5}), ("add", {"amount": 500}), ("add", {"many": 1})])]
    started = play(environment_of(task), replies)
    assert [tool["function"]["name"] for tool in started.tools] == ["add", "submit"]
    assert started.tools[0]["function"]["description"] == "Adds to the total, and returns it."
    parameters = started.tools[0]["function"]["parameters"]
    assert parameters["properties"] == {"amount": {"type": "integer"}}
    system, asked, _, *outputs = [message["content"] for message in started.messages]
    assert system == "Use the tools." and re.fullmatch(r"Make the total 1\d\.", asked)
    assert outputs[0] == "5" and "the amount is from 1 to 99" in outputs[1] and "amount" in outputs[2]
    assert (started.is_done, started.metrics["tool_errors"]) == (False, 2.0)
    wanted = int(asked[-3:-1])
    ended = play(
        environment_of(task), [call("add", amount=5), call("add", amount=wanted - 5), call("submit")]
    )
    assert ended.is_done and ended.turn_rewards == [0.0, 0.0, 1.0]
    assert play(environment_of(task), [call("add", amount=5), say("Done.")]).reward == 0.0


def test_settings_that_do_not_fit(serve: Serve) -> None:
    with pytest.raises(ConfigError, match=r"an action has no field move; its fields: guess"):
        play(environment_of(task_of(serve("guess"), action_field="move")), [])
    with pytest.raises(ConfigError, match=r"there is no tool multiply; its tools: add, submit"):
        play(environment_of(task_of(serve("total"), tools=["multiply"])), [])
