"""A copy of the policy that lags behind it: the proximal policy around which decoupled PPO clips.

    snapshot   replaced by the policy after every `interval` steps
    average    sum_i decay^(n-i) theta_i / sum_i decay^(n-i), theta_0 .. theta_n the weights so far

The average and its correction for the first steps are those of PPO-EWMA (arXiv 2110.00641, section 3.2). It
is updated in place after each step, in the masters' dtype: in bfloat16 a relative change below 1/256 would be
lost.

Memory of each rank: its rows of the weights that are trained once more, in the masters' dtype (4 bytes for
each parameter of the rank, without moments and gradients), and as much host memory for checkpoints. Time: one
more forward of every micro-batch, without gradient. Checkpoints contain the rows, so a resumed run is equal
to the last bit.

With an adapter only the adapter is copied: for the forward, its rows change places with the policy's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from areal_like.config import Config
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local, reshard
from trainer.models.policy import Policy, TokenLogProbs, build_policy
from trainer.objectives import ProximalRule


class ProximalPolicy:
    """The copy, which follows the policy: restart() or a checkpoint -> [follow() after each step]*

    For checkpoints it is the state of a model without moments (`ModelState`).
    """

    kinds: tuple[str, ...] = ()
    """No moments."""

    def __init__(self, model: Policy, policy: Policy, *, rule: ProximalRule) -> None:
        """`model`: sharded like `policy`, with any weights; it is never trained. A policy with an adapter is
        its own `model`."""
        self.model = model
        self.num_updates = 0
        """Number of steps that it has followed."""
        self._policy = policy
        self._rule = rule
        self._trained = {name: param for name, param in policy.named_parameters() if param.requires_grad}
        self.shards: dict[str, Tensor]
        """This rank's part of each parameter that is trained, by name; memory shared with a model of its
        own."""
        if model is policy:
            self.shards = {name: local(param.detach()).clone() for name, param in self._trained.items()}
        else:
            model.requires_grad_(False)
            model.with_entropy = False
            self.shards = {name: local(param.detach()) for name, param in model.named_parameters()}

    @classmethod
    def of(
        cls,
        config: Config,
        policy: Policy,
        ranks: Ranks,
        *,
        rule: ProximalRule,
        path: str,
        with_weights: bool,
    ) -> ProximalPolicy:
        """Builds the copy, from the skeleton in `path`.

        `with_weights`: False leaves the weights undefined, for a caller that reads a checkpoint into them.
        """
        model = policy if policy.has_adapter else build_policy(config, path, ranks, with_weights=False)
        proximal = cls(model, policy, rule=rule)
        if with_weights:
            proximal.restart()
        return proximal

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> TokenLogProbs:
        """Log-probs under the copy. Not between a forward of the policy and its backward. Collective."""
        if self.model is not self._policy:
            output: TokenLogProbs = self.model(batch)
            return output
        self._exchange()
        try:
            return self._policy.scored(batch)
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Swaps the copy's rows and the policy's."""
        reshard(self._policy)  # its last forward left gathered copies
        for name, param in self._trained.items():
            here, there = self.shards[name], local(param.detach())
            kept = here.clone()
            here.copy_(there)
            there.copy_(kept)

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the weights to the policy's, as before the first step."""
        self.num_updates = 0
        self._move(1.0)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Follows the policy after a step; `step`: number of steps completed before it."""
        self.num_updates += 1
        if self._rule.interval:
            if (step + 1) % self._rule.interval == 0:
                self._move(1.0)
            return
        self._move(1 / sum(self._rule.decay**i for i in range(self.num_updates + 1)))

    def moments(self, shard_name: str) -> dict[str, Tensor]:
        return {}

    def new_moments(self, *, num_updates: int) -> Mapping[str, dict[str, Tensor]]:
        """None; takes the number of steps followed from a checkpoint."""
        self.num_updates = num_updates
        return {}

    def _move(self, share: float) -> None:
        """Moves the weights by this share of the way to the policy's; 1 copies them exactly."""
        reshard(self.model)  # its last forward left gathered copies of the old weights
        for name, param in self._trained.items():
            here, there = self.shards[name], local(param.detach())
            if share == 1.0:
                here.copy_(there)
            else:
                here.lerp_(there, share)
