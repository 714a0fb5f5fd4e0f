"""The figures of a run, each with a name, for the head of a report and for the comparison of two. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from areal_like.failures import FailureKind
from areal_like.selection import failures_of
from launch.formatting import duration, percent, short
from launch.report.charts import generated_rate, idle_of_engines, idle_of_trainer
from launch.report.columns import mean
from launch.report.run import Evaluation, Run
from launch.run_files import mapping, number

_WARM_UP = 10
"""First steps, left out of idle shares and rates if there are more: the pipeline is still filling."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a run."""

    name: str
    value: float | None
    """None where the run has none."""
    text: str
    note: str = ""
    is_key: bool = False
    """True if it is among the large numbers at the head."""


def figures(run: Run) -> list[Figure]:
    """All figures of a run, in the order of the tables. Those without a value have the text `-`."""
    rows = run.columns
    found = [
        _plain("steps", float(len(rows.steps)), f"{len(rows.steps):,}", note=_planned(run), is_key=True),
        _plain("time", run.seconds, duration(run.seconds), note="first to last step", is_key=True),
    ]
    if run.is_sft:
        found += _supervised(run)
    else:
        found += _learning(run)
    found += _speed(run)
    return found if run.is_sft else [*found, *_pipeline(run)]


def last_evaluations(run: Run) -> dict[str, tuple[Evaluation, Evaluation]]:
    """Set -> its first and its last evaluation."""
    found: dict[str, tuple[Evaluation, Evaluation]] = {}
    for one in run.evaluations:
        found[one.set_name] = (found.get(one.set_name, (one, one))[0], one)
    return found


def num_failures(run: Run) -> int:
    """Samples that have failed."""
    counters = run.ledger.counters if run.has_ledger else mapping(run.summary.get("counters"))
    known = {name: value for name, value in counters.items() if number(value) is not None}
    by_kind = failures_of(known) if known else {}
    assert set(by_kind) <= {kind.value for kind in FailureKind}
    return sum(count for outcomes in by_kind.values() for count in outcomes.values())


def settled(run: Run, values: Callable[..., np.ndarray]) -> float | None:
    """The mean of a column without the first steps."""
    column = values(run.columns)
    return mean(column[_WARM_UP:] if len(column) > 2 * _WARM_UP else column)


def _planned(run: Run) -> str:
    return f"of {run.num_steps:,}" if run.num_steps else ""


def _plain(name: str, value: float | None, text: str, *, note: str = "", is_key: bool = False) -> Figure:
    return Figure(name=name, value=value, text=text, note=note, is_key=is_key)


def _supervised(run: Run) -> list[Figure]:
    rows = run.columns
    return [
        _number("loss, last tenth of the steps", rows.tail_mean("loss"), is_key=True),
        _number("held-out loss, before", number(run.summary.get("eval_loss_before"))),
        _number("held-out loss, after", number(run.summary.get("eval_loss_after")), is_key=True),
        _number("entropy, last tenth", rows.tail_mean("entropy")),
    ]


def _learning(run: Run) -> list[Figure]:
    rows = run.columns
    first = mean(rows.get("reward_mean")[: max(1, len(rows.steps) // 10)])
    last = rows.tail_mean("reward_mean")
    found = [
        _number(
            "reward, last tenth of the steps", last, note=f"from {short(first)} in the first", is_key=True
        )
    ]
    for name, (before, after) in last_evaluations(run).items():
        interval = f" [{short(after.low)}, {short(after.high)}]" if after.low is not None else ""
        found.append(
            Figure(
                name=f"held out: {name}",
                value=after.avg,
                text=short(after.avg),
                note=f"{interval.strip()} at step {after.step:,}, from {short(before.avg)}".strip(),
                is_key=True,
            )
        )
    return [
        *found,
        _share("effective sample size, last tenth", rows.tail_mean("ess_ratio")),
        _number("entropy, last tenth", rows.tail_mean("entropy"), note="nats"),
        _number("lag, mean", mean(rows.get("lag_mean")), note="optimizer steps", is_key=True),
        _number("lag, largest", _largest(run, "lag_max")),
        _number("KL of a token, last tenth", rows.tail_mean("kl_k3"), note="nats"),
        _number("response length, last tenth", rows.tail_mean("response_length_mean"), note="tokens"),
        _share("truncated samples, last tenth", rows.tail_mean("truncated_fraction")),
    ]


def _speed(run: Run) -> list[Figure]:
    step_s = run.columns.get("step_s")[_WARM_UP:]
    known = step_s[np.isfinite(step_s)]
    median = float(np.median(known)) if len(known) else mean(run.columns.get("step_s"))
    return [
        Figure(name="seconds a step, median", value=median, text=duration(median)),
        _number(
            "tokens trained a second",
            settled(run, lambda rows: rows.get("tokens_per_s_trained")),
            note="mean of the steps",
            is_key=True,
        ),
    ]


def _pipeline(run: Run) -> list[Figure]:
    generated = settled(run, generated_rate)
    if generated is None:
        generated = number(run.summary.get("tokens_per_s_generated"))
    engines = settled(run, idle_of_engines)
    if engines is None:
        engines = number(run.summary.get("generation_idle_fraction"))
    issued = sum(run.ledger.tickets.values()) or number(mapping(run.summary.get("tickets")).get("issued"))
    dropped = sum(run.drops.values())
    return [
        _number("tokens generated a second", generated),
        _share("trainer idle", settled(run, idle_of_trainer), note="waits for data", is_key=True),
        _share("engines idle", engines, note="nothing to decode", is_key=True),
        Figure(name="seconds a push, mean", value=mean(_pushes(run)), text=duration(mean(_pushes(run)))),
        _share("groups dropped", dropped / issued if issued else None, note=f"{dropped:,} groups"),
        _number("samples failed", float(num_failures(run))),
        _number("processes started again", float(num_restarts(run))),
    ]


def num_restarts(run: Run) -> int:
    """Processes beyond the first of each name, by the ledger and by the launcher's log."""
    names = {*run.ledger.starts, *run.logs.num_starts} - {"prepare_model"}
    return sum(max(run.ledger.starts.get(name, 0), run.logs.num_starts.get(name, 0), 1) - 1 for name in names)


def _pushes(run: Run) -> np.ndarray:
    column = run.columns.get("push_s")
    return column[column > 0]


def _largest(run: Run, name: str) -> float | None:
    column = run.columns.get(name)
    known = column[np.isfinite(column)]
    return float(known.max()) if len(known) else None


def _number(name: str, value: float | None, *, note: str = "", is_key: bool = False) -> Figure:
    return Figure(name=name, value=value, text=short(value), note=note, is_key=is_key)


def _share(name: str, value: float | None, *, note: str = "", is_key: bool = False) -> Figure:
    return Figure(name=name, value=value, text=percent(value), note=note, is_key=is_key)
