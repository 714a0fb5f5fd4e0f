"""The study of a real model: does reinforcement learning make SmolLM2-135M-Instruct better, beyond doubt?

    python -m benchmarks.real_model run rl-0 [NAME ...]     runs cells, and before each those it starts from
    python -m benchmarks.real_model status                  what is done, and hours that are left
    python -m benchmarks.real_model report                  results -> docs/results.md, docs/real_model.png

    cells   base, start-0..2, rl-0..2, killed-2, sft-2, lag0-2, trl-2, lora-2, tools-start-0..1, tools-0..1,
            distill-2 (benchmarks/real_model_cells.py says what each one is)

Data, number of steps, learning rates and evaluation are fixed before the first run: the last checkpoint of a
cell is evaluated, whatever its score, and every seed is reported. Held-out questions are in no training file,
which `run` checks by hash before it begins.

A cell is a training and an evaluation, both runs of `areal-like` in `--work` with `resume=auto`: after a
kill, or when the machine was cut off, the same command continues from the newest checkpoint. Ctrl-C and
SIGTERM end a cell with a checkpoint. Whether it ends or is stopped, its results go to
benchmarks/results/real_model/NAME/ (benchmarks/real_model_result.py); `report` refreshes them.

`trl-2` needs `make trl`. The goal is that the processes of a cell use less than 16 GB; the largest sum of
their proportional set sizes is in the results. (Before the trainer returned freed memory `distill-2` took
17.9, and `rl-2` 15.5; a later run of `rl-2` took 11.4.) `key=value` changes a setting of all cells, for a
machine that needs others (`model.dtype=float32` where there is no fast bfloat16).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from areal_like.paths import write_json
from benchmarks.processes import run_program
from benchmarks.real_model_cells import Cell, Study, cells_of, hours_left, write_config
from benchmarks.real_model_data import disjoint, write_rows
from benchmarks.real_model_report import write_report
from benchmarks.real_model_result import collect
from benchmarks.real_model_trl import missing_trl, trl_command
from benchmarks.report import ROOT, table
from launch.run_files import read_object


def main() -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Study.work, help="directory of rows and runs")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run cells to their end")
    run.add_argument("names", nargs="+", metavar="NAME", help="a cell, or key=value for all cells")
    commands.add_parser("status", help="show what is done")
    commands.add_parser("report", help="write the results' page")
    args = parser.parse_args()
    words = getattr(args, "names", [])
    settings = {key: yaml.safe_load(value) for key, _, value in (w.partition("=") for w in words if "=" in w)}
    names, cells = [word for word in words if "=" not in word], cells_of()
    if unknown := [name for name in names if name not in cells]:
        parser.exit(2, f"benchmarks.real_model: no cell {unknown[0]}: choose from {', '.join(cells)}\n")
    if any(cells[name].kind == "trl" for name in names) and (problem := missing_trl()):
        parser.exit(2, f"benchmarks.real_model: {problem}\n")
    try:
        settings = kept_settings(args.work.resolve(), settings, begins=args.command == "run")
    except ValueError as error:
        parser.exit(2, f"benchmarks.real_model: {error}\n")
    study = Study(work=args.work.resolve(), cells=cells, settings=settings)
    if args.command == "status":
        print(status(study))
    elif args.command == "report":
        for cell in cells.values():
            collect(study, cell)
        print(write_report(study))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        for name in names:
            run_cell(study, name)


def kept_settings(work: Path, settings: Mapping[str, Any], *, begins: bool) -> dict[str, Any]:
    """The settings of all cells: those with which the first cell of `work` began, or these.

    Raises ValueError if both are there and differ: cells with different settings could not be compared.
    """
    path = work / "settings.json"
    if path.exists():
        kept = read_object(path)
        if settings and dict(settings) != kept:
            raise ValueError(f"the study in {work} began with {kept or 'no settings'}: name another --work")
        return kept
    if begins:
        write_json(path, dict(settings))
    return dict(settings)


def run_cell(study: Study, name: str) -> None:
    """Runs what is missing of a cell, after the cell from which it starts and that of its teacher.

    Raises ValueError if a held-out question is in a training file, RuntimeError if a program fails.
    """
    cell = study.cells[name]
    for other in (cell.start, cell.teacher):
        if other:
            run_cell(study, other)
    if study.is_trained(cell) and study.is_evaluated(cell):
        print(f"{name}: complete", flush=True)
        if not (study.results / name / "result.json").exists():
            collect(study, cell)
        return
    write_rows(study.rows)
    disjoint(study.rows)
    began_unix_s = time.time()
    try:
        if not study.is_trained(cell):
            _train(study, cell, began_unix_s)
        _evaluate(study, cell, began_unix_s)
    finally:
        collect(study, cell)


def status(study: Study) -> str:
    """A row for each cell, and the hours that the study still needs as far as they are known."""
    left = hours_left(study)
    lines = []
    for name, cell in study.cells.items():
        own, hours = study.progress(cell), left[name]
        steps = f"{own.steps} / {own.num_steps or '?'}" if cell.kind != "base" else "-"
        pace = "-" if own.seconds_per_step is None else f"{own.seconds_per_step:.1f}"
        is_done = own.is_trained and own.is_evaluated
        state = "done" if is_done else "trained" if own.is_trained else "begun" if own.steps else "not begun"
        if cell.kind == "base" and not is_done:
            state = "not begun"
        estimate = "?" if hours is None else f"{hours:.1f}"
        lines.append([name, state, steps, pace, f"{own.hours:.1f}", estimate, cell.about])
    known = [hours for hours in left.values() if hours is not None]
    rest = f"{sum(known):.1f} hours left"
    if len(known) < len(left):
        rest += f", and those of {len(left) - len(known)} cells like none that has run"
    header = ["cell", "state", "steps", "s a step", "hours", "hours left", "what it is"]
    return f"{table(header, lines)}\n\n{rest}"


def _train(study: Study, cell: Cell, began_unix_s: float) -> None:
    start = study.cells[cell.start]
    config = study.config(cell)
    config["model"] |= {"path": study.checkpoint(start)}
    if cell.teacher:
        config["distill"] |= {"teachers": {"default": study.checkpoint(study.cells[cell.teacher])}}
    if cell.kind == "trl":
        command = trl_command(study, cell, config)
    else:
        verb = {"sft": "sft", "rl": "run"}[cell.kind]
        command = command_of(study, verb, name=cell.name, config=config)
    for kill in (step for step in cell.kills if step not in study.kills(cell)):
        run_logged(study, cell, command, began_unix_s=began_unix_s, what=cell.name, kill=kill)
    run_logged(study, cell, command, began_unix_s=began_unix_s, what=cell.name)
    if cell.kind == "trl":
        summary = {"finished": True, "steps": len(study.step_rows(cell))}
        write_json(study.run(cell) / "summary.json", summary)
    if not study.is_trained(cell):
        raise RuntimeError(f"{cell.name} was stopped before its last step: the same command continues it")


def _evaluate(study: Study, cell: Cell, began_unix_s: float) -> None:
    model = study.checkpoint(cell)
    if cell.has_adapter:
        merged = study.work / f"{cell.name}-merged"
        if not (merged / "config.json").exists():
            command = [sys.executable, "-m", "launch", "merge", model, "--into", str(merged)]
            run_logged(study, cell, command, began_unix_s=began_unix_s, what=f"{cell.name}-merged")
        model = str(merged)
    config = study.evaluation_config(cell)
    command = command_of(study, "eval", model, name=f"{cell.name}-eval", config=config)
    run_logged(study, cell, command, began_unix_s=began_unix_s, what=f"{cell.name}-eval")


def command_of(study: Study, verb: str, *words: str, name: str, config: Mapping[str, Any]) -> list[str]:
    """Writes the settings of a run and returns its command."""
    file = write_config(study.work / "configs" / f"{name}.yaml", config)
    own = [f"name={name}", f"runs_dir={study.work}", "resume=auto"]
    return [sys.executable, "-m", "launch", verb, *words, "--config", str(file), *own]


def run_logged(
    study: Study, cell: Cell, command: list[str], *, began_unix_s: float, what: str, kill: int | None = None
) -> None:
    """Runs a program to its end, or, with `kill`, until it has made so many steps and is killed. Raises
    RuntimeError if it fails."""
    log = study.work / f"{what}.log"
    print(f"{what}: {' '.join(command[1:])} > {log}", flush=True)

    def look(mib: float) -> None:
        wall_s = time.time() - began_unix_s
        study.note_attempt(cell, began_unix_s=began_unix_s, wall_s=wall_s, peak_mib=mib)

    def is_to_be_killed() -> bool:
        return kill is not None and len(study.step_rows(cell)) >= kill

    env = {"OMP_NUM_THREADS": "1"} | os.environ
    code = run_program(command, cwd=ROOT, log=log, env=env, on_look=look, is_to_be_killed=is_to_be_killed)
    look(0.0)
    if kill is not None and code == -signal.SIGKILL:
        study.note_kill(cell, kill)
        print(f"{what}: killed after {len(study.step_rows(cell))} steps", flush=True)
    elif code != 0:
        raise RuntimeError(f"{what} exited with {code}:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
