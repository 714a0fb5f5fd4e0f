"""The catalogue of a report's charts and their lines. Pure: from runs to numbers, without HTML.

A chart without data is left out, so that one catalogue serves every kind of run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from launch.report.columns import Line, reduced
from launch.report.run import Evaluation, Run

_MAX_SETS = 12
_MAX_EVALUATIONS = 200
"""Most points of one set in a chart; more are thinned out."""


@dataclass(frozen=True)
class Spec:
    """One chart of the catalogue."""

    title: str
    unit: str
    """The label of the vertical axis."""
    lines: Mapping[str, str]
    """Label -> column of `Columns.get`."""
    thin: Mapping[str, str] = field(default_factory=dict)
    """Label -> column, for lines that are drawn thinner: bounds, and the extremes around a mean."""
    evaluates: bool = False
    """True if the first evaluation set is shown in it."""
    floor: float | None = 0.0
    """The axis starts here, or lower if a value is smaller; None: near the smallest value."""
    log_scale: bool = False
    """Logarithmic if the values span more than a factor of 100 and all are above 0."""


_LENGTHS = {"median": "response_length_p50", "90 %": "response_length_p90", "longest": "response_length_max"}
_REASONS = ("stop", "length", "timeout", "turns", "tokens", "context")
_STEP_PARTS = {
    "step": "step_s",
    "wait for data": "wait_data_s",
    "compute": "compute_s",
    "reduce": "reduce_s",
    "update": "update_s",
    "snapshot": "freeze_s",
}
_LEARNING = (
    Spec(
        "Reward",
        "mean of a step's samples",
        {"training": "reward_mean", "gold (not trained on)": "reward_gold_mean"},
        {"greedy": "greedy_reward"},
        evaluates=True,
        floor=None,
    ),
    Spec(
        "Loss",
        "nats a token, or as the objective defines it",
        {"training": "loss", "held out": "eval_loss"},
        floor=None,
    ),
    Spec("Accuracy", "share of the comparisons", {"training": "accuracy", "held out": "eval_accuracy"}),
    Spec("Entropy", "nats", {"entropy": "entropy"}),
    Spec("Effective sample size", "share of the sequences", {"ESS": "ess_ratio"}),
    Spec("Lag", "optimizer steps", {"mean": "lag_mean"}, {"largest": "lag_max", "bound": "max_staleness"}),
    Spec(
        "Tokens beyond the bound",
        "share of the step's tokens, of first tokens, of samples by length",
        {"all": "beyond_share", "first tokens": "beyond_share_first", "masked": "masked_share"},
        {"shortest quarter": "beyond_share_q1", "longest quarter": "beyond_share_q4"},
    ),
    Spec(
        "Advantage of tokens beyond the bound",
        "mean; near 0, masking them is harmless",
        {"mean": "beyond_advantage"},
        floor=None,
    ),
    Spec("Late samples", "share of the step's samples", {"late": "late_share"}),
    Spec(
        "Reward of early samples minus that of late ones",
        "of a step",
        {"difference": "late_reward_gap"},
        floor=None,
    ),
    Spec("Complete samples at the closing", "of a group", {"mean": "early_members"}),
    Spec("Gradient norm", "before clipping", {"norm": "grad_norm"}, floor=None, log_scale=True),
    Spec("Learning rate", "in effect", {"rate": "lr"}),
    Spec(
        "Off-policy divergence",
        "KL(mu || pi) of a token, nats",
        {"all tokens": "kl_k3", "engine against trainer": "mismatch_k3"},
        floor=None,
    ),
    Spec(
        "Tokens that the objective changes",
        "share",
        {"clipped": "clipped_fraction", "kept by masks": "kept_fraction"},
    ),
    Spec(
        "Groups without advantage",
        "groups of a step",
        {"all rewards equal": "zero_advantage_groups"},
        {"groups of the step": "num_groups"},
    ),
)
_RESPONSES = (
    Spec("Response length", "sampled tokens", {"mean": "response_length_mean"}, _LENGTHS),
    Spec("What ended the samples", "share", {reason: f"finish_reasons.{reason}" for reason in _REASONS}),
    Spec("Time of a sample", "seconds", {"generation": "sample_generation_s", "reward": "sample_reward_s"}),
)
_SPEED = (
    Spec(
        "Tokens",
        "tokens a second",
        {"trained": "tokens_per_s_trained", "generated": "generated rate"},
        {"run through the trainer": "tokens_per_s"},
    ),
    Spec(
        "Idle",
        "share of the time",
        {"trainer (waits for data)": "trainer idle", "engines (nothing to decode)": "engines idle"},
    ),
    Spec("Time of a step", "seconds", _STEP_PARTS),
    Spec("Time of a push", "seconds, version to activation", {"push": "push_s"}),
    Spec(
        "Memory of a rank",
        "GB, the largest",
        {"in use": "memory_peak_gb", "reserved": "memory_reserved_peak_gb"},
    ),
    Spec("Model FLOPs utilization", "share of the peak", {"of the step": "mfu", "of compute": "mfu_compute"}),
)
_CATALOGUE = {"Learning": _LEARNING, "Responses": _RESPONSES, "Speed": _SPEED}


class SeriesKind(StrEnum):
    """The style in which a series is drawn."""

    LINE = "line"
    """A line, with a band between the extremes of the steps that a point stands for."""
    THIN = "line thin"
    """A thin line without a band."""
    POINTS = "points"
    """Evaluations: points with their intervals, joined by a thin line."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """The numbers of one label and one run."""

    label: str
    run: int
    """0: the run of the report, 1: the one that it is compared with."""
    color: int
    line: Line
    kind: SeriesKind


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart with its numbers."""

    spec: Spec
    series: list[Series]


