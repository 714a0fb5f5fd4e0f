"""Stages `devices` and `bandwidth`: the GPUs that torch sees, and the rates of copies.

A rate below a quarter of the published one fails: a PCIe link with too few lanes or of an old generation, or
a GPU that another process uses. Smaller differences are normal; the numbers are in the report.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping

import torch
from torch import Tensor

from areal_like.gpus import GpuKind, kind_of
from launch.doctor.gathering import driver_table
from launch.doctor.gpu.stages import OK, Measured, Notes, Request, Verdict, failed
from trainer.metrics.speed import clock_of

LEAST_SHARE = 0.25
"""Least share of a published rate that is in order."""
_COPIED_BYTES = {"cpu": 1 << 22, "cuda": 1 << 30}
_TIMES = 5


def check_devices(request: Request, notes: Notes) -> Verdict:
    """Reports the GPUs; fails if torch cannot use one."""
    notes.measured(
        python=platform.python_version(),
        torch=torch.__version__,
        num_cpus=os.cpu_count() or 0,
        host_memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    )
    if request.device == "cpu":
        return OK
    if not torch.version.cuda:
        return failed(
            f"torch {torch.__version__} is built for CPUs", "make setup REQUIREMENTS=requirements-gpu.txt"
        )
    notes.measured(cuda=torch.version.cuda)
    notes.at("initializing CUDA")
    if not torch.cuda.is_available():
        return failed(
            f"torch finds no GPU ({driver_table()[1] or 'nvidia-smi runs'})",
            "install a driver for torch's CUDA; give the container the GPUs; see CUDA_VISIBLE_DEVICES",
        )
    _note_gpus(notes)
    return OK


def _note_gpus(notes: Notes) -> None:
    nccl: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    notes.measured(nccl=".".join(map(str, nccl)), num_gpus=torch.cuda.device_count())
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        facts: dict[str, Measured] = {
            "": found.name,
            "_capability": f"{found.major}.{found.minor}",
            "_gb": round(total / 1e9, 1),
            "_free_gb": round(free / 1e9, 1),
        }
        notes.measured(**{f"gpu_{index}{name}": value for name, value in facts.items()})


def check_bandwidth(request: Request, notes: Notes) -> Verdict:
    """Copies between host and GPU (from pinned memory), inside a GPU, and to the next GPU."""
    device = torch.device(request.device, 0) if request.device == "cuda" else torch.device("cpu")
    is_gpu = device.type == "cuda"
    num_bytes = _COPIED_BYTES[device.type]
    host, back = (torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_gpu) for _ in range(2))
    host.view(torch.int64).copy_(torch.arange(num_bytes // 8))
    here, there = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    copies = {"host_to_device": (host, here), "device": (here, there)}
    if is_gpu and torch.cuda.device_count() > 1:
        other = torch.empty(num_bytes, dtype=torch.uint8, device=torch.device("cuda", 1))
        copies["gpu_to_gpu"] = (there, other)
        there = other  # the comparison at the end then covers this copy too
    copies["device_to_host"] = (there, back)
    rates = {}
    for name, (source, target) in copies.items():
        notes.at(f"copying {name.replace('_', ' ')}")
        rates[name] = _rate(source, target)
        notes.measured(**{f"{name}_gb_per_s": round(rates[name] / 1e9, 2)})
    if not torch.equal(host, back):
        return failed("data has changed on its way through the device", "replace the GPU, or test its memory")
    kind = kind_of(torch.cuda.get_device_name(device)) if is_gpu else None
    return OK if kind is None else judged_rates(rates, kind)


def judged_rates(rates: Mapping[str, float], kind: GpuKind) -> Verdict:
    """Fails if a rate is far below the published one. Links between GPUs differ too much to be judged.

    `rates`: bytes per second of copies; inside a GPU each byte is read and written.
    """
    published = {
        "host_to_device": kind.host_bytes_per_s,
        "device_to_host": kind.host_bytes_per_s,
        "device": kind.memory_bytes_per_s / 2,
    }
    slow = [
        f"{name.replace('_', ' ')} {rates[name] / 1e9:.1f} GB/s (published {rate / 1e9:.0f})"
        for name, rate in published.items()
        if rates[name] < LEAST_SHARE * rate
    ]
    if not slow:
        return OK
    return failed(
        ", ".join(slow),
        "stop other users of the GPU; see the generation and width of its PCIe link (nvidia-smi -q)",
    )


def _rate(source: Tensor, target: Tensor) -> float:
    """Bytes per second of a copy, which runs on the stream of the source's GPU, or of the target's."""
    clock = clock_of(source.device if source.is_cuda else target.device)
    target.copy_(source, non_blocking=True)  # maps the memory
    start = clock.mark()
    for _ in range(_TIMES):
        target.copy_(source, non_blocking=True)
    (seconds,) = clock.seconds([(start, clock.mark())])
    return _TIMES * source.numel() / max(seconds, 1e-9)
