"""Named figures of a run, for the head of a report and for the comparison of two runs. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from areal_like.selection import failures_of
from launch.formatting import count, duration, percent, short
from launch.offline_verbs import OfflineVerb
from launch.report.columns import mean
from launch.report.run import Evaluation, Run
from launch.run_files import mapping, number

_WARM_UP = 10
"""Number of first steps that idle shares and rates leave out in a longer run: the pipeline is still
filling."""


@dataclass(frozen=True)
class Figure:
    """One number of a run."""

    name: str
    value: float | None
    """None if the run does not have it."""
    form: Callable[[float | None], str] = short
    note: str = ""
    is_key: bool = False
    """True if it is among the large numbers at the head."""

    @property
    def text(self) -> str:
        """The value as text; `-` without one."""
        return self.form(self.value)


def figures(run: Run) -> list[Figure]:
    """All figures of a run, in the order of the tables."""
    rows = run.columns
    num_steps = len(rows.steps)
    planned = f"of {run.num_steps:,}" if run.num_steps else ""
    return [
        Figure("steps", float(num_steps), count, planned, is_key=True),
        Figure("time", run.seconds, duration, "first to last step", is_key=True),
        *(_learning(run) if run.verb is None else _offline(run, run.verb)),
        Figure("seconds a step, median", _median_step_s(run), duration),
        Figure(
            "tokens trained a second",
            settled(run, "tokens_per_s_trained"),
            note="mean of the steps",
            is_key=True,
        ),
        *([] if run.is_offline else _pipeline(run)),
    ]


def last_evaluations(run: Run) -> dict[str, tuple[Evaluation, Evaluation]]:
    """Set -> its first and its last evaluation."""
    found: dict[str, tuple[Evaluation, Evaluation]] = {}
    for one in run.evaluations:
        found[one.set_name] = (found.get(one.set_name, (one, one))[0], one)
    return found


def num_failures(run: Run) -> int:
    """Samples that have failed."""
    by_kind = failures_of(run.counters)
    return sum(count for outcomes in by_kind.values() for count in outcomes.values())


def num_restarts(run: Run) -> int:
    """Number of processes beyond the first of each name, from the ledger and the launcher's log."""
    return sum(max(num, 1) - 1 for num in run.num_starts.values())


def settled(run: Run, name: str) -> float | None:
    """The mean of a column without the first steps."""
    column = run.columns.get(name)
    return mean(column[_WARM_UP:] if len(column) > 2 * _WARM_UP else column)


def idle_of_engines(run: Run) -> float | None:
    """Share of the time in which the engines had nothing to decode."""
    found = settled(run, "engines idle")
    return number(run.summary.get("generation_idle_fraction")) if found is None else found


def _offline(run: Run, verb: OfflineVerb) -> list[Figure]:
    rows = run.columns
    return [
        Figure("loss, last tenth of the steps", rows.tail_mean("loss"), is_key=True),
        *(
            Figure(
                f"held-out {label}, {when}",
                number(run.summary.get(f"eval_{name}_{when}")),
                is_key=when == "after",
            )
            for name, label, _ in verb.measures
            for when in ("before", "after")
        ),
        Figure("entropy, last tenth", rows.tail_mean("entropy")),
    ]


def _learning(run: Run) -> list[Figure]:
    rows = run.columns
    first = f"from {short(rows.head_mean('reward_mean'))} in the first"
    lag_max = rows.get("lag_max")
    return [
        Figure("reward, last tenth of the steps", rows.tail_mean("reward_mean"), note=first, is_key=True),
        *(_held_out(name, *ends) for name, ends in last_evaluations(run).items()),
        Figure("effective sample size, last tenth", rows.tail_mean("ess_ratio"), percent),
        Figure("entropy, last tenth", rows.tail_mean("entropy"), note="nats"),
        Figure("lag, mean", mean(rows.get("lag_mean")), note="optimizer steps", is_key=True),
        Figure("lag, largest", float(np.nanmax(lag_max)) if rows.has("lag_max") else None),
        Figure("KL of a token, last tenth", rows.tail_mean("kl_k3"), note="nats"),
        Figure("response length, last tenth", rows.tail_mean("response_length_mean"), note="tokens"),
        Figure("truncated samples, last tenth", rows.tail_mean("truncated_fraction"), percent),
    ]


def _held_out(name: str, before: Evaluation, after: Evaluation) -> Figure:
    interval = "" if after.low is None else f"[{short(after.low)}, {short(after.high)}] "
    note = f"{interval}at step {after.step:,}, from {short(before.avg)}"
    return Figure(f"held out: {name}", after.avg, note=note, is_key=True)


def _of_limit(run: Run) -> float | None:
    """Share of the time in which the busier pool worked: 1 is the largest throughput that both allow."""
    idle = [share for share in (settled(run, "trainer idle"), idle_of_engines(run)) if share is not None]
    return 1 - min(idle) if len(idle) == 2 else None


def _closing(run: Run) -> list[Figure]:
    """What closing groups did, or what waiting for whole groups cost."""
    held_back_s, seconds = run.held_back_s, run.seconds
    share = held_back_s / seconds if held_back_s and seconds else None
    note = f"{duration(held_back_s)} in which other samples were complete"
    found = [Figure("time lost by waiting for whole groups", share, percent, note)]
    if closing := run.closing:
        early, late, dropped, groups = (
            number(closing.get(name))
            for name in ("samples_early", "samples_late", "parts_dropped", "groups_closed")
        )
        masked = number(closing.get("tokens_masked_share"))
        found += [
            Figure("groups closed", groups, count, f"{count(early)} samples early"),
            Figure("samples late", late, count, "complete after their group was closed"),
            Figure("parts given up", dropped, count, "too old, cancelled, or of a dropped group"),
            Figure("tokens beyond the bound", masked, percent, "of samples that were trained on"),
        ]
    return found


def _median_step_s(run: Run) -> float | None:
    step_s = run.columns.get("step_s")
    settled_s = step_s[_WARM_UP:]
    known = settled_s[np.isfinite(settled_s)]
    return float(np.median(known)) if len(known) else mean(step_s)


def _pipeline(run: Run) -> list[Figure]:
    generated = settled(run, "generated rate")
    if generated is None:
        generated = number(run.summary.get("tokens_per_s_generated"))
    push_s = run.columns.get("push_s")
    issued = sum(run.ledger.tickets.values()) or number(mapping(run.summary.get("tickets")).get("issued"))
    dropped = sum(run.drops.values())
    share = dropped / issued if issued else None
    return [
        Figure("tokens generated a second", generated),
        Figure("throughput, of the limit", _of_limit(run), percent, "busy time of trainer or engines"),
        Figure("trainer idle", settled(run, "trainer idle"), percent, "waits for data", is_key=True),
        Figure("engines idle", idle_of_engines(run), percent, "nothing to decode", is_key=True),
        Figure("seconds a push, mean", mean(push_s[push_s > 0]), duration),
        Figure("groups dropped", share, percent, f"{dropped:,} groups"),
        *_closing(run),
        Figure("samples failed", float(num_failures(run))),
        Figure("processes started again", float(num_restarts(run))),
    ]
