"""How much of its teacher's gain does a distilled SmolLM2 get?

    python -m benchmarks.real_model_gap [distill-2] [--work runs/real_model]

The cell of `benchmarks.real_model` and that of its teacher run first, if they are missing. The published
model, the teacher and the student then answer NUM_MORE further held-out questions of each data set greedily:
so many that the standard error of a score is below .01. The share of the gap, (student - base) / (teacher -
base), has a 95 % interval by a bootstrap over the questions within each data set. The result is
benchmarks/results/real_model_gap.json; nothing is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.real_model import command_of, run_cell, run_logged
from benchmarks.real_model_cells import Cell, Study, cells_of
from benchmarks.real_model_data import DATA, disjoint, write_more
from benchmarks.real_model_result import num_solved
from benchmarks.report import table, write
from launch.samples.reading import RunLedgers, Selection

NUM_MORE, NUM_DRAWS = 1000, 10_000
Marks = Mapping[str, NDArray[np.float64]]
"""Data set -> [P] greedy reward of each question."""


def main() -> None:
    """Runs what is missing, writes the result and prints the table."""
    cells = cells_of()
    distilled = [name for name, cell in cells.items() if cell.teacher]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cell", nargs="?", choices=distilled, default=distilled[0])
    parser.add_argument("--work", type=Path, default=Study.work)
    args = parser.parse_args()
    result = measure(Study(work=args.work.resolve(), cells=cells), args.cell)
    print(table(*rows_of(result)))
    print(f"written to {write('real_model_gap', result)}")


def measure(study: Study, name: str, *, num_more: int = NUM_MORE) -> dict[str, Any]:
    """Scores of the three models on the further questions, and the share of the gap."""
    student = study.cells[name]
    run_cell(study, name)
    write_more(study.rows, num_more)
    disjoint(study.rows)
    cells = {"base": study.cells[student.start], "teacher": study.cells[student.teacher], "student": student}
    marks = {who: marks_of(study, cell, num_more) for who, cell in cells.items()}
    return {
        "cell": name,
        "questions_of_each_set": num_more,
        "scores": {who: scores_of(sets) for who, sets in marks.items()},
        "share": share_of(marks["base"], marks["teacher"], marks["student"]),
    }


def marks_of(study: Study, cell: Cell, num_more: int) -> Marks:
    """The last model of a cell on the further questions."""
    config = study.evaluation_config(cell)
    sets = {}
    for data in DATA:
        own = config["eval"]["sets"][data.name]
        task = own["task"] | {"eval": str(study.rows / f"{data.name}.more.jsonl")}
        sets[data.name] = own | {"task": task, "num_prompts": num_more}
    # A name of its own, so that the cell's hours are those of its training.
    own_cell = replace(cell, name=f"{cell.name}-more")
    config |= {"eval": config["eval"] | {"sets": sets}}
    command = command_of(study, "eval", study.checkpoint(cell), name=own_cell.name, config=config)
    run_logged(study, own_cell, command, began_unix_s=time.time(), what=own_cell.name)
    ledgers = RunLedgers(study.work / own_cell.name)
    return {
        data: np.array(num_solved(ledgers.find(Selection(set_name=data)), num_more), dtype=np.float64)
        for data in sets
    }


def scores_of(sets: Marks) -> dict[str, dict[str, float]]:
    """Score and standard error of each set, and of all questions together."""
    scores = {**sets, "all": np.concatenate(list(sets.values()))}
    return {
        name: {"score": float(mark_P.mean()), "error": float(mark_P.std(ddof=1) / np.sqrt(len(mark_P)))}
        for name, mark_P in scores.items()
    }


def share_of(base: Marks, teacher: Marks, student: Marks, *, rng_seed: int = 0) -> dict[str, float]:
    """(student - base) / (teacher - base) over all questions, with its 95 % interval. The same questions are
    drawn for all three. Empty if the teacher is not better than the base in every draw."""
    rng = np.random.default_rng(rng_seed)
    gains_2P = {name: np.stack([student[name] - base[name], teacher[name] - base[name]]) for name in base}
    drawn_2B = np.zeros((2, NUM_DRAWS))
    for gain_2P in gains_2P.values():
        for draw in range(NUM_DRAWS):
            drawn_2B[:, draw] += gain_2P[:, rng.integers(gain_2P.shape[1], size=gain_2P.shape[1])].sum(axis=1)
    if drawn_2B[1].min() <= 0:
        return {}
    low, high = np.quantile(drawn_2B[0] / drawn_2B[1], (0.025, 0.975))
    own, whole = np.concatenate(list(gains_2P.values()), axis=1).sum(axis=1)
    return {"share": float(own / whole), "low": float(low), "high": float(high)}


def rows_of(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    names = list(result["scores"]["base"])
    rows = [
        [who, *(f"{own[name]['score']:.3f} ± {own[name]['error']:.3f}" for name in names)]
        for who, own in result["scores"].items()
    ]
    share = result["share"]
    text = f"{share['share']:.2f} ({share['low']:.2f} to {share['high']:.2f})" if share else "no gap"
    rows.append(["share of the gap", *[""] * (len(names) - 1), text])
    return ["model", *names], rows


if __name__ == "__main__":
    main()
