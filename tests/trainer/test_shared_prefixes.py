"""Shared prefixes: rows stand for equal prefixes only; values and gradients are those of whole sequences."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from areal_like.trajectory import FinishReason, Trajectory
from tests.support.trainer_helpers import ARCHITECTURES, VOCAB, dense_logprobs, write_model
from trainer.batching import attention_layout
from trainer.batching.packing import PackedBatch, Packer, collate
from trainer.batching.shared_prefixes import InputSequence, SharedRows
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.policy import Policy
from trainer.models.value_model import ValueModel

sequences = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=12).map(lambda s: np.array(s, dtype=np.int32)),
    min_size=1,
    max_size=24,
)
"""Of two tokens, so that prefixes of all lengths are frequent."""


def trajectory(tokens: NDArray[np.int32], *, prompt: int) -> Trajectory:
    mask = (np.arange(len(tokens)) >= prompt).astype(np.uint8)
    return Trajectory(
        tokens=tokens,
        loss_mask=mask,
        logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        versions=np.where(mask, 3, -1).astype(np.int32),
        reward=0.0,
        finish_reason=FinishReason.STOP,
    )


def branched(seed: int, *, prompts: tuple[int, ...], answers: int = 4, longest: int = 14) -> list[Trajectory]:
    """Samples of several prompts; of each two begin alike beyond the prompt, and two are the same."""
    rng = np.random.default_rng(seed)
    trajectories = []
    for prompt in prompts:
        prompt_tokens = rng.integers(3, VOCAB, prompt)
        made = [
            np.concatenate([prompt_tokens, rng.integers(3, VOCAB, int(rng.integers(2, longest)))])
            for _ in range(answers)
        ]
        made.append(np.concatenate([made[0][: prompt + 1], rng.integers(3, VOCAB, 3)]))
        made.append(made[1].copy())
        trajectories += [trajectory(tokens.astype(np.int32), prompt=prompt) for tokens in made]
    return trajectories


def samples_of(trajectories: list[Trajectory]) -> list[TrainingSample]:
    return [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories]


def packed(trajectories: list[Trajectory], *, shares_prefixes: bool = True) -> PackedBatch:
    return collate(samples_of(trajectories), shares_prefixes=shares_prefixes)


@pytest.fixture(autouse=True)
def wide_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorm rounds its input, and so the gradient of every row, to float32 even in a float64
    model. Then a sum of gradients would differ from the gradient of a sum in the eighth digit."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden * scale)

    for norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, MistralRMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    found = ((name, param.grad) for name, param in module.named_parameters())
    return {name: local(grad).clone() for name, grad in found if grad is not None}


@given(sequences)
def test_rows_stand_for_equal_prefixes_only(tokens: list[NDArray[np.int32]]) -> None:
    shared = SharedRows.of(list(map(InputSequence, tokens)))
    if shared is None:
        return
    starts = np.cumsum([0, *map(len, tokens)])
    flat_T = np.concatenate(tokens)
    prefix_of_row: dict[int, bytes] = {}
    for i, sequence in enumerate(tokens):
        rows = shared.row_T[starts[i] : starts[i + 1]]
        np.testing.assert_array_equal(flat_T[shared.token_U[rows]], sequence)
        for position, row in enumerate(rows.tolist()):
            prefix = sequence[: position + 1].tobytes()
            assert prefix_of_row.setdefault(row, prefix) == prefix
    assert len(prefix_of_row) == len(shared.token_U) == sum(shared.own_lengths) < len(flat_T)
    assert min(shared.own_lengths) >= 1
    assert (np.diff(shared.token_U) > 0).all()


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 1), st.sampled_from((0, 0, 0, 1))), min_size=1, max_size=12),
        min_size=2,
        max_size=12,
    )
)
def test_routed_rows_stand_for_equal_routes_too(made: list[list[tuple[int, int]]]) -> None:
    """A row is shared by sequences that agree in all tokens and experts up to it."""
    inputs = [
        InputSequence(
            np.array([token for token, _ in pairs], dtype=np.int32),
            np.array([[[expert]] for _, expert in pairs[:-1]], dtype=np.uint8).reshape(-1, 1, 1),
        )
        for pairs in made
    ]
    shared = SharedRows.of(inputs)
    plain = SharedRows.of([InputSequence(each.tokens) for each in inputs])
    if shared is None:
        return
    assert plain is not None and len(plain.token_U) <= len(shared.token_U)
    starts = np.cumsum([0, *(each.num_tokens for each in inputs)])
    content_of_row: dict[int, tuple[object, ...]] = {}
    for start, each in zip(starts, made, strict=False):
        for position in range(len(each)):
            is_last = position == len(each) - 1
            # The last token has no experts, so nobody else has its row.
            content = (start,) if is_last else tuple(each[: position + 1])
            row = int(shared.row_T[start + position])
            assert content_of_row.setdefault(row, content) == content
    assert len(content_of_row) == len(shared.token_U)


def test_routed_and_plain_sequences_share_nothing() -> None:
    tokens = np.arange(8, dtype=np.int32)
    routed = InputSequence(tokens, np.zeros((7, 1, 1), dtype=np.uint8))
    assert SharedRows.of([InputSequence(tokens), routed]) is None
    assert SharedRows.of([routed, routed]) is not None


@given(sequences, st.booleans())
def test_the_budget_bounds_rows_and_shared_tokens(tokens: list[NDArray[np.int32]], whole: bool) -> None:
    samples = samples_of([trajectory(t, prompt=1) for t in tokens])
    groups = [samples[i : i + 3] for i in range(0, len(samples), 3)]

    def cut(groups: list[list[TrainingSample]]) -> list[tuple[TrainingSample, ...]]:
        packer = Packer(budget_tokens=36, whole_groups=whole)
        return [*(pack for group in groups for pack in packer.add(group)), *packer.flush()]

    packs = cut(groups)
    assert [id(s) for pack in packs for s in pack] == [id(s) for s in samples]

    def size_of(samples: Sequence[TrainingSample]) -> int:
        batch = collate(samples)
        own = batch.lengths if batch.shared is None else batch.shared.own_lengths
        assert sum(own) == batch.num_rows
        return sum(o + math.ceil((n - o) / 8) for o, n in zip(own, batch.lengths, strict=True))

    sizes = [size_of(pack) for pack in packs]
    assert max(sizes) <= 36
    unit_of = {id(s): group if whole else [s] for group in groups for s in group}
    for pack, after, size in zip(packs, packs[1:], sizes, strict=False):
        is_full = size == 36 or size_of([*pack, *unit_of[id(after[0])]]) > 36
        assert is_full, "cut before the budget was used"
    if not whole:
        assert [len(p) for p in cut([[s] for s in samples])] == [len(p) for p in packs]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param((9,), marks=pytest.mark.chaos),
        pytest.param((5, 9, 17), marks=pytest.mark.chaos),
        (1, 40, 6),
    ],
    ids=["even", "near", "uneven"],
)
@pytest.mark.parametrize("long", [1024, 7], ids=["one-block", "blocks"])
def test_shared_equals_padded_in_value_and_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, prompts: tuple[int, ...], long: int
) -> None:
    monkeypatch.setattr(attention_layout, "_LONG", long)
    path = write_model(tmp_path, architecture)
    trajectories = branched(0, prompts=prompts)
    batch = packed(trajectories)
    assert batch.shared is not None and batch.num_rows < 0.8 * batch.num_tokens
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    dense_BL = dense_logprobs(reference, trajectories)
    want_S = torch.cat([dense_BL[i, : t.num_tokens][t.loss_mask == 1] for i, t in enumerate(trajectories)])
    policy = Policy.load(path, Ranks.alone(), chunk_tokens=7, master_dtype=torch.float64)
    got_S = policy(batch).logprobs_S
    torch.testing.assert_close(got_S, want_S, rtol=1e-10, atol=1e-10)
    weights_S = torch.linspace(-1, 1, len(got_S), dtype=torch.float64)
    (want_S * weights_S).sum().backward()
    (got_S * weights_S).sum().backward()
    want = gradients(reference)
    assert want.keys() == gradients(policy.model).keys()
    for name, grad in gradients(policy.model).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_critic_and_checkpointing_share_rows_likewise(tmp_path: Path, checkpointing: bool) -> None:
    path = write_model(tmp_path, "qwen3")
    trajectories = branched(1, prompts=(8, 12))
    results = []
    for shares in (True, False):
        critic = ValueModel.load(
            path, Ranks.alone(), gradient_checkpointing=checkpointing, master_dtype=torch.float64
        )
        with torch.no_grad():
            local(critic.model.get_output_embeddings().weight).normal_(generator=torch.manual_seed(0))
        value_S = critic(packed(trajectories, shares_prefixes=shares))
        value_S.square().sum().backward()
        results.append((value_S.detach(), gradients(critic)))
    (shared_S, shared), (whole_S, whole) = results
    torch.testing.assert_close(shared_S, whole_S, rtol=1e-10, atol=1e-10)
    for name, grad in shared.items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-9, atol=1e-10, msg=name)


def test_the_same_batch_gives_the_same_bits(tmp_path: Path) -> None:
    path = write_model(tmp_path, "qwen3", dtype=torch.float32)
    policy = Policy.load(path, Ranks.alone())
    results = []
    for _ in range(2):
        policy.zero_grad()
        policy(packed(branched(2, prompts=(5, 9, 30)))).logprobs_S.sum().backward()
        results.append(gradients(policy))
    assert all(torch.equal(grad, results[1][name]) for name, grad in results[0].items())
