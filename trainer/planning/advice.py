"""Finds changes that make a job fit on its GPUs, each verified by tracing the job with it.

    for change in changes_until_it_fits(plan): ...

The order is fixed: settings that cost no speed first, then settings that cost some, then more GPUs. A change
that does not reduce the shortage of memory is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from areal_like.config import Config
from areal_like.errors import ConfigError
from trainer.planning.gpus import GPUS_PER_HOST, Placement
from trainer.planning.planner import Plan, planned_again


@dataclass(frozen=True, kw_only=True)
class AdvisedChange:
    """One change of settings, and the plan with it and all changes before it."""

    text: str
    """The change as it is written on the command line."""
    plan: Plan


def changes_until_it_fits(plan: Plan) -> Iterator[AdvisedChange]:
    """Adds changes one after the other until the job fits or none is left."""
    for change in _CANDIDATES:
        if plan.fits:
            return
        if (changed := change(plan)) is None:
            continue
        text, config, placement = changed
        try:
            after = planned_again(plan, config, placement)
        except ConfigError:
            continue
        if after.memory.shortage < plan.memory.shortage:
            plan = after
            yield AdvisedChange(text=text, plan=plan)


_Changed = tuple[str, Config, Placement]
_Candidate = Callable[[Plan], _Changed | None]


def _trainer(plan: Plan, key: str, value: object) -> _Changed | None:
    """Sets trainer.KEY, if the trainer is short of memory."""
    if not plan.memory.trainer_shortage or getattr(plan.config.trainer, key) == value:
        return None
    text = str(value).lower() if isinstance(value, bool) else str(value)
    trainer = replace(plan.config.trainer, **{key: value})  # type: ignore[arg-type]
    return f"trainer.{key}={text}", replace(plan.config, trainer=trainer), plan.placement


def _bfloat16(plan: Plan) -> _Changed | None:
    if plan.config.model.dtype == "bfloat16":
        return None
    model = replace(plan.config.model, dtype="bfloat16")
    return "model.dtype=bfloat16", replace(plan.config, model=model), plan.placement


def _at_most(plan: Plan, key: str, most: int) -> _Changed | None:
    """Lowers trainer.KEY to `most`, if the trainer is short of memory."""
    return _trainer(plan, key, min(most, getattr(plan.config.trainer, key)))


def _fewer_replicas(plan: Plan) -> _Changed | None:
    """One replica for every two: each rank has half of the rows."""
    replicas = plan.config.trainer.replicas
    return _trainer(plan, "replicas", replicas // 2 if replicas % 2 == 0 else 1)


def _offloaded(plan: Plan) -> _Changed | None:
    """The inputs of recomputed layers in host memory."""
    if not plan.config.trainer.gradient_checkpointing:
        return None
    return _trainer(plan, "offload_activations", True)


def _one_snapshot(plan: Plan) -> _Changed | None:
    """One copy of what is pushed."""
    if not plan.memory.host_shortage or plan.memory.snapshots == 1:
        return None
    weights = replace(plan.config.weights, num_snapshots=1)
    return "weights.num_snapshots=1", replace(plan.config, weights=weights), plan.placement


def _larger_context(plan: Plan) -> _Changed | None:
    """Twice as many ranks for each micro-batch, as long as those of a group are on one host."""
    size = 2 * plan.config.trainer.context_parallel
    if plan.config.trainer.world_size % size or size > GPUS_PER_HOST:
        return None
    return _trainer(plan, "context_parallel", size)


def _more_gpus_an_engine(plan: Plan) -> _Changed | None:
    """Twice as many GPUs for each engine, and half as many engines if there are several."""
    rollout, placement = plan.config.rollout, plan.placement
    gpus = 2 * rollout.gpus_per_engine
    can_split = rollout.engine == "sglang" and not rollout.sglang.url and gpus <= GPUS_PER_HOST
    if not plan.memory.engine_shortage or placement.is_shared or not can_split:
        return None
    servers = max(1, placement.engine_gpus // gpus)
    rollout = replace(rollout, gpus_per_engine=gpus, num_servers=servers)
    text = f"rollout.gpus_per_engine={gpus} rollout.num_servers={servers}"
    return text, replace(plan.config, rollout=rollout), replace(placement, engine_gpus=servers * gpus)


def _apart(plan: Plan) -> _Changed | None:
    """Engines and trainer on GPUs of their own."""
    if not plan.placement.is_shared:
        return None
    placement = replace(plan.placement, is_shared=False)
    return f"--gpus {placement.text}", plan.config, placement


def _more_ranks(plan: Plan) -> _Changed | None:
    ranks = 2 * plan.placement.trainer_gpus
    most = plan.config.trainer.groups_per_step * plan.config.trainer.context_parallel
    if plan.placement.is_shared or ranks > most:
        return None
    changed = _trainer(plan, "world_size", ranks)
    return changed and (changed[0], changed[1], replace(plan.placement, trainer_gpus=ranks))


_SMALL_CHUNK = 256
_CANDIDATES: tuple[_Candidate, ...] = (
    _bfloat16,
    lambda plan: _trainer(plan, "gradient_checkpointing", True),
    lambda plan: _at_most(plan, "tokens_per_microbatch", plan.lengths.context),
    lambda plan: _at_most(plan, "logprob_chunk_tokens", _SMALL_CHUNK),
    *[_fewer_replicas] * 3,
    _offloaded,
    lambda plan: _trainer(plan, "offload_optimizer", True),
    _one_snapshot,
    *[_larger_context] * 3,
    _apart,
    *[_more_gpus_an_engine] * 3,
    *[_more_ranks] * 6,
)
