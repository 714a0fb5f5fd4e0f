"""What may change from one optimizer step to the next, because an operator has asked for it.

Rank 0 gets it from the buffer (`StepSettings`) when the step before is complete, and shares with the other
ranks what they need, in integers, with the vote that they have before each step anyway.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from areal_like.config import Config
from areal_like.wire.messages.consumer import StepSettings

NUM_SHARED = 2


def configured(config: Config) -> dict[str, str]:
    """This trainer's own values, for `StartTraining.settings`."""
    return {
        "trainer.lr": repr(config.trainer.lr),
        "eval.interval": str(config.eval.interval if config.eval.resolved_sets else 0),
        "daemon.log_level": config.daemon.log_level,
    }


def shared(settings: StepSettings | None) -> list[int]:
    """The learning rate's bits, and whether to save a checkpoint; zeros on ranks without settings."""
    if settings is None:
        return [0] * NUM_SHARED
    (bits,) = struct.unpack("<q", struct.pack("<d", settings.lr))
    return [bits, int(settings.checkpoint)]


def received(numbers: Sequence[int]) -> tuple[float, bool]:
    """The learning rate and whether to save a checkpoint, of rank 0's `shared`."""
    bits, saves = numbers
    (lr,) = struct.unpack("<d", struct.pack("<q", bits))
    return lr, bool(saves)
