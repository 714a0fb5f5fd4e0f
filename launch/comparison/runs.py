"""Finds the first step at which two runs differ, and by what.

    settings, initial weights -> for each step { trajectories -> row of metrics.jsonl -> checkpoint } *

The comparison ends with the first step that differs, and lists its differences in causal order.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from areal_like.errors import ConfigError, StoreCorruptError
from areal_like.wire.messages.consumer import Group
from launch.comparison.groups import StepDifferences, compare_groups, compare_sample_rows
from launch.comparison.recorded import RecordedRun
from launch.comparison.replaying import add_replay
from launch.comparison.result import Comparison, Difference
from launch.comparison.rows import compare_rows
from launch.comparison.settings import compare_settings
from launch.comparison.weights import compare_weights, same_files
from trainer.replay.recording import Recording

_OF_RECORDS = ("groups", "prompts", "tokens", "shape of samples", "versions", "behavior log-probs", "rewards")
_OF_ROWS = ("groups", "prompts", "tokens", "versions", "rewards")


def compare_runs(
    root: Path, other: Path, *, tolerance: float | None = None, replays: bool = False
) -> Comparison:
    """Compares two runs. `tolerance`: largest relative difference that counts as equal; None: chosen from the
    settings.

    `replays`: train the first step that differs again, from the records of both runs. Raises ConfigError if
    they have no step in common.
    """
    with closing(RecordedRun(root)) as ours, closing(RecordedRun(other)) as theirs:
        try:
            result = _Comparer(ours, theirs, tolerance=tolerance).run()
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"the ledger of {root} or {other} cannot be read: {error}") from None
        if replays and result.step is not None:
            add_replay(result, ours, theirs)
        return result


class _Comparer:
    def __init__(self, ours: RecordedRun, theirs: RecordedRun, *, tolerance: float | None) -> None:
        self._ours, self._theirs = ours, theirs
        self._incomplete: set[Path] = set()
        settings = compare_settings(ours.settings, theirs.settings)
        self._of_steps = settings.of_steps
        if tolerance is None:
            tolerance = ours.rounding_tolerance if settings.of_rounding else 0.0
        self._result = Comparison(
            run=str(ours.root),
            other=str(theirs.root),
            first_step=-1,
            last_step=-1,
            tolerance=tolerance,
            rounding=settings.of_rounding,
        )
        if settings.of_generation:
            acted = "settings that act on trajectories alone: "
            self._result.notes.append(acted + ", ".join(settings.of_generation))
        self._same_trajectories = ours.recording is not None and ours.source == theirs.source
        if self._same_trajectories:
            self._result.notes.append(f"both have the trajectories of {ours.source}")
        else:
            self._result.not_recorded += [run.missing for run in (ours, theirs) if run.missing]

    def run(self) -> Comparison:
        """Compares step by step up to the first difference."""
        result = self._result
        for step, row, other_row in _in_both(self._ours.rows(), self._theirs.rows()):
            if result.first_step < 0:
                result.first_step = step
                found = [*self._settings(), *(self._initial_weights() if step == 0 else [])]
            else:
                found = []
            result.last_step = step
            found += self._trajectories(step)
            kinds, of_rows = compare_rows(row, other_row, tolerance=result.tolerance)
            result.compared_means.update(kinds - {"settings"})
            known = {one.kind for one in found}
            # The sample that differs is more useful than a mean in the row.
            found += [one for one in of_rows if one.kind not in known or one.kind == "settings"]
            found += self._checkpoint(step + 1)
            if found:
                result.add(step, found)
                break
        if result.first_step < 0:
            raise ConfigError(f"{result.run} and {result.other} have no step in common")
        if not result.compared["parameters"]:
            result.not_recorded.append("parameters after any of these steps in both runs (no checkpoints)")
        return result

    def _settings(self) -> Iterator[Difference]:
        self._result.compared["settings"] += 1
        yield from (Difference(kind="settings", text=text) for text in self._of_steps)

    def _initial_weights(self) -> Iterator[Difference]:
        ours, theirs = self._ours.initial_weights, self._theirs.initial_weights
        if ours is None or theirs is None:
            names = [run.settings.get("model.path", "") for run in (self._ours, self._theirs)]
            if names[0] != names[1]:
                yield Difference(kind="initial weights", text=f"model.path={names[0]} / {names[1]}")
            return
        self._result.compared["initial weights"] += 1
        if ours != theirs and (found := compare_weights(ours, theirs)) is not None:
            yield Difference(kind="initial weights", text=found.text, other=found.relative)

    def _trajectories(self, step: int) -> list[Difference]:
        """Returns the differences in the trajectories of a step, in as much detail as both runs recorded."""
        result = self._result
        one, another = self._ours.recording, self._theirs.recording
        if one is None or another is None:
            return []
        numbers = self._ours.num_groups.get(step, 0), self._theirs.num_groups.get(step, 0)
        if not all(numbers):
            self._is_gone(step, numbers)
            return []
        has_records = self._ours.has_records and self._theirs.has_records
        result.compared.update(_OF_RECORDS if has_records or self._same_trajectories else _OF_ROWS)
        if self._same_trajectories:
            return []
        found = StepDifferences()
        if numbers[0] != numbers[1]:
            found.add("groups", "number of groups", *numbers)
        for position in range(min(numbers)):
            if not has_records:
                rows = one.sample_rows(step, position), another.sample_rows(step, position)
                compare_sample_rows(found, *rows, position=position, tolerance=result.tolerance)
                continue
            groups = [
                _read(found, recording, step, position, of=str(run.root))
                for recording, run in ((one, self._ours), (another, self._theirs))
            ]
            if groups[0] is not None and groups[1] is not None:
                compare_groups(
                    found,
                    groups[0],
                    groups[1],
                    steps=(self._ours.steps_of_versions, self._theirs.steps_of_versions),
                    tolerance=result.tolerance,
                )
        return found.found()

    def _is_gone(self, step: int, numbers: tuple[int, int]) -> None:
        """Notes once that a ledger does not have the groups of a step: it started later, or ended earlier."""
        for run, number in zip((self._ours, self._theirs), numbers, strict=True):
            if not number and run.root not in self._incomplete:
                self._incomplete.add(run.root)
                text = f"{run.root}: trajectories of some steps, the first of them step {step}"
                self._result.not_recorded.append(text)

    def _checkpoint(self, num_steps: int) -> Iterator[Difference]:
        """Yields the differences of the checkpoints after this many steps, if both runs have one."""
        ours, theirs = (run.checkpoints.get(num_steps) for run in (self._ours, self._theirs))
        if ours is None or theirs is None:
            return
        result = self._result
        result.compared["parameters"] += 1
        found = compare_weights(ours, theirs)
        if found is not None and found.relative > result.tolerance:
            text = f"checkpoint {ours.name}: {found.text}"
            yield Difference(kind="parameters", text=text, other=found.relative)
        elif not result.tolerance:
            equal = same_files(ours, theirs, "rows/*-of-*.safetensors")
            result.compared["moments"] += equal is not None
            if equal is False:
                text = f"checkpoint {ours.name}: the weights are equal, masters or moments differ"
                yield Difference(kind="moments", text=text)


def _read(found: StepDifferences, recording: Recording, step: int, position: int, *, of: str) -> Group | None:
    try:
        return next(recording.groups(step, range(position, position + 1)))
    except StoreCorruptError as error:
        found.add("damaged records", f"group {position} of {of}: {error}")
        return None


_Rows = Iterator[tuple[int, dict[str, Any]]]


def _in_both(ours: _Rows, theirs: _Rows) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:
    """(step, both rows) of the steps that both iterators have; both ascend."""
    one, another = next(ours, None), next(theirs, None)
    while one is not None and another is not None:
        if one[0] == another[0]:
            yield one[0], one[1], another[1]
            one, another = next(ours, None), next(theirs, None)
        elif one[0] < another[0]:
            one = next(ours, None)
        else:
            another = next(theirs, None)
