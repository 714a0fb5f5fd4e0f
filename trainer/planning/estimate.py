"""Estimates of time, from FLOPs and bytes over a GPU's published rates times assumed efficiencies.

No number here is measured: `Assumptions` lists the assumptions, and `Estimate.formulas` the derivation of
each number. An estimate is for choosing between settings, not for predicting a date.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.advantages.gae import Gae
from trainer.batching.scope import Scope
from trainer.planning.engines import EngineMemory
from trainer.planning.gpus import GPUS_PER_HOST
from trainer.planning.staleness import (
    MASKED,
    Durations,
    Forecast,
    forecast,
    least_staleness,
    least_staleness_of_close,
)
from trainer.planning.tensor_memory import INPUTS_ON_HOST, MOMENTS_ON_HOST
from trainer.planning.trace import PlannedJob
from trainer.step.recipe import StepRecipe

SPREADS = (0.5, 1.0)
"""Standard deviations of the log of the samples' durations for which the cost of a bound is predicted."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumed efficiencies and rates."""

    trainer_efficiency: float = 0.30
    """Share of the peak FLOP/s that the trainer's kernels reach (eager, one kernel for each operation). With
    Liger 0.39 was measured: Qwen3-1.7B on one H100, benchmarks/results/gpu/step_h100.json."""
    fa3_attention: float = 0.45
    """Time of attention with FlashAttention 3, relative to torch's own kernel (estimated from rates on an
    H100: 31 instead of 69 microseconds a token with sequences of 16,384 tokens and Qwen3-8B)."""
    liger_saving: float = 0.11
    """Share of a step's computation that Liger's norms, rotary embedding and SwiGLU save (estimated from
    their memory traffic: 25 of 227 microseconds a token of the same step)."""
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


ASSUMED = Assumptions()


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
    """What the bound costs with `buffer.overdue=wait` and with `close`, for each of SPREADS; empty for
    `max_staleness=0`."""
    staleness_of_close: int
    """The least `max_staleness` with which `buffer.overdue=close` masks at most 5 % of the tokens, for the
    largest of SPREADS."""
    formulas: tuple[str, ...]


def estimate(job: PlannedJob, engine: EngineMemory) -> Estimate:
    """The estimate of a job that fits."""
    lengths, num_samples = job.lengths, job.num_samples
    formulas: list[str] = []
    train_s, mfu = _train(job, formulas)
    push_s = _push_seconds(job, formulas)
    running, generate_s, latency_s = _generate(job, engine, formulas)
    step_s = _step_seconds(job, formulas, train_s, generate_s, latency_s, push_s)
    if job.routes_bytes:
        routes_s = 2 * job.routes_bytes / ASSUMED.network_bytes_per_s
        formulas.append(
            f"routes = {job.routes_bytes / 1e9:.3g} GB a step, which the buffer receives and sends in "
            f"{routes_s:.2g} s at {ASSUMED.network_bytes_per_s / 1e9:.0f} GB/s; not part of a step"
        )
    staleness, staleness_of_close = _forecasts(job, formulas, latency_s / step_s)
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
        lag=_lag(
            job,
            formulas,
            waits_for_engines=generate_s >= train_s,
            steps_a_sample=latency_s / step_s,
            staleness=staleness,
        ),
        staleness=staleness,
        staleness_of_close=staleness_of_close,
        formulas=tuple(formulas),
    )


def _generate(job: PlannedJob, engine: EngineMemory, formulas: list[str]) -> tuple[float, float, float]:
    """(sequences that an engine decodes, seconds for a step's samples, seconds for one sample)"""
    config, lengths, gpu = job.config, job.lengths, job.placement.gpu
    parallel = config.rollout.gpus_per_engine
    flops_per_s = job.peak * ASSUMED.prefill_efficiency
    num_engines = job.placement.engine_gpus / parallel
    context = lengths.prompt + lengths.response / 2
    in_cache = engine.num_sequences(context)
    ahead = (config.staleness_cap + 1) * job.num_samples / num_engines
    running = min(float(config.rollout.max_running), in_cache, ahead)
    formulas.append(
        f"sequences an engine decodes = min(rollout.max_running = {config.rollout.max_running}, KV tokens "
        f"/ mean context = {in_cache:.0f}, (max_staleness + 1) x samples of a step / engines = "
        f"{ahead:.0f}) = {running:.0f}"
    )
    weights = job.trace.num_params * job.param_bytes / parallel
    # A state is read and written for each token.
    cached_bytes = context * engine.kv_per_token + 2 * engine.state
    read_bytes = weights + engine.adapters + running * cached_bytes
    read_s = read_bytes / (gpu.memory_bytes_per_s * ASSUMED.decode_bandwidth)
    of_position = job.shape.decode_flops_per_position(engine=config.rollout.engine)
    flops = (2.0 * job.trace.num_params + context * of_position) * running / parallel
    decode_s = ASSUMED.decode_overhead_s + max(read_s, flops / flops_per_s)
    adapters = "all slots of adapters + " if engine.adapters else ""
    formulas.append(
        f"decode step = {ASSUMED.decode_overhead_s:g} s + max((weights + {adapters}KV of the running "
        f"sequences) / ({ASSUMED.decode_bandwidth:.0%} of {gpu.memory_bytes_per_s / 1e12:g} TB/s), "
        f"their FLOPs / ({ASSUMED.prefill_efficiency:.0%} of the peak)) = {decode_s * 1e3:.1f} ms"
    )
    # The samples of a group share the prefill of their prompt.
    prompts = lengths.prompt * config.trainer.groups_per_step
    prefill_s = 2.0 * job.trace.num_params * prompts / (job.placement.engine_gpus * flops_per_s)
    rate = num_engines * running / decode_s
    generate_s = job.num_samples * lengths.response / rate + prefill_s
    latency_s = lengths.response * decode_s
    formulas.append(
        f"generation of a step = {job.num_samples} samples x {lengths.response:.0f} tokens / {rate:.0f} "
        f"tokens/s + prefill of {prefill_s:.1f} s = {generate_s:.1f} s; one sample takes {latency_s:.1f} s"
    )
    return running, generate_s, latency_s


