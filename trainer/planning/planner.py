"""Plans one job: trace, memory and estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from areal_like.automatic_settings import resolved
from areal_like.config import Config
from areal_like.config.gpus import check_gpus_are_separate
from areal_like.errors import ConfigError
from trainer.planning.estimate import Assumptions, Estimate, estimate
from trainer.planning.gpus import Placement, on_gpus, parse_gpus, placement_of
from trainer.planning.lengths import Lengths, lengths_of
from trainer.planning.memory import MemoryPlan, plan_memory
from trainer.planning.shapes import ModelShape, with_local_model
from trainer.planning.trace import StepTrace, trace_step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job on GPUs, with its needs and the estimate of its speed."""

    config: Config
    """The resolved configuration, with the model's local directory and the planned GPUs."""
    model_path: str
    """The setting `model.path`."""
    shape: ModelShape
    lengths: Lengths
    placement: Placement
    trace: StepTrace
    memory: MemoryPlan
    estimate: Estimate | None
    """None if the job does not fit."""
    assumed: Assumptions

    @property
    def fits(self) -> bool:
        """True if trainer ranks and engines have enough memory."""
        return not self.memory.problems


def make_plan(
    config: Config,
    *,
    gpus: str | None = None,
    prompt: float | None = None,
    response: float | None = None,
) -> Plan:
    """`gpus`: as `parse_gpus` takes it; None: those of the configuration. `prompt`, `response`: mean lengths.

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
    local = resolved(on_gpus(local, placement))
    lengths = lengths_of(local, max_positions=shape.max_positions, prompt=prompt, response=response)
    trace = trace_step(local, shape, lengths)
    memory = plan_memory(local, shape, lengths, placement, trace)
    assumed = Assumptions()
    expected = (
        None
        if memory.problems
        else estimate(local, shape, lengths, placement, trace, memory.engine, assumed=assumed)
    )
    return Plan(
        config=local,
        model_path=model_path,
        shape=shape,
        lengths=lengths,
        placement=placement,
        trace=trace,
        memory=memory,
        estimate=expected,
        assumed=assumed,
    )


def planned_again(plan: Plan, config: Config, placement: Placement) -> Plan:
    """The plan with another configuration or other GPUs; traced again where the trainer's memory changes."""
    lengths = plan.lengths
    trace = plan.trace
    if config.trainer != plan.config.trainer or config.model != plan.config.model:
        trace = trace_step(config, plan.shape, lengths)
    memory = plan_memory(config, plan.shape, lengths, placement, trace)
    expected = (
        None
        if memory.problems
        else estimate(config, plan.shape, lengths, placement, trace, memory.engine, assumed=plan.assumed)
    )
    return replace(plan, config=config, placement=placement, trace=trace, memory=memory, estimate=expected)