def sections(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """Title -> the charts that have numbers, for one run or two."""
    names = list(dict.fromkeys(one.set_name for run in runs for one in run.evaluations))[:_MAX_SETS]
    found = {}
    for title, specs in _CATALOGUE.items():
        charts = [_chart(spec, runs, names[:1]) for spec in specs]
        if title == "Learning":
            charts[1:1] = [_set_chart(name, runs) for name in names[1:]]
        found[title] = [chart for chart in charts if chart.series]
    return {title: charts for title, charts in found.items() if charts}


def _chart(spec: Spec, runs: Sequence[Run], set_names: Sequence[str]) -> Chart:
    series: list[Series] = []
    labels: list[str] = []
    for at, (label, name) in enumerate({**spec.lines, **spec.thin}.items()):
        lines = [reduced(run.columns.steps, run.columns.get(name)) for run in runs]
        # A series of zeros is shown only as the first line: a run without time-outs needs no line for them.
        shown = [
            (run, line)
            for run, line in enumerate(lines)
            if any(value and math.isfinite(value) for value in line.mean)
            or (at == 0 and any(map(math.isfinite, line.mean)))
        ]
        kind = SeriesKind.THIN if label in spec.thin else SeriesKind.LINE
        series += [
            Series(label=label, run=run, color=len(labels), line=line, kind=kind) for run, line in shown
        ]
        labels += [label] * bool(shown)
    points = [
        one for name in set_names if spec.evaluates for one in _points(name, runs, first_color=len(labels))
    ]
    if len(runs) > 1 and len(labels) + bool(points) == 1:  # the runs differ in color, not only in dashes
        series = [
            Series(label=one.label, run=one.run, color=one.run, line=one.line, kind=one.kind)
            for one in series
        ]
    return Chart(spec=spec, series=[*series, *points])


def _set_chart(name: str, runs: Sequence[Run]) -> Chart:
    spec = Spec(f"Held-out reward: {name}", "mean and 95 % interval", {}, floor=None)
    return Chart(spec=spec, series=_points(name, runs, first_color=0))


def _points(name: str, runs: Sequence[Run], *, first_color: int) -> list[Series]:
    """The evaluations of one set, for each run that has any."""
    found = []
    for index, run in enumerate(runs):
        if known := thinned([one for one in run.evaluations if one.set_name == name]):
            line = Line(
                x=[float(one.step) for one in known],
                mean=[one.avg for one in known],
                low=[math.nan if one.low is None else one.low for one in known],
                high=[math.nan if one.high is None else one.high for one in known],
            )
            color = first_color + index
            found.append(
                Series(label=f"held out: {name}", run=index, color=color, line=line, kind=SeriesKind.POINTS)
            )
    return found


def thinned(points: list[Evaluation], *, most: int = _MAX_EVALUATIONS) -> list[Evaluation]:
    """At most `most` of the points, evenly spaced, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]
