"""A reward that is a user's function: `task.reward=my_rewards.score`.

    def score(completion, answer, **row):
        return float(completion.strip() == answer)

It is called with the completion, the answer, and those columns of the row that are among its arguments (all
of them with `**row`). Functions written for verl or TRL work unchanged (`conventions.py`). Settings other
than `name`, `weight` and `part` become further keyword arguments.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from areal_like.errors import ConfigError, RewardError
from rollout_server.rewards.library import conventions
from rollout_server.rewards.library.base import RewardFunction, place_of
from rollout_server.tasks.base import Completion, Example, Rewarded

_COMPLETION = ("completion", conventions.VERL)
_ANSWER = ("answer", "ground_truth")


@dataclass(frozen=True, kw_only=True)
class UserFunction(RewardFunction):
    """`{name: my_rewards.score, ...}`."""

    path: str
    """`module.function`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of every call."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._arguments  # noqa: B018, raises ConfigError for a function that cannot be called

    @property
    def own_name(self) -> str:
        """The function's name without its module."""
        return self.path.rpartition(".")[2]

    @property
    def is_async(self) -> bool:
        """True for an `async def` function, or an object whose `__call__` is one."""
        call = getattr(self._function, "__call__", None)  # noqa: B004, to see if it is async
        return inspect.iscoroutinefunction(self._function) or inspect.iscoroutinefunction(call)

    def score(self, example: Example, completion: Completion) -> Rewarded | Awaitable[Rewarded]:
        """Calls the function and returns its result."""
        names, takes_all = self._arguments
        row = row_of(example)
        metrics: dict[str, float] = {}
        # The completion comes last, so that neither a column nor a setting can replace it.
        if self._convention == conventions.TRL:
            known = conventions.trl_arguments(example, completion, row, self.settings, metrics)
        else:
            known = {"prompt": example.prompt, **row, **self.settings}
            known |= dict.fromkeys([name for name in _ANSWER if name in names] or ["answer"], example.answer)
            known |= dict.fromkeys(
                [name for name in _COMPLETION if name in names] or ["completion"], completion
            )
        if self._convention == conventions.VERL:
            known.setdefault("extra_info", {})
        if missing := [name for name, is_needed in names.items() if is_needed and name not in known]:
            raise RewardError(
                f"{self.path} needs {', '.join(missing)}, which {place_of(example)} does not have: it has "
                f"{', '.join(map(str, row)) or 'no columns'}; write a default value, or take `**row`"
            )
        arguments = known if takes_all else {name: known[name] for name in names if name in known}
        returned = self._function(**arguments)
        return self._awaited(returned, metrics) if self.is_async else self._read(returned, metrics)

    async def _awaited(self, returned: Awaitable[Any], metrics: Mapping[str, float]) -> Rewarded:
        return self._read(await returned, metrics)

    def _read(self, returned: Any, metrics: Mapping[str, float]) -> Rewarded:
        if self._convention == conventions.TRL:
            return conventions.trl_score(returned, metrics, path=self.path)
        result: Rewarded = conventions.verl_score(returned) if self._convention else returned
        return result

    @functools.cached_property
    def _convention(self) -> str:
        """The argument that marks verl's or TRL's convention; empty for this project's own."""
        names, _ = self._arguments
        if "completion" in names:
            return ""
        return next((name for name in (conventions.VERL, conventions.TRL) if name in names), "")

    @functools.cached_property
    def _function(self) -> Callable[..., Any]:
        module_name, _, attribute = self.path.rpartition(".")
        try:
            function = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, SyntaxError) as error:
            raise ConfigError(
                f"task.reward={self.path}: {error}; it must be importable from the directory in which the "
                "job starts"
            ) from error
        except AttributeError:
            raise ConfigError(f"task.reward={self.path}: module {module_name} has no {attribute}") from None
        if not callable(function) or inspect.isclass(function):
            raise ConfigError(f"task.reward={self.path}: not a function")
        called: Callable[..., Any] = function
        return called

    @functools.cached_property
    def _arguments(self) -> tuple[dict[str, bool], bool]:
        """Returns the named arguments (name -> True if it has no default), and whether there is `**row`."""
        parameters = list(inspect.signature(self._function).parameters.values())
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        names = {p.name: p.default is p.empty for p in named}
        if not (takes_all or any(name in names for name in (*_COMPLETION, conventions.TRL))):
            raise ConfigError(
                f"task.reward={self.path}: it has no argument `completion`: write "
                f"def {self.own_name}(completion, answer, **row)"
            )
        if unknown := [] if takes_all else [name for name in self.settings if name not in names]:
            raise ConfigError(
                f"unknown key `task.reward.{unknown[0]}`: {self.path} has no such argument; it has "
                f"{', '.join(names)}"
            )
        if conventions.TRL in names and (absent := [a for a in conventions.ABSENT if names.get(a)]):
            raise ConfigError(
                f"task.reward={self.path} needs TRL's `{absent[0]}`, which a rollout server does not have: "
                "remove the argument, or give it a default value"
            )
        return names, takes_all


def row_of(example: Example) -> Mapping[str, Any]:
    """Returns the columns of the example's row; for a task without rows, its metadata."""
    row = example.metadata.get("row", example.metadata)
    return row if isinstance(row, Mapping) else {}
