"""The tables of a report as rows of plain text and numbers, which page.html turns into HTML. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from areal_like.failures import FailureKind
from areal_like.selection import LENGTHS, MAX_BUCKET, SAMPLE_POPULATIONS, SOLVE_RATES, lengths_of
from launch.formatting import count, short, utc
from launch.report.figures import Figure, figures
from launch.report.run import Run
from launch.run_files import mapping, number

_MAX_MESSAGES = 60
_MAX_EVENTS = 200
_SOLVE_RATE_NAMES = {
    "0": "none solved",
    "0_25": "up to 25 %",
    "25_50": "25 to 50 %",
    "50_75": "50 to 75 %",
    "75_100": "75 to below 100 %",
    "100": "all solved",
}
_SELECTION = {
    "samples": "samples",
    "reward_mean": "mean reward",
    "tokens_mean": "tokens, mean",
    "tokens_p50": "tokens, median",
    "tokens_p90": "tokens, 90 %",
    "tokens_p99": "tokens, 99 %",
}


@dataclass(frozen=True)
class Table:
    """Rows whose cells the page escapes and shortens."""

    kinds: str
    """The kind of each column: `text`, `n` (a number), `code`, `level` (of a log), or `bar`: bars below one
    another, each with a length of at most 1."""
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    summary: str = ""
    """If it is not empty, the table is collapsed under this text."""
    empty: str = ""
    """The text that is shown without rows."""


def figure_table(runs: Sequence[Run]) -> Table:
    """All figures of one run, or of two runs with their differences."""
    if len(runs) == 1:
        known = [one for one in figures(runs[0]) if one.value is not None]
        return Table("text n text", ("", "", ""), [(one.name, one.text, one.note) for one in known])
    first, second = ({one.name: one for one in figures(run) if one.value is not None} for run in runs)
    rows = []
    for name in dict.fromkeys((*first, *second)):
        a, b = first.get(name), second.get(name)
        texts = ["-" if one is None else one.text for one in (a, b)]
        rows.append((name, *texts, _difference(a, b)))
    return Table("text n n n", ("", "A", "B", "A - B"), rows)


def _difference(ours: Figure | None, theirs: Figure | None) -> str:
    a, b = (one.value if one is not None else None for one in (ours, theirs))
    if a is None or b is None:
        return ""
    plus = "+" if a > b else ""
    share = f" ({plus}{short(100 * (a - b) / abs(b))}\u00a0%)" if b and a != b else ""
    return f"{plus}{short(a - b)}{share}"


def setting_tables(runs: Sequence[Run]) -> list[Table]:
    """Settings that differ from the defaults; for two runs, first those that differ between them."""
    settings = [run.settings() for run in runs]
    if len(runs) == 1:
        return [Table("code code", ("setting", "value"), list(settings[0].items()))]
    a, b = settings
    keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key) and key not in ("name", "runs_dir"))
    rows = [(key, a.get(key, "(default)"), b.get(key, "(default)")) for key in keys]
    same = sorted((key, value) for key, value in a.items() if key not in keys)
    summary = "Settings that both have"
    return [
        Table("code code code", ("setting", "A", "B"), rows, empty="A and B have the same settings."),
        Table("code code", ("setting of both", "value"), same, summary=summary),
    ]


def drop_tables(run: Run) -> list[Table]:
    """Dropped groups by reason, failed samples by kind, tokens that were not trained on by reason."""
    failures = {}
    for kind, outcomes in mapping(run.selection.get("failures")).items():
        counts = {name: num for name, num in _counts(outcomes).items() if name != "length"}
        listed = ", ".join(f"{num:,} {name}" for name, num in counts.items())
        known = kind in {one.value for one in FailureKind}
        failures[f"{kind} ({listed})" if known else str(kind)] = sum(counts.values())
    return [
        _bars("Dropped groups", ("reason", "groups"), run.drops),
        _bars("Failed samples", ("kind (by what was done)", "samples"), failures),
        _bars(
            "Sampled tokens that are not trained on",
            ("reason", "tokens"),
            _counts(run.selection.get("tokens_wasted")),
        ),
    ]


def _counts(value: Any) -> dict[str, int]:
    return {str(name): int(num) for name, num in mapping(value).items() if number(num)}


def _bars(title: str, head: Sequence[str], counts: Mapping[str, int]) -> Table:
    largest = max([1, *counts.values()])
    found = sorted(counts.items(), key=lambda item: -item[1])
    rows = [(name, count(num), [num / largest]) for name, num in found]
    return Table("text n bar", (*head, ""), rows, title=title)


def selection_tables(run: Run) -> list[Table]:
    """Offered samples compared with trained samples: lengths, rewards, groups by solve rate."""
    sides = [mapping(run.selection.get(name)) for name in ("offered", "trained")]
    if not number(sides[0].get("samples")):
        return []
    numbers = [
        (text, *(short(number(side.get(name))) for side in sides)) for name, text in _SELECTION.items()
    ]
    rates = [mapping(run.selection.get(f"groups_{name}_by_solve_rate")) for name in ("offered", "trained")]
    by_rate = {rate: [number(side.get(rate)) or 0.0 for side in rates] for rate in SOLVE_RATES}
    largest = max(1.0, *(num for nums in by_rate.values() for num in nums))
    groups = [
        (_SOLVE_RATE_NAMES[rate], *map(short, nums), [num / largest for num in nums])
        for rate, nums in by_rate.items()
    ]
    return [
        Table("text n n", ("", "offered", "trained"), numbers),
        Table("text n n bar", ("groups by solve rate", "offered", "trained", ""), groups),
        *_by_length(run),
    ]


def _by_length(run: Run) -> list[Table]:
    """Samples by length, and their tokens beyond the staleness bound; empty without closed groups."""
    masked = run.closing.get("tokens_masked_by_length")
    if not isinstance(masked, list):
        return []
    offered, trained = (lengths_of(run.counters, [name]) for name in SAMPLE_POPULATIONS)
    rows = []
    for bucket, (num_offered, num_trained, num_masked) in enumerate(
        zip(offered, trained, masked, strict=False)
    ):
        if num_offered:
            upto = f"up to {LENGTHS[bucket]:,}" if bucket < MAX_BUCKET else "more"
            of_sample = short(num_masked / num_trained) if num_trained else "-"
            rows.append((upto, count(num_offered), count(num_trained), of_sample))
    head = ("samples by sampled tokens", "offered", "trained", "tokens beyond the bound, mean")
    return [Table("text n n n", head, rows)]


def change_table(run: Run) -> Table:
    """Settings that changed during the run; empty if none did."""
    rows = [
        (
            utc(one.unix_s),
            f"after {one.step:,}" if one.value == "now" else count(one.step),
            one.key,
            one.before or "-",
            one.value,
            "an operator" if one.by == "operator" else "the trainer's start",
        )
        for one in run.ledger.changes[-_MAX_EVENTS:]
    ]
    head = ("time", "from step", "setting", "before", "value", "by")
    return Table("text n text text text text", head, rows)


def event_tables(run: Run) -> list[Table]:
    """Two tables: restarts, rollbacks and operator actions; and how often each daemon was started."""
    events = [(utc(one.unix_s), count(one.step), one.text) for one in run.events()[-_MAX_EVENTS:]]
    starts = list(run.num_starts.items())
    return [
        Table("text n text", ("time", "step", "event"), events),
        Table("text n", ("name", "processes"), starts, summary="Processes by name"),
    ]


def message_table(run: Run) -> Table:
    """Warnings and errors of the logs in groups."""
    rows = [
        (one.level, one.daemon, count(one.count), utc(one.last_s), one.example)
        for one in run.logs.messages[:_MAX_MESSAGES]
    ]
    return Table("level text n text text", ("", "daemon", "times", "last", "message"), rows)
