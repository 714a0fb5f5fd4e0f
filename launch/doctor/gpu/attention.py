"""Stage `attention`: the kernels of packed attention against exact attention, outputs and gradients.

Exact is softmax attention by its definition, with a mask, in float64 on the CPU, over inputs that are rounded
as the kernel gets them. On a GPU the varlen kernel and the rectangles run in bfloat16, and the varlen kernel
again with FlashAttention 3 where it is installed; on a CPU only the rectangles run, in float32. The cases
have shared prefixes, sliding windows and fewer heads of keys than of queries.

Shape suffixes: U rows, L and M queries and keys of one sequence, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from launch.doctor.gpu.stages import Notes, Request, Verdict, within
from trainer.attention import varlen
from trainer.attention.packed_attention import rectangle_attention
from trainer.attention.varlen import varlen_attention
from trainer.batching.attention_layout import AttentionLayout
from trainer.batching.shared_prefixes import InputSequence, SharedRows
from trainer.metrics.speed import clock_of
from trainer.models.kernels import activate_flash_attention_3, choose_kernels

HEADS, KV_HEADS = 4, 2
LIMITS = {torch.bfloat16: 0.02, torch.float32: 1e-5}
"""Largest norm of a difference, as a share of the exact tensor's norm. Rounding to bfloat16 gives 0.004."""
_WINDOWS = (None, 40)
_PROMPTS = ((), (50,), (4, 60, 20))
"""Lengths of the prompts that three sequences each share; none: two sequences that share nothing."""
_LONG = 4096
"""Tokens of each of the four sequences whose time is measured on a GPU."""
_REMEDY = "set trainer.kernels=torch if only fa3 differs, else trainer.attention=rectangles; send us the file"

Attend = Callable[..., Tensor]


