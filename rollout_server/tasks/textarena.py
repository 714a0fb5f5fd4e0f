"""Games of TextArena, alone or against a scripted opponent: `task: {name: textarena, game: Nim-v0, ...}`.

TextArena's observation wrappers repeat the whole game before each move. A conversation already contains it,
so the wrappers are bypassed: the policy reads only what is new, without its own moves.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from areal_like.errors import ConfigError
from areal_like.registry import named_object
from rollout_server.environments.base import Environment, Message, Reply, Step
from rollout_server.tasks.base import Example
from rollout_server.tasks.games import GameTask, optional_package


@dataclass(frozen=True, kw_only=True)
class TextArenaTask(GameTask):
    """One game with many seeds. The reward is the game's reward for the policy's player."""

    game: str = ""
    """TextArena's id of the game."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the game."""
    opponent: str = ""
    """Dotted path of a function `(observation: str, rng: random.Random) -> str`, which moves for the other
    player; empty for games of one player."""
    player: int = 0
    """The policy's player: 0 moves first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        registry = optional_package("textarena", task="textarena").envs.registration.ENV_REGISTRY
        if self.game not in registry:
            raise ConfigError(f"task.game={self.game!r} is not one of the {len(registry)} games of TextArena")
        if self.player not in range(2 if self.opponent else 1):
            raise ConfigError(f"task.player={self.player}: want 0, or 1 with task.opponent")
        if self.opponent:
            self.opponent_function()

    def opponent_function(self) -> Any:
        """Returns the function named by `opponent`. Raises ConfigError."""
        return named_object(self.opponent, key=f"task.opponent={self.opponent}", form="module.function")

    def environment(self, example: Example) -> Environment:
        return TextArenaEnvironment(self, seed=example.answer)


class TextArenaEnvironment(Environment):
    """One game."""

    def __init__(self, task: TextArenaTask, *, seed: int) -> None:
        self._task = task
        self._seed = seed
        self._rng = random.Random(seed)
        self._opponent = task.opponent_function() if task.opponent else None

    async def reset(self) -> list[Message]:
        """Returns the rules, and the opponent's move if it moves first."""
        textarena = optional_package("textarena", task="textarena")
        self._game = self._inner = textarena.make(self._task.game, **self._task.params)
        while isinstance(self._inner, textarena.Wrapper):
            self._inner = self._inner.env
        self._own_move = textarena.ObservationType.PLAYER_ACTION
        self._game.reset(num_players=2 if self._opponent else 1, seed=self._seed)
        self._let_opponent_move(is_done=False)
        return self._task.first_messages(self._observation(self._task.player))

    async def step(self, reply: Reply) -> Step:
        """Plays the reply, then the opponent's moves. Metric: `invalid_moves`, if one ended the game."""
        is_done, _ = self._game.step(action=reply.text)
        if not self._let_opponent_move(is_done=is_done):
            return Step(messages=[{"role": "user", "content": self._observation(self._task.player)}])
        rewards, about = self._game.close()
        is_invalid = bool(about.get(self._task.player, {}).get("invalid_move"))
        return Step(
            reward=float((rewards or {}).get(self._task.player, 0.0)),
            done=True,
            metrics={"invalid_moves": float(is_invalid)},
        )

    def _let_opponent_move(self, *, is_done: bool) -> bool:
        """Moves until it is the policy's turn; returns True if the game has ended."""
        while not is_done and self._inner.state.current_player_id != self._task.player:
            assert self._opponent is not None
            move = self._opponent(self._observation(self._inner.state.current_player_id), self._rng)
            is_done, _ = self._game.step(action=move)
        return bool(is_done)

    def _observation(self, player: int) -> str:
        """Returns the new observations for a player whose turn it is."""
        _, news = self._inner.get_observation()
        return "\n\n".join(
            text for author, text, kind in news if not (author == player and kind == self._own_move)
        )
