"""What one kind of offline training has of its own: its settings, rows, model and loss.

A new kind is a subclass here, a section of the configuration that derives from `OfflineConfig`, a module that
starts it (`trainer/offline/start.py`), and a verb (`launch/commands/offline.py`).
"""

from __future__ import annotations

import abc
from typing import ClassVar

from areal_like.config import Config, OfflineConfig
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.offline.rows import OfflineRows
from trainer.offline.step import OfflineLoss


class OfflineTraining(abc.ABC):
    """One kind of training. Its methods are called on all ranks."""

    name: ClassVar[str]
    """Name of its section in the configuration, and of its part of a checkpoint's state."""
    command: ClassVar[str]
    """The verb of `areal-like` that starts it."""
    measured: ClassVar[tuple[str, ...]]
    """Those metrics of its loss that the summary has, before and after the training, for held-out rows."""

    @classmethod
    def settings(cls, config: Config) -> OfflineConfig:
        section: OfflineConfig = getattr(config, cls.name)
        return section

    @abc.abstractmethod
    def rows(self, config: Config, source: str, key: str, ranks: Ranks) -> OfflineRows:
        """The rows of the setting `key`, `train` or `eval` of the section. `source`: the model's directory or
        name for `from_pretrained`. Collective. Raises ConfigError."""

    @abc.abstractmethod
    def model(self, config: Config, source: str, ranks: Ranks, *, with_weights: bool) -> PackedModel:
        """The sharded model. `with_weights`: False leaves the weights that are trained undefined, for a
        caller that reads a checkpoint into them. Raises ConfigError."""

    @abc.abstractmethod
    def loss(self, config: Config, model: PackedModel, ranks: Ranks) -> OfflineLoss: ...
