"""Which charts a report has, and the lines in them. Pure: from a `Run` to numbers, without HTML.

A chart whose columns no row has is left out, so the same list serves every kind of run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from launch.report.columns import Columns, Floats, Line, filled_back, ratio, reduced
from launch.report.run import Evaluation, Run

Values = Callable[[Columns], Floats]
_MAX_SETS = 12


@dataclass(frozen=True, kw_only=True)
class LineSpec:
    """One line of a chart, for each run."""

    label: str
    values: Values
    is_thin: bool = False
    """For a bound, or for the extremes beside a mean."""


@dataclass(frozen=True, kw_only=True)
class ChartSpec:
    """One chart of the catalogue."""

    title: str
    unit: str
    """Of the vertical axis, in words."""
    lines: tuple[LineSpec, ...]
    evaluates: bool = False
    """True if the first evaluation set is shown in it."""
    floor: float | None = None
    """The axis begins here at the latest."""
    log_scale: bool = False
    """Logarithmic if the values span more than a factor of 100 and all are above 0."""


@dataclass(frozen=True, kw_only=True)
class DrawnLine:
    """One line of one run."""

    label: str
    run: int
    """0: the run of the report, 1: the one that it is compared with."""
    color: int
    line: Line
    is_thin: bool = False


@dataclass(frozen=True, kw_only=True)
class DrawnPoints:
    """The evaluations of one set of one run, with their intervals."""

    label: str
    run: int
    color: int
    points: list[Evaluation]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart with its numbers."""

    title: str
    unit: str
    lines: list[DrawnLine]
    points: list[DrawnPoints] = field(default_factory=list)
    floor: float | None = None
    log_scale: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts under one heading."""

    title: str
    charts: list[Chart]


def column(name: str, label: str, *, is_thin: bool = False) -> LineSpec:
    """A line through a column of metrics.jsonl."""
    return LineSpec(label=label, values=lambda rows: rows.get(name), is_thin=is_thin)


def idle_of_trainer(rows: Columns) -> Floats:
    """Share of each step's time in which rank 0 waited for data."""
    return ratio(rows.get("wait_data_s"), rows.get("step_s"))


def idle_of_engines(rows: Columns) -> Floats:
    """Share of the time in which the engines had nothing to decode, since the row before."""
    idle = rows.increase("generation_idle_s")
    return filled_back(ratio(idle, idle + rows.increase("generation_busy_s")))


def generated_rate(rows: Columns) -> Floats:
    """Sampled tokens a second, since the row before."""
    generated = rows.increase("tokens_generated")
    return filled_back(ratio(generated, rows.seconds_between("tokens_generated")))


_LEARNING = (
    ChartSpec(
        title="Reward",
        unit="mean of a step's samples",
        lines=(column("reward_mean", "training"), column("greedy_reward", "greedy", is_thin=True)),
        evaluates=True,
    ),
    ChartSpec(
        title="Loss",
        unit="nats a token, or as the objective defines it",
        lines=(column("loss", "training"), column("eval_loss", "held out")),
    ),
    ChartSpec(title="Entropy", unit="nats", lines=(column("entropy", "entropy"),), floor=0),
    ChartSpec(
        title="Effective sample size",
        unit="share of the sequences",
        lines=(column("ess_ratio", "ESS"),),
        floor=0,
    ),
    ChartSpec(
        title="Lag",
        unit="optimizer steps",
        lines=(
            column("lag_mean", "mean"),
            column("lag_max", "largest", is_thin=True),
            column("max_staleness", "bound", is_thin=True),
        ),
        floor=0,
    ),
    ChartSpec(
        title="Gradient norm", unit="before clipping", lines=(column("grad_norm", "norm"),), log_scale=True
    ),
    ChartSpec(title="Learning rate", unit="in effect", lines=(column("lr", "rate"),), floor=0),
    ChartSpec(
        title="Off-policy divergence",
        unit="KL(mu || pi) of a token, nats",
        lines=(column("kl_k3", "all tokens"), column("mismatch_k3", "engine against trainer")),
    ),
    ChartSpec(
        title="Tokens that the objective changes",
        unit="share",
        lines=(column("clipped_fraction", "clipped"), column("kept_fraction", "kept by masks")),
        floor=0,
    ),
    ChartSpec(
        title="Groups without advantage",
        unit="groups of a step",
        lines=(
            column("zero_advantage_groups", "all rewards equal"),
            column("num_groups", "groups of the step", is_thin=True),
        ),
        floor=0,
    ),
)
_SAMPLES = (
    ChartSpec(
        title="Response length",
        unit="sampled tokens",
        lines=(
            column("response_length_mean", "mean"),
            column("response_length_p50", "median", is_thin=True),
            column("response_length_p90", "90 %", is_thin=True),
            column("response_length_max", "longest", is_thin=True),
        ),
        floor=0,
    ),
    ChartSpec(
        title="What ended the samples",
        unit="share",
        lines=(
            column("finish_reasons.stop", "stop"),
            column("finish_reasons.length", "length"),
            column("finish_reasons.timeout", "timeout"),
            column("finish_reasons.turns", "turns"),
            column("finish_reasons.tokens", "tokens"),
            column("finish_reasons.context", "context"),
        ),
        floor=0,
    ),
    ChartSpec(
        title="Time of a sample",
        unit="seconds",
        lines=(
            column("sample_generation_s", "generation"),
            column("sample_reward_s", "reward"),
        ),
        floor=0,
    ),
)
_SPEED = (
    ChartSpec(
        title="Tokens",
        unit="tokens a second",
        lines=(
            column("tokens_per_s_trained", "trained"),
            LineSpec(label="generated", values=generated_rate),
            column("tokens_per_s", "run through the trainer", is_thin=True),
        ),
        floor=0,
    ),
    ChartSpec(
        title="Idle",
        unit="share of the time",
        lines=(
            LineSpec(label="trainer (waits for data)", values=idle_of_trainer),
            LineSpec(label="engines (nothing to decode)", values=idle_of_engines),
        ),
        floor=0,
    ),
    ChartSpec(
        title="Time of a step",
        unit="seconds",
        lines=(
            column("step_s", "step"),
            column("wait_data_s", "wait for data"),
            column("compute_s", "compute"),
            column("reduce_s", "reduce"),
            column("update_s", "update"),
            column("freeze_s", "snapshot"),
        ),
        floor=0,
    ),
    ChartSpec(
        title="Time of a push",
        unit="seconds, version to activation",
        lines=(column("push_s", "push"),),
        floor=0,
    ),
    ChartSpec(
        title="Memory of a rank",
        unit="GB, the largest",
        lines=(column("memory_peak_gb", "in use"), column("memory_reserved_peak_gb", "reserved")),
        floor=0,
    ),
    ChartSpec(
        title="Model FLOPs utilization",
        unit="share of the peak",
        lines=(column("mfu", "of the step"), column("mfu_compute", "of compute")),
        floor=0,
    ),
)
_CATALOGUE = (("Learning", _LEARNING), ("Responses", _SAMPLES), ("Speed", _SPEED))