def _train(job: PlannedJob, formulas: list[str]) -> tuple[float, float]:
    """(seconds of computation of one step, MFU)"""
    trace, mean = job.trace, job.lengths.mean
    tokens = job.num_samples * mean
    recipe = StepRecipe.of(job.config)
    # The critic runs a forward for the values, then a forward and a backward for each of its updates; the
    # reward model of advantage=prime a forward for the rewards, then a forward and a backward.
    updates = recipe.estimator.critic_updates + 1 / 3 if isinstance(recipe.estimator, Gae) else 1.0
    times = {"critic": updates, "prm": 4 / 3}
    linear = sum(f * times.get(phase, 1.0) for phase, f in trace.linear_flops.items()) / trace.num_tokens
    attention = sum(f * times.get(phase, 1.0) for phase, f in trace.attention_flops.items())
    if recipe.objective.scope is Scope.BATCH:
        linear += 2.0 * trace.num_params  # one more forward, for the statistics of the whole step
        attention += 2.0 * job.shape.attention_size
    executed = tokens * linear + tokens * mean * attention
    # Forward and backward without recomputation: 6 for each parameter, 4 for a frozen one, and 6 for each
    # pair of tokens (causal).
    of_weights = 4.0 * (trace.num_params + trace.num_adapter) + 2.0 * trace.num_trained
    useful = tokens * of_weights + tokens * mean * 6.0 * job.shape.attention_size
    compute_s = executed / (trace.world_size * job.peak * ASSUMED.trainer_efficiency)
    microbatches = math.ceil(tokens / trace.num_data / job.config.trainer.tokens_per_microbatch)
    # The ranks of a replica are neighbors, so a replica is on one host if hosts hold whole ones.
    is_one_host = job.placement.trainer_gpus <= GPUS_PER_HOST or GPUS_PER_HOST % trace.num_shards == 0
    rate = _nvlink(job) if is_one_host else ASSUMED.network_bytes_per_s
    gathered = 2.0 * job.param_bytes * (trace.num_params + trace.num_adapter)
    moved = (gathered + 4.0 * trace.num_trained) * (1 - 1 / trace.num_shards)
    communicate_s = microbatches * moved / rate
    exchange_s = _exchange_seconds(job, formulas, tokens=tokens)
    replicas_s = _replicas_seconds(job, formulas)
    offload_s = _offload_seconds(job, formulas, microbatches=microbatches)
    apart_s = exchange_s + replicas_s + offload_s
    train_s = max(compute_s, communicate_s) + apart_s
    if job.config.trainer.kernels == "auto" and job.config.model.dtype == "bfloat16":
        trainer = job.config.trainer
        has_fa3 = job.placement.gpu.name in ("H100", "H200") and trainer.attention != "rectangles"
        liger = 0.0 if trainer.compile else ASSUMED.liger_saving
        share = tokens * mean * attention / executed if has_fa3 else 0.0
        saved = liger + share * (1 - ASSUMED.fa3_attention)
        faster_s = max(compute_s * (1 - saved), communicate_s) + apart_s
        formulas.append(
            f"training = {faster_s:.1f} s instead of {train_s:.1f} s with trainer.kernels=auto, if the "
            f"packages are installed. UNPROVEN: assumes that Liger saves {liger:.0%} of the computation and "
            f"FlashAttention 3 {saved - liger:.0%}; no other number here assumes either"
        )
    mfu = useful / (trace.world_size * job.peak * train_s)
    per_parameter = "4" if trace.num_adapter else "6"
    formulas += [
        f"training = max(compute {compute_s:.1f} s, FSDP2 {communicate_s:.1f} s)"
        + (f" + context groups {exchange_s:.1f} s" if exchange_s else "")
        + (f" + replicas {replicas_s:.1f} s" if replicas_s else "")
        + (f" + copies to the host and back {offload_s:.1f} s" if offload_s else "")
        + f" = {train_s:.1f} s for {tokens:.0f} tokens",
        f"compute = traced FLOPs {executed:.3g} (with recomputation; attention at the mean length) / "
        f"({trace.world_size} ranks x {ASSUMED.trainer_efficiency:.0%} of {job.peak / 1e12:g} TFLOP/s)",
        f"FSDP2 = {microbatches} micro-batches x {moved / 1e9:.1f} GB (weights gathered twice, gradients "
        f"reduced in float32) / {rate / 1e9:.0f} GB/s, overlapped with compute",
        f"MFU = ({per_parameter} x parameters x tokens + causal attention) = {useful:.3g} FLOPs / (ranks "
        f"x peak x training) = {mfu:.0%}",
    ]
    return train_s, mfu


