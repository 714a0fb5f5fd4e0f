"""Statistics of a whole step for an objective, from vectors observed per micro-batch on all ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.batching.sampled_tokens import SampledTokens
from trainer.distributed.ranks import Ranks
from trainer.objectives import Objective, StepStats


class Observations:
    """Collects what an objective observes in one step: add() per micro-batch -> summarize() once."""

    def __init__(self, objective: Objective, ranks: Ranks) -> None:
        self._objective = objective
        self._ranks = ranks
        self._vectors: list[dict[str, Tensor]] = []

    @torch.no_grad()
    def add(self, tokens: SampledTokens, *, live: bool) -> None:
        """Observes one micro-batch.

        `live=False`: a dummy, of which only the names of the vectors are kept.
        """
        observed = self._objective.observe(tokens)
        self._vectors.append(observed if live else {name: vector[:0] for name, vector in observed.items()})

    def summarize(self) -> StepStats:
        """The objective's stats from all micro-batches of all ranks.

        Collective if the objective observes anything.
        """
        names = sorted(self._vectors[0]) if self._vectors else []
        gathered = {
            name: self._ranks.gather(torch.cat([vectors[name].double().cpu() for vectors in self._vectors]))
            for name in names
        }
        return self._objective.summarize(gathered) if gathered else {}
