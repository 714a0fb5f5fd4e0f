"""Shows the plan of a job as a table, as formulas, and as JSON."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from areal_like.config.default_objective import as_setting
from trainer.planning.advice import AdvisedChange
from trainer.planning.estimate import ASSUMED
from trainer.planning.gpus import GIB
from trainer.planning.memory import CONTEXT_BYTES, FRAGMENTATION, HOST_PROCESS_BYTES, gib
from trainer.planning.planner import Plan
from trainer.planning.staleness import MASKED, Forecast

_WIDTH = 110
_IDLE_BELOW = 0.9
"""Share of the limit below which a rule that closes groups is recommended."""
_UNEVEN = 1.1
"""Rows of rank 0 over the mean, from which on the report says so."""
_NO_CHANGE = "No setting that plan knows helps: use a smaller model, shorter sequences or larger GPUs."


def text_of(plan: Plan, changes: Sequence[AdvisedChange], *, explain: bool) -> str:
    """The report for a terminal. `explain`: with all formulas and assumptions."""
    output = io.StringIO()
    console = Console(file=output, width=_WIDTH, highlight=False, markup=False)
    for line in _job_lines(plan):
        console.print(line)
    console.print()
    console.print(_memory_table(plan))
    console.print()
    for line in (*_verdict_lines(plan, changes), *_uneven_lines(plan)):
        console.print(line)
    if plan.estimate is not None:
        console.print()
        console.print(_estimate_table(plan))
        for line in _staleness_lines(plan):
            console.print()
            console.print(line)
    console.print()
    if explain:
        for line in _explanations(plan):
            console.print(line)
    else:
        console.print("--explain shows every formula and assumption.")
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def json_of(plan: Plan, changes: Sequence[AdvisedChange]) -> dict[str, Any]:
    """The report as plain values; memory in bytes, times in seconds."""
    return {
        "fits": plan.fits,
        "problems": plan.memory.problems,
        "gpus": plan.placement.text,
        "model": {
            "path": plan.model_path,
            "shape_from": plan.shape.source,
            "num_params": plan.trace.num_params,
            "num_trained": plan.trace.num_trained,
        },
        "objective": plan.config.objective,
        "objective_choice": plan.objective_choice,
        "lengths": dataclasses.asdict(plan.lengths),
        "routes": None
        if plan.experts is None
        else {
            "bytes_per_token": plan.experts.routes.bytes_per_token,
            "step": plan.routes_bytes,
            "ledger": plan.ledger_steps * plan.routes_bytes,
        },
        "memory": {
            "gpu": plan.memory.gpu_bytes,
            "trainer": plan.memory.trainer,
            "trainer_total": plan.memory.trainer_total,
            "engine": dataclasses.asdict(plan.memory.engine)
            | {"total": plan.memory.engine.total, "num_tokens": plan.memory.engine.num_tokens},
            "host": plan.memory.host,
            "host_bytes": plan.memory.host_bytes,
            "rank_host": plan.memory.rank_host,
        },
        "changes": [{"setting": change.text, "fits": change.plan.fits} for change in changes],
        "estimate": None if plan.estimate is None else dataclasses.asdict(plan.estimate),
        "assumptions": dataclasses.asdict(ASSUMED),
    }


def _job_lines(plan: Plan) -> list[str]:
    config, placement = plan.config, plan.placement
    parallel = config.rollout.gpus_per_engine
    where = "on the same GPUs" if placement.is_shared else "on GPUs of their own"
    lengths = plan.lengths
    return [
        f"model      {plan.trace.num_params / 1e9:.2f} B parameters, {plan.shape.source}",
        *_adapter_lines(plan),
        *_routes_lines(plan),
        f"GPUs       {placement.num_gpus} {placement.gpu.name} with {placement.gpu.memory_bytes / 1e9:g} GB: "
        f"{config.rollout.num_servers} engines of {parallel} GPU{'s' * (parallel > 1)}, "
        f"{placement.trainer_gpus} trainer ranks, {where}",
        f"settings   {config.model.dtype}, "
        f"gradient_checkpointing={str(config.trainer.gradient_checkpointing).lower()}, "
        f"tokens_per_microbatch={config.trainer.tokens_per_microbatch}, "
        f"logprob_chunk_tokens={config.trainer.logprob_chunk_tokens}"
        + (", offload_activations" if config.trainer.offload_activations else "")
        + (", offload_optimizer" if config.trainer.offload_optimizer else "")
        + (f", context_parallel={plan.trace.context_parallel}" if plan.trace.context_parallel > 1 else "")
        + (f", replicas={plan.trace.replicas}" if plan.trace.replicas > 1 else ""),
        f"sequences  up to {lengths.context} tokens; assumed means: prompt {lengths.prompt:.0f}, response "
        f"{lengths.response:.0f} (--prompt-tokens, --response-tokens)",
        f"objective  {plan.objective_choice or as_setting(plan.config.objective)}",
    ]


def _adapter_lines(plan: Plan) -> list[str]:
    lora, trace = plan.config.model.lora, plan.trace
    if not lora.is_on:
        return []
    targets = lora.targets if isinstance(lora.targets, str) else ", ".join(lora.targets)
    share = trace.num_adapter / trace.num_params
    pushed = "the adapter alone" if plan.config.num_adapters else "all weights, merged with the adapter"
    return [
        f"adapter    {trace.num_adapter / 1e6:.1f} M parameters ({share:.2%}), rank {lora.rank}, {targets}",
        f"push       {pushed}: {plan.pushed_bytes / 1e9:.3g} GB",
    ]


def _routes_lines(plan: Plan) -> list[str]:
    if plan.experts is None:
        return []
    step, steps = plan.routes_bytes, plan.ledger_steps
    return [
        f"routes     {plan.experts.routes.bytes_per_token} bytes a token: {step / 1e9:.3g} GB a step to the "
        f"buffer, and from it to the trainer; up to {steps * step / 1e9:.3g} GB in the ledger"
    ]


def _memory_table(plan: Plan) -> Table:
    memory, engine = plan.memory, plan.memory.engine
    sequences = engine.num_sequences(plan.lengths.context)
    cache = f"  KV cache: {engine.num_tokens} tokens, {sequences:.0f} sequences of the longest context"
    table = Table(box=None, pad_edge=False, title="memory", title_justify="left")
    table.add_column("part", min_width=44)
    table.add_column("GiB", justify="right")
    for name, size in (
        ("one trainer rank, traced at its peak", None),
        *((f"  {part}", size) for part, size in memory.trainer.items()),
        ("  total", memory.trainer_total),
        ("one engine GPU", None),
        ("  weights", engine.weights),
        *[("  encoders of other inputs", engine.encoders)] * bool(engine.encoders),
        *[(f"  adapters: {plan.config.num_adapters + 1} slots", engine.adapters)] * bool(engine.adapters),
        (cache, engine.kv_at_least),
        ("  activations, CUDA graphs", engine.other),
        (f"one GPU ({plan.placement.gpu.name})", memory.gpu_bytes),
        ("memory of the host of rank 0", memory.host_total),
        *((f"  {part}", size) for part, size in memory.host.items()),
        ("  of rank 0 alone", sum(memory.rank_host.values())),
        ("  of another rank", memory.other_rank_host),
        ("one host", memory.host_bytes),
    ):
        table.add_row(name, "" if size is None else f"{size / GIB:.1f}")
    return table


def _verdict_lines(plan: Plan, changes: Sequence[AdvisedChange]) -> list[str]:
    if plan.fits:
        free = plan.memory.trainer_room - plan.memory.trainer_total
        on_host = plan.memory.host_bytes - plan.memory.host_total
        return [f"It fits: a trainer rank's GPU has {gib(free)} to spare, the host of rank 0 {gib(on_host)}."]
    lines = ["It does not fit:"]
    lines += [f"  {problem}" for problem in plan.memory.problems]
    if not changes:
        return [*lines, _NO_CHANGE]
    lines.append("Changes, each traced together with those above it:")
    for change in changes:
        after = change.plan.memory
        verdict = "it fits" if change.plan.fits else "not yet"
        lines.append(
            f"  {change.text:<44} a rank needs {gib(after.trainer_total)}, "
            f"KV cache of {after.engine.num_tokens} tokens: {verdict}"
        )
    return lines


def _uneven_lines(plan: Plan) -> list[str]:
    trace = plan.trace
    if trace.unevenness < _UNEVEN:
        return []
    return [
        f"Rank 0 has {trace.unevenness:.2f} times the mean of the ranks' rows: FSDP2 divides the first "
        "dimension of each parameter, of experts their number. Choose a trainer.world_size that divides it."
    ]


def _estimate_table(plan: Plan) -> Table:
    e = plan.estimate
    assert e is not None
    table = Table(box=None, pad_edge=False, title="estimate (not measured)", title_justify="left")
    table.add_column("quantity", min_width=44)
    table.add_column("value", justify="right")
    for name, value in (
        ("tokens in a step", f"{e.tokens_per_step:.3g}"),
        ("training of a step", f"{e.train_s:.1f} s"),
        ("generation of a step's samples", f"{e.generate_s:.1f} s"),
        ("step", f"{e.step_s:.1f} s"),
        ("one sample of mean length", f"{e.latency_s:.1f} s"),
        ("push", f"{e.push_s:.2f} s"),
        ("trainer, tokens/s", f"{e.trainer_tokens_per_s:.0f}"),
        ("engines, sampled tokens/s", f"{e.engine_tokens_per_s:.0f}"),
        ("sequences that an engine decodes", f"{e.running_per_engine:.0f}"),
        ("MFU of the trainer while it computes", f"{e.mfu:.0%}"),
        ("trainer idle", f"{e.trainer_idle:.0%}"),
        ("engines idle", f"{e.engine_idle:.0%}"),
        ("expected lag, steps", f"{e.lag:.1f}"),
        *_staleness_rows(e.staleness),
    ):
        table.add_row(f"  {name}", value)
    return table


def _staleness_rows(forecasts: Sequence[Forecast]) -> list[tuple[str, str]]:
    """Rows with one number for each spread of the samples' durations."""
    if not forecasts:
        return []
    spreads = " and ".join(f"{one.spread:g}" for one in forecasts)
    return [
        (name, ", ".join(f"{value:.0%}" for value in values))
        for name, values in (
            (f"throughput / limit with wait, spread {spreads}", [one.waiting for one in forecasts]),
            ("throughput / limit with close", [one.closing for one in forecasts]),
            ("tokens beyond max_staleness with close", [one.masked for one in forecasts]),
        )
    ]