def _exchange_seconds(job: PlannedJob, formulas: list[str], *, tokens: float) -> float:
    """Time of the all-to-alls of context groups in a step, which are not overlapped with compute."""
    trace, shape = job.trace, job.shape
    if (size := trace.context_parallel) == 1:
        return 0.0
    sizes = shape.head_dim + shape.value_dim
    values = shape.num_attention_layers * (shape.num_heads + shape.num_kv_heads) * sizes
    # Forward, backward, and the forward again where activations are recomputed.
    passes = 3 if job.config.trainer.gradient_checkpointing else 2
    moved = tokens * values * job.param_bytes * passes * (1 - 1 / size) / trace.world_size
    rate = _nvlink(job) if size <= GPUS_PER_HOST else ASSUMED.network_bytes_per_s
    formulas.append(
        f"context groups = {moved / 1e9:.1f} GB of queries, keys, values and outputs from each rank "
        f"({size} ranks a group, {passes} passes) / {rate / 1e9:.0f} GB/s = {moved / rate:.1f} s"
    )
    return moved / rate


def _replicas_seconds(job: PlannedJob, formulas: list[str]) -> float:
    """Time of the sum of a step's gradients over the replicas, which is not overlapped with compute."""
    trace = job.trace
    if trace.replicas == 1:
        return 0.0
    moved = 4.0 * trace.num_trained / trace.num_shards * 2 * (1 - 1 / trace.replicas)
    is_one_host = job.placement.trainer_gpus <= GPUS_PER_HOST
    rate = _nvlink(job) if is_one_host else ASSUMED.network_bytes_per_s
    formulas.append(
        f"replicas = {moved / 1e9:.1f} GB of a step's gradients (float32) from each rank, summed over "
        f"{trace.replicas} replicas of {trace.num_shards} ranks / {rate / 1e9:.0f} GB/s = "
        f"{moved / rate:.1f} s"
    )
    return moved / rate


def _offload_seconds(job: PlannedJob, formulas: list[str], *, microbatches: int) -> float:
    """Time of the copies to the host and back in a step, which are not overlapped with compute."""
    on_host = job.trace.on_host_bytes
    moved = 2.0 * (microbatches * on_host.get(INPUTS_ON_HOST, 0) + on_host.get(MOMENTS_ON_HOST, 0))
    if not moved:
        return 0.0
    rate = job.placement.gpu.host_bytes_per_s * ASSUMED.host_efficiency
    formulas.append(
        f"copies to the host and back = {moved / 1e9:.1f} GB of each rank (layers' inputs of {microbatches} "
        f"micro-batches, Adam's moments) / {rate / 1e9:.0f} GB/s = {moved / rate:.1f} s"
    )
    return moved / rate


def _nvlink(job: PlannedJob) -> float:
    """Bytes per second that collectives reach on one host."""
    return job.placement.gpu.nvlink_bytes_per_s * ASSUMED.nvlink_efficiency


