"""The results of a cell of the study, small enough for the repository: benchmarks/results/real_model/NAME/.

    config.yaml         settings of the training
    metrics.jsonl       means of the steps' metrics over BIN steps each
    evaluations.jsonl   rows of the evaluations during training and of the last model
    audit.json          what `areal-like audit` says about the training
    result.json         the rest: scores of each held-out question, samples, failures, hours, memory

They are made from the run's directory as far as it is, so an interrupted cell has results too. Without a
run's directory the results stay as they are. Paths of this machine are left out.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from areal_like.errors import ArealError
from areal_like.paths import write_json
from benchmarks.real_model_cells import SAMPLED, Cell, Study
from benchmarks.real_model_data import disjoint
from benchmarks.report import ROOT, machine
from launch.audit.run import audit_run
from launch.run_files import read_object, read_rows
from launch.samples.choosing import transcripts
from launch.samples.reading import Row, RunLedgers, Selection
from launch.samples.transcripts import Transcript

BIN = 10
"""Steps of a row of metrics.jsonl."""
MEANS = (
    "reward_mean", "loss", "grad_norm", "entropy", "response_length_mean", "truncated_fraction", "turns",
    "lag_mean", "ess_ratio_geometric", "clipped_fraction", "mismatch_abs", "mismatch_k3", "masked_share",
    "late_share", "num_groups", "zero_advantage_groups", "tokens_trained", "step_s", "wait_data_s",
    "compute_s", "reverse_kl", "reward_parts", "sample_metrics", "by_label",
)  # fmt: skip
LARGEST = ("lag_max", "mismatch_abs_max", "weight_check_abs", "memory_peak_gb")
OF_SUMMARY = (
    "steps", "tokens_generated", "tokens_trained", "max_trained_lag", "mean_trained_lag", "tickets", "drops",
    "trainer_idle_fraction", "loss_first", "loss_last",
)  # fmt: skip
OF_EVALUATION = (
    "step", "set", "avg", "ci_low", "ci_high", "pass_at_k", "num_prompts", "num_samples", "num_failed",
    "truncated_fraction", "mean_tokens", "oldest_step", "newest_step",
)  # fmt: skip
NUM_SHOWN = 3
"""Held-out questions of each set whose completions are shown: the first ones."""
MAX_CHARS = 400
"""Length of a completion that is shown."""


def collect(study: Study, cell: Cell) -> None:
    """Writes the results of a cell, as far as it is."""
    if not (study.run(cell).is_dir() or study.evaluation(cell).is_dir()):
        return
    folder, run = study.results / cell.name, study.run(cell)
    folder.mkdir(parents=True, exist_ok=True)
    rows, progress = study.step_rows(cell), study.progress(cell)
    kept = next(
        (d / "config.yaml" for d in (run, study.evaluation(cell)) if (d / "config.yaml").exists()), None
    )
    text = OmegaConf.to_yaml(study.config(cell)) if kept is None or cell.kind == "trl" else kept.read_text()
    (folder / "config.yaml").write_text(_without_paths(text, study))
    evaluations = [*_evaluations(run), *_evaluations(study.evaluation(cell))]
    _write_lines(folder / "metrics.jsonl", binned(rows))
    _write_lines(folder / "evaluations.jsonl", evaluations)
    audit = _audit(run) if cell.kind == "rl" else {}
    if audit:
        write_json(folder / "audit.json", audit)
    result = {
        "cell": cell.name,
        "about": cell.about,
        "kind": cell.kind,
        "seed": cell.seed,
        "start": cell.start,
        "machine": machine(),
        "settings": {**study.settings, **cell.settings},
        "rows": disjoint(study.rows),
        "finished": progress.is_trained and progress.is_evaluated,
        "steps": progress.steps,
        "num_steps": progress.num_steps,
        "hours": round(progress.hours, 3),
        "step_seconds": progress.seconds_per_step,
        "evaluation_seconds": progress.evaluation_s,
        "peak_gib": round(progress.peak_gib, 2),
        "run": {k: v for k, v in read_object(run / "summary.json").items() if k in OF_SUMMARY},
        "metrics": totals(rows),
        "failures": audit.get("failures", {}),
        "evaluation": _evaluation(study, cell) if progress.is_evaluated else None,
    }
    (folder / "result.json").write_text(_without_paths(_compact(result), study))


def binned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The means of MEANS and the largest of LARGEST over BIN steps each; a metric that no step has is left
    out. Nested metrics keep their form."""
    parts = [rows[first : first + BIN] for first in range(0, len(rows), BIN)]
    return [{"first_step": part[0]["step"], "num_steps": len(part), **totals(part)} for part in parts]


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The means of MEANS and the largest of LARGEST."""
    means = _merged(({k: row[k] for k in MEANS if k in row} for row in rows), statistics.fmean)
    return means | _merged(({k: row[k] for k in LARGEST if k in row} for row in rows), max)


def _merged(rows: Iterable[Mapping[str, Any]], merge: Any) -> dict[str, Any]:
    """Each number is merged over the rows that have it; mappings are merged inside."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.items():
            if value is not None:
                found.setdefault(key, []).append(value)
    return {
        key: _merged(values, merge) if isinstance(values[0], Mapping) else _rounded(merge(values))
        for key, values in found.items()
    }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _audit(run: Path) -> dict[str, Any]:
    """The verdict of the audit with up to three offenders of each check; empty without a ledger."""
    try:
        audit = audit_run(run)
    except ArealError:
        return {}
    checks = [
        {
            "text": check.text,
            "num_checked": check.num_checked,
            "num_offenders": len(check.offenders),
            "offenders": check.offenders[:3],
        }
        for check in audit.checks
    ]
    kept = {key: value for key, value in asdict(audit).items() if key not in ("run", "checks")}
    return {"clean": audit.is_clean, **kept, "checks": checks}


