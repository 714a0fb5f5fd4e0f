"""Collects GPUs and versions of packages for `areal-like doctor`, without importing torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from areal_like.config import Config
from areal_like.config.gpus import engine_gpus, trainer_gpus
from areal_like.paths import cache_dir
from launch.doctor.facts import Gpu, GpuFacts, Versions

_PROBE = """
import importlib.metadata as m, importlib.util as u, json, re, pathlib, sys
def version(*names):
    for name in names:
        try: return m.version(name)
        except m.PackageNotFoundError: pass
    return ""
spec = u.find_spec("torch")
text = (pathlib.Path(spec.origin).parent / "version.py").read_text() if spec and spec.origin else ""
cuda = re.search(r"^cuda\\b[^=]*= '([0-9.]+)'", text, re.M)
print(json.dumps({"python": sys.version.split()[0], "torch": version("torch"),
    "cuda": cuda[1] if cuda else "", "transformers": version("transformers"), "sglang": version("sglang"),
    "nccl": version("nvidia-nccl-cu13", "nvidia-nccl-cu12")}))
"""
"""Reads versions from metadata: importing torch would take seconds and memory."""


def wanted_gpus(config: Config, roles: Sequence[str]) -> GpuFacts:
    wanted: dict[int, list[str]] = {}
    if "trainer" in roles:
        for index in list(trainer_gpus(config))[
            : max(1, config.trainer.world_size // config.trainer.num_hosts)
        ]:
            wanted.setdefault(index, []).append("the trainer")
    if "rollout" in roles:
        for server in range(config.rollout.num_servers):
            for index in engine_gpus(config.rollout, index=server):
                wanted.setdefault(index, []).append(f"rollout-{server}")
    named = {index: " and ".join(names) for index, names in wanted.items()}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    may_share = "--mem-fraction-static" in config.rollout.sglang.args
    if not named:
        return GpuFacts()
    query = "--query-gpu=index,name,memory.total,memory.used,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except FileNotFoundError:
        return GpuFacts(wanted=named, error="nvidia-smi is not installed", visible=visible)
    except (OSError, subprocess.SubprocessError) as error:
        return GpuFacts(wanted=named, error=f"nvidia-smi fails: {error}", visible=visible)
    return gpus_from(done.stdout, wanted=named, visible=visible, may_share=may_share)


def gpus_from(table: str, *, wanted: dict[int, str], visible: str | None, may_share: bool) -> GpuFacts:
    """The facts in nvidia-smi's table, with the numbers that CUDA_VISIBLE_DEVICES gives."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.count(",") >= 4]
    by_number = {row[0]: row for row in rows}
    order = [row[0] for row in rows]
    if visible is not None and all(each.strip().isdecimal() for each in visible.split(",")):
        order = [each.strip() for each in visible.split(",") if each.strip() in by_number]
    elif visible == "":
        order = []
    found = tuple(
        Gpu(index=index, name=row[1], total_mb=_int(row[2]), used_mb=_int(row[3]))
        for index, row in enumerate(by_number[number] for number in order)
    )
    return GpuFacts(
        wanted=wanted,
        found=found,
        driver=rows[0][4] if rows else "",
        error="" if rows else "the driver shows no GPU",
        visible=visible,
        may_share=may_share,
    )


def _int(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def versions(config: Config, roles: Sequence[str]) -> Iterator[Versions]:
    if "trainer" in roles or config.rollout.engine == "embedded":
        yield _probe("trainer", sys.executable)
    if "rollout" in roles and config.rollout.engine == "sglang" and not config.rollout.sglang.url:
        built = str(cache_dir() / "sglang/bin/python")
        given = config.rollout.sglang.python
        probes = (_probe("engine", python) for python in ([given] if given else [sys.executable, built]))
        first = next(probes)
        yield first if first.sglang or first.error else next((each for each in probes if each.sglang), first)


def _probe(of: str, python: str) -> Versions:
    try:
        done = subprocess.run(
            [str(Path(python).expanduser()), "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return Versions(of=of, **json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Versions(of=of, error=f"{python} does not run: {error}")
