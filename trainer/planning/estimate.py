"""Estimates of time, from FLOPs and bytes over a GPU's published rates times assumed efficiencies.

No number here is measured: `Assumptions` lists the assumptions, and `Estimate.formulas` the derivation of
each number. An estimate is for choosing between settings, not for predicting a date.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from areal_like.config import Config
from trainer.advantages.gae import Gae
from trainer.batching.scope import Scope
from trainer.planning.engines import BYTES, EngineMemory
from trainer.planning.gpus import GPUS_PER_HOST, Placement
from trainer.planning.lengths import Lengths
from trainer.planning.shapes import ModelShape
from trainer.planning.staleness import (
    MASKED,
    Durations,
    Forecast,
    forecast,
    least_staleness,
    least_staleness_of_close,
)
from trainer.planning.trace import StepTrace
from trainer.step.recipe import StepRecipe

SPREADS = (0.5, 1.0)
"""Standard deviations of the log of the samples' durations for which the cost of a bound is predicted."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Efficiencies and rates that are assumed."""

    trainer_efficiency: float = 0.30
    """Share of the peak FLOP/s that the trainer's kernels reach (eager, one kernel for each operation)."""
    prefill_efficiency: float = 0.50
    """The same for an engine's prefill and for large decode batches."""
    decode_bandwidth: float = 0.60
    """Share of the memory bandwidth that a decode step reaches."""
    decode_overhead_s: float = 0.003
    """Time of a decode step in addition to its kernels: scheduling and sampling."""
    network_bytes_per_s: float = 40e9
    """Rate from one GPU to other hosts: a 400 Gbit/s link at 80 %."""
    nvlink_efficiency: float = 0.6
    """Share of NVLink's one-directional rate that collectives reach."""
    host_efficiency: float = 0.8
    """Share of PCIe's rate that copies from pinned memory reach."""
    gloo_bytes_per_s: float = 1.8e9
    """Rate of a push over gloo (docs/results.md, measured on CPUs)."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One job. Times in seconds, rates over the whole job."""

    tokens_per_step: float
    train_s: float
    """Computation of one optimizer step, waiting excluded."""
    generate_s: float
    """Time of all engines for the samples of one step."""
    latency_s: float
    """Time of one sample of mean length."""
    push_s: float
    step_s: float
    """Time from one step to the next."""
    trainer_tokens_per_s: float
    """All tokens that the trainer runs, per second of its computation."""
    engine_tokens_per_s: float
    """Sampled tokens of all engines, while they generate."""
    mfu: float
    """Model FLOPs (recomputation not counted) per second of `train_s` over the peak."""
    running_per_engine: float
    """Sequences that an engine decodes at the same time."""
    trainer_idle: float
    engine_idle: float
    lag: float
    """Expected lag of the oldest token that is trained on, in steps."""
    staleness: tuple[Forecast, ...]
    """What the bound costs with each rule of `buffer.overdue`, for each of SPREADS; empty for
    `max_staleness=0`."""
    staleness_of_close: int
    """The least `max_staleness` with which `buffer.overdue=close` masks at most 5 % of the tokens, for the
    largest of SPREADS."""
    formulas: tuple[str, ...]


