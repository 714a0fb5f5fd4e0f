"""Records the memory of every tensor that torch makes, by purpose, and the FLOPs of every operation.

It is a dispatch mode for fake tensors, which use no memory. A storage counts from the operation that returns
it until it is freed; FSDP2 also empties and refills storages by resizing them. The peak is computed
afterwards, because the purpose of a tensor may be known only later: a gradient is recognized as FSDP2's when
FSDP2 reduces it.

torch's own `FSDPMemTracker` is not used: it follows one model through one iteration, and a step here has two
optimizers (policy and critic), a reference model and gradients of earlier micro-batches.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from trainer.distributed.sharding import local

ACTIVATIONS = "activations"
LOGITS = "logits of the head"
ATTENTION = " attention"
"""Suffix of a phase under which the FLOPs of its attention are counted."""
GATHERED = "layers gathered by FSDP2, their gradients"
INPUTS_ON_HOST = "inputs of layers (trainer.offload_activations)"
MOMENTS_ON_HOST = "Adam's moments (trainer.offload_optimizer)"
ON_HOST = (INPUTS_ON_HOST, MOMENTS_ON_HOST)
"""Tensors in the host's memory: no part of the device's total, and so of its peak."""
_WORKING = (ACTIVATIONS, LOGITS)
_FSDP_OPS = ("fsdp", "c10d")


class Stage(NamedTuple):
    """A part of the step in which the live tensors of all layers but one stay the same."""

    phase: str
    """`policy`, `reference`, `proximal`, `teacher`, `critic`, `prm`; empty before the first of them."""
    part: str
    """`forward`, `backward`, `update`."""
    layer: int | None
    """Index of the decoder layer that began last; None before the first one."""


_BEFORE = Stage("", "", None)


@dataclass(kw_only=True, eq=False)
class _Storage:
    """One allocation. `purpose` may change until the trace has ended."""

    purpose: str
    num_bytes: int
    reference: weakref.ref[torch.UntypedStorage] | None = None


@dataclass(kw_only=True)
class TensorMemory:
    """The records of a trace; `recording` adds to them."""

    vocab_size: int
    """Tensors whose last dimension has this size are logits."""
    flops: Counter[str] = field(default_factory=Counter)
    """FLOPs by phase; those of attention have the phase's name with a suffix."""
    purpose: str = ACTIVATIONS
    stage: Stage = _BEFORE
    _live: dict[int, _Storage] = field(default_factory=dict)
    _events: list[tuple[_Storage, int, Stage]] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records all operations on fake tensors in the body."""
        original = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            self._resized(storage, size)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        try:
            with _Mode(self):
                yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    @contextmanager
    def as_(self, purpose: str, *, phase: str | None = None) -> Iterator[None]:
        """Tensors created in the body have this purpose. `phase`: the body begins this phase's forward, and
        its FLOPs belong to the phase."""
        before = self.purpose, self.stage
        self.purpose = purpose
        if phase is not None:
            self.stage = Stage(phase, "forward", None)
        try:
            yield
        finally:
            self.purpose, self.stage = before

    def begin(self, part: str, *, layer: int | None = None) -> None:
        """The current phase enters another part of the step, or another layer in it."""
        self.stage = self.stage._replace(part=part, layer=layer)

    def now_bytes(self) -> dict[str, int]:
        """Bytes by purpose at this moment."""
        totals: Counter[str] = Counter()
        for storage in self._live.values():
            totals[storage.purpose] += storage.num_bytes
        return {purpose: size for purpose, size in totals.items() if size}

    def peaks(self) -> dict[Stage, dict[str, int]]:
        """Bytes by purpose at the moment of the largest total of each stage. Those of ON_HOST are the largest
        numbers in the stage."""
        totals: Counter[str] = Counter()
        now = 0
        most: Counter[Stage] = Counter()
        on_host: dict[Stage, Counter[str]] = {}
        peaks: dict[Stage, dict[str, int]] = {}
        for storage, change, stage in self._events:
            totals[storage.purpose] += change
            if storage.purpose in ON_HOST:
                most_on_host = on_host.setdefault(stage, Counter())
                most_on_host[storage.purpose] = max(most_on_host[storage.purpose], totals[storage.purpose])
                continue
            now += change
            if now > most[stage]:
                most[stage], peaks[stage] = now, dict(totals)
        for stage, sizes in on_host.items():
            peaks.setdefault(stage, {}).update(sizes)
        return peaks

    def made(self, tensor: Tensor) -> _Storage:
        """The record of a tensor's storage, created for a new storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (known := self._live.get(key)) is not None:
            return known
        is_logits = self.purpose == ACTIVATIONS and tensor.shape[-1:] == (self.vocab_size,)
        record = _Storage(purpose=LOGITS if is_logits else self.purpose, num_bytes=storage.nbytes())
        record.reference = weakref.ref(storage, lambda _: self._freed(key))
        self._live[key] = record
        self._change(record, record.num_bytes)
        return record

    def used_by_fsdp(self, tensor: Tensor) -> None:
        """Counts a working tensor as FSDP2's: a collective or its copies read or write it."""
        record = self.made(tensor)
        if record.purpose in _WORKING:
            record.purpose = GATHERED

    def _freed(self, key: int) -> None:
        record = self._live.pop(key)
        self._change(record, -record.num_bytes)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        if (record := self._live.get(storage._cdata)) is None:
            return
        change, record.num_bytes = size - record.num_bytes, size
        if record.purpose in _WORKING:
            record.purpose = GATHERED
        self._change(record, change)

    def _change(self, record: _Storage, change: int) -> None:
        if change:
            self._events.append((record, change, self.stage))


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, memory: TensorMemory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls; FakeTensorMode returns the same
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        memory = self._memory
        for tensor in tree_iter(out):
            # Operations inside a DTensor's operation are not dispatched here, so its shard is taken from the
            # result.
            shard = local(tensor) if isinstance(tensor, DTensor) else tensor
            if isinstance(shard, FakeTensor):
                memory.made(shard)
        if func.namespace in _FSDP_OPS and "alltoall" not in str(func):  # that of a context group's attention
            for tensor in tree_iter((args, kwargs)):
                if isinstance(tensor, FakeTensor):
                    memory.used_by_fsdp(tensor)
        elif isinstance(next(iter(tree_iter(out)), None), FakeTensor):
            self._count_flops(func, args, kwargs, out)
        return out

    def _count_flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = str(func)
        phase = self._memory.stage.phase
        if "_scaled_dot_product" in name:
            is_backward = "backward" in name
            query = args[1] if is_backward else args[0]
            self._memory.flops[phase + ATTENTION] += attention_flops(query.shape, is_backward=is_backward)
        elif (formula := flop_registry.get(func._overloadpacket)) is not None:
            self._memory.flops[phase] += formula(*args, **kwargs, out_val=out)


def attention_flops(shape: torch.Size, *, is_backward: bool) -> int:
    """FLOPs of causal attention over queries [N, H, L, D]: half of the full square is computed.

    Forward: two products of [L, D] with [D, L] size for each head. Backward: five.
    """
    num_seqs, heads, length, size = shape
    return (5 if is_backward else 2) * num_seqs * heads * length * length * size
