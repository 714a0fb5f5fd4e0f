"""The default objective in a trainer that dies at prescribed moments: `objective._target_=tests.support.fault_points.Doomed`.

`objective.deaths="update:5 save:7 commit:11"`: each happens once, by SIGKILL, and is noted in `objective.folder`, so that the next trainer
gets past it, and a replay with the same settings meets none. The checkpoint before is waited for: a step may be quicker than its writing,
and what the next trainer goes back to would be luck. `poison:3` happens as long as the first group of step 3 is the one that it was
at first: data that no trainer survives.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.leader import Leader
from trainer.objectives.tis import TruncatedIS
from trainer.step.runner import StepRunner


@dataclass(frozen=True, kw_only=True)
class Doomed(TruncatedIS):
    """See the module."""

    deaths: str
    folder: str

    def __post_init__(self) -> None:
        super().__post_init__()
        doom = _Doom({death: Path(self.folder) / death for death in self.deaths.split()})
        run, stream_state, commit = StepRunner.run, Leader.stream_state, Leader.commit

        def doomed_run(
            runner: StepRunner, groups: Iterable[Any], *, step: int, **rest: Any
        ) -> dict[str, float]:
            metrics = run(runner, doom.poisoned(groups, step=step), step=step, **rest)
            doom.at("update", step)  # the weights have moved, nobody knows
            return metrics

        def doomed_stream_state(leader: Leader, step: int) -> dict[str, Any]:
            doom.at("save", step)  # the ledger knows that the step is complete, there is no checkpoint
            doom.committed.clear()
            return stream_state(leader, step)

        def doomed_commit(leader: Leader, step: int, **rest: Any) -> None:
            doom.at("commit", step)  # there is a checkpoint, the ledger does not know
            commit(leader, step, **rest)
            doom.committed.set()

        StepRunner.run, Leader.stream_state, Leader.commit = doomed_run, doomed_stream_state, doomed_commit  # type: ignore[method-assign]


class _Doom:
    def __init__(self, notes: dict[str, Path]) -> None:
        self._notes = notes
        self.committed = threading.Event()
        """No checkpoint is being written."""
        self.committed.set()

    def at(self, point: str, step: int) -> None:
        note = self._notes.get(f"{point}:{step}")
        if note is not None and not note.exists():
            if point != "commit":  # which is called by the writer itself
                assert self.committed.wait(timeout=60)
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def poisoned(self, groups: Iterable[Any], *, step: int) -> Iterable[Any]:
        note = self._notes.get(f"poison:{step}")
        if note is None:
            return groups
        groups = list(groups)
        first = hashlib.sha256(
            b"".join(trajectory.logprobs.tobytes() for trajectory in groups[0])
        ).hexdigest()
        if not note.exists():
            note.write_text(first)
        if note.read_text() == first:
            os.kill(os.getpid(), signal.SIGKILL)
        return groups
