"""Plans one job: trace, memory and estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from areal_like.automatic_settings import model_facts, resolved
from areal_like.config import Config
from areal_like.config.gpus import check_gpus_are_separate
from areal_like.errors import ConfigError
from areal_like.expert_layers import ExpertLayers
from trainer.planning.estimate import Estimate, estimate
from trainer.planning.gpus import GIB, Placement, on_gpus, parse_gpus, placement_of
from trainer.planning.lengths import lengths_of
from trainer.planning.memory import MemoryPlan, plan_memory
from trainer.planning.shapes import with_local_model
from trainer.planning.trace import PlannedJob, trace_step


@dataclass(frozen=True, kw_only=True)
class Plan(PlannedJob):
    """A job on GPUs, with its needs and the estimate of its speed."""

    model_path: str
    """The setting `model.path`."""
    objective_choice: str
    """The objective that `objective=auto` is, and why; empty if the job names one."""
    memory: MemoryPlan
    estimate: Estimate | None
    """None if the job does not fit."""

    @property
    def fits(self) -> bool:
        """True if trainer ranks, engines and the host of rank 0 have enough memory."""
        return not self.memory.problems


def make_plan(
    config: Config,
    *,
    gpus: str | None = None,
    host_gib: float | None = None,
    prompt: float | None = None,
    response: float | None = None,
) -> Plan:
    """`gpus`: as `parse_gpus` takes it; None: those of the configuration. `host_gib`: memory of
    a host in GiB; None: assumed for its GPUs. `prompt`, `response`: mean lengths.

    Raises ConfigError for a job that cannot be planned.
    """
    model_path = config.model.path
    local, shape = with_local_model(config)
    if gpus is not None:
        placement = parse_gpus(gpus)
    elif config.trainer.device == "cpu" or config.rollout.engine_device == "cpu":
        raise ConfigError(
            "plan: this job is on CPUs (trainer.device, rollout.engine_device): "
            "give the GPUs to plan for, as --gpus 4+4xH100"
        )
    else:
        check_gpus_are_separate(local)
        placement = placement_of(local)
    if host_gib is not None:
        placement = replace(placement, given_host_bytes=host_gib * GIB)
    local = resolved(on_gpus(local, placement))
    lengths = lengths_of(local, max_positions=shape.max_positions, prompt=prompt, response=response)
    trace = trace_step(local, shape, lengths)
    experts = None
    if local.model.router_replay:
        experts = ExpertLayers.of(model_facts(local, needed_for="model.router_replay"))
    job = PlannedJob(
        config=local, shape=shape, lengths=lengths, placement=placement, trace=trace, experts=experts
    )
    return _plan(job, model_path=model_path, objective_choice=config.objective_choice)


def planned_again(plan: Plan, config: Config, placement: Placement) -> Plan:
    """The plan with another configuration or other GPUs; traced again where the trainer's memory changes."""
    trace = plan.trace
    if config.trainer != plan.config.trainer or config.model != plan.config.model:
        trace = trace_step(config, plan.shape, plan.lengths)
    job = PlannedJob(
        config=config,
        shape=plan.shape,
        lengths=plan.lengths,
        placement=placement,
        trace=trace,
        experts=plan.experts,
    )
    return _plan(job, model_path=plan.model_path, objective_choice=plan.objective_choice)


def _plan(job: PlannedJob, *, model_path: str, objective_choice: str) -> Plan:
    memory = plan_memory(job)
    expected = None if memory.problems else estimate(job, memory.engine)
    return Plan(
        **vars(job),
        model_path=model_path,
        objective_choice=objective_choice,
        memory=memory,
        estimate=expected,
    )
