"""GPUs with the figures that their vendors publish; rates are dense, without sparsity.

Memory is in units of 10^9 bytes. A driver shows a little more, so a job that fits these figures has room
left.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BF16_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "MI300X": 1307.0,
}
"""bfloat16 teraflops. Where a part has several form factors, the figure is that of the SXM one unless the
name says otherwise. The order matters: the first name that matches a device applies."""


@dataclass(frozen=True, kw_only=True)
class GpuKind:
    """One kind of GPU that a job can be planned for. Source: NVIDIA's data sheets of the SXM parts."""

    name: str
    memory_bytes: float
    float32_flops: float
    """float32 FLOP/s of matrix products without TF32, which torch leaves off by default."""
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    """One direction, one GPU."""
    host_bytes_per_s: float
    """One direction between the GPU and its host's memory (PCIe, 16 lanes)."""
    host_memory_bytes: float
    """Assumed memory of a host with eight of these GPUs: a little less than machines that clouds rent."""

    @property
    def bf16_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return BF16_TFLOPS[self.name] * 1e12

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of matrix products in `model.dtype`."""
        return self.bf16_flops if dtype == "bfloat16" else self.float32_flops


GPUS = {
    name.lower(): GpuKind(
        name=name,
        memory_bytes=memory,
        float32_flops=flops,
        memory_bytes_per_s=bandwidth,
        nvlink_bytes_per_s=nvlink,
        host_bytes_per_s=host,
        host_memory_bytes=host_memory,
    )
    for name, memory, flops, bandwidth, nvlink, host, host_memory in (
        ("A100", 80e9, 19.5e12, 2.039e12, 300e9, 32e9, 1200e9),
        ("H100", 80e9, 67e12, 3.35e12, 450e9, 64e9, 1870e9),
        ("H200", 141e9, 67e12, 4.8e12, 450e9, 64e9, 1900e9),
        ("B200", 180e9, 75e12, 8e12, 900e9, 64e9, 2000e9),
    )
}


def peak_flops(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a GPU by the name that torch gives it ("NVIDIA H100 80GB HBM3").

    None for a GPU that is not in the table, and for a part of one (MIG): `trainer.peak_tflops` gives it.
    """
    name = _name_in_table(device_name)
    return BF16_TFLOPS[name] * 1e12 if name else None


def kind_of(device_name: str) -> GpuKind | None:
    """The figures of a GPU by the name that torch gives it; None if a job cannot be planned for it."""
    return GPUS.get(_name_in_table(device_name).lower())


def _name_in_table(device_name: str) -> str:
    """The name in BF16_TFLOPS; empty if it has none."""
    if "MIG" in device_name.split():
        return ""
    for name in BF16_TFLOPS:
        if re.search(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", device_name, re.IGNORECASE):
            return name
    return ""
