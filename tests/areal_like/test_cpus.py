"""What a processor is fast in, and how much of the machine a process could have."""

import os
from pathlib import Path

import pytest

from areal_like import cpus
from areal_like.cpus import CoreTimes, core_times, cpu_flags, fast_bfloat16, free_cores, usable_cores


def test_flags_that_make_bfloat16_fast() -> None:
    assert fast_bfloat16(frozenset({"avx2", "avx512_bf16", "fma"})) == "avx512_bf16"
    assert fast_bfloat16(frozenset({"amx_bf16", "avx512_bf16"})) == "amx_bf16"
    assert fast_bfloat16(frozenset({"avx512f", "avx512_vnni", "bf16"})) == ""
    assert cpu_flags() == cpu_flags()


def _times(at_s: float, own_s: float, *spare_s: float) -> CoreTimes:
    return CoreTimes(at_s=at_s, own_s=own_s, spare_s=spare_s)


@pytest.mark.parametrize(
    ("before", "after", "free"),
    [
        (_times(10, 5, 100), _times(12, 7, 102), 2.0),
        (_times(10, 5, 100), _times(12, 7, 100), 1.0),
        (_times(10, 5, 100, 7), _times(12, 7, 102, 8), 1.5),  # a quota leaves less than the cores do
        (_times(10, 5, 100, 7), _times(12, 7, 102, 6), 1.0),  # more was used than the quota
        (_times(10, 5), _times(12, 7), 1.0),  # nothing is known about the machine
        (_times(10, 5, 1), _times(12, 7, 1, 2), 0.0),
        (_times(10, 5, 1), _times(10, 5, 1), 0.0),
    ],
)
def test_free_cores(before: CoreTimes, after: CoreTimes, free: float) -> None:
    assert free_cores(before, after) == pytest.approx(free)


def test_this_machine_can_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = core_times()
    assert sum(i * i for i in range(300_000)) > 0
    after = core_times()
    assert len(before.spare_s) == len(after.spare_s) >= 1
    assert after.own_s > before.own_s and free_cores(before, after) > 0
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))

    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 2000000\nuser_usec 1\n")
    monkeypatch.setattr(cpus, "_CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cores() == 1
    times = core_times()
    assert times.spare_s[1] == pytest.approx(1.5 * times.at_s - 2.0)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores() == 8 and len(core_times().spare_s) == 1
