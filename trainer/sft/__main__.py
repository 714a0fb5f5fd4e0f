"""Starts supervised training: `python -m trainer.sft --config FILE key=value ...`.

This process is the only rank, or with `trainer.world_size` > 1 it starts the ranks, like `python -m trainer`.
`areal-like sft` prepares the model and the run's directory first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.offline.start import start_offline

if TYPE_CHECKING:
    from trainer.offline.kind import OfflineTraining


def main(argv: Sequence[str]) -> int:
    return start_offline(argv, text=__doc__, name="sft", module="trainer.sft", kind=_training)


def _training() -> OfflineTraining:
    from trainer.sft.training import SupervisedTraining

    return SupervisedTraining()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
