"""What the processors of this machine can do, and how idle they are (Linux; elsewhere nothing is known).

Cores are those that this process may run on (its affinity), fewer if its control group has a smaller quota.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16")
"""Flags of processors that multiply matrices several times faster in bfloat16 than in float32. Without one
torch converts the operands to float32, and bfloat16 is slower."""
_CGROUP = Path("/sys/fs/cgroup")


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The flags of the first processor in /proc/cpuinfo (x86); empty if there are none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = (line.partition(":")[2] for line in lines if line.startswith("flags"))
    return frozenset(next(found, "").split())


def fast_bfloat16(flags: frozenset[str]) -> str:
    """The flag that makes bfloat16 fast, empty if there is none."""
    return next((flag for flag in FAST_BFLOAT16 if flag in flags), "")


def usable_cores() -> int:
    """The number of cores that this process can keep busy, at least 1."""
    if not hasattr(os, "sched_getaffinity"):
        return 1
    quota = _quota()
    cores = len(os.sched_getaffinity(0))
    return cores if quota is None else max(1, min(cores, int(quota)))


@dataclass(frozen=True, kw_only=True)
class CoreTimes:
    """Times at one moment, in seconds; only differences between two moments have a meaning."""

    at_s: float
    own_s: float
    """CPU time of this process."""
    spare_s: tuple[float, ...]
    """CPU time that nobody used: of the cores, and of the control group's quota if it has one. The one that
    grew less is what this process could have used. Empty if it is not known."""


def core_times() -> CoreTimes:
    """Reads the times."""
    now_s = time.monotonic()
    return CoreTimes(at_s=now_s, own_s=time.process_time(), spare_s=_spare_s(now_s))


def free_cores(before: CoreTimes, after: CoreTimes) -> float:
    """How many cores this process could have kept busy between two moments: those that it did, and those that
    were idle."""
    elapsed_s = after.at_s - before.at_s
    if elapsed_s <= 0 or len(before.spare_s) != len(after.spare_s):
        return 0.0
    spare = [end - start for start, end in zip(before.spare_s, after.spare_s, strict=True)]
    return (after.own_s - before.own_s + max(0.0, min(spare, default=0.0))) / elapsed_s


def _spare_s(now_s: float) -> tuple[float, ...]:
    try:
        names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        ticks = sum(int(row[4]) + int(row[5]) for row in rows if row and row[0] in names)  # idle, iowait
        idle_s = ticks / os.sysconf("SC_CLK_TCK")
        quota = _quota()
        return (idle_s,) if quota is None else (idle_s, quota * now_s - _used_s())
    except (OSError, ValueError, IndexError, AttributeError):
        return ()


def _quota() -> float | None:
    """The cores that the control group may use at a time; None: no limit."""
    try:
        limit, period = (_CGROUP / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def _used_s() -> float:
    """CPU time of the control group's processes. Raises OSError and ValueError."""
    for line in (_CGROUP / "cpu.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == "usage_usec":
            return int(value) / 1e6
    raise ValueError("cpu.stat does not tell the time that was used")
