"""The page of the real model's study: tables and samples from its results, and a plot.

`write_report` replaces what is between BEGIN and END in docs/results.md. It shows every cell with a result,
whatever came out, and says which ones are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.evaluation.statistics import pass_at_k
from benchmarks.real_model_cells import Cell, Study
from benchmarks.real_model_statistics import Gain, gain_of
from benchmarks.report import ROOT, pyplot, table
from launch.run_files import read_object, read_rows

BEGIN = "<!-- begin: python -m benchmarks.real_model report -->"
END = "<!-- end: python -m benchmarks.real_model report -->"
PAGE, PLOT = ROOT / "docs" / "results.md", ROOT / "docs" / "real_model.png"

Result = Mapping[str, Any]


def write_report(study: Study, *, page: Path = PAGE, plot: Path = PLOT) -> str:
    """Writes the section and the plot; returns the section. Raises ValueError for a page without BEGIN and
    END. Changes nothing and says so while no cell has a result."""
    found = results_of(study)
    if not found:
        return f"no results in {study.results}: python -m benchmarks.real_model run rl-0"
    text = section(study, found, plot=plot.name)
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    draw(study, found, plot)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return text


def results_of(study: Study) -> dict[str, Result]:
    """Cell -> its result, in the order of the study."""
    found = {name: read_object(study.results / name / "result.json") for name in study.cells}
    return {name: result for name, result in found.items() if result}


def section(study: Study, found: Mapping[str, Result], *, plot: str) -> str:
    """The text of the page, from the results of the cells."""
    compared = comparisons(study, found)
    missing = [name for name in study.cells if not found.get(name, {}).get("finished")]
    parts = [_head(found), _verdict(compared)]
    if missing:
        parts.append(f"Not complete: {', '.join(f'`{name}`' for name in missing)}.")
    if compared:
        parts += [
            "Greedy score on the held-out questions. *Gain* is the difference with its 95 % interval: a "
            "two-level bootstrap over seeds and, within each set, prompts (10,000 draws; "
            "`benchmarks/real_model_statistics.py`); with one seed over prompts alone.",
            greedy_table(compared),
            sets_table(compared),
            "At temperature 1: the share of correct completions (pass@1) and of questions that at least one "
            "of eight completions solves (pass@8), both estimated without bias from "
            f"{_num_samples(found)} completions of each question (Chen et al. 2021). If rewards only made "
            "the policy choose more often what it already could, pass@1 would rise and pass@8 would not.",
            passes_table(compared),
        ]
    if twins := comparisons_with_rl(study, found):
        parts += ["The other cells beside reinforcement learning from the same start, on the same questions:"]
        parts += [twins_table(twins)]
    parts += [f"![held-out score, reward and entropy by step]({plot})", runs_table(study, found)]
    if rewards := rewards_table(study, found):
        parts += [
            "Rewards of training samples by kind of question, first and last tenth of the steps:",
            rewards,
        ]
    if shown := samples_table(compared):
        parts += ["The first held-out questions of each set, before and after (greedy):", shown]
    return "\n\n".join(parts)


class Comparison:
    """Cells of one group with their starts: paired scores of the same held-out questions."""

    def __init__(self, label: str, pairs: Sequence[tuple[Result, Result]]) -> None:
        """`pairs`: (start, cell), both evaluated on the same sets."""
        self.label, self.pairs = label, pairs
        self.sets = list(pairs[0][1]["evaluation"]["greedy"])

    @property
    def num_seeds(self) -> int:
        return len(self.pairs)

    def gain(self, score: str, *, only: str = "", k: int = 1) -> Gain:
        """`score`: `greedy` or `pass`. `only`: one set."""
        sets = [only] if only else self.sets
        before, after = (
            np.stack(
                [np.concatenate([_scores(pair[at], score, name, k) for name in sets]) for pair in self.pairs]
            )
            for at in (0, 1)
        )
        sizes = [len(_scores(self.pairs[0][1], score, name, k)) for name in sets]
        return gain_of(before, after, sizes=sizes)

    @property
    def ks(self) -> list[int]:
        """The k of pass@k."""
        num_samples = self.pairs[0][1]["evaluation"]["num_samples"]
        return sorted({1, min(8, num_samples)})


def _scores(result: Result, score: str, name: str, k: int) -> NDArray[np.float64]:
    """[P] greedy score, or pass@k, of each question of a set."""
    evaluation = result["evaluation"]
    if score == "greedy":
        return np.array([float(mark) for mark in evaluation["greedy"][name]])
    num = evaluation["num_samples"]
    return np.array([pass_at_k(num, solved, k) for solved in evaluation["solved"][name]])


def comparisons(study: Study, found: Mapping[str, Result]) -> list[Comparison]:
    """Each group of cells with several seeds, then each cell that is evaluated and whose start is."""
    pairs: dict[str, tuple[Result, Result]] = {}
    for name, cell in study.cells.items():
        after, before = found.get(name, {}), found.get(cell.start, {})
        if after.get("evaluation") and before.get("evaluation") and _have_same_sets(before, after):
            pairs[name] = before, after
    groups: dict[str, list[str]] = {}
    for name in pairs:
        groups.setdefault(study.cells[name].group, []).append(name)
    compared = []
    for group, names in groups.items():
        if len(names) > 1:
            compared.append(Comparison(f"{group}, {len(names)} seeds", [pairs[name] for name in names]))
        compared += [Comparison(name, [pairs[name]]) for name in names]
    return compared


def comparisons_with_rl(study: Study, found: Mapping[str, Result]) -> list[Comparison]:
    """Each other cell with the start of a cell of reinforcement learning, after that cell."""
    by_start = {study.cells[name].start: name for name in found if study.cells[name].group == "rl"}
    compared = []
    for name, after in found.items():
        twin = by_start.get(study.cells[name].start, name)
        before = found[twin]
        if twin != name and before.get("evaluation") and after.get("evaluation"):
            compared.append(Comparison(f"{name} beside {twin}", [(before, after)]))
    return compared


def _have_same_sets(before: Result, after: Result) -> bool:
    """True if both were asked the same questions; the start of the tool task comes from another job."""
    one, other = (
        {name: len(marks) for name, marks in result["evaluation"]["greedy"].items()}
        for result in (before, after)
    )
    return one == other


def _verdict(compared: Sequence[Comparison]) -> str:
    pooled = [one for one in compared if one.label.startswith("rl") and one.num_seeds > 1]
    pooled = pooled or [one for one in compared if one.label.startswith("rl")]
    if not pooled:
        return "No cell of reinforcement learning has been evaluated yet."
    gain = pooled[0].gain("greedy")
    beyond = (
        "above 0" if gain.low > 0 else "below 0" if gain.high < 0 else "not different from 0 beyond doubt"
    )
    singles = [one for one in compared if one.label.startswith("rl-")]
    worse = [one.label for one in singles if one.gain("greedy").mean < 0]
    last = f"Worse than its start: {', '.join(worse)}." if worse else "No seed became worse."
    return (
        f"**Reinforcement learning changes the greedy score on {gain.num_prompts} held-out questions by "
        f"{_signed(gain)}, which is {beyond}** ({gain.num_seeds} seeds, {gain.before:.3f} to "
        f"{gain.after:.3f}). {last}"
    )


def _head(found: Mapping[str, Result]) -> str:
    result = next(iter(found.values()))
    machines = dict.fromkeys(_cpu(one) + f", {one['machine']['cores']} cores" for one in found.values())
    return (
        "SmolLM2-135M-Instruct on three kinds of questions from reasoning_gym, and on expressions with a "
        "calculator ([the guide](guides/real-model.md)). Data, steps and rates were fixed before the first "
        f"run, and the last checkpoint is evaluated. All {result['rows']['questions']:,} questions are "
        f"different, and each is in one file only (compared by hash). {'; '.join(machines)}."
    )


def _cpu(result: Result) -> str:
    return str(result["machine"]["cpu"]).replace("(R)", "").removesuffix(" Processor")


def _num_samples(found: Mapping[str, Result]) -> int:
    return next(int(r["evaluation"]["num_samples"]) for r in found.values() if r.get("evaluation"))


def _signed(gain: Gain) -> str:
    """`+0.048 (+0.012 to +0.081)`"""
    return f"{gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"


def greedy_table(compared: Sequence[Comparison]) -> str:
    """A row for each comparison, over all sets."""
    rows = []
    for one in compared:
        gain = one.gain("greedy")
        rows.append([one.label, gain.num_prompts, f"{gain.before:.3f}", f"{gain.after:.3f}", _signed(gain)])
    return table(["cell", "questions", "before", "after", "gain"], rows)


def sets_table(compared: Sequence[Comparison]) -> str:
    """The gains by set, for comparisons with several sets."""
    names = list(dict.fromkeys(name for one in compared if len(one.sets) > 1 for name in one.sets))
    rows = [
        [one.label, *(_signed(one.gain("greedy", only=name)) if name in one.sets else "-" for name in names)]
        for one in compared
        if len(one.sets) > 1
    ]
    return table(["greedy gain", *names], rows)


def passes_table(compared: Sequence[Comparison]) -> str:
    """pass@k before and after."""
    ks = compared[0].ks
    rows = []
    for one in compared:
        cells: list[str] = []
        for k in one.ks:
            gain = one.gain("pass", k=k)
            cells += [f"{gain.before:.3f}", f"{gain.after:.3f}", _signed(gain)]
        rows.append([one.label, *cells])
    header = [text for k in ks for text in (f"pass@{k} before", "after", "gain")]
    return table(["cell", *header], rows)


def twins_table(compared: Sequence[Comparison]) -> str:
    """Greedy score and pass@1 of both cells of each comparison, and the differences."""
    rows = []
    for one in compared:
        gains = one.gain("greedy"), one.gain("pass", k=1)
        numbers = [
            text for gain in gains for text in (f"{gain.before:.3f}", f"{gain.after:.3f}", _signed(gain))
        ]
        rows.append([one.label, *numbers])
    return table(["cells", "greedy, rl", "other", "difference", "pass@1, rl", "other", "difference"], rows)


def runs_table(study: Study, found: Mapping[str, Result]) -> str:
    """Steps, time, memory and what went on in each training."""
    rows = []
    for name, result in found.items():
        bins = bins_of(study, name)
        metrics, audit = result["metrics"], read_object(study.results / name / "audit.json")
        failures = ", ".join(f"{kind} {number}" for kind, number in result["failures"].items())
        verdict = "-" if not audit else "clean" if audit["clean"] else "FAILED"
        rows.append(
            [
                name,
                _cpu(result),
                f"{result['steps']} / {result['num_steps']}",
                f"{result['hours']:.2f}",
                _number(result["step_seconds"], ".1f"),
                _number(result["peak_gib"] or None, ".1f"),
                f"{_number(metrics.get('lag_mean'), '.2f')} / {_number(metrics.get('lag_max'), '.0f')}",
                _number(metrics.get("mismatch_abs"), ".1e"),
                _ends(bins, "entropy", ".3f"),
                _ends(bins, "response_length_mean", ".1f"),
                _ends(bins, "truncated_fraction", ".3f"),
                failures or ("none" if audit else "-"),
                verdict,
            ]
        )
    header = [
        "cell", "CPU", "steps", "hours", "s a step", "peak GiB", "lag mean / max", "mismatch, mean",
        "entropy", "sampled tokens", "truncated", "failed samples", "audit",
    ]  # fmt: skip
    return (
        "Hours include evaluations and restarts; *mismatch* is the mean |log-prob of engine - of trainer| "
        "over tokens that the step's own weights sampled; entropy, tokens and truncated samples are of the "
        f"first and the last ten steps.\n\n{table(header, rows)}"
    )


def rewards_table(study: Study, found: Mapping[str, Result]) -> str:
    """Rewards by label and by part, and the tasks' own metrics, of the first and the last tenth."""
    rows = []
    for name in found:
        bins = bins_of(study, name)
        if study.cells[name].kind not in ("rl", "trl") or not bins:
            continue
        tenth = max(1, len(bins) // 10)
        first, last = (_flat(part) for part in (bins[:tenth], bins[-tenth:]))
        rows += [[name, key, f"{first[key]:.3f}", f"{last[key]:.3f}"] for key in last if key in first]
    return table(["cell", "of", "first", "last"], rows) if rows else ""


def _flat(bins: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean reward, rewards by label and part, and sample metrics of the bins."""
    values: dict[str, list[float]] = {}
    for one in bins:
        named = {"all": one.get("reward_mean")}
        named |= {label: each.get("reward_mean") for label, each in one.get("by_label", {}).items()}
        named |= {f"part {key}": value for key, value in one.get("reward_parts", {}).items()}
        named |= {f"metric {key}": value for key, value in one.get("sample_metrics", {}).items()}
        for key, value in named.items():
            if value is not None:
                values.setdefault(key, []).append(value)
    return {key: sum(some) / len(some) for key, some in values.items()}


def samples_table(compared: Sequence[Comparison]) -> str:
    """Completions before and after of the first seed of each group of reinforcement learning."""
    rows: list[list[str]] = []
    seen: set[str] = set()
    for one in compared:
        before, after = one.pairs[0]
        group = one.label.rpartition("-")[0]
        if one.num_seeds > 1 or after["kind"] != "rl" or group in seen:
            continue
        seen.add(group)
        shown = zip(before["evaluation"]["samples"], after["evaluation"]["samples"], strict=False)
        for old, new in shown:
            texts = [old["question"], old["answer"], old["completion"], new["completion"]]
            rows.append([one.label, *map(_in_cell, texts), f"{old['reward']:g} → {new['reward']:g}"])
    return table(["cell", "question", "reference", "before", "after", "reward"], rows) if rows else ""


def _in_cell(text: str) -> str:
    """Text as code in a cell of a table."""
    plain = " ".join(text.replace("`", "'").replace("|", "\\|").split())
    return f"`{plain}`" if plain else "-"


def bins_of(study: Study, name: str) -> list[dict[str, Any]]:
    """The rows of a cell's metrics.jsonl in the results."""
    return [row for row in read_rows(study.results / name / "metrics.jsonl") if row]


def curve(study: Study, name: str) -> dict[int, float]:
    """Step -> greedy score pooled over the questions of all sets; only steps whose sets are complete."""
    by_step: dict[int, dict[str, tuple[float, int]]] = {}
    for row in read_rows(study.results / name / "evaluations.jsonl"):
        if row and row["num_samples"] == 1 and row["avg"] is not None:
            by_step.setdefault(row["step"], {})[row["set"]] = row["avg"], row["num_prompts"]
    most = max((len(sets) for sets in by_step.values()), default=0)
    return {
        step: sum(avg * num for avg, num in sets.values()) / sum(num for _, num in sets.values())
        for step, sets in sorted(by_step.items())
        if len(sets) == most
    }


def draw(study: Study, found: Mapping[str, Result], path: Path) -> None:
    """Held-out score, reward and entropy of the cells of reinforcement learning, over the steps."""
    figure, (scores, rewards, entropies) = pyplot().subplots(1, 3, figsize=(13, 3.8), dpi=130)
    names = [name for name in found if study.cells[name].kind in ("rl", "trl")]
    groups = list(dict.fromkeys(study.cells[name].group for name in names))
    for name in names:
        cell, bins = study.cells[name], bins_of(study, name)
        style = _style(cell, groups)
        at = curve(study, name)
        scores.plot(list(at), list(at.values()), marker="o", markersize=3, label=name, **style)
        steps = [one["first_step"] + one["num_steps"] / 2 for one in bins]
        for axes, key in ((rewards, "reward_mean"), (entropies, "entropy")):
            points = [(step, one[key]) for step, one in zip(steps, bins, strict=True) if key in one]
            axes.plot([step for step, _ in points], [value for _, value in points], **style)
    for axes, label in (
        (scores, "held-out, greedy, all sets"),
        (rewards, "reward of training samples"),
        (entropies, "entropy, nats"),
    ):
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
    if names:
        scores.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot().close(figure)


def _style(cell: Cell, groups: Sequence[str]) -> dict[str, Any]:
    colors = ("black", "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")
    lines = ("-", "--", ":", "-.")
    return {
        "color": colors[groups.index(cell.group) % len(colors)],
        "linestyle": lines[cell.seed % len(lines)],
        "linewidth": 1.3,
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ends(bins: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    """The value in the first and the last bin that has it."""
    values = [one[key] for one in bins if one.get(key) is not None]
    return f"{values[0]:{form}} → {values[-1]:{form}}" if values else "-"
