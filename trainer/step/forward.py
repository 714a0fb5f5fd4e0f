"""The forward passes over a micro-batch: the policy's, and those of other models that are needed."""

from __future__ import annotations

from collections.abc import Set

import torch

from trainer.batching.packing import PackedBatch
from trainer.batching.sampled_tokens import SampledTokens
from trainer.models.policy import Policy
from trainer.objectives import Need


def forward(
    batch: PackedBatch,
    *,
    policy: Policy,
    reference: Policy | None,
    needs: Set[Need],
    proximal: Policy | None = None,
) -> SampledTokens:
    """Log-probs of the micro-batch's sampled tokens, with the optional inputs in `needs`.

    `proximal`: the copy of the policy that Need.PROX is about; None: the policy itself. Collective under
    FSDP2.
    """
    logp_S, entropy_S, collision_S = policy(batch)
    # One optimizer step per batch: the weights at the start of the step are the current ones.
    prox_logp_S = logp_S.detach() if Need.PROX in needs else None
    if proximal is not None and Need.PROX in needs:
        with torch.no_grad():
            prox_logp_S = proximal(batch).logprobs_S
    ref_logp_S = None
    if Need.REF in needs:
        assert reference is not None
        with torch.no_grad():
            ref_logp_S = reference(batch).logprobs_S
    return SampledTokens.of(
        batch,
        logp_S=logp_S,
        entropy_S=entropy_S,
        prox_logp_S=prox_logp_S,
        ref_logp_S=ref_logp_S,
        collision_S=collision_S,
    )
