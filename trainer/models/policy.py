"""The trained policy: log-probs of a packed batch's sampled tokens, from any causal language model.

The transformer runs over all tokens, its head only over positions whose next token is trained on,
`chunk_tokens` rows at a time, so that the logits of a whole batch never exist. A chunk's logits are
recomputed in the backward (checkpointing). If there is only one chunk its logits are kept: recomputing them
would save no memory. With `model.fp32_head` the chunks' gradients of the head's weight are added up in
float32 (`areal_like/precision.py`).

Shape suffixes: S sampled tokens, C those whose logits this rank computes (all, except in a context group) or
those of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from areal_like.automatic_settings import (
    compute_dtype,
    recomputation,
    router_dtype,
    uses_fp32_head,
)
from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.precision import Fp32Head, RouterDtype, widen_head
from areal_like.weights.untrained import decoder_of, text_config
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import Ranks
from trainer.models.kernels import use_kernels
from trainer.models.lora import adapter_off
from trainer.models.packed_model import PackedModel
from trainer.profiling.ranges import ranged

ENTROPY_NUMBERS_ON_CPU, ENTROPY_NUMBERS_ON_GPU = 1 << 16, 1 << 26


class TokenLogProbs(NamedTuple):
    """Output of a forward.

    A NamedTuple, because FSDP2 looks for tensors with gradients only in outputs that it can traverse.
    """

    logprobs_S: Tensor
    """float32 (or the masters' dtype if wider): log_softmax(logits / temperature) of each sampled token;
    carries gradient."""
    entropy_S: Tensor
    """Entropy of the same distribution, in nats; detached unless `Policy.with_entropy_gradient`, NaN unless
    `Policy.with_entropy`."""
    collision_S: Tensor | None = None
    """Sum of its squared probabilities, detached; None unless `Policy.with_collision`."""
    reverse_kl_S: Tensor | None = None
    """KL(policy || teacher) over the vocabulary at each sampled token; carries gradient. None without the
    distributions of a teacher."""


class Distributions:
    """The log-probs of the whole vocabulary at the sampled tokens of a micro-batch whose logits this rank
    computes.

    A class, because FSDP2 casts the tensors in a forward's arguments to the model's dtype; and not a
    dataclass, because it casts those in their fields too.
    """

    def __init__(self, logprobs_CV: Tensor) -> None:
        """`logprobs_CV`: float32 or wider."""
        self.logprobs_CV = logprobs_CV


class Policy(PackedModel):
    """The model that is trained."""

    def __init__(
        self,
        model: Any,
        *,
        temperature: float = 1.0,
        chunk_tokens: int = 1024,
        fp32_head: bool = False,
        router_dtype: RouterDtype = "float32",
    ) -> None:
        """`model`: a transformers causal LM. Raises ConfigError if it scales or caps its logits, or has more
        layers between its decoder and its output embedding."""
        for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
            if getattr(text_config(model.config), name, None) not in (None, 1, 1.0):
                raise ConfigError(
                    f"{type(model).__name__} scales its logits ({name}), which the trainer does not support: "
                    "choose another model"
                )
        head = model.get_output_embeddings()
        known = {id(p) for part in (decoder_of(model), head) if part is not None for p in part.parameters()}
        if others := [name for name, param in model.named_parameters() if id(param) not in known]:
            raise ConfigError(
                f"{type(model).__name__} computes its logits with more than its output embedding "
                f"({others[0]}), which the trainer does not support: choose another model"
            )
        super().__init__(model, router_dtype=router_dtype)
        if fp32_head:
            widen_head(model)
        self.temperature = temperature
        self.chunk_tokens = chunk_tokens
        self.with_entropy = True
        self.with_collision = False
        self.with_entropy_gradient = False
        self._kept: list[Tensor] | None = None
        """The log-probs of the vocabulary of a forward's chunks, during `all_logprobs`."""
        self.entropy_numbers: int | None = None
        """Log-probs whose entropy is computed at a time; None: the number that suits the device."""

    def forward(self, batch: PackedBatch, teacher: Distributions | None = None) -> TokenLogProbs:
        """`teacher`: its distributions at the sampled tokens, for `reverse_kl_S`."""
        own = self._of_own(batch, None if teacher is None else teacher.logprobs_CV)
        found = iter(self.of_all(batch, [each for each in own if each is not None]))
        logprobs_S, entropy_S = next(found), next(found)
        collision_S, reverse_kl_S = (None if each is None else next(found) for each in own[2:])
        return TokenLogProbs(logprobs_S, entropy_S, collision_S, reverse_kl_S)

    def _of_own(
        self, batch: PackedBatch, teacher_CV: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The values [C] of an output for the sampled tokens whose logits this rank computes."""
        hidden_CD = self.hidden(batch)
        targets_C = batch.tokens_T.index_select(0, batch.target_C)
        sizes = self.chunk_tokens
        if len(targets_C) <= sizes:
            return self._head(hidden_CD, targets_C, None, teacher_CV)
        hidden, targets = torch.split(hidden_CD, sizes), torch.split(targets_C, sizes)
        of_teacher: Sequence[Tensor | None] = [None] * len(hidden)
        if teacher_CV is not None:
            of_teacher = torch.split(teacher_CV, sizes)
        head = self.model.get_output_embeddings()
        gradient_VD = head.gradient_sum() if isinstance(head, Fp32Head) else None
        parts = [
            checkpoint(self._head, h, t, gradient_VD, tea, use_reentrant=False, preserve_rng_state=False)
            for h, t, tea in zip(hidden, targets, of_teacher, strict=True)
        ]
        logprobs, entropies, collisions, reverse_kls = zip(*parts, strict=True)
        return (
            torch.cat(logprobs),
            torch.cat(entropies),
            torch.cat(collisions) if self.with_collision else None,
            None if teacher_CV is None else torch.cat(reverse_kls),
        )

    @torch.no_grad()
    def all_logprobs(self, batch: PackedBatch) -> Tensor:
        """[C, V] log-probs of the whole vocabulary at each sampled token whose logits this rank computes, for
        a teacher. Collective."""
        self._kept = []
        try:
            self(batch)
            return torch.cat(self._kept)
        finally:
            self._kept = None

    @torch.no_grad()
    def scored(self, batch: PackedBatch) -> TokenLogProbs:
        """Log-probs alone, without gradient, for the policy in another's role. Collective."""
        wanted = self.with_entropy, self.with_collision
        self.with_entropy = self.with_collision = False
        try:
            output: TokenLogProbs = self(batch)
            return output
        finally:
            self.with_entropy, self.with_collision = wanted

    @ranged("head")
    def _head(
        self,
        hidden_CD: Tensor,
        targets_C: Tensor,
        gradient_VD: Tensor | None = None,
        teacher_CV: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        head = self.model.get_output_embeddings()
        logits_CV = head(hidden_CD) if gradient_VD is None else head(hidden_CD, gradient_VD)
        logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
        if self.temperature != 1.0:
            logits_CV = logits_CV / self.temperature
        logps_CV = torch.log_softmax(logits_CV, dim=-1)
        if self._kept is not None:
            self._kept.append(logps_CV)
        # Before `gather`, at which a recomputation in the backward ends.
        reverse_kl_C = None
        if teacher_CV is not None:
            reverse_kl_C = (logps_CV.exp() * (logps_CV - teacher_CV.to(logps_CV.dtype))).sum(-1)
        # Before the entropy: a recomputation in the backward stops once `gather` has saved its input.
        # A sum and not a squeeze: FSDP2 attaches its backward hook to outputs, which must not be views.
        logps_C = logps_CV.gather(1, targets_C[:, None]).sum(1)
        if not self.with_entropy:
            entropy_C = torch.full_like(logps_C, torch.nan)
        elif self.with_entropy_gradient:
            entropy_C = -(logps_CV.exp() * logps_CV).sum(-1)
        else:
            entropy_C = _entropy(logps_CV.detach(), numbers=self.entropy_numbers)
        collision_C = None
        if self.with_collision:
            collision_C = torch.linalg.vector_norm(logps_CV.detach().exp(), dim=-1).square()
        return logps_C, entropy_C, collision_C, reverse_kl_C


def _entropy(logps_CV: Tensor, *, numbers: int | None) -> Tensor:
    """[C] entropy of log-probs without gradient.

    It computes a few rows at a time: their probabilities then fit into a CPU's cache, and need little GPU
    memory.
    """
    num_rows, vocab = logps_CV.shape
    if numbers is None:
        numbers = ENTROPY_NUMBERS_ON_CPU if logps_CV.device.type == "cpu" else ENTROPY_NUMBERS_ON_GPU
    rows = max(numbers // vocab, num_rows >> 8, 1)
    return torch.cat([-logps_RV.exp().mul_(logps_RV).sum(-1) for logps_RV in torch.split(logps_CV, rows)])


def build_policy(
    config: Config, path: str, ranks: Ranks, *, frozen: bool = False, with_weights: bool = True
) -> Policy:
    """The sharded policy of a configuration, loaded from `path` (see `areal_like.paths.model_path`).

    `frozen`: a reference model, without an adapter and without router replay. `with_weights`: False leaves
    the weights that are trained undefined, for a caller that reads a checkpoint into them.
    """
    kernels = use_kernels(config, ranks.device, dtype=compute_dtype(config))
    policy = Policy.build(
        path,
        temperature=config.sampling.temperature,
        chunk_tokens=config.trainer.logprob_chunk_tokens,
        fp32_head=uses_fp32_head(config),
        router_dtype=router_dtype(config),
        compiles=config.trainer.compile,
        liger=not kernels.liger,
        liger_rope=recomputation(config) != "selective",
        router_replay=config.model.router_replay and not frozen,
        gradient_checkpointing=not frozen and recomputation(config),
        offload_activations=not frozen and config.trainer.offload_activations,
        lora_settings=None if frozen else config.model.lora,
        seed=config.seed,
    )
    policy.with_entropy = not frozen
    return policy.made_ready(config, ranks, frozen=frozen, with_weights=with_weights)


class BaseReference:
    """The base of a policy with an adapter as the reference model: no second model is in memory."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.shares_prefixes = policy.shares_prefixes

    def __call__(self, batch: PackedBatch) -> TokenLogProbs:
        """Log-probs of the base alone, without gradient. Collective."""
        with adapter_off(self.policy.model), self.policy.routed_live():
            return self.policy.scored(batch)