def _staleness_lines(plan: Plan) -> list[str]:
    """What to change about the staleness bound, if its rule costs much with the larger spread."""
    e, config = plan.estimate, plan.config
    if e is None or not e.staleness:
        return []
    worst = e.staleness[-1]
    if config.overdue == "close":
        if worst.masked <= MASKED:
            return []
        return [
            f"max_staleness={e.staleness_of_close} masks at most {MASKED:.0%} of the tokens instead of "
            f"{worst.masked:.0%} (spread {worst.spread:g}); staleness.close_after={config.close_after} keeps "
            "the mean lag near what it is."
        ]
    if worst.waiting >= _IDLE_BELOW:
        return []
    cost = (
        f"buffer.overdue={config.overdue} makes steps wait for the slowest samples: {worst.waiting:.0%} of "
        f"the limit with a spread of {worst.spread:g}."
        if config.overdue == "wait"
        else "buffer.overdue=drop throws away samples that are too old."
    )
    if contradiction := config.contradicts_close[0]:
        return [f"{cost} buffer.overdue=close would not, but {contradiction}."]
    larger = (
        ""
        if worst.masked <= MASKED
        else f"; at most {MASKED:.0%} with max_staleness={e.staleness_of_close} "
        f"staleness.close_after={config.close_after}"
    )
    return [
        f"{cost} buffer.overdue=close reaches {worst.closing:.0%} and masks {worst.masked:.0%} of the "
        f"tokens{larger}."
    ]


