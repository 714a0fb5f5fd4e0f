"""Assembles the page: one HTML file that needs no network and no other file, and is readable without its
script.

Text from a run, a peer or the policy is made harmless in three ways: control characters become visible
escapes, the template escapes every text, and the Content-Security-Policy allows only the page's own style and
script, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from areal_like.config.loading import flat
from areal_like.terminal_text import harmless
from launch.formatting import short, utc
from launch.report.charts import Chart, sections
from launch.report.drawing import NUM_COLORS, hover, legend, paths, x_axis, y_axis
from launch.report.figures import figures
from launch.report.findings import findings
from launch.report.run import Run
from launch.report.tables import (
    Table,
    change_table,
    drop_tables,
    event_tables,
    figure_table,
    message_table,
    selection_tables,
    setting_tables,
)
from launch.samples.choosing import NUM_AT_ENDS
from launch.samples.showing import facts
from launch.samples.transcripts import Transcript

_HERE = Path(__file__).parent
_MAX_CHARS = 400
"""Longest text in a cell of a table."""
_MAX_MARKS = 60
_MAX_PARTS = 200
"""Most parts of a sample that are shown."""
_SHOWN_CHARS = 3000
"""Longest part, in characters, that is shown whole; a longer one is cut in the middle."""
_SELECTION_NOTE = (
    "Offered: samples that arrived with a reward. Trained: those of completed steps. A filter, the staleness "
    "bound or failures make them differ."
)
_UPGRADE_NOTE = " The ledger is of an earlier release and counts since its upgrade."
_MESSAGES_NOTE = "Messages that differ only in numbers are one line; the newest is shown."
_FACTS = {
    "model": "model.path",
    "task": "task.name task._target_",
    "objective": "objective.name objective._target_",
    "advantage": "advantage.name advantage._target_",
    "staleness bound": "max_staleness",
    "overdue groups": "buffer.overdue",
    "trainer ranks": "trainer.world_size",
    "rollout servers": "rollout.num_servers",
}
_OFFLINE_FACTS = {"model": "model.path", "data": "", "trainer ranks": "trainer.world_size"}
"""Item in the head of the page -> settings; the first one that is set is shown."""


@dataclass(frozen=True)
class PageSection:
    """The content under one heading; left out if it has no content and no text `empty` for that case."""

    title: str
    tables: list[Table] = field(default_factory=list)
    note: str = ""
    empty: str = ""
    is_wide: bool = False
    """True if there is room for two tables in a row."""
    findings: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    samples: Sequence[Transcript] = ()

    @property
    def anchor(self) -> str:
        """The id of its heading in the page."""
        return self.title.lower().replace(" ", "-")

    @property
    def has_content(self) -> bool:
        """True if there is more than a heading, or a table that explains why it has no rows."""
        has_rows = any(table.rows or table.empty for table in self.tables)
        return bool(self.findings or self.charts or self.samples or has_rows)


def page(runs: Sequence[Run], *, samples: Sequence[Transcript] | str, now_s: float, version: str) -> str:
    """The page of one run, or of two: the second is the one to compare with.

    `samples`: of the first run, or the reason why there are none.
    """
    run = runs[0]
    charted = sections(runs)
    x = x_axis(chart for charts in charted.values() for chart in charts)
    steps: list[list[float]] = []
    charts = [PageSection(title, charts=found) for title, found in charted.items()]
    compared = PageSection("Figures" if len(runs) == 1 else "A and B", [figure_table(runs)])
    is_upgraded = not run.is_offline and run.has_ledger and not run.ledger.counts_selection
    selection_note = _SELECTION_NOTE + _UPGRADE_NOTE * is_upgraded
    parts = [
        PageSection("Look at", findings=findings(run), empty="Nothing to report."),
        *([*charts, compared] if len(runs) == 1 else [compared, *charts]),
        PageSection(
            "Drops and failures", drop_tables(run), is_wide=True, empty="" if run.is_offline else "None."
        ),
        PageSection("Selection", selection_tables(run), selection_note, is_wide=True),
        PageSection("Changes", [change_table(run)]),
        PageSection("Samples", empty=samples)
        if isinstance(samples, str)
        else PageSection("Samples", samples=samples),
        PageSection("Events", event_tables(run)),
        PageSection("Log messages", [message_table(run)], _MESSAGES_NOTE, empty="No warning and no error."),
        PageSection("Settings", setting_tables(runs)),
    ]
    shown = [part for part in parts if part.empty or part.has_content]
    # An event in the last step is usually the end of the run, which is already shown.
    marks = [one for one in run.events() if one.step is not None and one.step < run.completed - 1]
    letters = ("A: ", "B: ") if len(runs) > 1 else ("",)
    template = _environment().get_template("page.html")
    return template.render(
        runs=list(zip(letters, runs, strict=True)),
        parts=shown,
        keys=[one for one in figures(run) if one.is_key and one.value is not None],
        x=x,
        marks=[(x.at(one.step or 0), one.text) for one in marks[:_MAX_MARKS]],
        data={
            "x": (x.low, x.high),
            "charts": [
                [hover(one, steps, num_runs=len(runs)) for one in chart.series]
                for part in charts
                for chart in part.charts
            ],
            "steps": steps,
        },
        described=described,
        facts=facts,
        legend=legend,
        paths=paths,
        y_axis=y_axis,
        max_parts=_MAX_PARTS,
        shown_chars=_SHOWN_CHARS,
        num_at_ends=NUM_AT_ENDS,
        now=utc(now_s),
        version=version,
        num_colors=NUM_COLORS,
        style=Markup((_HERE / "style.css").read_text()),
        script=Markup((_HERE / "hover.js").read_text()),
    )


def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    found.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    found.filters |= {"short": short, "short_text": _short_text, "sha256": _sha256}
    return found


def _visible(value: Any) -> Any:
    """Applied to everything that the template writes, before it is escaped."""
    return harmless(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _short_text(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]} ... ({len(text):,} characters)"


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def described(run: Run) -> str:
    """Model, task, objective and size of the run in one line."""
    settings = flat(run.config)
    found = []
    facts = _FACTS if run.verb is None else _OFFLINE_FACTS | {"data": f"{run.verb.section}.train"}
    for name, keys in facts.items():
        known = [settings[key] for key in keys.split() if settings.get(key) not in (None, "", "None")]
        found += [f"{name} {known[0]}"] if known else []
    return ("" if run.verb is None else f"{run.verb.title or f'Run of {run.verb.verb}'}. ") + ", ".join(found)
