"""Starts preference optimization: `python -m trainer.preferences --config FILE key=value ...`.

This process is the only rank, or with `trainer.world_size` > 1 it starts the ranks, like `python -m trainer`.
`areal-like preferences` prepares the model and the run's directory first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.offline.start import start_offline

if TYPE_CHECKING:
    from trainer.offline.kind import OfflineTraining


def main(argv: Sequence[str]) -> int:
    return start_offline(argv, text=__doc__, name="preferences", module="trainer.preferences", kind=_training)


def _training() -> OfflineTraining:
    from trainer.preferences.training import PreferenceTraining

    return PreferenceTraining()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
