"""Trains on samples whose segments together are too long for one micro-batch.

    parts of the sample -> forward of each, without gradient -> the whole sample's tokens -> its losses
    -> slope of the sum of the losses in each token's log-prob -> forward and backward of each part

Losses depend on the whole sample: W, means over its tokens, masks that drop it. Their gradients reach only
log-probs (and with Need.ENTROPY entropies), so a loss that is linear in these, with the same slopes, has the
same gradient, and needs only one part at a time. The price is another forward of these samples.

They are trained on at the end of the step, where in both passes all ranks run together. Each rank trains on
its own: they are not balanced, and not in `busy_share`.

Shape suffix: S sampled tokens, of the sample or of one of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.batching.packing import num_targets
from trainer.batching.sampled_tokens import SampledTokens
from trainer.batching.training_sample import TrainingSample


@dataclass(frozen=True, kw_only=True, eq=False)
class PartLosses:
    """Losses of one part that are linear in its log-probs and entropies."""

    tokens: SampledTokens
    """Those of the whole sample."""
    slope_S: Tensor
    entropy_slope_S: Tensor | None
    kl_slope_S: Tensor | None
    value: Tensor
    """The mean of the whole sample's losses."""

    def of(self, part: SampledTokens) -> Tensor:
        """[S] losses of the part's tokens, from its forward with gradient."""
        loss_S = self.value + self.slope_S * (part.logp_S - part.logp_S.detach())
        if self.entropy_slope_S is not None:
            loss_S = loss_S + self.entropy_slope_S * (part.entropy_S - part.entropy_S.detach())
        if self.kl_slope_S is not None:
            assert part.reverse_kl_S is not None
            loss_S = loss_S + self.kl_slope_S * (part.reverse_kl_S - part.reverse_kl_S.detach())
        return loss_S


@dataclass(frozen=True, kw_only=True, eq=False)
class LongSample:
    """The parts of one sample and the tokens of all of them; on a rank without any, those of a dummy."""

    parts: Sequence[TrainingSample]
    """Empty for a dummy."""
    tokens: SampledTokens
    """Without gradient."""

    @property
    def is_live(self) -> bool:
        return bool(self.parts)

    def with_leaves(self, *, entropy: bool) -> SampledTokens:
        """The tokens with log-probs (and `entropy`: entropies; and reverse KLs, if there are any) that
        `losses_of_parts` differentiates by."""
        logp_S, entropy_S = self.tokens.logp_S.detach(), self.tokens.entropy_S.detach()
        kl_S = self.tokens.reverse_kl_S
        return replace(
            self.tokens,
            logp_S=logp_S.requires_grad_(),
            entropy_S=entropy_S.requires_grad_() if entropy else entropy_S,
            reverse_kl_S=None if kl_S is None else kl_S.detach().requires_grad_(),
        )

    def losses_of_parts(
        self, loss_S: Tensor, *, leaves: SampledTokens, tokens: SampledTokens
    ) -> list[PartLosses]:
        """`loss_S`: the whole sample's losses of `tokens`, computed from those of `leaves`."""
        found = {
            "slope_S": leaves.logp_S,
            "entropy_slope_S": leaves.entropy_S,
            "kl_slope_S": leaves.reverse_kl_S,
        }
        wanted = {name: leaf for name, leaf in found.items() if leaf is not None and leaf.requires_grad}
        slopes = torch.autograd.grad(loss_S.sum(), [*wanted.values()], materialize_grads=True)
        lengths = [num_targets(part.trajectory) for part in self.parts]
        value = loss_S.detach().sum() / sum(lengths)
        of_parts = {name: torch.split(slope_S, lengths) for name, slope_S in zip(wanted, slopes, strict=True)}
        return [
            PartLosses(
                tokens=tokens,
                slope_S=of_parts["slope_S"][number],
                entropy_slope_S=_of(of_parts, "entropy_slope_S", number),
                kl_slope_S=_of(of_parts, "kl_slope_S", number),
                value=value,
            )
            for number in range(len(lengths))
        ]


def _of(of_parts: Mapping[str, Sequence[Tensor]], name: str, number: int) -> Tensor | None:
    return of_parts[name][number] if name in of_parts else None