def _push_seconds(job: PlannedJob, formulas: list[str]) -> float:
    """Seconds of a push of all weights, or of an adapter alone."""
    config = job.config
    through_server = config.num_adapters and config.rollout.engine == "sglang"  # which receives it on its CPU
    # Rank 0 has the buckets in the host's memory; NCCL sends one while the next is copied to its GPU.
    from_host = job.placement.gpu.host_bytes_per_s * ASSUMED.host_efficiency
    is_on_cpu = config.weights.backend == "gloo" or config.trainer.device == "cpu"
    if job.placement.is_shared or is_on_cpu or through_server:
        name, rate = "gloo", ASSUMED.gloo_bytes_per_s
    elif job.placement.is_one_host:
        name, rate = "NCCL over NVLink, from the host's memory", min(_nvlink(job), from_host)
    else:
        name = "NCCL over the network, from the host's memory"
        rate = min(ASSUMED.network_bytes_per_s, from_host)
    num_bytes = job.pushed_bytes
    push_s = num_bytes / rate
    delta = ""
    if config.weights.delta != "off":
        takes_all = config.weights.delta_with(config.rollout.engine) == "off"
        delta = ", all bytes: SGLang takes no deltas" if takes_all else ", all bytes, as after a join"
    formulas.append(
        f"push = {num_bytes / 1e9:.1f} GB / {rate / 1e9:.1f} GB/s ({name}{delta}) = {push_s:.1f} s"
    )
    return push_s


def _step_seconds(
    job: PlannedJob, formulas: list[str], train_s: float, generate_s: float, latency_s: float, push_s: float
) -> float:
    """Seconds from one step to the next."""
    pushed_s = push_s / job.config.weights.sync_interval
    if job.placement.is_shared:
        step_s = train_s + generate_s + pushed_s
        text = f"training + generation + push = {step_s:.1f} s: one GPU does both in turn"
    elif job.config.staleness_cap == 0:
        step_s = train_s + max(generate_s, latency_s) + pushed_s
        text = f"training + generation + push = {step_s:.1f} s: max_staleness=0 waits for each other"
    else:
        step_s = max(train_s, generate_s + pushed_s)
        text = f"max(training, generation + push, which pauses engines) = {step_s:.1f} s"
    formulas.append(f"step = {text}")
    return step_s


def _lag(
    job: PlannedJob,
    formulas: list[str],
    *,
    waits_for_engines: bool,
    steps_a_sample: float,
    staleness: tuple[Forecast, ...],
) -> float:
    """Expected lag of the oldest token that is trained on, in steps."""
    bound, interval = job.config.staleness_cap, job.config.weights.sync_interval
    if bound == 0:
        lag, text = 0.0, "0: max_staleness=0"
    elif job.config.overdue == "close":
        lag = min(float(bound), staleness[-1].lag + interval - 1)
        text = (
            f"{lag:.1f}, the mean of min(max_staleness = {bound}, steps from a sample's start to its "
            "training): buffer.overdue=close does not let the engines run ahead"
        )
    elif not waits_for_engines:
        lag = float(bound)
        text = f"{bound}: the engines are faster, so they run ahead up to max_staleness"
    else:
        lag = min(float(bound), steps_a_sample + interval)
        text = (
            f"min(max_staleness = {bound}, a sample's time / step + weights.sync_interval) = {lag:.1f}: "
            "the trainer waits for the engines"
        )
    formulas.append(f"lag = {text}")
    return lag


def _forecasts(
    job: PlannedJob, formulas: list[str], steps_a_sample: float
) -> tuple[tuple[Forecast, ...], int]:
    """What the bound costs for each of SPREADS, and `Estimate.staleness_of_close`."""
    config, num_samples = job.config, job.num_samples
    longest = max(1.0, job.lengths.max_response / job.lengths.response)
    durations = [
        Durations(mean=steps_a_sample, spread=spread, longest_over_mean=longest) for spread in SPREADS
    ]
    waiting = [
        least_staleness(
            steps_a_sample=steps_a_sample,
            spread=spread,
            samples=num_samples,
            longest_over_mean=longest,
        )
        for spread in SPREADS
    ]
    closing = [least_staleness_of_close(each) for each in durations]
    formulas += [
        f"max_staleness with which neither pool waits for long (buffer.overdue=wait): {waiting[0]} if "
        f"durations of samples are log-normal with a spread of .5, {waiting[1]} with 1; a sample takes "
        f"{steps_a_sample:.2f} steps",
        f"max_staleness with which at most {MASKED:.0%} of the tokens are beyond it (buffer.overdue=close, "
        f"which waits for no sample): {closing[0]} with a spread of .5, {closing[1]} with 1",
    ]
    if not config.staleness_cap:
        return (), closing[-1]
    found = tuple(
        forecast(
            each,
            samples=num_samples,
            group_size=config.sampling.group_size,
            max_staleness=config.staleness_cap,
            close_after=config.close_after,
        )
        for each in durations
    )
    formulas += [
        f"max_staleness={config.staleness_cap} with a spread of {one.spread:g}: wait reaches "
        f"{one.waiting:.0%} of the limit; close reaches {one.closing:.0%}, masks {one.masked:.1%} of the "
        f"tokens, and has a mean lag of {one.lag:.1f} (staleness.close_after={config.close_after})"
        for one in found
    ]
    return found, closing[-1]