def estimate(
    config: Config,
    shape: ModelShape,
    lengths: Lengths,
    placement: Placement,
    trace: StepTrace,
    engine: EngineMemory,
    *,
    assumed: Assumptions,
) -> Estimate:
    """The estimate of a job that fits."""
    formulas: list[str] = []
    num_samples = config.trainer.groups_per_step * config.sampling.group_size
    train_s, mfu = _train_seconds(config, shape, lengths, placement, trace, assumed, formulas)
    push_s = _push_seconds(config, placement, trace, assumed, formulas)
    running, generate_s, latency_s = _generate_seconds(
        config, shape, lengths, placement, trace, engine, assumed, formulas
    )
    step_s = _step_seconds(config, placement, train_s, generate_s, latency_s, push_s, formulas)
    staleness, staleness_of_close = _forecasts(config, lengths, latency_s / step_s, formulas)
    return Estimate(
        tokens_per_step=num_samples * lengths.mean,
        train_s=train_s,
        generate_s=generate_s,
        latency_s=latency_s,
        push_s=push_s,
        step_s=step_s,
        trainer_tokens_per_s=num_samples * lengths.mean / train_s,
        engine_tokens_per_s=num_samples * lengths.response / generate_s,
        mfu=mfu,
        running_per_engine=running,
        trainer_idle=max(0.0, 1 - train_s / step_s),
        engine_idle=max(0.0, 1 - generate_s / step_s),
        lag=_lag(config, train_s, generate_s, latency_s, step_s, staleness, formulas),
        staleness=staleness,
        staleness_of_close=staleness_of_close,
        formulas=tuple(formulas),
    )


def _generate_seconds(
    config: Config,
    shape: ModelShape,
    lengths: Lengths,
    placement: Placement,
    trace: StepTrace,
    engine: EngineMemory,
    assumed: Assumptions,
    formulas: list[str],
) -> tuple[float, float, float]:
    """(sequences that an engine decodes, seconds for a step's samples, seconds for one sample)"""
    gpu, parallel = placement.gpu, config.rollout.gpus_per_engine
    flops_per_s = gpu.flops(str(config.model.dtype)) * assumed.prefill_efficiency
    num_engines = placement.engine_gpus / parallel
    num_samples = config.trainer.groups_per_step * config.sampling.group_size
    context = lengths.prompt + lengths.response / 2
    in_cache = engine.num_tokens / context
    ahead = (config.staleness_cap + 1) * num_samples / num_engines
    running = min(float(config.rollout.max_running), in_cache, ahead)
    formulas.append(
        f"sequences an engine decodes = min(rollout.max_running = {config.rollout.max_running}, KV tokens / "
        f"mean context = {in_cache:.0f}, (max_staleness + 1) x samples of a step / engines = {ahead:.0f}) "
        f"= {running:.0f}"
    )
    weights = trace.num_params * BYTES[str(config.model.dtype)] / parallel
    read_s = (weights + running * context * engine.kv_per_token) / (
        gpu.memory_bytes_per_s * assumed.decode_bandwidth
    )
    flops = (2.0 * trace.num_params + 4.0 * context * shape.attention_size) * running / parallel
    decode_s = assumed.decode_overhead_s + max(read_s, flops / flops_per_s)
    formulas.append(
        f"decode step = {assumed.decode_overhead_s:g} s + max((weights + KV of the running sequences) / "
        f"({assumed.decode_bandwidth:.0%} of {gpu.memory_bytes_per_s / 1e12:g} TB/s), their FLOPs / "
        f"({assumed.prefill_efficiency:.0%} of the peak)) = {decode_s * 1e3:.1f} ms"
    )
    # The samples of a group share the prefill of their prompt.
    prompts = lengths.prompt * config.trainer.groups_per_step
    prefill_s = 2.0 * trace.num_params * prompts / (placement.engine_gpus * flops_per_s)
    rate = num_engines * running / decode_s
    generate_s = num_samples * lengths.response / rate + prefill_s
    latency_s = lengths.response * decode_s
    formulas.append(
        f"generation of a step = {num_samples} samples x {lengths.response:.0f} tokens / {rate:.0f} tokens/s "
        f"+ prefill of {prefill_s:.1f} s = {generate_s:.1f} s; one sample takes {latency_s:.1f} s"
    )
    return running, generate_s, latency_s


