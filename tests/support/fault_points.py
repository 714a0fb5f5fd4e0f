"""Objectives whose trainer is killed at given points, or slow, for tests of resumption.

Set `objective._target_=tests.support.fault_points.KilledTrainer` and `objective.deaths`, for instance
`"update:5 push:6 sender:7 save:7 commit:11"`. Each death happens once, by SIGKILL, and leaves a file in
`objective.folder`, so that neither the next trainer nor a replay with the same settings is killed there
again. A death waits for the checkpoint in flight, because a step may be quicker than the writing of a
checkpoint; without the wait, the step from which the next trainer resumes would vary. `poison:3` kills every
trainer as long as the first group of step 3 is the same.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.batching.positions import Position
from trainer.leader import Leader
from trainer.objectives import SampledTokens, StepStats, TokenLosses
from trainer.objectives.tis import TruncatedIS
from trainer.step.runner import StepRunner
from trainer.weights.broadcaster import Broadcaster
from trainer.weights.snapshot import GatheredBucket, Snapshot

_MID_PUSH = 2
"""Bucket of a sender that is read after its first one has been broadcast, and before its second one is."""


@dataclass(frozen=True, kw_only=True)
class KilledTrainer(TruncatedIS):
    """The default objective (TIS) with deaths."""

    deaths: str
    folder: str

    def __post_init__(self) -> None:
        super().__post_init__()
        points = _FaultPoints({death: Path(self.folder) / death for death in self.deaths.split()})
        run, stream_state, commit = StepRunner.run, Leader.stream_state, Leader.commit
        push, read = Broadcaster.push, Snapshot.read

        def run_or_die(
            runner: StepRunner, positions: Iterable[Position], *, step: int, **rest: Any
        ) -> dict[str, float]:
            metrics = run(runner, points.poisoned(positions, step=step), step=step, **rest)
            points.at("update", step)  # the weights have changed; the buffer has not got CompleteStep
            return metrics

        def stream_state_or_die(leader: Leader, step: int) -> dict[str, Any]:
            points.at("save", step)  # the step is complete in the ledger; there is no checkpoint
            points.committed.clear()
            return stream_state(leader, step)

        def commit_or_die(leader: Leader, step: int, **rest: Any) -> None:
            points.at("commit", step)  # the checkpoint is on disk; it is not committed
            commit(leader, step, **rest)
            points.committed.set()

        async def noted_push(broadcaster: Broadcaster, snapshot: Snapshot, *, step: int, **rest: Any) -> Any:
            points.pushed_step = step
            return await push(broadcaster, snapshot, step=step, **rest)

        def read_or_die(snapshot: Snapshot, index: int) -> GatheredBucket:
            snapshotter = snapshot._snapshotter
            # An earlier bucket has arrived at the engines. A small push has fewer buckets.
            if index in snapshotter.share[_MID_PUSH : _MID_PUSH + 1]:
                if snapshotter.is_helper:  # of a run that starts at step 0 and pushes after every step
                    points.at("sender", snapshot.number - 1)
                else:
                    points.at("push", points.pushed_step)
            return read(snapshot, index)

        StepRunner.run = run_or_die  # type: ignore[method-assign]
        Leader.stream_state = stream_state_or_die  # type: ignore[method-assign]
        Leader.commit = commit_or_die  # type: ignore[method-assign]
        Broadcaster.push = noted_push  # type: ignore[method-assign]
        Snapshot.read = read_or_die  # type: ignore[method-assign]


@dataclass(frozen=True, kw_only=True)
class SlowTrainer(TruncatedIS):
    """The default objective; each micro-batch takes `seconds` while the file `slow` is in `folder`."""

    folder: str
    seconds: float

    def losses(self, tokens: SampledTokens, stats: StepStats) -> TokenLosses:
        if (Path(self.folder) / "slow").exists():
            (Path(self.folder) / "entered").touch()
            time.sleep(self.seconds)
        return super().losses(tokens, stats)


class _FaultPoints:
    def __init__(self, notes: dict[str, Path]) -> None:
        self._notes = notes
        self.committed = threading.Event()
        """Set while no checkpoint is being written."""
        self.pushed_step = -1
        self.committed.set()

    def at(self, point: str, step: int) -> None:
        note = self._notes.get(f"{point}:{step}")
        if note is not None and not note.exists():
            if point != "commit":  # called by the checkpoint's own thread
                assert self.committed.wait()
            note.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def poisoned(self, positions: Iterable[Position], *, step: int) -> Iterable[Position]:
        note = self._notes.get(f"poison:{step}")
        if note is None:
            return positions
        positions = list(positions)
        first = hashlib.sha256(
            b"".join(trajectory.logprobs.tobytes() for trajectory in positions[0].trajectories)
        ).hexdigest()
        if not note.exists():
            note.write_text(first)
        if note.read_text() == first:
            os.kill(os.getpid(), signal.SIGKILL)
        return positions
