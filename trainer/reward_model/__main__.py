"""Starts the training of a reward model: `python -m trainer.reward_model --config FILE key=value ...`.

This process is the only rank, or with `trainer.world_size` > 1 it starts the ranks, like `python -m trainer`.
`areal-like reward-model` prepares the model and the run's directory first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.offline.start import start_offline

if TYPE_CHECKING:
    from trainer.offline.kind import OfflineTraining


def main(argv: Sequence[str]) -> int:
    return start_offline(
        argv, text=__doc__, name="reward-model", module="trainer.reward_model", kind=_training
    )


def _training() -> OfflineTraining:
    from trainer.reward_model.training import RewardTraining

    return RewardTraining()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
