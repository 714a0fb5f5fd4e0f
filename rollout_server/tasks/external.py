"""`task: {name: external}`: examples are just numbers, for external agents that have their own data."""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.errors import ConfigError
from rollout_server.tasks.base import Example, Split, Task


@dataclass(frozen=True, kw_only=True)
class ExternalTask(Task):
    """An external agent claims a session, gets the split and the index, and posts the reward."""

    external: bool = True

    def __post_init__(self) -> None:
        if not self.external:
            raise ConfigError(
                "task.external=false: the samples of the task `external` are made by external agents; "
                "leave the setting out, or use another task"
            )
        super().__post_init__()

    def example(self, split: Split, index: int) -> Example:
        """Returns an empty prompt: the agent knows what `index` of `split` stands for."""
        return Example(prompt="", answer=None)
