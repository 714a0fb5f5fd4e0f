"""Gymnasium environments with text observations: `task: {name: gymnasium, id: my_module:MyWorld-v0}`.

The policy's reply is the action: text in the environment's Text space, or one of `actions` if its space is
Discrete. For a reply that is not an action, the environment takes no step, and the policy is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_like.errors import ConfigError, EpisodeError
from rollout_server.environments.base import Environment, Message, Reply, Step
from rollout_server.tasks.base import Example
from rollout_server.tasks.games import GameTask, optional_package


@dataclass(frozen=True, kw_only=True)
class GymnasiumTask(GameTask):
    """Episodes of one registered environment."""

    id: str = ""
    """Id passed to `gymnasium.make`; `module:Name-v0` imports the module first."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the environment."""
    actions: Sequence[str] = ()
    """The policy's words for actions 0, 1, ... of a Discrete space; unused for a Text space."""

    def __post_init__(self) -> None:
        super().__post_init__()
        optional_package("gymnasium", task="gymnasium")
        if not self.id:
            raise ConfigError("task gymnasium: set task.id, as for gymnasium.make")

    def environment(self, example: Example) -> Environment:
        return GymnasiumEnvironment(self, seed=example.answer)


class GymnasiumEnvironment(Environment):
    """One episode."""

    def __init__(self, task: GymnasiumTask, *, seed: int) -> None:
        self._task = task
        self._example_seed = seed
        self._env: Any = None

    def check(self) -> None:
        """Raises ConfigError if the environment does not exist, or if its observations or actions are not
        text."""
        try:
            env = self._make()
            observation, _ = env.reset(seed=self._example_seed)
        except Exception as error:  # the environment's code may raise anything
            raise ConfigError(f"task gymnasium: id={self._task.id}: {error}") from error
        try:
            self._action_of("", env.action_space)
            _text(observation)
        except EpisodeError as error:
            raise ConfigError(f"task gymnasium: {self._task.id}: {error}") from error
        finally:
            env.close()

    async def reset(self) -> list[Message]:
        self._env = self._make()
        observation, _ = self._env.reset(seed=self._example_seed)
        return self._task.first_messages(_text(observation))

    async def step(self, reply: Reply) -> Step:
        """Performs the reply as an action. Metrics: `invalid_actions`, and `time_limit` if that ended the
        episode."""
        action, problem = self._action_of(reply.text.strip(), self._env.action_space)
        if problem:
            return Step(messages=[{"role": "user", "content": problem}], metrics={"invalid_actions": 1.0})
        observation, reward, terminated, truncated, _ = self._env.step(action)
        return Step(
            messages=[{"role": "user", "content": _text(observation)}],
            reward=float(reward),
            done=bool(terminated or truncated),
            metrics={"invalid_actions": 0.0, "time_limit": float(truncated and not terminated)},
        )

    async def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def _make(self) -> Any:
        gymnasium = optional_package("gymnasium", task="gymnasium")
        return gymnasium.make(self._task.id, disable_env_checker=True, **self._task.params)

    def _action_of(self, text: str, space: Any) -> tuple[Any, str]:
        """Returns the action that a reply means, and why it means none. Raises EpisodeError for other
        spaces."""
        spaces = optional_package("gymnasium.spaces", task="gymnasium")
        if isinstance(space, spaces.Text):
            about = f"{space.min_length} to {space.max_length} of the characters {space.characters!r:.200}"
            return text, "" if text in space else f"This is not a valid action. Reply with {about}."
        if isinstance(space, spaces.Discrete) and len(self._task.actions) == space.n:
            words = list(self._task.actions)
            if text in words:
                return space.start + words.index(text), ""
            return None, f"This is not a valid action. Reply with one of: {', '.join(words)}."
        raise EpisodeError(
            f"the action space is {space}: want Text, or Discrete with task.actions (a word for each action)"
        )


def _text(observation: Any) -> str:
    if not isinstance(observation, str):
        raise EpisodeError(
            f"an observation is {type(observation).__name__}, not text: use an environment, or an "
            "ObservationWrapper, whose observations are str"
        )
    return observation
