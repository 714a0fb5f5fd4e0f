"""Finds what a reader of a report should look at first, by rules over the run's numbers and messages. Pure.

A rule states an observation with numbers; it does not guess at a cause that the files do not show.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from launch.formatting import duration, percent, short
from launch.report.figures import idle_of_engines, num_failures, num_restarts, settled
from launch.report.run import Run
from launch.run_files import mapping, number

_MAX_GAPS = 3
_LONG_GAP_S = 10.0
_NUM_STEPS_JUDGED = 20
"""Fewest steps for rules about shares and means, which are not meaningful in shorter runs."""


def findings(run: Run) -> list[str]:
    """One sentence each, the most serious first. Empty if there is nothing to report."""
    return [*_failures(run), *_pipeline(run), *_learning(run), *_selection(run)]


def _failures(run: Run) -> Iterator[str]:
    if run.status.word in ("failed", "ended"):
        yield f"The run has {'failed' if run.status.word == 'failed' else 'ended'}: {run.status.detail}."
    if run.ledger.problem:
        yield run.ledger.problem + "."
    if run.columns.is_incomplete:
        yield "metrics.jsonl has a line that cannot be read; the steps after it are missing here."
    errors = sum(one.count for one in run.logs.messages if one.level != "WARNING")
    if errors:
        yield f"The logs have {counted(errors, 'error')} (Log messages, below)."
    for step, count in sorted(run.ledger.crashed_steps.items()):
        yield f"Step {step} was begun by {counted(count, 'trainer')} and not completed."
    if restarts := num_restarts(run):
        yield f"{counted(restarts, 'restart')} of processes (Events, below)."
    for step, seconds, median in _gaps(run):
        usual = duration(median)
        yield f"Nothing was trained for {duration(seconds)} before step {step} ended; {usual} is usual."
    lost = [one for one in run.logs.messages if "failed" in one.example and "push of version" in one.example]
    if lost:
        num = sum(one.count for one in lost)
        yield f"{counted(num, 'failure')} of pushes of weights (Log messages, below)."
    scorers = [one for one in run.logs.messages if "another reward model scores samples" in one.example]
    if scorers:
        num = sum(one.count for one in scorers)
        yield f"{counted(num, 'change')} of the reward model that scores samples (Log messages, below)."
    if failed := num_failures(run):
        yield f"{counted(failed, 'failed sample')} (Failed samples, below)."


def counted(count: int, noun: str) -> str:
    """`1 error`, `2 errors`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _gaps(run: Run) -> list[tuple[int, float, float]]:
    """(step, seconds, median) of the longest times between two steps that are far above the median."""
    between = np.diff(run.columns.times_s)
    if not len(between) or not np.isfinite(between).any():
        return []
    median = float(np.nanmedian(between))
    order = np.argsort(-np.nan_to_num(between))[:_MAX_GAPS]
    return [
        (int(run.columns.steps[at + 1]), float(between[at]), median)
        for at in sorted(order)
        if between[at] > max(_LONG_GAP_S, 10 * median)
    ]


def _pipeline(run: Run) -> Iterator[str]:
    if run.is_offline or len(run.columns.steps) < _NUM_STEPS_JUDGED:
        return
    trainer, engines = settled(run, "trainer idle"), idle_of_engines(run)
    if trainer is not None and trainer > 0.3:
        too = "" if engines is None else f", and the engines had nothing to decode for {percent(engines)}"
        yield f"The trainer waited for data for {percent(trainer)} of the time{too}."
    elif engines is not None and engines > 0.3:
        yield f"The engines had nothing to decode for {percent(engines)} of the time: the trainer is slower."
    held_back_s, seconds = run.held_back_s, run.seconds
    if held_back_s and seconds and held_back_s > 0.1 * seconds:
        yield (
            f"For {percent(held_back_s / seconds)} of the time the trainer waited for the slowest samples of "
            "groups whose complete samples would have filled its step (buffer.overdue=close trains on those)."
        )
    masked = number(run.closing.get("tokens_masked_share"))
    if masked and masked > 0.1:
        yield f"{percent(masked)} of the tokens of trained samples were beyond the staleness bound."
    issued, dropped = sum(run.ledger.tickets.values()), run.drops
    if issued and sum(dropped.values()) > 0.05 * issued:
        worst = max(dropped, key=lambda name: dropped[name])
        share = percent(sum(dropped.values()) / issued)
        yield f"{share} of the groups were dropped, most as {worst} ({dropped[worst]:,})."
    bound, lag = run.columns.tail_mean("max_staleness"), run.columns.tail_mean("lag_mean")
    if bound and lag is not None and lag > 0.9 * bound:
        yield f"The mean lag ({short(lag)}) is near the bound ({short(bound)})."


def _learning(run: Run) -> Iterator[str]:
    rows = run.columns
    losses = rows.get("loss")
    unknown = int(np.isnan(losses).sum())
    if rows.has("loss") and unknown:
        at = int(rows.steps[int(np.flatnonzero(np.isnan(losses))[0])])
        yield f"The loss is not finite in {unknown:,} steps, first in step {at}."
    if run.is_offline or len(rows.steps) < _NUM_STEPS_JUDGED:
        return
    ess = rows.tail_mean("ess_ratio")
    if ess is not None and ess < 0.3:
        yield f"The effective sample size is {percent(ess)} of the sequences in the last tenth of the steps."
    first, last = rows.head_mean("entropy"), rows.tail_mean("entropy")
    if first and last is not None and last < 0.1 * first:
        yield f"The entropy fell from {short(first)} to {short(last)} nats."
    groups, flat = rows.tail_mean("num_groups"), rows.tail_mean("zero_advantage_groups")
    if groups and flat is not None and flat > 0.5 * groups:
        yield f"{percent(flat / groups)} of the groups have no advantage in the last tenth of the steps."
    truncated = rows.tail_mean("truncated_fraction")
    if truncated is not None and truncated > 0.2:
        yield f"A limit ended {percent(truncated)} of the samples in the last tenth of the steps."
    first, last = rows.head_mean("reward_mean"), rows.tail_mean("reward_mean")
    if first is not None and last is not None and last < first - 0.05:
        yield f"The reward fell from {short(first)} to {short(last)}."
    gold_first, gold_last = rows.head_mean("reward_gold_mean"), rows.tail_mean("reward_gold_mean")
    if first is None or last is None or gold_first is None or gold_last is None:
        return
    if last > first and gold_last < gold_first:
        yield (
            f"The trained reward rose from {short(first)} to {short(last)}, and the gold reward fell from "
            f"{short(gold_first)} to {short(gold_last)}."
        )


def _selection(run: Run) -> Iterator[str]:
    offered, trained = mapping(run.selection.get("offered")), mapping(run.selection.get("trained"))
    for name, what in (("tokens_mean", "length"), ("reward_mean", "reward")):
        a, b = number(offered.get(name)), number(trained.get(name))
        if a is not None and b is not None and abs(b - a) > max(0.05 * abs(a), 0.01):
            yield f"The mean {what} of trained samples is {short(b)}, that of offered samples {short(a)}."
