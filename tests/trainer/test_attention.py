"""Attention of packs equals plain attention, windows cost their own length, micro-batches do not wait."""

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from areal_like.automatic_settings import resolved
from areal_like.config import from_mapping
from areal_like.errors import ConfigError
from tests.support.quick import others_in_chaos
from tests.support.trainer_helpers import ARCHITECTURES, random_groups, write_model
from tests.support.trainer_ranks import make_runner
from trainer.attention import varlen
from trainer.attention.packed_attention import rectangle_attention, uses_varlen
from trainer.attention.varlen import varlen_attention
from trainer.batching import attention_layout
from trainer.batching.attention_layout import AttentionLayout, RectangleLayout, VarlenLayout
from trainer.batching.packing import collate, in_lockstep
from trainer.batching.shared_prefixes import InputSequence, SharedRows
from trainer.batching.training_sample import MicroBatch, TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models import packed_model
from trainer.models.policy import Policy

HEADS, KV_HEADS, HEAD = 4, 2, 8
WINDOWS = (None, 1, 5, 40, 300)


def plain(query_LHD: Tensor, key_MHD: Tensor, value_MHD: Tensor, *, window: int | None) -> Tensor:
    """Attention of one sequence by its definition; the last query is at the last key."""
    num_queries, num_keys = len(query_LHD), len(key_MHD)
    key_MHD, value_MHD = (
        x.repeat_interleave(query_LHD.shape[1] // x.shape[1], dim=1) for x in (key_MHD, value_MHD)
    )
    scores_HLM = torch.einsum("lhd,mhd->hlm", query_LHD, key_MHD) / query_LHD.shape[-1] ** 0.5
    at_L1 = torch.arange(num_keys - num_queries, num_keys)[:, None]
    key_M = torch.arange(num_keys)
    hidden_LM = key_M > at_L1
    if window is not None:
        hidden_LM = hidden_LM | (key_M <= at_L1 - window)
    return torch.einsum("hlm,mhd->lhd", scores_HLM.masked_fill(hidden_LM, -torch.inf).softmax(-1), value_MHD)


def blockwise(
    query_UHD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    layout: VarlenLayout,
    *,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """What torch's kernel computes, sequence by sequence."""
    assert scale in (None, query_UHD.shape[-1] ** -0.5)
    of_queries, of_keys = layout.query_bounds.tolist(), layout.key_bounds.tolist()
    spans = list(zip(of_queries, of_queries[1:], of_keys, of_keys[1:], strict=False))
    assert max(b - a for a, b, _, _ in spans) == layout.most_queries
    assert max(d - c for _, _, c, d in spans) == layout.most_keys
    return torch.cat(
        [plain(query_UHD[a:b], key_THD[c:d], value_THD[c:d], window=window) for a, b, c, d in spans]
    )


def sequences(*, prompts: tuple[int, ...], seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
    """Three answers to each prompt; lengths are uneven."""
    rng = np.random.default_rng(seed)
    made = []
    for prompt in prompts:
        first = rng.integers(0, 99, prompt)
        for length in (3, 30, 90):
            made.append(np.concatenate([first, rng.integers(0, 99, length)]).astype(np.int32))
    return made


def layout_of(tokens: list[np.ndarray[Any, np.dtype[np.int32]]], *, shares: bool) -> AttentionLayout:
    shared = SharedRows.of(list(map(InputSequence, tokens))) if shares else None
    assert (shared is not None) == shares
    return AttentionLayout(
        lengths=tuple(map(len, tokens)),
        device=torch.device("cpu"),
        shared=shared,
        row_T=None if shared is None else torch.from_numpy(shared.row_T),
    )


def inputs(layout: AttentionLayout, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key and value of each row."""
    num_rows = sum(layout.lengths if layout.shared is None else layout.shared.own_lengths)
    random = torch.manual_seed(1)
    return [
        torch.randn(num_rows, heads, HEAD, dtype=dtype, generator=random).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def results(attend: Callable[..., Tensor], qkv: list[Tensor], *args: Any, **settings: Any) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    out_UHD = attend(*qkv, *args, **settings)
    weights = torch.linspace(-1, 1, out_UHD.numel(), dtype=out_UHD.dtype).view_as(out_UHD).to(out_UHD.device)
    return [out_UHD.detach(), *torch.autograd.grad((out_UHD * weights).sum(), qkv)]


def expected(layout: AttentionLayout, qkv: list[Tensor], *, window: int | None) -> list[Tensor]:
    """Plain attention over the whole of each sequence, of which only the own rows are kept."""

    def attend(query_UHD: Tensor, key_UHD: Tensor, value_UHD: Tensor) -> Tensor:
        row_T = torch.arange(len(query_UHD)) if layout.row_T is None else layout.row_T
        own = layout.lengths if layout.shared is None else layout.shared.own_lengths
        outs = []
        for row_t, num_own in zip(row_T.split(layout.lengths), own, strict=True):
            out = plain(query_UHD[row_t], key_UHD[row_t], value_UHD[row_t], window=window)
            outs.append(out[-num_own:])
        return torch.cat(outs)

    return results(attend, qkv)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("prompts", [(), (50,), (4, 60, 20)], ids=["whole", "even", "uneven"])
@pytest.mark.parametrize("block", [256, 16], ids=["one-block", "blocks"])
def test_rectangles_and_varlen_equal_plain_attention(
    monkeypatch: pytest.MonkeyPatch, window: int | None, prompts: tuple[int, ...], block: int
) -> None:
    monkeypatch.setattr(attention_layout, "_LEAST_BLOCK", block)
    monkeypatch.setattr(attention_layout, "_LONG", 4 * block)
    monkeypatch.setattr(varlen, "kernel", blockwise)
    layout = layout_of(sequences(prompts=prompts or (9, 70)), shares=bool(prompts))
    qkv = inputs(layout)
    wanted = expected(layout, qkv, window=window)
    for attend, arranged in (
        (rectangle_attention, layout.rectangles),
        (varlen_attention, layout.varlen),
    ):
        for got, want in zip(
            results(attend, qkv, arranged, window=window, scale=HEAD**-0.5), wanted, strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=attend.__name__)


@pytest.mark.parametrize("prompts", [(), (4, 60, 20)], ids=["whole", "shared"])
def test_heads_of_values_may_be_smaller(monkeypatch: pytest.MonkeyPatch, prompts: tuple[int, ...]) -> None:
    """As in latent attention; the kernel gets equal sizes."""

    def kernel(query_UHD: Tensor, key_THD: Tensor, value_THD: Tensor, *args: Any, **settings: Any) -> Tensor:
        assert query_UHD.shape[-1] == key_THD.shape[-1] == value_THD.shape[-1]
        return blockwise(query_UHD, key_THD, value_THD, *args, **settings)

    monkeypatch.setattr(varlen, "kernel", kernel)
    layout = layout_of(sequences(prompts=prompts or (9, 70)), shares=bool(prompts))
    query, key, value = inputs(layout)
    qkv = [query, key, value[..., : HEAD // 2].detach().requires_grad_()]
    wanted = expected(layout, qkv, window=None)
    for attend, arranged in ((rectangle_attention, layout.rectangles), (varlen_attention, layout.varlen)):
        found = results(attend, qkv, arranged, window=None, scale=HEAD**-0.5)
        for got, want in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=attend.__name__)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("prompt", [0, 1500], ids=["whole", "shared"])
def test_a_window_costs_its_own_length(prompt: int) -> None:
    """Bytes kept for the backward, and the largest tensor of both passes, of two sequences."""
    window, costs = 64, []
    for length in (2000, 4000):
        first = np.arange(prompt, dtype=np.int32)
        tokens = [np.concatenate([first, np.full(length, fill, dtype=np.int32)]) for fill in (-1, -2)]
        layout = layout_of(tokens, shares=prompt > 0)
        qkv, kept = inputs(layout, torch.float32), {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                out = rectangle_attention(*qkv, layout.rectangles, window=window, scale=None)
            out.sum().backward()
        costs.append((sum(kept.values()), largest.num_bytes))
    added = 2 * 2000 * HEADS * HEAD * 4  # bytes of the queries of the tokens that were added
    (kept_short, largest_short), (kept_long, largest_long) = costs
    # Queries, keys, values and outputs. The masks of squares would add 90 times as much.
    assert 0 < kept_long - kept_short < 4 * added
    assert largest_long - largest_short <= added


@pytest.mark.parametrize("architecture", others_in_chaos(ARCHITECTURES, quick=("gpt2", "qwen3", "mistral")))
def test_models_give_the_same_with_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    """The whole path of a model, with plain attention in place of the kernel. Mistral has a window."""
    monkeypatch.setattr(varlen, "kernel", blockwise)
    path = write_model(tmp_path, architecture)
    batch = collate(
        [
            TrainingSample(trajectory=t, advantage=1.0, group=0)
            for group in random_groups(3, prompt=8)
            for t in group
        ]
    )
    assert batch.shared is not None
    found = []
    for obstacle in ("it is not wanted", ""):
        monkeypatch.setattr(varlen, "obstacle", lambda *_, obstacle=obstacle: obstacle)
        policy = Policy.load(path, Ranks.alone(), master_dtype=torch.float64)
        logp_S = policy(batch).logprobs_S
        (logp_S * torch.linspace(-1, 1, len(logp_S))).sum().backward()
        found.append([logp_S.detach(), *(local(p.grad) for p in policy.parameters() if p.grad is not None)])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)  # norms round to float32


def test_the_layers_have_one_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 casts the inputs of each layer, and copies dataclasses for that."""
    monkeypatch.setattr(packed_model, "SMALLEST_SHARDED_APART", 0)
    path = write_model(tmp_path, dtype=torch.float32)
    policy = Policy.load(path, Ranks.alone(), dtype="bfloat16")
    made = []
    of = RectangleLayout.of

    def counted(*args: Any, **settings: Any) -> RectangleLayout:
        made.append(of(*args, **settings))
        return made[-1]

    monkeypatch.setattr(RectangleLayout, "of", counted)
    samples = [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in random_groups(1)[0]]
    policy(collate(samples)).logprobs_S.sum().backward()
    assert len(made) == 1 < policy.model.config.num_hidden_layers


def test_gradients_of_shared_keys_lose_no_bits() -> None:
    row_T = torch.zeros(257, dtype=torch.int64)
    rows = torch.zeros(1, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    varlen._Spread.of(rows, row_T).sum().backward()
    # One by one in bfloat16, a sum of ones ends at 256.
    assert rows.grad is not None and rows.grad.float().eq(torch.tensor(257.0).bfloat16().float()).all()
    (scaled,) = torch.autograd.grad((varlen._Spread.of(rows, row_T) * 3).sum(), rows)
    assert scaled.float().eq(torch.tensor(3 * 257.0).bfloat16().float()).all()


@pytest.mark.parametrize("window", [None, 3])
def test_torch_takes_the_call_of_the_kernel(window: int | None) -> None:
    """On the meta device, which checks arguments and shapes and computes nothing."""
    query, key = (
        torch.empty(n, heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for n, heads in ((5, 4), (9, 2))
    )
    bounds = [torch.empty(3, dtype=torch.int32, device="meta") for _ in range(2)]
    layout = VarlenLayout(
        query_bounds=bounds[0], key_bounds=bounds[1], most_queries=4, most_keys=6, row_T=None
    )
    out = varlen.kernel(query, key, key, layout, window=window, scale=0.1)
    out.sum().backward()
    assert out.shape == query.shape and key.grad is not None and key.grad.shape == key.shape


@pytest.mark.gpu
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("prompts", [(), (50,), (4, 60, 20)], ids=["whole", "even", "uneven"])
def test_the_kernel_equals_plain_attention(window: int | None, prompts: tuple[int, ...]) -> None:
    layout = layout_of(sequences(prompts=prompts or (9, 70)), shares=bool(prompts))
    wanted = expected(layout, inputs(layout), window=window)
    on_gpu = AttentionLayout(
        lengths=layout.lengths,
        device=torch.device("cuda"),
        shared=layout.shared,
        row_T=None if layout.row_T is None else layout.row_T.cuda(),
    )
    qkv = [x.detach().cuda().bfloat16().requires_grad_() for x in inputs(layout)]
    assert uses_varlen("auto", qkv[0], qkv[2])
    got = results(varlen_attention, qkv, on_gpu.varlen, window=window, scale=None)
    for found, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(found.cpu().double(), want, rtol=0.05, atol=0.05)


def test_varlen_that_cannot_run_is_refused() -> None:
    halves, floats = (torch.zeros(2, 1, 8, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    for tensor in (halves, floats):
        assert not uses_varlen("auto", tensor, tensor) and not uses_varlen("rectangles", tensor, tensor)
    with pytest.raises(ConfigError, match=r"trainer\.attention=varlen: the kernel needs CUDA"):
        uses_varlen("varlen", halves, halves)
    for heads, message in (((8, 16), "8 and 16"), ((12, 12), "12 and 12"), ((264, 264), "at most 256")):
        query, value = (
            torch.zeros(0, 1, head, dtype=torch.bfloat16, device="meta").as_subclass(_OnCuda)
            for head in heads
        )
        assert message in varlen.obstacle(query, value)
    assert "does not support float32" in varlen.obstacle(*[floats.as_subclass(_OnCuda)] * 2)
    with pytest.raises(ConfigError, match=r"varlen needs a GPU, and trainer\.device is cpu"):
        from_mapping({"trainer": {"attention": "varlen"}})
    job = {"trainer": {"attention": "varlen", "device": "cuda"}, "model": {"dtype": "float32"}}
    with pytest.raises(ConfigError, match=r"model\.dtype is float32: set model\.dtype=bfloat16"):
        resolved(from_mapping(job))


class _OnCuda(Tensor):
    """Says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


# --- micro-batches are prepared while the one before runs ---

_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "is_nonzero", "equal", "_unique2")


class Waits(TorchDispatchMode):
    """Counts operations that would wait for a GPU, in the phase of a step that computes."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks
        self.found: collections.Counter[str] = collections.Counter()
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._ranks.place.phase == "compute":
            name = str(func._schema.name).removeprefix("aten::")
            is_masked = name.startswith("index") and any(
                isinstance(at, Tensor) and at.dtype == torch.bool
                for at in (args[1] if isinstance(args[1], list | tuple) else ())
            )
            # A tensor made from a Python number. `copied` makes some, too, and does not wait.
            is_made = name == "lift_fresh" and args[0].dim() == 0
            self.found[name] += name in _WAITING or is_masked or is_made
            self.num_operations += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings", [{}, {"objective": {"name": "ppo"}}, {"kl": {"coef": 0.1, "place": "loss"}}], ids=str
)
def test_the_host_waits_for_no_micro_batch(tmp_path: Path, settings: dict[str, Any]) -> None:
    ranks = Ranks.alone()
    runner = make_runner(write_model(tmp_path, "mistral"), ranks, settings=settings, budget_tokens=24)
    with Waits(ranks) as waits:
        row = runner.run(random_groups(6, prompt=5), step=0)
    assert row["num_microbatches"] > 1 and waits.num_operations > 1000
    assert not +waits.found


def test_a_micro_batch_does_not_wait_for_the_next() -> None:
    """It runs before the next is asked for, and an error of the source arrives after it."""
    (sample,) = [
        TrainingSample(trajectory=t, advantage=1.0, group=0) for t in random_groups(1, group_size=1)[0]
    ]
    events: list[str] = []

    def source() -> Iterator[MicroBatch]:
        for number in range(2):
            events.append(f"asked for {number}")
            yield (sample,)
        raise ConnectionError("the buffer is gone")

    with pytest.raises(ConnectionError, match="gone"):
        for number, _ in enumerate(in_lockstep(source(), Ranks.alone())):
            events.append(f"ran {number}")
    assert events == ["asked for 0", "ran 0", "asked for 1", "ran 1"]
