"""Records losses and gradients of TRL's own functions into trl.json, with the Python of `make trl`:

    ~/.cache/areal_like/trl/bin/python tests/trainer/preferences/record_trl.py

Imports nothing of this project. The trainers are made without their constructors, and their models return
given numbers: log-probs of tokens (DPOTrainer, KTOTrainer) or logits (CPOTrainer, ORPOTrainer). A prompt is
one token, so the loss of a whole text, which ORPOTrainer takes, is that of the completion.
"""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

FILE = Path(__file__).with_name("trl.json")
NUM_PAIRS, MOST_TOKENS, VOCAB = 3, 6, 4
SCALES = {"near": 0.1, "far": 2.0, "extreme": 40.0}
"""Standard deviation of the log-ratio of a token."""
DPO = [("sigmoid", 0.1), ("sigmoid", 1.0), ("ipo", 0.1), ("ipo", 0.5)]
KTO = [(0.1, 1.0, 1.0), (0.5, 1.33, 0.8)]
SIMPO = [(2.0, 1.0, 0.0), (0.5, 0.25, 0.1)]
CDPO = [(0.1, 0.2), (1.0, 0.05)]
ORPO = [0.1, 1.0]

ACCELERATOR = SimpleNamespace(
    device="cpu", gather=lambda value: value, gather_for_metrics=lambda value: value
)