def _train_seconds(
    config: Config,
    shape: ModelShape,
    lengths: Lengths,
    placement: Placement,
    trace: StepTrace,
    assumed: Assumptions,
    formulas: list[str],
) -> tuple[float, float]:
    """(seconds of computation of one step, MFU)"""
    peak = placement.gpu.flops(str(config.model.dtype))
    num_samples = config.trainer.groups_per_step * config.sampling.group_size
    tokens = num_samples * lengths.mean
    recipe = StepRecipe.of(config)
    # The critic runs a forward for the values, then a forward and a backward for each of its updates.
    updates = recipe.estimator.critic_updates + 1 / 3 if isinstance(recipe.estimator, Gae) else 1.0
    times = {"critic": updates}
    linear = sum(f * times.get(phase, 1.0) for phase, f in trace.linear_flops.items()) / trace.num_tokens
    attention = sum(f * times.get(phase, 1.0) for phase, f in trace.attention_flops.items())
    if recipe.objective.scope is Scope.BATCH:
        linear += 2.0 * trace.num_params  # one more forward, for the statistics of the whole step
        attention += 2.0 * shape.attention_size
    executed = tokens * linear + num_samples * lengths.mean**2 * attention
    # Forward and backward without recomputation: 6 for each parameter, 6 for each pair of tokens (causal).
    useful = tokens * 6.0 * trace.num_params + num_samples * lengths.mean**2 * 6.0 * shape.attention_size
    compute_s = executed / (trace.world_size * peak * assumed.trainer_efficiency)
    microbatches = math.ceil(tokens / trace.world_size / config.trainer.tokens_per_microbatch)
    rate = (
        placement.gpu.nvlink_bytes_per_s * assumed.nvlink_efficiency
        if placement.trainer_gpus <= GPUS_PER_HOST
        else assumed.network_bytes_per_s
    )
    size = BYTES[str(config.model.dtype)]
    moved = trace.num_params * (2 * size + 4) * (1 - 1 / trace.world_size)
    communicate_s = microbatches * moved / rate
    train_s = max(compute_s, communicate_s)
    mfu = useful / (trace.world_size * peak * train_s)
    formulas.append(
        f"training = max(compute {compute_s:.1f} s, FSDP2 {communicate_s:.1f} s) = {train_s:.1f} s for "
        f"{tokens:.0f} tokens"
    )
    formulas.append(
        f"compute = traced FLOPs {executed:.3g} (with recomputation; attention at the mean length) / "
        f"({trace.world_size} ranks x {assumed.trainer_efficiency:.0%} of {peak / 1e12:g} TFLOP/s)"
    )
    formulas.append(
        f"FSDP2 = {microbatches} micro-batches x {moved / 1e9:.1f} GB (weights gathered twice, gradients "
        f"reduced in float32) / {rate / 1e9:.0f} GB/s, overlapped with compute"
    )
    formulas.append(
        f"MFU = (6 x parameters x tokens + causal attention) = {useful:.3g} FLOPs / (ranks x peak x "
        f"training) = {mfu:.0%}"
    )
    return train_s, mfu


def _push_seconds(
    config: Config, placement: Placement, trace: StepTrace, assumed: Assumptions, formulas: list[str]
) -> float:
    wire, gpu = trace.num_params * BYTES[str(config.model.dtype)], placement.gpu
    # Rank 0 has the buckets in the host's memory; NCCL sends one while the next is copied to its GPU.
    from_host = gpu.host_bytes_per_s * assumed.host_efficiency
    if placement.is_shared or config.weights.backend == "gloo" or config.trainer.device == "cpu":
        name, rate = "gloo", assumed.gloo_bytes_per_s
    elif placement.is_one_host:
        nvlink = gpu.nvlink_bytes_per_s * assumed.nvlink_efficiency
        name, rate = "NCCL over NVLink, from the host's memory", min(nvlink, from_host)
    else:
        name = "NCCL over the network, from the host's memory"
        rate = min(assumed.network_bytes_per_s, from_host)
    push_s = wire / rate
    formulas.append(f"push = {wire / 1e9:.1f} GB / {rate / 1e9:.1f} GB/s ({name}) = {push_s:.1f} s")
    return push_s


