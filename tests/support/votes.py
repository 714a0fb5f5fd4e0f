"""Steps whose samples have one to three segments, and their losses from a plain float64 computation.

Nothing here is the trainer's: the log-probs are those of transformers on one segment at a time, and a sample
is a list of its tokens' log-probs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from areal_like.trajectory import Trajectory
from tests.support.trainer_helpers import joined, random_trajectory
from trainer.batching.packing import is_target

GROUP_SIZE = 3
BETA, ETA = 0.3, 0.25


def branching_groups(num_groups: int = 4) -> list[list[Trajectory]]:
    """Groups of three samples, of one to three segments in varying order; rewards differ in each group."""
    rng = np.random.default_rng(11)
    return [
        [
            joined(pieces) if len(pieces) > 1 else pieces[0]
            for place in range(GROUP_SIZE)
            for pieces in [
                [
                    random_trajectory(rng, longest=10, reward=float(place) + 0.25 * group)
                    for _ in range(1 + (group + place) % 3)
                ]
            ]
        ]
        for group in range(num_groups)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The trained tokens of one sample, of all its segments."""

    logp: Tensor
    """With gradient."""
    mu: Tensor
    squares: Tensor
    """Squared norm of each log-prob's gradient by the logits."""
    advantage: float
    reward: float
    group: int

    @property
    def r(self) -> Tensor:
        return (self.logp.detach() - self.mu).exp()

    @property
    def w(self) -> float:
        return float(self.r.prod())

    @property
    def s(self) -> float:
        return self.w ** (1 / len(self.mu))


def samples_of(model: Any, groups: Sequence[Sequence[Trajectory]]) -> list[Sample]:
    """With the advantage R - mean of the group."""
    found = []
    for number, group in enumerate(groups):
        mean = sum(t.reward for t in group) / len(group)
        for trajectory in group:
            logps, squares = [], []
            for part in trajectory.segment_slices:
                tokens = torch.from_numpy(trajectory.tokens[part]).long()[None]
                target = torch.from_numpy(is_target(trajectory)[part])
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
                every = torch.log_softmax(logits, -1)
                logp = every.gather(-1, tokens[0, 1:, None])[:, 0]
                with torch.no_grad():
                    error = torch.nn.functional.one_hot(tokens[0, 1:], every.shape[1]) - every.exp()
                logps.append(logp[target[1:]])
                squares.append(error.square().sum(1)[target[1:]])
            found.append(
                Sample(
                    logp=torch.cat(logps),
                    mu=torch.from_numpy(trajectory.logprobs[is_target(trajectory)]).double(),
                    squares=torch.cat(squares),
                    advantage=trajectory.reward - mean,
                    reward=trajectory.reward,
                    group=number,
                )
            )
    return found


def load(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
    return dict(zip(params, grads, strict=True))


# Losses of one sample, summed over its tokens. A weight is a plain number.


def tis(x: Sample) -> Tensor:
    return -min(x.w, 2.0) * x.advantage * x.logp.sum()


def geometric_tis(x: Sample) -> Tensor:
    return -min(x.s, 1.02) * x.advantage * x.logp.sum()


def masked_tis(x: Sample) -> Tensor:
    return tis(x) if 0.5 <= x.w <= 5 else 0 * x.logp.sum()


def vespo(x: Sample) -> Tensor:
    k, lam = (2, 3) if x.advantage >= 0 else (3, 2)
    return -(x.w**k) * float(np.exp(lam * (1 - x.w))) * x.advantage * x.logp.sum()


def topr(x: Sample) -> Tensor:
    return -(1.0 if x.advantage >= 0 else min(x.w, 1.0)) * x.advantage * x.logp.sum()


def lad(x: Sample) -> Tensor:
    u = x.advantage / ETA
    slope = 0.5 * np.log(2 * (x.w / np.exp(u)) / (x.w / np.exp(u) + 1))  # f' of js
    return float(x.w * slope) * x.logp.sum()


def gspo(x: Sample) -> Tensor:
    live = (x.logp - x.mu).mean().exp()
    return len(x.mu) * torch.maximum(-x.advantage * live, -x.advantage * live.clamp(0.97, 1.03))


def oapl(x: Sample, group: Sequence[Sample]) -> Tensor:
    value = float(np.log(np.mean([np.exp(y.reward) for y in group])))
    return (BETA * (x.logp - x.mu).sum() - (x.reward - value)).square()


def opsm(x: Sample) -> Tensor:
    drops = x.advantage < 0 and float((x.mu - x.logp.detach()).mean()) > 0.02
    return (0 if drops else 1) * reinforce(x)


def band(x: Sample) -> Tensor:
    return (1 if 0.97 <= x.s <= 1.03 else 0) * reinforce(x)


def trust_region(x: Sample) -> Tensor:
    log_r = x.r.log()
    outside = bool((log_r.square() / 2 > 0.3).any()) or float((x.r - 1 - log_r).mean()) > 0.06
    return (0 if outside else 1) * reinforce(x)


def reinforce(x: Sample) -> Tensor:
    return -x.advantage * x.logp.sum()


def rebel(group: Sequence[Sample]) -> Tensor:
    """The mean over the group's pairs."""
    pairs = list(itertools.combinations(group, 2))
    losses = [
        (BETA * ((a.logp - a.mu).sum() - (b.logp - b.mu).sum()) - (a.reward - b.reward)).square()
        for a, b in pairs
    ]
    return torch.stack(losses).sum() / len(pairs)


def baseline(samples: Sequence[Sample], m: Sequence[float]) -> float:
    total = sum(m)
    return sum(mi * x.advantage for mi, x in zip(m, samples, strict=True)) / total


def vcpo(
    model: Any, samples: Sequence[Sample], *, norms: str, scope: str, leave_one_out: bool, weighted: bool
) -> Tensor:
    """The mean over samples of `-w (A - b) mean log pi`."""
    squares = []
    for x in samples:
        if norms == "proxy":
            square = float(x.squares.sum())
        else:
            square = sum(float(g.square().sum()) for g in gradients_of(model, x.logp.sum()).values())
        squares.append(square / len(x.mu) ** 2 * (min(x.w, 8.0) ** 2 if weighted else 1))
    losses = []
    for i, x in enumerate(samples):
        like = [j for j, y in enumerate(samples) if scope == "batch" or y.group == x.group]
        like = [j for j in like if not (leave_one_out and j == i)]
        b = baseline([samples[j] for j in like], [squares[j] for j in like])
        losses.append(-min(x.w, 8.0) * (x.advantage - b) * x.logp.mean())
    return torch.stack(losses).mean()


def ess_ratio(samples: Sequence[Sample]) -> float:
    w = [x.w for x in samples]
    return sum(w) ** 2 / sum(each**2 for each in w) / len(w)