def trainer_of(kind: type, **attributes: Any) -> Any:
    """A trainer with only these attributes."""
    trainer = object.__new__(kind)
    defaults = {
        "accelerator": ACCELERATOR,
        "aux_loss_enabled": False,
        "model": SimpleNamespace(training=False),
        "_metrics": {"eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "precompute_ref_logps": True,
        "is_encoder_decoder": False,
    }
    for name, value in (defaults | attributes).items():
        object.__setattr__(trainer, name, value)
    return trainer


def fused(log_probs: Tensor) -> SimpleNamespace:
    """The outputs of a model with TRL's fused head."""
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def completions(num: int, *, scale: float, draw: torch.Generator) -> dict[str, Any]:
    """Lengths of completions, and the sums of their log-probs under policy and reference."""
    lengths = torch.randint(1, MOST_TOKENS, (num,), generator=draw)
    inside = torch.arange(MOST_TOKENS - 1)[None] < lengths[:, None]
    ref = -torch.rand(num, MOST_TOKENS - 1, generator=draw) * 3 * inside
    noise = torch.randn(num, MOST_TOKENS - 1, generator=draw) * scale * inside
    return {"inside": inside, "logp": ref + noise, "ref": ref, "lengths": lengths}


def numbers(**tensors: Tensor) -> dict[str, Any]:
    return {name: rounded(tensor.detach().tolist()) for name, tensor in tensors.items()}


def rounded(value: Any) -> Any:
    """Floats with the nine digits that tell any two float32 numbers apart."""
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def of_dpo(loss_type: str, beta: float, *, scale: float, draw: torch.Generator) -> dict[str, Any]:
    given = completions(2 * NUM_PAIRS, scale=scale, draw=draw)
    mask = torch.cat([torch.zeros(2 * NUM_PAIRS, 1, dtype=torch.int64), given["inside"].long()], dim=1)
    moved = torch.zeros(2 * NUM_PAIRS, requires_grad=True)
    logp = given["logp"] + moved[:, None] * given["inside"] / given["lengths"][:, None]
    ref_chosen, ref_rejected = given["ref"].sum(1).chunk(2)
    trainer = trainer_of(
        DPOTrainer,
        beta=beta,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        label_smoothing=0.0,
        use_weighting=False,
    )
    inputs = {
        "input_ids": mask,
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    loss = trainer._compute_loss(lambda **kwargs: fused(logp), inputs, False)
    loss.backward()
    metrics = {name: value[-1] for name, value in trainer._metrics["eval"].items() if name != "num_tokens"}
    return {
        "settings": {"beta": beta},
        **numbers(logp=given["logp"].sum(1), ref=given["ref"].sum(1), lengths=given["lengths"]),
        **numbers(loss=loss, grad=moved.grad),
        "accuracy": metrics["rewards/accuracies"],
        "margin": metrics["rewards/margins"],
    }


def of_kto(
    beta: float, desirable: float, undesirable: float, *, scale: float, draw: torch.Generator
) -> dict[str, Any]:
    num = 2 * NUM_PAIRS
    given, kl = (completions(num, scale=scale, draw=draw) for _ in range(2))
    mask, kl_mask = (
        torch.cat([torch.zeros(num, 1, dtype=torch.int64), each["inside"].long()], dim=1)
        for each in (given, kl)
    )
    label = torch.rand(num, generator=draw) < 0.5
    label[:2] = torch.tensor([True, False])
    moved = torch.zeros(num, requires_grad=True)
    logp = given["logp"] + moved[:, None] * given["inside"] / given["lengths"][:, None]
    trainer = trainer_of(
        KTOTrainer,
        beta=beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        loss_type="kto",
        calculate_KL=True,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.ones_like(mask),
        "KL_attention_mask": torch.ones_like(mask),
        "KL_completion_mask": kl_mask,
        "ref_logps": given["ref"].sum(1),
        "ref_KL_logps": kl["ref"].sum(1),
        "label": label,
    }
    loss = trainer._compute_loss(
        lambda **kwargs: fused(kl["logp"] if kwargs["input_ids"].any() else logp), inputs, False
    )
    loss.backward()
    return {
        "settings": {"beta": beta, "desirable_weight": desirable, "undesirable_weight": undesirable},
        **numbers(logp=given["logp"].sum(1), ref=given["ref"].sum(1), label=label),
        **numbers(kl_logp=kl["logp"].sum(1), kl_ref=kl["ref"].sum(1)),
        **numbers(loss=loss, grad=moved.grad),
        "kl": trainer._metrics["eval"]["kl"][-1],
    }


def of_logits(trainer: Any, *, scale: float, draw: torch.Generator) -> dict[str, Any]:
    """A loss from the logits of pairs, and its gradient."""
    tokens = torch.randint(0, VOCAB, (2 * NUM_PAIRS, MOST_TOKENS), generator=draw)
    lengths = torch.randint(2, MOST_TOKENS + 1, (2 * NUM_PAIRS,), generator=draw)
    lengths[0] = lengths[NUM_PAIRS] = MOST_TOKENS  # both halves are padded to this width
    attention = (torch.arange(MOST_TOKENS)[None] < lengths[:, None]).long()
    labels = tokens.masked_fill(attention == 0, -100)
    labels[:, 0] = -100
    batch = {}
    for name, rows in (("chosen", slice(NUM_PAIRS)), ("rejected", slice(NUM_PAIRS, None))):
        batch[f"{name}_input_ids"] = tokens[rows]
        batch[f"{name}_attention_mask"] = attention[rows]
        batch[f"{name}_labels"] = labels[rows]
    logits = torch.randn(2 * NUM_PAIRS, MOST_TOKENS, VOCAB, generator=draw) * scale
    logits.requires_grad_()
    loss, _ = trainer.get_batch_loss_metrics(lambda *args, **kwargs: SimpleNamespace(logits=logits), batch)
    loss.backward()
    return numbers(tokens=tokens, lengths=lengths, logits=logits, loss=loss, grad=logits.grad)


def of_simpo(
    beta: float, gamma: float, smoothing: float, *, scale: float, draw: torch.Generator
) -> dict[str, Any]:
    trainer = trainer_of(
        CPOTrainer,
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=smoothing,
        loss_type="simpo",
        cpo_alpha=0.0,
        alpha=0.0,
        padding_value=0,
        pad_token_id=0,
    )
    settings = {"beta": beta, "gamma": gamma, "label_smoothing": smoothing}
    return {"settings": settings, **of_logits(trainer, scale=scale, draw=draw)}


def of_orpo(beta: float, *, scale: float, draw: torch.Generator) -> dict[str, Any]:
    trainer = trainer_of(ORPOTrainer, beta=beta, padding_value=0)
    return {"settings": {"beta": beta}, **of_logits(trainer, scale=scale, draw=draw)}


def of_cdpo(beta: float, smoothing: float, *, scale: float, draw: torch.Generator) -> dict[str, Any]:
    """DPO's `sigmoid` ignores label smoothing in this version. CPO's has it; with log-ratios in place of
    log-probs it is cDPO."""
    given = completions(2 * NUM_PAIRS, scale=scale, draw=draw)
    ratio = (given["logp"] - given["ref"]).sum(1).requires_grad_()
    trainer = trainer_of(CPOTrainer, beta=beta, label_smoothing=smoothing, loss_type="sigmoid", alpha=0.0)
    losses, _, _ = trainer.cpo_loss(*ratio.chunk(2))
    loss = losses.mean()
    loss.backward()
    return {
        "settings": {"beta": beta, "label_smoothing": smoothing},
        **numbers(logp=given["logp"].sum(1), ref=given["ref"].sum(1), lengths=given["lengths"]),
        **numbers(loss=loss, grad=ratio.grad),
    }


def main() -> None:
    """Writes the file."""
    draw = torch.Generator().manual_seed(7)
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, scale in SCALES.items():

        def add(method: str, case: dict[str, Any], name: str = name) -> None:
            cases[method].append({"name": name, **case})

        for loss_type, beta in DPO:
            add({"sigmoid": "dpo"}.get(loss_type, loss_type), of_dpo(loss_type, beta, scale=scale, draw=draw))
        for beta, desirable, undesirable in KTO:
            add("kto", of_kto(beta, desirable, undesirable, scale=scale, draw=draw))
        for beta, smoothing in CDPO:
            add("cdpo", of_cdpo(beta, smoothing, scale=scale, draw=draw))
        for beta, gamma, smoothing in SIMPO:
            add("simpo", of_simpo(beta, gamma, smoothing, scale=scale, draw=draw))
        for beta in ORPO:
            add("orpo", of_orpo(beta, scale=scale, draw=draw))
    packages = {name: version(name) for name in ("trl", "transformers", "torch")}
    FILE.write_text(json.dumps({"packages": packages, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
