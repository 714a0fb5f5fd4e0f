"""Published peak rates of GPUs: dense bfloat16 FLOP/s, without sparsity, by the vendors' data sheets.

A name is compared with what torch calls the device ("NVIDIA H100 80GB HBM3"), the first that fits counts. A
GPU that is not in the table, or a part of one (MIG), has no known peak: `trainer.peak_tflops` gives it.
"""

from __future__ import annotations

import re

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
"""Teraflops of one GPU; of parts with several form factors the SXM one, unless the name says another."""


def peak_flops(device_name: str) -> float | None:
    """Peak bfloat16 FLOP/s of a GPU by the name that torch gives it; None if it is not known."""
    if "MIG" in device_name.split():
        return None
    for name, tflops in BF16_TFLOPS.items():
        if re.search(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", device_name, re.IGNORECASE):
            return tflops * 1e12
    return None
