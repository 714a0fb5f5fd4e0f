"""Guess a digit within three tries: an action with one text, written with OpenEnv's SDK."""

from __future__ import annotations

import random
from typing import Any

from openenv.core.env_server import Action, Environment, Observation, State
from pydantic import Field


class GuessAction(Action):
    guess: str = Field(max_length=8)


class GuessObservation(Observation):
    hint: str
    left: int | None = None


class Guess(Environment[GuessAction, GuessObservation, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> GuessObservation:
        self._number = random.Random(seed).randrange(10)
        self._left = 3
        return GuessObservation(hint="Guess a digit.", left=self._left)

    def step(self, action: GuessAction, timeout_s: float | None = None, **_: Any) -> GuessObservation:
        if action.guess == "crash":
            raise RuntimeError("the environment has crashed")
        self._left -= 1
        digits = [int(one) for one in action.guess if one in "0123456789"]
        if digits[:1] == [self._number]:
            return GuessObservation(hint="Right.", reward=1.0, done=True)
        where = "Higher" if digits and digits[0] < self._number else "Lower" if digits else "No digit"
        reward = 0.1 if digits else 0.0
        return GuessObservation(hint=f"{where}.", left=self._left, reward=reward, done=not self._left)

    @property
    def state(self) -> State:
        return State()


ENVIRONMENT, ACTION, OBSERVATION = Guess, GuessAction, GuessObservation
