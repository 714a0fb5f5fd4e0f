"""The packed policy gives the same log-probs and gradients as transformers on a padded batch.

For several architectures and any chunk size.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from tests.support.trainer_helpers import ARCHITECTURES, dense_logprobs, random_groups, write_model
from trainer.batching.packing import PackedBatch, collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models import policy as policy_module
from trainer.models.policy import Policy, build_policy


def packed(trajectories: list[Trajectory]) -> PackedBatch:
    return collate([TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories])


def sampled(logps_BL: Tensor, trajectories: list[Trajectory]) -> Tensor:
    return torch.cat(
        [logps_BL[i, : t.num_tokens][torch.from_numpy(t.loss_mask) == 1] for i, t in enumerate(trajectories)]
    )


def gradients(module: Any) -> dict[str, Tensor]:
    found = ((name, param.grad) for name, param in module.named_parameters())
    return {name: local(grad).clone() for name, grad in found if grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("uneven", [False, True], ids=["one-rectangle", "several-rectangles"])
def test_packed_equals_padded_in_value_and_gradient(tmp_path: Path, architecture: str, uneven: bool) -> None:
    path = write_model(tmp_path, architecture)
    trajectories = [t for group in random_groups(3) for t in group]
    if uneven:
        trajectories[4:4] = random_groups(1, seed=1, group_size=1, longest=50)[0][:1]
        trajectories += [
            t for seed in range(2, 6) for t in random_groups(1, seed=seed, group_size=2, longest=3)[0]
        ]
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    want_S = sampled(dense_logprobs(reference, trajectories, temperature=0.7), trajectories)
    policy = Policy.load(path, Ranks.alone(), temperature=0.7, chunk_tokens=7, master_dtype=torch.float64)
    got_S = policy(packed(trajectories)).logprobs_S
    torch.testing.assert_close(got_S, want_S, rtol=1e-10, atol=1e-10)

    weights_S = torch.linspace(-1, 1, len(got_S), dtype=torch.float64)
    (want_S * weights_S).sum().backward()
    (got_S * weights_S).sum().backward()
    want = gradients(reference)
    assert want.keys() == gradients(policy.model).keys()
    for name, grad in gradients(policy.model).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_chunks_change_nothing_and_bound_the_logits(tmp_path: Path, checkpointing: bool) -> None:
    path = write_model(tmp_path)
    batch = packed([t for group in random_groups(4) for t in group])
    results = []
    for chunk_tokens in (1000, 9, 1):
        policy = Policy.load(
            path,
            Ranks.alone(),
            chunk_tokens=chunk_tokens,
            gradient_checkpointing=checkpointing,
            master_dtype=torch.float64,
        )
        rows: list[int] = []
        policy.model.get_output_embeddings().register_forward_hook(
            lambda _m, _i, out, rows=rows: rows.append(len(out))
        )
        out = policy(batch)
        out.logprobs_S.sum().backward()
        assert max(rows) <= chunk_tokens
        results.append((out.logprobs_S.detach(), out.entropy_S, gradients(policy)))
    for logprobs_S, entropy_S, grads in results[1:]:
        torch.testing.assert_close(logprobs_S, results[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(entropy_S, results[0][1], rtol=1e-12, atol=1e-12)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][2][name], rtol=1e-10, atol=1e-11)


def test_entropy_uses_the_sampling_temperature(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    (trajectory, *_) = random_groups(1)[0]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    logits_LV = model(input_ids=torch.from_numpy(trajectory.tokens).long()[None]).logits[0] / 0.5
    want_L = torch.distributions.Categorical(logits=logits_LV).entropy()
    policy = Policy.load(path, Ranks.alone(), temperature=0.5, master_dtype=torch.float64)
    got_S = policy(packed([trajectory])).entropy_S
    places = torch.from_numpy(trajectory.loss_mask).nonzero().squeeze(1) - 1
    torch.testing.assert_close(got_S, want_L[places], rtol=1e-10, atol=1e-10)


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path))
    model.config.logit_scale = 0.5
    with pytest.raises(ConfigError, match="scales its logits"):
        Policy(model)


SMALL = {
    **{"vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
UNFIT = {
    "bloom": ({}, "0 of its 2 layers use transformers' attention interface"),
    "gpt_neo": (
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
        "0 of its 2 layers use transformers' attention interface",
    ),
    "modernbert-decoder": (
        {"intermediate_size": 48, "cls_token_id": 1, "sep_token_id": 2},
        "more than its output embedding .lm_head",
    ),
}
"""Family -> its further settings, and why it is refused: its log-probs would be wrong."""


@pytest.mark.parametrize("family", UNFIT)
def test_a_model_whose_log_probs_would_be_wrong(tmp_path: Path, family: str) -> None:
    settings, message = UNFIT[family]
    config = AutoConfig.for_model(family, **SMALL | settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        Policy.load(str(tmp_path), Ranks.alone())(packed(random_groups(1)[0]))


def test_entropy_of_some_rows_at_a_time_has_the_same_bits() -> None:
    """Also where a vocabulary is larger than a block, with certain and impossible tokens, and no rows."""
    generator = torch.Generator().manual_seed(0)
    for num_rows, vocab in ((0, 50), (3, 7), (700, 300), (300, 1000), (9, 70_000)):
        logits = 9 * torch.randn(num_rows, vocab, generator=generator)
        logits[:2, 3] = 1e4
        logps = torch.log_softmax(logits, -1)
        assert torch.equal(policy_module._entropy(logps, numbers=None), -(logps.exp() * logps).sum(-1)), (
            num_rows,
            vocab,
        )


def test_entropy_is_computed_once_and_not_for_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backward recomputes the logits of chunks, and not their entropies."""
    computed: list[int] = []
    plain = policy_module._entropy
    monkeypatch.setattr(
        policy_module, "_entropy", lambda x, **kwargs: computed.append(len(x)) or plain(x, **kwargs)
    )
    path = write_model(tmp_path)
    batch = packed([t for group in random_groups(4) for t in group])
    policy = Policy.load(path, Ranks.alone(), chunk_tokens=9)
    heads: list[int] = []
    policy.model.get_output_embeddings().register_forward_hook(lambda _m, _i, out: heads.append(len(out)))
    policy(batch).logprobs_S.sum().backward()
    num_sampled = len(batch.sampled_S)
    assert (sum(heads), sum(computed)) == (2 * num_sampled, num_sampled)

    computed.clear()
    reference = build_policy(Config(), path, Ranks.alone(), frozen=True)
    with torch.no_grad():
        found = reference(batch)
        torch.testing.assert_close(found.logprobs_S, policy(batch).logprobs_S)
    assert found.entropy_S.isnan().all() and sum(computed) == num_sampled, "only the policy's"
