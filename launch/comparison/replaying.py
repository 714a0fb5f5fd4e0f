"""Replays the first differing step from both runs' records and compares the results token by token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import ConfigError, first_line
from launch.comparison.groups import StepDifferences
from launch.comparison.recorded import RecordedRun
from launch.comparison.result import KINDS, Comparison, Replayed
from launch.comparison.rows import SCALED, are_close
from launch.local_job.child import python_path

_KIND_OF = {"logp_S": "policy's log-probs", "advantage_S": "advantages", "weight_S": "weights of the loss"}
_ONE_RANK = (
    *("trainer.world_size=1", "trainer.context_parallel=1", "trainer.replicas=1"),
    *("trainer.num_hosts=1", "trainer.host_index=0", "trainer.rendezvous="),
)
_SETTINGS = (*_ONE_RANK, "trainer.balance=streaming", "resume=")
_NUM_LINES = 3


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The results of a step's computation (trainer/replay/trace.py)."""

    sequences: dict[tuple[int, int], dict[str, NDArray[np.float64]]]
    """(group, number of the sequence in the group) -> arrays over its trained tokens, by name."""
    step: dict[str, Any]


def add_replay(result: Comparison, ours: RecordedRun, theirs: RecordedRun) -> None:
    """Adds to a comparison the replay of the differing step, or the reason why there is none."""
    assert result.step is not None
    try:
        with tempfile.TemporaryDirectory(prefix="areal-like-replay-") as folder:
            traces = [
                _traced(run, result.step, Path(folder) / str(i)) for i, run in enumerate((ours, theirs))
            ]
    except ConfigError as error:
        result.not_recorded.append(f"advantages and weights of the loss: {error}")
        return
    rounding = max(ours.rounding_tolerance, theirs.rounding_tolerance, result.tolerance)
    # One different token changes the computation of its micro-batch, and with it the last bits of the others.
    is_same_data = not {one.kind for one in result.differences} & set(KINDS[: KINDS.index("rewards")])
    found, kinds = compare_traces(
        traces[0], traces[1], tolerance=result.tolerance if is_same_data else rounding
    )
    differing = {one.kind for one in found.found()}
    result.replayed = Replayed(
        step=result.step,
        differences=sorted(found.found(), key=lambda one: KINDS.index(one.kind)),
        equal=[kind for kind in KINDS if kind in kinds - differing],
        rows=[
            _against_row(run, trace, tolerance=rounding)
            for run, trace in zip((ours, theirs), traces, strict=True)
        ],
    )


def compare_traces(ours: Trace, theirs: Trace, *, tolerance: float) -> tuple[StepDifferences, set[str]]:
    """Returns the differences of two replays of a step, and the kinds that were compared."""
    found = StepDifferences()
    kinds = {*_KIND_OF.values(), "loss", "gradient norm"}
    if tolerance == 0:
        kinds |= {"parameters before the step", "parameters"}
        for kind, name in (("parameters before the step", "before"), ("parameters", "after")):
            digests = [trace.step[f"parameters_{name}"][:16] for trace in (ours, theirs)]
            if digests[0] != digests[1]:
                found.add(kind, f"SHA-256 {name} the step", *digests)
    for place in sorted(ours.sequences.keys() | theirs.sequences.keys()):
        where = f"group {place[0]}, sequence {place[1]}"
        one, another = ours.sequences.get(place), theirs.sequences.get(place)
        for name, kind in _KIND_OF.items():
            if one is None or another is None:
                runs = ("trained", "not trained") if another is None else ("not trained", "trained")
                if kind == "advantages":  # a group with advantages of zero is not trained on
                    found.add(kind, where, *runs)
                continue
            a, b = one[name], another[name]
            num = min(len(a), len(b))
            scale = float(np.abs(a[:num]).max(initial=0.0))  # the terms of a sum may be near zero
            what = f"{where}, trained token"
            found.add_arrays(kind, what, a[:num], b[:num], tolerance=tolerance, scale=scale)
    for kind, name in (("loss", "loss"), ("gradient norm", "grad_norm")):
        values = ours.step[name], theirs.step[name]
        if not are_close(*values, tolerance=tolerance, is_scaled=name in SCALED):
            found.add(kind, name, *values)
    return found, kinds


def _against_row(run: RecordedRun, trace: Trace, *, tolerance: float) -> str:
    """States whether a run's row matches its records."""
    row = next((row for step, row in run.rows() if step == trace.step["step"]), {})
    both = {name: (row.get(name), trace.step[name]) for name in ("loss", "grad_norm")}
    if None in [recorded for recorded, _ in both.values()]:
        return f"{run.root}: its row has no loss or gradient norm to compare with"
    other = [
        f"{name} {recorded} in the row, {replayed} from the records"
        for name, (recorded, replayed) in both.items()
        if not are_close(recorded, replayed, tolerance=tolerance, is_scaled=name in SCALED)
    ]
    if not other:
        return f"{run.root}: the loss and gradient norm in its row match its records"
    return f"{run.root}: its row does NOT match its records: {', '.join(other)}"


def _traced(run: RecordedRun, step: int, out: Path) -> Trace:
    """Replays a step. Raises ConfigError if the run's records are not sufficient."""
    if run.source is None or not run.has_records:
        raise ConfigError(run.missing or f"{run.root}: its trajectories")
    out.mkdir()
    sys.stderr.write(f"areal-like: training step {step} of {run.root} again\n")
    command = [sys.executable, "-m", "trainer.replay.trace", "--recording", str(run.source)]
    command += ["--step", str(step), "--out", str(out), *(["--own-lr"] if run.has_own_lr else [])]
    place = [f"name={run.paths.root.name}", f"runs_dir={run.paths.root.parent}"]
    done = subprocess.run(
        [*command, "--config", str(run.paths.config), *_SETTINGS, *place],
        env=os.environ | {"PYTHONPATH": python_path()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = "; ".join(lines[-1 if done.returncode == 2 else -_NUM_LINES :])
        raise ConfigError(f"{run.root}: step {step} cannot be trained again ({reason})")
    return _read(out)


def _read(folder: Path) -> Trace:
    try:
        with np.load(folder / "tokens.npz", allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        step = json.loads((folder / "step.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: {first_line(error)}") from None
    sequences: dict[tuple[int, int], dict[str, NDArray[np.float64]]] = {}
    num_in_group: defaultdict[int, int] = defaultdict(int)
    start = 0
    for group, length in zip(arrays["group_N"].astype(int), arrays["length_N"].astype(int), strict=True):
        end = start + int(length)
        place = int(group), num_in_group[int(group)]
        num_in_group[int(group)] += 1
        sequences[place] = {name: arrays[name][start:end] for name in _KIND_OF}
        start = end
    return Trace(sequences=sequences, step=step)