def check_attention(request: Request, notes: Notes) -> Verdict:
    """Compares every kernel that runs on this device."""
    device = torch.device(request.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = (64, 128) if device.type == "cuda" else (16,)
    notes.at("the rectangles")
    errors = {"rectangles": _error(rectangle_attention, heads, device=device, dtype=dtype)}
    probe = torch.empty(0, HEADS, heads[0], dtype=dtype, device=device)
    obstacle = varlen.obstacle(probe, probe)
    if obstacle:
        notes.measured(varlen=obstacle)
    else:
        notes.at("the varlen kernel")
        errors["varlen"] = _error(varlen_attention, heads, device=device, dtype=dtype)
        notes.at("the varlen kernel with FlashAttention 3")
        with _fa3(device) as reason:
            if reason:
                notes.measured(fa3=reason)
            else:
                errors["fa3"] = _error(varlen_attention, heads, device=device, dtype=dtype)
    notes.measured(**{f"error_of_{name}": error for name, error in errors.items()})
    if device.type == "cuda":
        _note_times(notes, with_varlen="varlen" in errors, with_fa3="fa3" in errors)
    return within(errors, dict.fromkeys(errors, LIMITS[dtype]), remedy=_REMEDY)


def _error(attend: Attend, heads: Sequence[int], *, device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of outputs and gradients over all cases."""
    largest = 0.0
    for head in heads:
        for prompts in _PROMPTS:
            layout = _layout(_sequences(prompts), shares=bool(prompts), device=device)
            on_cpu = _layout(_sequences(prompts), shares=bool(prompts), device=torch.device("cpu"))
            qkv = _inputs(layout, head=head, device=device, dtype=dtype)
            exact_qkv = [x.detach().cpu().double().requires_grad_() for x in qkv]
            for window in _WINDOWS:
                got = _with_gradients(_run(attend, qkv, layout, window=window), qkv)
                want = _with_gradients(_exact(exact_qkv, on_cpu, window=window), exact_qkv)
                for ours, exact in zip(got, want, strict=True):
                    error = (ours.cpu().double() - exact).norm() / exact.norm()
                    largest = max(largest, float(error)) if error.isfinite() else torch.inf
    return largest


def _run(attend: Attend, qkv: Sequence[Tensor], layout: AttentionLayout, *, window: int | None) -> Tensor:
    arranged = layout.varlen if attend is varlen_attention else layout.rectangles
    return attend(*qkv, arranged, window=window, scale=None)


def _with_gradients(out_UHD: Tensor, qkv: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    weights = torch.linspace(-1, 1, out_UHD.numel(), dtype=torch.float64).view_as(out_UHD)
    loss = (out_UHD * weights.to(out_UHD)).sum()
    return [out_UHD.detach(), *torch.autograd.grad(loss, qkv)]


def _exact(qkv: Sequence[Tensor], layout: AttentionLayout, *, window: int | None) -> Tensor:
    """[U, H, D]: attention over the whole of each sequence, of which only the own rows are kept."""
    row_T = torch.arange(len(qkv[0])) if layout.row_T is None else layout.row_T
    own = layout.lengths if layout.shared is None else layout.shared.own_lengths
    outs = []
    for rows, num_own in zip(torch.split(row_T, list(layout.lengths)), own, strict=True):
        q, k, v = (x[rows].transpose(0, 1) for x in qkv)
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=0) for x in (k, v))
        ahead_LM = torch.arange(len(rows))[:, None] - torch.arange(len(rows))
        sees_LM = (ahead_LM >= 0) & (ahead_LM < (window or len(rows)))
        outs.append(scaled_dot_product_attention(q, k, v, attn_mask=sees_LM).transpose(0, 1)[-num_own:])
    return torch.cat(outs)


def _sequences(prompts: tuple[int, ...]) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    rng = np.random.default_rng(0)
    made = []
    for prompt in prompts or (9, 70):
        first = rng.integers(0, 99, prompt)
        for length in (3, 30, 90) if prompts else (40,):
            made.append(np.concatenate([first, rng.integers(0, 99, length)]).astype(np.int32))
    return made


def _layout(
    tokens: Sequence[np.ndarray[Any, np.dtype[np.int32]]], *, shares: bool, device: torch.device
) -> AttentionLayout:
    shared = SharedRows.of(list(map(InputSequence, tokens))) if shares else None
    return AttentionLayout(
        lengths=tuple(map(len, tokens)),
        device=device,
        shared=shared,
        row_T=None if shared is None else torch.from_numpy(shared.row_T).to(device),
    )


def _inputs(layout: AttentionLayout, *, head: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value of each row."""
    num_rows = sum(layout.lengths if layout.shared is None else layout.shared.own_lengths)
    random = torch.Generator().manual_seed(1)
    return [
        torch.randn(num_rows, num_heads, head, generator=random).to(device, dtype).requires_grad_()
        for num_heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


@contextmanager
def _fa3(device: torch.device) -> Iterator[str]:
    """FlashAttention 3 in place of the varlen kernel; yields why it is not used, as in a job."""
    capability = torch.cuda.get_device_capability(device)
    chosen = choose_kernels("auto", dtype="bfloat16", is_cuda=True, capability=capability)
    reason = chosen.flash_attention_3 or activate_flash_attention_3()
    try:
        yield reason
    finally:
        if not reason:
            torch.nn.attention.restore_flash_attention_impl()


def _note_times(notes: Notes, *, with_varlen: bool, with_fa3: bool) -> None:
    """Milliseconds of a forward and backward of 16 heads over four long sequences."""
    device = torch.device("cuda")
    layout = AttentionLayout(lengths=(_LONG,) * 4, device=device, shared=None, row_T=None)
    qkv = [
        torch.randn(4 * _LONG, heads, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
        for heads in (16, 8, 8)
    ]

    def milliseconds(attend: Attend) -> float:
        clock = clock_of(device)
        marks = []
        for _ in range(4):
            marks.append(clock.mark())
            torch.autograd.grad(_run(attend, qkv, layout, window=None).sum(), qkv)
        return round(1e3 * min(clock.seconds(zip(marks[1:], [*marks[2:], clock.mark()], strict=True))), 3)

    notes.measured(rectangles_ms=milliseconds(rectangle_attention))
    if with_varlen:
        notes.measured(varlen_ms=milliseconds(varlen_attention))
    if with_fa3:
        with _fa3(device):
            notes.measured(fa3_ms=milliseconds(varlen_attention))