def _explanations(plan: Plan) -> list[str]:
    margin = f"{1 + FRAGMENTATION:g} + {gib(CONTEXT_BYTES)}"
    lines = [
        "formulas",
        "  a rank's memory = the largest total of the tensors of a traced step (fake tensors, the job's",
        f"    world size, the full micro-batch whose attention pads most) x {margin}",
        "  KV cache = static share x GPU memory - (weights + encoders) / tp - slots of adapters",
        "  KV of a token = 2 x layers x KV heads x head size x bytes / tp; with multi-head latent attention",
        "    layers x (kv_lora_rank + qk_rope_head_dim) x bytes in SGLang; twice the larger of the two, not",
        "    their sum, in the embedded engine",
    ]
    if plan.estimate is not None:
        lines += [f"  {formula}" for formula in plan.estimate.formulas]
    lines += [
        "assumptions, not measured on GPUs",
        f"  CUDA context, cuBLAS and NCCL {gib(CONTEXT_BYTES)} a GPU, fragmentation {FRAGMENTATION:.0%}, "
        f"host memory {gib(HOST_PROCESS_BYTES)} a process, {gib(plan.memory.host_bytes)} a host "
        "(--host-memory)",
    ]
    for field in dataclasses.fields(ASSUMED):
        lines.append(f"  {field.name} = {getattr(ASSUMED, field.name):g}")
    return lines
