"""Terms around an objective (masks, KL to a reference, entropy) and objectives from a user's file."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_like.config import KlConfig
from areal_like.errors import ConfigError, UserError
from tests.support import warm_start
from tests.support.objective_helpers import BEHAVIOR_LOGP, LOGP, evaluate, published, tokens_of
from trainer.advantages import ADVANTAGES
from trainer.advantages.reward_shaping import SHAPINGS
from trainer.objectives import MASKS, OBJECTIVES, Composed, Need, SampledTokens, StepStats, build_objective
from trainer.objectives.base import Objective, TokenLosses, checked_losses
from trainer.objectives.composed import kl_estimate

TOKEN_TIS = {"name": "tis", "level": "token", "cap": 2}


def test_band_mask_matches_published_values() -> None:
    band = {"name": "band", "level": "geometric", "low": 0.7, "high": 1.4}
    loss, grad = evaluate(build_objective({**TOKEN_TIS, "masks": [band]}), [published()])
    assert loss == pytest.approx(0.744005, abs=1e-6)
    assert grad == pytest.approx([-0.244281, -0.4, -0.180967, 0, 0], abs=1e-6)
    sequence = {"name": "band", "level": "sequence", "low": 0.5, "high": 3, "denominator": "kept"}
    loss, grad = evaluate(build_objective({"name": "tis", "cap": 8, "masks": [sequence]}), [published()])
    assert loss == pytest.approx(2.265235, abs=1e-6) and grad == pytest.approx(
        [-0.906094] * 3 + [0, 0], abs=1e-6
    )


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (
            lambda loss_S: TokenLosses(loss_S=loss_S.mean()),
            r"shape \[\] for 5 sampled tokens: return one loss",
        ),
        (lambda loss_S: loss_S, r"Reduced.losses returned Tensor: return TokenLosses"),
    ],
)
def test_losses_that_are_not_of_tokens_are_refused(reduce: Any, message: str) -> None:
    class Reduced(Objective):
        def losses(self, batch: SampledTokens, stats: StepStats) -> TokenLosses:
            return reduce(-batch.advantage_S * batch.logp_S)

    with pytest.raises(UserError, match=message):
        checked_losses(Reduced(), published(), {})
    with pytest.raises(UserError, match=message):
        Composed(inner=Reduced()).losses(published(), {})


def test_opsm_drops_bad_sequences_that_became_unlikely() -> None:
    def kept(delta: float, advantages: list[float]) -> list[bool]:
        objective = build_objective({"name": "reinforce", "masks": [{"name": "opsm", "delta": delta}]})
        return objective.losses(published(advantages=advantages), {}).means["kept_fraction"].tolist()

    assert kept(0.4, [1, -1]) == [True] * 3 + [False] * 2
    assert kept(0.6, [1, -1]) == [True] * 5
    assert kept(0.4, [-1, -1]) == [True] * 3 + [False] * 2, (
        "the mean of log(mu / pi) of the first sequence is -1/3"
    )
    assert kept(0.4, [-1, 1]) == [True] * 5


def test_truncated_mask_drops_truncated_samples() -> None:
    objective = build_objective({"name": "reinforce", "masks": [{"name": "truncated"}]})
    assert evaluate(objective, [published(truncated=[False, True])])[1] == pytest.approx([-0.2] * 3 + [0, 0])


def test_stapo_drops_unlikely_low_entropy_tokens() -> None:
    """Entropies 1..5 have the 80th percentile 4.2."""
    rare, common = math.log(0.001), math.log(0.5)
    pi = [[rare, rare, common], [rare, common]]
    entropy = [[1.0, 5.0, 2.0], [3.0, 4.0]]
    objective = build_objective({"name": "reinforce", "masks": [{"name": "stapo"}]})
    for parts in (
        [tokens_of(pi, pi, [1, -1], entropy=entropy)],
        [tokens_of([p], [p], [a], entropy=[e]) for p, a, e in zip(pi, [1, -1], entropy, strict=True)],
    ):
        _, grad = evaluate(objective, parts)
        assert grad == pytest.approx([0, -0.25, -0.25, 0.25, 0.25]), (
            "only the first token is dropped, from the loss and the normalizer"
        )


def test_masks_and_denominators_compose() -> None:
    masks = [
        {"name": "band", "level": "token", "low": 0.5, "high": 2},
        {"name": "opsm", "delta": 0.4, "denominator": "kept"},
    ]
    objective = build_objective({**TOKEN_TIS, "cap": 9, "masks": masks})
    _, grad = evaluate(objective, [published()])
    assert grad == pytest.approx([-math.exp(0.2) / 3, 0, -math.exp(-0.1) / 3, 0, 0]), (
        "token 2 stays in the normalizer, sequence 2 leaves it"
    )
    assert not objective.skips_zero_advantage


def test_messages_name_the_configured_objective() -> None:
    composed = build_objective({"name": "oapl"}, entropy_coef=0.1)
    assert isinstance(composed, Composed) and composed.display_name == "Oapl"


def test_no_terms_gives_the_bare_objective() -> None:
    assert not isinstance(build_objective({"name": "tis"}, kl=KlConfig(), max_tokens=9), Composed)
    assert not isinstance(build_objective({"name": "tis"}, kl=KlConfig(coef=1, place="reward")), Composed)


def test_max_tokens_is_filled_in_from_the_job() -> None:
    assert vars(build_objective({"name": "oapl"}, max_tokens=500))["max_tokens"] == 500
    assert vars(build_objective({"name": "oapl", "max_tokens": 7}, max_tokens=500))["max_tokens"] == 7


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_in_the_loss(estimator: str) -> None:
    bare, composed = (
        build_objective({"name": "reinforce"}, kl=KlConfig(coef=c, estimator=estimator)) for c in (0, 0.5)
    )
    assert composed.needs == {Need.REF} and not composed.skips_zero_advantage
    x = [
        p - r
        for p_row, r_row in zip(LOGP, BEHAVIOR_LOGP, strict=True)
        for p, r in zip(p_row, r_row, strict=True)
    ]
    value = {"k1": lambda v: v, "k2": lambda v: v * v / 2, "k3": lambda v: math.exp(-v) - 1 + v}[estimator]
    slope = {"k1": lambda v: 1, "k2": lambda v: v, "k3": lambda v: 1 - math.exp(-v)}[estimator]
    loss, grad = evaluate(bare, [published()])
    with_kl, with_kl_grad = evaluate(composed, [published(ref_logp=BEHAVIOR_LOGP)])
    assert with_kl - loss == pytest.approx(0.5 * sum(map(value, x)) / 5)
    assert [b - a for a, b in zip(grad, with_kl_grad, strict=True)] == pytest.approx(
        [0.1 * slope(v) for v in x]
    )


def test_on_policy_gradients_of_kl_estimators() -> None:
    """Expected over a tabular policy: k2 has the gradient of KL(pi || ref), k3 of KL(ref || pi), k1 zero."""
    logits = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([-0.3, 0.4, 0.2], dtype=torch.float64), 0)
    pi = torch.log_softmax(logits, 0)

    def gradient(value: torch.Tensor) -> list[float]:
        (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
        return grad.tolist()

    def expected(estimator: str) -> torch.Tensor:
        return (pi.exp().detach() * kl_estimate(pi - ref, estimator=estimator)).sum()

    assert gradient(expected("k1")) == pytest.approx([0, 0, 0], abs=1e-12)
    assert gradient(expected("k2")) == pytest.approx(gradient((pi.exp() * (pi - ref)).sum()))
    assert gradient(expected("k3")) == pytest.approx(gradient((ref.exp() * (ref - pi)).sum()))
    kl = (pi.exp() * (pi - ref)).sum().item()
    assert expected("k1").item() == pytest.approx(kl) == expected("k3").item()
    assert torch.isfinite(kl_estimate(torch.tensor([1000.0, -1000.0]), estimator="k3")).all()


def test_entropy_bonus_is_subtracted_from_the_loss() -> None:
    objective = build_objective({"name": "reinforce"}, entropy_coef=0.1)
    entropy = [[1.0, 2.0, 3.0], [4.0, 5.0]]
    assert objective.needs == {Need.ENTROPY}
    plain, _ = evaluate(build_objective({"name": "reinforce"}), [published()])
    assert evaluate(objective, [published(entropy=entropy)])[0] == pytest.approx(plain - 0.1 * 3)


def test_masked_tokens_get_no_gradient_from_any_term() -> None:
    masks = [{"name": "band", "level": "token", "low": 0.5, "high": 2}]
    objective = build_objective({"name": "oapl", "masks": masks}, kl=KlConfig(coef=1.0), entropy_coef=0.1)
    losses = objective.losses(published(ref_logp=BEHAVIOR_LOGP), {})
    assert losses.loss_S[1] == 0
    assert evaluate(objective, [published(ref_logp=BEHAVIOR_LOGP)])[1][1] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": {"name": "opsm"}}, "objective.masks: want a list"),
        ({"masks": [{"delta": 1}]}, "each with `name`"),
        ({"masks": [{"name": "opsn"}]}, "choose one of band, kpop, opsm, stapo, truncated, trust_region"),
        ({"masks": [{"name": "opsm", "detla": 1}]}, "did you mean delta"),
        ({"masks": [{"name": "band", "low": 3}]}, "low < high"),
        ({"masks": [{"name": "stapo", "denominator": "all"}]}, "original or kept"),
    ],
)
def test_error_messages_for_invalid_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective({"name": "tis", **settings})


def test_late_coefficients_refuse_other_terms() -> None:
    with pytest.raises(ConfigError, match="Vcpo allows no other terms"):
        build_objective({"name": "vcpo"}, entropy_coef=0.1)


@dataclass(frozen=True, kw_only=True)
class OldSecondArgument(Objective):
    """A custom objective whose second argument has the earlier name."""

    def losses(self, batch: SampledTokens, facts: StepStats) -> TokenLosses:
        return TokenLosses(loss_S=-batch.advantage_S * batch.logp_S)


def test_losses_takes_its_arguments_by_position() -> None:
    bare = {"_target_": f"{__name__}.OldSecondArgument"}
    masked = {**bare, "masks": [{"name": "opsm", "delta": 9.0}]}
    want = evaluate(build_objective({"name": "reinforce"}), [published()])
    assert evaluate(build_objective(bare), [published()]) == want
    assert evaluate(build_objective(masked), [published()]) == want


OWN = """
from dataclasses import dataclass
import torch
from trainer.objectives import Objective, TokenLosses

