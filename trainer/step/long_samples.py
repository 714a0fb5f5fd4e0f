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

from collections.abc import Sequence
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
    value: Tensor
    """The mean of the whole sample's losses."""

    def of(self, part: SampledTokens) -> Tensor:
        """[S] losses of the part's tokens, from its forward with gradient."""
        loss_S = self.value + self.slope_S * (part.logp_S - part.logp_S.detach())
        if self.entropy_slope_S is not None:
            loss_S = loss_S + self.entropy_slope_S * (part.entropy_S - part.entropy_S.detach())
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
        """The tokens with log-probs (and `entropy`: entropies) that `losses_of_parts` differentiates by."""
        logp_S, entropy_S = self.tokens.logp_S.detach(), self.tokens.entropy_S.detach()
        return replace(
            self.tokens,
            logp_S=logp_S.requires_grad_(),
            entropy_S=entropy_S.requires_grad_() if entropy else entropy_S,
        )

    def losses_of_parts(
        self, loss_S: Tensor, *, leaves: SampledTokens, tokens: SampledTokens
    ) -> list[PartLosses]:
        """`loss_S`: the whole sample's losses of `tokens`, computed from those of `leaves`."""
        wanted = [leaves.logp_S, *([leaves.entropy_S] if leaves.entropy_S.requires_grad else [])]
        slopes = torch.autograd.grad(loss_S.sum(), wanted, materialize_grads=True)
        lengths = [num_targets(part.trajectory) for part in self.parts]
        value = loss_S.detach().sum() / sum(lengths)
        of_parts = [torch.split(slope_S, lengths) for slope_S in slopes]
        return [
            PartLosses(
                tokens=tokens,
                slope_S=of_parts[0][number],
                entropy_slope_S=of_parts[1][number] if len(of_parts) > 1 else None,
                value=value,
            )
            for number in range(len(lengths))
        ]
