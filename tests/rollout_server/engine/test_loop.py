"""The engine's thread: when it passes on outputs, returns freed memory, and opens updates."""

from __future__ import annotations

import asyncio
import functools
import threading
from pathlib import Path

import pytest

from areal_like.errors import WeightSyncError
from rollout_server.engine import loop as loop_module
from rollout_server.engine.core import EngineCore
from rollout_server.engine.loop import EngineLoop, SequenceOutput
from rollout_server.engine.models.base import Weights
from rollout_server.engine.scheduler import SamplingParams, Sequence
from rollout_server.engine.threads import ThreadCount
from rollout_server.engine.weights import updater as updater_module
from rollout_server.engine.weights.updater import WeightUpdater
from tests.rollout_server.engine.test_core import make_core
from tests.support.engine_harness import Models
from tests.support.waiting import HANG_LIMIT_S

LIMIT_S = HANG_LIMIT_S


@pytest.fixture
def core(models: Models) -> EngineCore:
    return make_core(models[0])


class Reports:
    """What a loop has passed on: the ids of each report. Its sequences are submitted before it starts."""

    def __init__(self, core: EngineCore, lengths: list[int]) -> None:
        self.ids: list[list[str]] = []
        self.complete = threading.Event()
        self.sequences = [
            Sequence(seq_id=str(i), prompt=(3, 4), params=SamplingParams(max_new_tokens=length))
            for i, length in enumerate(lengths)
        ]
        for sequence in self.sequences:
            core.submit(sequence)
        threads = ThreadCount(least=1, most=1)
        self.loop = EngineLoop(core, threads=threads, on_output=self._on_output, on_failure=pytest.fail)
        self.loop.start()

    def _on_output(self, outputs: list[SequenceOutput]) -> None:
        self.ids.append([output.sequence.seq_id for output in outputs])
        if sum(map(len, self.ids)) == len(self.sequences):
            self.complete.set()


@pytest.mark.parametrize(("interval_s", "want"), [(1e9, [["0", "1", "2"]]), (0.0, [["0"], ["1"], ["2"]])])
def test_outputs_of_quick_steps_are_passed_on_together(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, interval_s: float, want: list[list[str]]
) -> None:
    monkeypatch.setattr(loop_module, "_REPORT_EVERY_S", interval_s)
    reports = Reports(core, [2, 4, 6])
    assert reports.complete.wait(LIMIT_S)
    reports.loop.stop(timeout_s=LIMIT_S)
    assert reports.ids == want


def test_no_command_is_answered_before_earlier_outputs(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "_REPORT_EVERY_S", 1e9)
    step, has_ended, is_asked = core.step, threading.Event(), threading.Event()

    def held_step() -> list[Sequence]:
        """The step in which the short one ends takes until there is a command."""
        with_output = step()
        if any(sequence.seq_id == "0" and sequence.finish is not None for sequence in with_output):
            has_ended.set()
            is_asked.wait(LIMIT_S)
        return with_output

    monkeypatch.setattr(core, "step", held_step)
    reports = Reports(core, [1, 60])
    assert has_ended.wait(LIMIT_S) and reports.ids == []
    answered = reports.loop.call(lambda core: list(reports.ids))
    is_asked.set()
    assert answered.result(LIMIT_S) == [["0"]]
    assert reports.complete.wait(LIMIT_S) and reports.ids == [["0"], ["1"]]
    reports.loop.stop(timeout_s=LIMIT_S)


def test_an_abort_is_answered_after_its_outputs(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "_REPORT_EVERY_S", 1e9)
    reports = Reports(core, [60, 60])
    reports.loop.abort(lambda core: core.all_sequences).result(LIMIT_S)
    assert reports.ids == [["0", "1"]]
    reports.loop.stop(timeout_s=LIMIT_S)


def test_freed_memory_is_returned_after_growth(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, returned_at = iter([100, 110, 200, 210, 220]), []
    monkeypatch.setattr(loop_module, "_LOOK_AT_MEMORY_EVERY_S", 0.0)
    monkeypatch.setattr(loop_module, "resident_bytes", lambda: next(resident, 220))
    monkeypatch.setattr(loop_module, "return_freed_memory", lambda: returned_at.append(core.num_steps))
    reports = Reports(core, [6])
    assert reports.complete.wait(LIMIT_S)
    reports.loop.stop(timeout_s=LIMIT_S)
    assert returned_at == [2], "before the third step"


def test_updates_that_begin_together_leave_one(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replaces the one before, and gets its memory; without turns each took memory of its own."""
    new_weights, made = core.model.new_weights, []

    def counted() -> Weights:
        made.append(new_weights())
        return made[-1]

    async def begin() -> None:
        updater = WeightUpdater(loop, core.model.facts)
        async with asyncio.timeout(LIMIT_S):
            await asyncio.gather(*(updater.begin() for _ in range(3)))
            late = updater.end(version="1", running="keep")
            outcomes = await asyncio.gather(updater.begin(), late, return_exceptions=True)
            assert outcomes[0] is None and "no weight update is open" in str(outcomes[1])
            with pytest.raises(WeightSyncError, match="missing"):
                await updater.end(version="2", running="keep")
            await updater.begin()
        updater.close()

    monkeypatch.setattr(core.model, "new_weights", counted)
    threads = ThreadCount(least=1, most=1)
    loop = EngineLoop(core, threads=threads, on_output=lambda outputs: None, on_failure=pytest.fail)
    loop.start()
    asyncio.run(begin())
    loop.stop(timeout_s=LIMIT_S)
    assert len(made) == 1


def test_a_replaced_load_returns_its_memory(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes to its end, so the next update needs memory of its own; the one after that gets the first."""
    new_weights, made = core.model.new_weights, []
    may_end = {name: threading.Event() for name in "abc"}

    def counted() -> Weights:
        made.append(new_weights())
        return made[-1]

    def stored(path: Path, *_: object, **__: object) -> None:
        assert may_end[path.name].wait(LIMIT_S)

    async def load_thrice() -> None:
        updater = WeightUpdater(loop, core.model.facts)
        load = functools.partial(updater.load_from_disk, version="1", running="recompute")
        first, second = asyncio.create_task(load("a")), asyncio.create_task(load("b"))
        while len(made) < 2:
            await asyncio.sleep(0.01)
        may_end["a"].set()
        with pytest.raises(WeightSyncError, match="discarded"):
            await first
        update = updater._open_update()
        third = asyncio.create_task(load("c"))
        while not update.is_discarded:
            await asyncio.sleep(0.01)
        may_end["b"].set()
        may_end["c"].set()
        with pytest.raises(WeightSyncError, match="missing"):
            await third
        with pytest.raises(WeightSyncError, match="discarded"):
            await second
        updater.close()

    monkeypatch.setattr(core.model, "new_weights", counted)
    monkeypatch.setattr(updater_module, "_store_checkpoint", stored)
    loop = EngineLoop(
        core,
        threads=ThreadCount(least=1, most=1),
        on_output=lambda outputs: None,
        on_failure=pytest.fail,
    )
    loop.start()
    asyncio.run(load_thrice())
    loop.stop(timeout_s=LIMIT_S)
    assert len(made) == 2