@dataclass(frozen=True, kw_only=True)
class SoftReinforce(Objective):
    power: float = 1.0

    def losses(self, batch, stats):
        weight_S = torch.exp(self.power * (batch.logp_S - batch.behavior_logp_S).clamp(max=1.0)).detach()
        return TokenLosses(loss_S=-weight_S * batch.advantage_S * batch.logp_S)
"""


def test_custom_objective_from_the_working_directory(tmp_path: Path) -> None:
    """The file is imported from the directory in which the job starts, and masks work with the class."""
    (tmp_path / "my_objectives.py").write_text(OWN)
    code = (
        "from areal_like.runtime.command_line import load_config; "
        "from trainer.objectives import build_objective; "
        "section = ['objective._target_=my_objectives.SoftReinforce', 'objective.power=0.5', "
        "'objective.masks=[{name: opsm}]']; "
        "config = load_config(section); "
        "objective = build_objective(config.objective); "
        "print(type(objective.inner).__name__, objective.inner.power, len(objective.masks))"
    )
    root = str(Path(__file__).resolve().parents[3])
    done = warm_start.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["SoftReinforce", "0.5", "1"], done.stderr


RENAMED = """
from trainer.objectives import Objective, TokenLosses

class Exact(Objective):
    lone_sequences = True

    def losses(self, batch, stats):
        return TokenLosses(loss_S=-batch.logp_S)
