"""The tables of a report, as HTML. Pure; every text of the run is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from areal_like.failures import FailureKind
from areal_like.selection import SOLVE_RATES
from launch.formatting import short, utc
from launch.report.figures import figures
from launch.report.run import Run
from launch.report.svg import escape
from launch.run_files import mapping, number

_MAX_MESSAGES = 60
_MAX_EVENTS = 200
_MAX_CHARS = 400
_SOLVE_RATE_NAMES = {
    "0": "none solved",
    "0_25": "up to 25 %",
    "25_50": "25 to 50 %",
    "50_75": "50 to 75 %",
    "75_100": "75 to below 100 %",
    "100": "all solved",
}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Sequence[int] = ()) -> str:
    """A table in a card. Cells are HTML already; `numeric`: columns that are aligned to the right."""

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = ["n" if at in numeric else "wrap" for at in range(len(row))]
        return "".join(f'<{tag} class="{kind}">{cell}</{tag}>' for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    if not body:
        return ""
    header = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    return f'<div class="card"><table>{header}<tbody>{body}</tbody></table></div>'


def figures_table(run: Run) -> str:
    """All figures of one run."""
    rows = [
        (escape(one.name), escape(one.text), escape(one.note))
        for one in figures(run)
        if one.value is not None
    ]
    return table(("", "", ""), rows, numeric=(1,))


def compared(runs: Sequence[Run]) -> str:
    """The figures of two runs and their differences."""
    first, second = ({one.name: one for one in figures(run)} for run in runs)
    rows = []
    for name in dict.fromkeys((*first, *second)):
        a, b = first.get(name), second.get(name)
        values = [one.value if one is not None else None for one in (a, b)]
        if values == [None, None]:
            continue
        difference = ""
        if values[0] is not None and values[1] is not None:
            change = values[0] - values[1]
            difference = f"{'+' if change > 0 else ''}{short(change)}"
            if values[1] and change:
                difference += f" ({'+' if change > 0 else ''}{short(100 * change / abs(values[1]))}\u00a0%)"
        rows.append((escape(name), *(escape(one.text) if one else "-" for one in (a, b)), difference))
    return table(("", "A", "B", "A - B"), rows, numeric=(1, 2, 3))


def settings_table(runs: Sequence[Run]) -> str:
    """Settings that differ from the defaults; of two runs those that differ between them, first."""
    if len(runs) == 1:
        return table(("setting", "value"), _settings_rows(runs[0].settings()))
    a, b = (run.settings() for run in runs)
    keys = sorted({*a, *b})
    differing = [key for key in keys if a.get(key) != b.get(key) and key not in ("name", "runs_dir")]
    rows = [
        (f"<code>{escape(key)}</code>", *(_value(side.get(key, "(default)")) for side in (a, b)))
        for key in differing
    ]
    same = {key: a[key] for key in keys if key not in differing and key in a}
    common = table(("setting of both", "value"), _settings_rows(same))
    return (
        table(("setting", "A", "B"), rows) or '<div class="card"><p>A and B have the same settings.</p></div>'
    ) + f"<details><summary>Settings that both have</summary>{common}</details>"


def drops_and_failures(run: Run) -> str:
    """Dropped groups by reason, failed samples by kind, tokens that were not trained on by reason."""
    parts = [_bars("Dropped groups", ("reason", "groups"), run.drops)]
    failures = {}
    for kind, outcomes in mapping(run.selection.get("failures")).items():
        by_outcome = {
            name: int(count)
            for name, count in mapping(outcomes).items()
            if number(count) and name != "length"
        }
        listed = ", ".join(f"{count:,} {name}" for name, count in by_outcome.items())
        known = kind in {one.value for one in FailureKind}
        failures[f"{kind} ({listed})" if known else str(kind)] = sum(by_outcome.values())
    parts.append(_bars("Failed samples", ("kind (by what was done)", "samples"), failures))
    wasted = {
        str(name): int(value)
        for name, value in mapping(run.selection.get("tokens_wasted")).items()
        if number(value)
    }
    parts.append(_bars("Sampled tokens that are not trained on", ("reason", "tokens"), wasted))
    shown = "".join(part for part in parts if part)
    if run.is_sft:
        return ""
    return f'<div class="two">{shown}</div>' if shown else '<div class="card"><p>None.</p></div>'


def selection_tables(run: Run) -> str:
    """What was offered against what was trained: lengths, rewards, groups by solve rate."""
    selection = run.selection
    offered, trained = mapping(selection.get("offered")), mapping(selection.get("trained"))
    if not number(offered.get("samples")):
        return ""
    names = {
        "samples": "samples",
        "reward_mean": "mean reward",
        "tokens_mean": "tokens, mean",
        "tokens_p50": "tokens, median",
        "tokens_p90": "tokens, 90 %",
        "tokens_p99": "tokens, 99 %",
    }
    rows = [
        (escape(text), short(number(offered.get(name))), short(number(trained.get(name))))
        for name, text in names.items()
    ]
    numbers = table(("", "offered", "trained"), rows, numeric=(1, 2))
    a, b = (mapping(selection.get(f"groups_{name}_by_solve_rate")) for name in ("offered", "trained"))
    largest = max([1.0, *(number(value) or 0.0 for side in (a, b) for value in side.values())])
    groups = [
        (
            _SOLVE_RATE_NAMES[rate],
            short(number(a.get(rate)) or 0.0),
            short(number(b.get(rate)) or 0.0),
            _bar(*((number(side.get(rate)) or 0.0) / largest for side in (a, b))),
        )
        for rate in SOLVE_RATES
    ]
    by_rate = table(("groups by solve rate", "offered", "trained", ""), groups, numeric=(1, 2))
    note = (
        '<p class="soft">Offered: samples that arrived with a reward. Trained: those of completed steps. '
        "A filter, the staleness bound or failures make them differ.</p>"
    )
    if not run.is_sft and run.has_ledger and not run.ledger.counts_selection:
        note += '<p class="soft">The ledger is of an earlier release and counts since its upgrade.</p>'
    return f'{note}<div class="two">{numbers}{by_rate}</div>'


def changes_table(run: Run) -> str:
    """Settings that changed while the run went on; empty if none did."""
    rows = [
        (
            utc(one.unix_s),
            f"after {one.step:,}" if one.value == "now" else f"{one.step:,}",
            escape(one.key),
            escape(one.before) or "-",
            escape(one.value),
            "an operator" if one.by == "operator" else "the trainer's start",
        )
        for one in run.ledger.changes[-_MAX_EVENTS:]
    ]
    head = ("time", "from step", "setting", "before", "value", "by")
    return table(head, rows, numeric=(1,)) if rows else ""


def events_table(run: Run) -> str:
    """Restarts, rollbacks and what operators did; how many processes each name has had."""
    events = run.events()[-_MAX_EVENTS:]
    rows = [
        (utc(one.unix_s), "-" if one.step is None else f"{one.step:,}", _text(one.text)) for one in events
    ]
    starts = {
        name: str(max(run.ledger.starts.get(name, 0), run.logs.num_starts.get(name, 0)))
        for name in sorted({*run.ledger.starts, *run.logs.num_starts} - {"prepare_model"})
    }
    processes = table(("name", "processes"), [(escape(k), v) for k, v in starts.items()], numeric=(1,))
    return table(("time", "step", "event"), rows, numeric=(1,)) + (
        f"<details><summary>Processes by name</summary>{processes}</details>" if processes else ""
    )


def messages_table(run: Run) -> str:
    """Warnings and errors of the logs in groups."""
    rows = [
        (
            f'<span class="{one.level}">{one.level.lower()}</span>',
            escape(one.daemon),
            f"{one.count:,}",
            utc(one.last_s),
            _text(one.example),
        )
        for one in run.logs.messages[:_MAX_MESSAGES]
    ]
    note = '<p class="soft">Messages that differ only in numbers are one line; the newest is shown.</p>'
    found = table(("", "daemon", "times", "last", "message"), rows, numeric=(2,))
    return note + found if found else '<div class="card"><p>No warning and no error.</p></div>'


def _settings_rows(settings: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(f"<code>{escape(key)}</code>", _value(value)) for key, value in settings.items()]


def _value(value: str) -> str:
    return f"<code>{_text(value)}</code>"


def _text(text: str) -> str:
    """Text of the run: escaped, without control characters, and not too long."""
    shown = text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} ... ({len(text):,} characters)"
    return escape(shown)


def _bars(title: str, head: Sequence[str], counts: Mapping[str, int]) -> str:
    if not counts:
        return ""
    largest = max(1, *counts.values())
    rows = [
        (_text(name), f"{count:,}", _bar(count / largest))
        for name, count in sorted(counts.items(), key=lambda item: -item[1])
    ]
    return f"<div><h3>{escape(title)}</h3>{table((*head, ''), rows, numeric=(1,))}</div>"


def _bar(*shares: float) -> str:
    height = 12 / len(shares)
    rects = "".join(
        f'<rect{" class=second" if at else ""} y="{at * height:g}" height="{height - 1:g}" '
        f'width="{100 * min(1.0, max(0.0, share)):.1f}%"/>'
        for at, share in enumerate(shares)
    )
    return f'<svg class="bar" aria-hidden="true">{rects}</svg>'
