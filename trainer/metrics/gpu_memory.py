"""The GPU memory of one trainer rank, read when the metrics page is requested."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from areal_like.runtime.metrics import PREFIX


class GpuMemory(Collector):
    """`areal_trainer_gpu_memory_bytes{of}`; without values on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def collect(self) -> Iterable[Metric]:
        """Yields the metric family."""
        family = GaugeMetricFamily(
            f"{PREFIX}_trainer_gpu_memory_bytes",
            "Memory of the rank's GPU: in tensors, held by the rank's allocator, free, and all of it",
            labels=["of"],
        )
        for of, num_bytes in self._read().items():
            family.add_metric([of], num_bytes)
        yield family

    def _read(self) -> dict[str, int]:
        if self._device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        return {
            "allocated": torch.cuda.memory_allocated(self._device),
            "reserved": torch.cuda.memory_reserved(self._device),
            "free": free,
            "total": total,
        }