def sections(runs: Sequence[Run]) -> list[Section]:
    """The charts that have numbers, of one run or of two."""
    found = []
    for title, specs in _CATALOGUE:
        charts = [chart for spec in specs if (chart := _chart(spec, runs)) is not None]
        if title == "Learning":
            charts[1:1] = _other_sets(runs)
        if charts:
            found.append(Section(title=title, charts=charts))
    return found


def _chart(spec: ChartSpec, runs: Sequence[Run]) -> Chart | None:
    lines, known = [], 0
    for one in spec.lines:
        drawn = []
        for index, run in enumerate(runs):
            line = reduced(run.columns.steps, one.values(run.columns))
            if any(value == value and value != 0 for value in line.mean) or (
                any(value == value for value in line.mean) and one is spec.lines[0]
            ):
                drawn.append((index, line))
        if drawn:
            lines += [
                DrawnLine(label=one.label, run=index, color=known, line=line, is_thin=one.is_thin)
                for index, line in drawn
            ]
            known += 1
    points = _points(runs, at=0, color=known) if spec.evaluates else []
    if not lines and not points:
        return None
    if len(runs) > 1 and known + bool(points) == 1:  # the runs differ in color, not only in dashes
        lines = [
            DrawnLine(label=one.label, run=one.run, color=one.run, line=one.line, is_thin=one.is_thin)
            for one in lines
        ]
    return Chart(
        title=spec.title,
        unit=spec.unit,
        lines=lines,
        points=points,
        floor=spec.floor,
        log_scale=spec.log_scale,
    )


def _sets(runs: Sequence[Run]) -> list[str]:
    """Names of the evaluation sets, as they come."""
    return list(dict.fromkeys(one.set_name for run in runs for one in run.evaluations))[:_MAX_SETS]


def _points(runs: Sequence[Run], *, at: int, color: int) -> list[DrawnPoints]:
    names = _sets(runs)
    if at >= len(names):
        return []
    return [
        DrawnPoints(
            label=f"held out: {names[at]}",
            run=index,
            color=color + index,
            points=thinned([one for one in run.evaluations if one.set_name == names[at]]),
        )
        for index, run in enumerate(runs)
        if any(one.set_name == names[at] for one in run.evaluations)
    ]


def _other_sets(runs: Sequence[Run]) -> list[Chart]:
    names = _sets(runs)
    return [
        Chart(
            title=f"Held-out reward: {name}",
            unit="mean and 95 % interval",
            lines=[],
            points=_points(runs, at=at, color=0),
        )
        for at, name in enumerate(names)
        if at > 0
    ]


def thinned(points: list[Evaluation], *, most: int = 200) -> list[Evaluation]:
    """At most `most` of the points, evenly spaced, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]