def _step_seconds(
    config: Config,
    placement: Placement,
    train_s: float,
    generate_s: float,
    latency_s: float,
    push_s: float,
    formulas: list[str],
) -> float:
    pushed_s = push_s / config.weights.sync_interval
    if placement.is_shared:
        step_s = train_s + generate_s + pushed_s
        formulas.append(f"step = training + generation + push = {step_s:.1f} s: one GPU does both in turn")
    elif config.staleness_cap == 0:
        step_s = train_s + max(generate_s, latency_s) + pushed_s
        formulas.append(
            f"step = training + generation + push = {step_s:.1f} s: max_staleness=0 waits for each other"
        )
    else:
        step_s = max(train_s, generate_s + pushed_s)
        formulas.append(f"step = max(training, generation + push, which pauses engines) = {step_s:.1f} s")
    return step_s


def _lag(
    config: Config,
    train_s: float,
    generate_s: float,
    latency_s: float,
    step_s: float,
    staleness: tuple[Forecast, ...],
    formulas: list[str],
) -> float:
    bound = config.staleness_cap
    if bound == 0:
        formulas.append("lag = 0: max_staleness=0")
        return 0.0
    if config.overdue == "close":
        lag = staleness[-1].lag + config.weights.sync_interval - 1
        lag = min(float(bound), lag)
        formulas.append(
            f"lag = {lag:.1f}, the mean of min(max_staleness = {bound}, steps from a sample's begin to its "
            "training): buffer.overdue=close does not let the engines run ahead"
        )
        return lag
    if generate_s < train_s:
        formulas.append(f"lag = {bound}: the engines are faster, so they run ahead up to max_staleness")
        return float(bound)
    lag = min(float(bound), latency_s / step_s + config.weights.sync_interval)
    formulas.append(
        f"lag = min(max_staleness = {bound}, a sample's time / step + weights.sync_interval) = {lag:.1f}: "
        "the trainer waits for the engines"
    )
    return lag


def _forecasts(
    config: Config, lengths: Lengths, steps_a_sample: float, formulas: list[str]
) -> tuple[tuple[Forecast, ...], int]:
    """What the bound costs for each of SPREADS, and `Estimate.staleness_of_close`."""
    group_size, longest = config.sampling.group_size, max(1.0, lengths.max_response / lengths.response)
    num_samples = config.trainer.groups_per_step * group_size
    durations = [
        Durations(mean=steps_a_sample, spread=spread, longest_over_mean=longest) for spread in SPREADS
    ]
    waiting = [
        least_staleness(
            steps_a_sample=steps_a_sample,
            spread=each.spread,
            samples=num_samples,
            longest_over_mean=longest,
        )
        for each in durations
    ]
    closing = [least_staleness_of_close(each) for each in durations]
    formulas.append(
        f"max_staleness with which neither pool waits for long (buffer.overdue=wait): {waiting[0]} if "
        f"durations of samples are log-normal with a spread of .5, {waiting[1]} with 1; a sample takes "
        f"{steps_a_sample:.2f} steps"
    )
    formulas.append(
        f"max_staleness with which at most {MASKED:.0%} of the tokens are beyond it (buffer.overdue=close, "
        f"which waits for no sample): {closing[0]} with a spread of .5, {closing[1]} with 1"
    )
    if not config.staleness_cap:
        return (), closing[-1]
    found = tuple(
        forecast(
            each,
            samples=num_samples,
            group_size=group_size,
            max_staleness=config.staleness_cap,
            close_after=config.close_after,
        )
        for each in durations
    )
    formulas.extend(
        f"max_staleness={config.staleness_cap} with a spread of {one.spread:g}: wait reaches "
        f"{one.waiting:.0%} of the limit; close reaches {one.closing:.0%}, masks {one.masked:.1%} of the "
        f"tokens, and has a mean lag of {one.lag:.1f} (staleness.close_after={config.close_after})"
        for one in found
    )
    return found, closing[-1]
