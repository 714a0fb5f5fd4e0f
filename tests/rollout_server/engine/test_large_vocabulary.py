"""A large vocabulary is sampled in two stages: tokens and log-probs are those of the whole distribution."""

import pytest
import torch

from rollout_server.engine import sampling
from rollout_server.engine.sampling import sample

VOCAB = 9001  # no multiple of a block


def _inputs(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits_NV = 4 * torch.randn(num_rows, VOCAB, generator=generator)
    uniform_N = torch.rand(num_rows, dtype=torch.float64, generator=generator)
    uniform_N[:2] = torch.tensor([0.0, 1 - 2.0**-53])
    temperature_N = torch.tensor([1.0, 0.7, 0.0, 1.3]).repeat(num_rows)[:num_rows]
    return logits_NV, uniform_N, temperature_N


def _sample(
    logits_NV: torch.Tensor, uniform_N: torch.Tensor, temperature_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return sample(
        logits_NV,
        temperature_N=temperature_N,
        uniform_N=uniform_N,
        any_greedy=bool((temperature_N == 0).any()),
        any_random=bool((temperature_N > 0).any()),
        filters=None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_the_whole_distribution(dtype: torch.dtype) -> None:
    logits_NV, uniform_N, temperature_N = _inputs(64)
    logits_NV = logits_NV.to(dtype)
    token_N, logprob_N = _sample(logits_NV, uniform_N, temperature_N)
    exact_NV = logits_NV.double() / torch.where(temperature_N > 0, temperature_N, 1.0).unsqueeze(1)
    exact_NV = torch.log_softmax(exact_NV, -1)
    torch.testing.assert_close(
        logprob_N.double(), exact_NV.gather(1, token_N[:, None]).squeeze(1), atol=2e-6, rtol=1e-6
    )
    cdf_NV = exact_NV.exp().cumsum(-1)
    for row, (token, uniform) in enumerate(zip(token_N.tolist(), uniform_N.tolist(), strict=True)):
        if temperature_N[row] == 0:
            assert token == int(logits_NV[row].argmax())
        else:
            below = float(cdf_NV[row, token - 1]) if token else 0.0
            assert below - 1e-6 <= uniform <= float(cdf_NV[row, token]) + 1e-6


def test_a_row_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_NV, uniform_N, temperature_N = _inputs(16)
    token_N, logprob_N = _sample(logits_NV, uniform_N, temperature_N)
    monkeypatch.setattr(sampling, "_NUMBERS_AT_A_TIME", 1)  # one row at a time
    for row in range(16):
        part = slice(row, row + 1)
        alone = _sample(logits_NV[part], uniform_N[part], temperature_N[part])
        assert alone[0].tolist() == token_N[part].tolist()
        torch.testing.assert_close(alone[1], logprob_N[part], atol=1e-6, rtol=0)


def test_only_tokens_with_a_weight_are_drawn() -> None:
    logits_NV = torch.full((128, VOCAB), float("-inf"))
    possible = [0, 255, 256, 5000, VOCAB - 1]
    logits_NV[:, possible] = torch.tensor([0.0, 1.0, -20.0, 0.5, 0.0])
    uniform_N = torch.linspace(0, 1 - 2.0**-53, 128, dtype=torch.float64)
    token_N, logprob_N = _sample(logits_NV, uniform_N, torch.ones(128))
    assert set(token_N.tolist()) <= set(possible) and {0, 255, 5000, VOCAB - 1} <= set(token_N.tolist())
    assert torch.isfinite(logprob_N).all()


def test_logits_that_are_not_finite_show_in_the_log_prob() -> None:
    logits_NV, uniform_N, temperature_N = _inputs(4)
    logits_NV[1, 7], logits_NV[2, 8] = float("nan"), float("inf")
    token_N, logprob_N = _sample(logits_NV, uniform_N, temperature_N)
    assert torch.isfinite(logprob_N).tolist() == [True, False, False, True]
    assert ((token_N >= 0) & (token_N < VOCAB)).all()


def test_a_greedy_batch() -> None:
    logits_NV, uniform_N, _ = _inputs(8)
    token_N, logprob_N = _sample(logits_NV, uniform_N, torch.zeros(8))
    assert token_N.tolist() == logits_NV.argmax(-1).tolist()
    want_N = torch.log_softmax(logits_NV, -1).max(-1).values
    torch.testing.assert_close(logprob_N, want_N, atol=2e-6, rtol=1e-6)