"""


def test_error_for_an_old_class_attribute_gives_the_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "renamed_objective.py").write_text(RENAMED)
    monkeypatch.syspath_prepend(str(tmp_path))
    message = "objective Exact sets lone_sequences, which is now called one_sequence_per_microbatch"
    with pytest.raises(ConfigError, match=message):
        build_objective({"_target_": "renamed_objective.Exact"})
    body = {"__annotations__": {"lone_sequences": "bool"}, "losses": Objective.losses}
    with pytest.raises(ConfigError, match="one_sequence_per_microbatch"):
        type("Annotated", (Objective,), body)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("pi_S", "logp_S"),
        ("mu_S", "behavior_logp_S"),
        ("prox_S", "prox_logp_S"),
        ("ref_S", "ref_logp_S"),
        ("segment_S", "sample_S"),
    ],
)
def test_error_for_an_old_tokens_attribute_gives_the_new_name(old: str, new: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{old}': renamed to {new}$"):
        getattr(published(), old)
    unknown = "sigma_S"
    with pytest.raises(AttributeError, match=r"no attribute 'sigma_S'$"):
        getattr(published(), unknown)
    assert not hasattr(published(), old) and not hasattr(published(), unknown)


def test_the_page_names_every_registered_choice() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "reference" / "objectives.md").read_text()
    for registry in (OBJECTIVES, ADVANTAGES, MASKS, SHAPINGS):
        for name in registry.names():
            assert f"`{name}`" in page, f"{name} is not in docs/reference/objectives.md"