def _evaluations(run: Path) -> list[dict[str, Any]]:
    rows = read_rows(run / "evaluations.jsonl")
    return [{key: row[key] for key in OF_EVALUATION if key in row} for row in rows if row]


def _evaluation(study: Study, cell: Cell) -> dict[str, Any]:
    """Scores and samples of the last model."""
    run = study.evaluation(cell)
    sets = read_object(run / "summary.json").get("sets", {})
    ledgers, config = RunLedgers(run), study.evaluation_config(cell)
    greedy: dict[str, str] = {}
    solved: dict[str, list[int]] = {}
    samples: list[dict[str, Any]] = []
    for name, row in sets.items():
        found = ledgers.find(Selection(set_name=name))
        if name.endswith(SAMPLED):
            solved[name.removesuffix(SAMPLED)] = num_solved(found, row["num_prompts"])
            continue
        greedy[name] = "".join(map(str, num_solved(found, row["num_prompts"])))
        task = config["eval"]["sets"][name].get("task") or config["task"]
        questions = [json.loads(line) for line in Path(task["eval"]).read_text().splitlines()]
        _, shown = transcripts(run, Selection(set_name=name), limit=NUM_SHOWN)
        samples += [_sample(one, questions) for one in shown]
    kept = ("avg", "ci_low", "ci_high", "pass_at_k", "num_failed", "truncated_fraction", "mean_tokens")
    return {
        "sets": {name: {key: row[key] for key in kept if key in row} for name, row in sets.items()},
        "num_samples": study.num_samples,
        "greedy": greedy,
        "solved": solved,
        "samples": samples,
    }


def num_solved(rows: Iterable[Row], num_prompts: int) -> list[int]:
    """[P] number of solved completions of each prompt. One that is missing or failed is not solved."""
    counts = [0] * num_prompts
    for row in rows:
        counts[row.prompt_index] += row.reward >= 1 and not row.failure
    return counts


def _sample(one: Transcript, questions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A question with its completion: everything after the prompt, with tool messages if there are any."""
    text = "".join(part.text for part in one.segments[-1][1:]) if one.segments else one.missing
    row = questions[one.prompt_index]
    return {
        "set": one.eval_set,
        "question": row["question"],
        "answer": row["answer"],
        "completion": text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]}...",
        "reward": one.reward,
    }


def _without_paths(text: str, study: Study) -> str:
    for path, name in ((study.work, "runs/real_model"), (ROOT, "."), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return text


def _compact(result: Mapping[str, Any]) -> str:
    """JSON with a line for each key, so that long lists do not take a line for each number."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
    return f"{{\n{lines}\n}}\n"


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
