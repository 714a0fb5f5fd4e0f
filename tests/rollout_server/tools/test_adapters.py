"""Environments of gymnasium and TextArena as tasks."""

from __future__ import annotations

import asyncio
import random
import sys
from typing import Any

import pytest

from areal_like.errors import ConfigError
from areal_like.trajectory import FinishReason
from rollout_server.environments.base import Environment, Reply, Step
from rollout_server.tasks.base import Task, make_task
from tests.support.lazily import lazily

gymnasium = lazily("gymnasium", reason="needs gymnasium")


def echo_class() -> Any:
    class Echo(gymnasium.Env):  # type: ignore[misc, name-defined]
        """A word has to be said; the observation names it. The space may be a Discrete one."""

        def __init__(self, is_discrete: bool = False, is_text: bool = True) -> None:
            spaces = gymnasium.spaces
            self.observation_space = spaces.Text(100)
            self.action_space = spaces.Discrete(2) if is_discrete else spaces.Text(5, charset="abc")
            self.is_text = is_text
            self.closed = False

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            super().reset(seed=seed)
            self.word = "".join(self.np_random.choice(list("abc"), 3))
            return f"Say {self.word}." if self.is_text else 5, {}

        def step(self, action: Any) -> tuple[str, float, bool, bool, dict[str, Any]]:
            is_right = action in (self.word, 1)
            return ("Right." if is_right else f"Not {action}."), float(is_right), is_right, False, {}

    return Echo


@pytest.fixture(autouse=True, scope="module")
def echo() -> None:
    gymnasium.register("Echo-v0", entry_point=echo_class(), max_episode_steps=3)


def reply(text: str) -> Reply:
    return Reply(text=text, raw_text=text, finish_reason=FinishReason.STOP, num_tokens=1)


def task_of(name: str, **settings: Any) -> Task:
    return make_task({"name": name, **settings}, seed=0)


def environment_of(task: Task, index: int = 0) -> Environment:
    environment = task.environment(task.example("train", index))
    assert environment is not None
    environment.check()
    return environment


def play(environment: Environment, *texts: str) -> tuple[list[str], list[Step]]:
    """The first messages, and the steps."""

    async def episode() -> tuple[list[str], list[Step]]:
        first = [message["content"] for message in await environment.reset()]
        steps = [await environment.step(reply(text)) for text in texts]
        await environment.close()
        return first, steps

    return asyncio.run(episode())


def test_gymnasium_episode() -> None:
    task = task_of("gymnasium", id="Echo-v0", system_prompt="Be brief.")
    (system, first), _ = play(environment_of(task))
    assert system == "Be brief." and first.startswith("Say ")
    word = first[4:7]
    _, (wrong, odd, right) = play(environment_of(task), "abc" if word != "abc" else "cba", "xyz!", word)
    assert (wrong.reward, wrong.done) == (0.0, False)
    assert odd.metrics == {"invalid_actions": 1.0} and not odd.done
    assert (
        odd.messages[0]["content"] == "This is not a valid action. Reply with 1 to 5 of the characters 'abc'."
    )
    assert (right.reward, right.done) == (1.0, True)
    assert right.metrics == {"invalid_actions": 0.0, "time_limit": 0.0}
    assert play(environment_of(task, 1))[0] != [system, first] or play(environment_of(task, 2))[0] != first


def test_gymnasium_limits_and_discrete_actions() -> None:
    _, steps = play(environment_of(task_of("gymnasium", id="Echo-v0")), "a", "b", "c")
    assert steps[-1].done and steps[-1].metrics["time_limit"] == 1.0
    task = task_of("gymnasium", id="Echo-v0", params={"is_discrete": True}, actions=["wait", "go"])
    _, (odd, wait, go) = play(environment_of(task), "jump", "wait", " go ")
    assert odd.messages[0]["content"] == "This is not a valid action. Reply with one of: wait, go."
    assert (wait.reward, go.reward, go.done) == (0.0, 1.0, True)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "set task.id"),
        ({"id": "Missing-v0"}, "id=Missing-v0: Environment `Missing` doesn't exist"),
        ({"id": "Echo-v0", "params": {"size": 3}}, "unexpected keyword argument"),
        ({"id": "Echo-v0", "params": {"is_text": False}}, "an observation is int, not text"),
        ({"id": "Echo-v0", "params": {"is_discrete": True}}, r"the action space is Discrete\(2\)"),
    ],
)
def test_wrong_settings_of_gymnasium(settings: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        environment_of(task_of("gymnasium", **settings))


def test_examples_are_pure_and_splits_are_disjoint() -> None:
    task = task_of("gymnasium", id="Echo-v0")
    train = {task.example("train", index).answer for index in range(100)}
    held_out = {task.example("eval", index).answer for index in range(100)}
    assert len(train) == len(held_out) == 100 and not train & held_out
    assert task.fingerprint() == task_of("gymnasium", id="Echo-v0").fingerprint()


@pytest.mark.parametrize("package", ["gymnasium", "textarena"])
def test_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        task_of(package, **({"id": "Echo-v0"} if package == "gymnasium" else {"game": "Nim-v0"}))


def test_textarena_game_of_one_player() -> None:
    pytest.importorskip("textarena")
    task = task_of("textarena", game="GuessTheNumber-v0")
    (rules,), _ = play(environment_of(task))
    assert rules.startswith("You are Player 0. You are playing Guess The Number.")
    low, high = 1, 20
    guesses: list[str] = []
    while True:  # the environment has the same seed each time, so the guesses so far have the same answers
        middle = (low + high) // 2
        guesses.append(f"[{middle}]")
        _, steps = play(environment_of(task), *guesses)
        if steps[-1].done:
            break
        answer = steps[-1].messages[0]["content"]
        assert guesses[-1] not in answer  # its own move is not repeated
        low, high = (middle + 1, high) if "higher" in answer else (low, middle - 1)
    assert steps[-1].reward == 1.0 and steps[-1].metrics == {"invalid_moves": 0.0}


def first_free(observation: str, rng: random.Random) -> str:
    """Moves for the other player."""
    return observation.rpartition("Available Moves: ")[2].split(",")[0].strip("'")


@pytest.mark.parametrize("player", [0, 1])
def test_textarena_game_against_a_script(player: int) -> None:
    pytest.importorskip("textarena")
    opponent = f"{__name__}.first_free"
    task = task_of("textarena", game="TicTacToe-v0", opponent=opponent, player=player)
    # The script takes the first free cell, so 4 and 6 after 2 (or before) win by the diagonal.
    (rules,), steps = play(environment_of(task), "[4]", "[2]", "[6]")
    assert f"Player {player} in Tic Tac Toe" in rules and ("Player 0 placed" in rules) == (player == 1)
    assert [step.done for step in steps] == [False, False, True]
    assert steps[-1].reward == 1.0
    assert "Player " in steps[0].messages[0]["content"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"game": "Nothing-v0"}, "task.game='Nothing-v0' is not one of the [0-9]+ games of TextArena"),
        ({"game": "TicTacToe-v0", "player": 1}, "want 0, or 1 with task.opponent"),
        ({"game": "TicTacToe-v0", "opponent": "no.such.thing"}, "task.opponent=no.such.thing: No module"),
    ],
)
def test_wrong_settings_of_textarena(settings: Any, problem: str) -> None:
    pytest.importorskip("textarena")
    with pytest.raises(ConfigError, match=problem):
        task_of("textarena", **settings)
