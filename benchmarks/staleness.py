"""Measures reward against staleness: a grid of off-policy corrections and sample ages, on the default task.

    python -m benchmarks.staleness [--full] [--jobs 2] [--only PATTERN ...] [--seeds 0 1 2] [--steps 400]
                                   [--report]

A cell of the grid is (method, fixed or mixed ages, lag, learning rate, seed); `benchmarks.staleness_cell`
runs one cell and defines the ages. A cell's result depends on its settings alone. Each cell takes one thread
and is appended to benchmarks/results/staleness.jsonl when it finishes, so the grid may be stopped and
restarted; a finished cell is not run again unless its settings have changed. Cells run seed by seed, lag 16
first, so that a partial grid is useful too. At its end the benchmark prints the table and draws
docs/staleness.png from all results so far.

`--only` takes shell patterns of a cell's name, such as `PPO/*`, `*/fixed-16/*`,
`VCPO/mixed-16/0.0003/seed-0`. `--report` runs nothing.

Nothing is tuned for a single cell. Each method runs at the same learning rates, with the settings and the
normalizer of its paper and with group-normalized advantages, except for OAPL, which defines its own
advantages, and for VCPO, whose default differs from its paper (docs/reference/objectives.md). `VCPO, proxy
norms` needs no gradients of single sequences: it is the form for large models. OAPL's beta2 follows the
project's rule for the completion length (.3 at ten tokens, set before the grid was run), and its engine syncs
periodically, as its paper prescribes.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from transformers.utils.logging import disable_progress_bar

from areal_like.runtime.process import die_with_parent
from benchmarks.report import RESULTS, ROOT
from benchmarks.staleness_bounds import write_bounds
from benchmarks.staleness_cell import Cell, CellResult, build_model, run_cell
from benchmarks.staleness_report import COMMON_RATE, as_table, draw

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LEARNING_RATES = (COMMON_RATE, 1e-4, 1e-3, 3e-5)
PAGE_SETTINGS = (("fixed", 16), ("mixed", 16), ("fixed", 64), ("fixed", 4), ("fixed", 0), ("fixed", 1))
FULL_SETTINGS = (*PAGE_SETTINGS, *(("fixed", lag) for lag in (2, 8, 32)), ("mixed", 4), ("mixed", 64))

PAGE_METHODS: dict[str, dict[str, Any]] = {
    "none": {"objective": {"name": "reinforce"}},
    "token TIS": {"objective": {"name": "tis", "level": "token", "cap": 2.0}},
    "sequence TIS": {"objective": {"name": "tis", "level": "sequence", "cap": 2.0}},
    "PPO": {"objective": {"name": "ppo"}},
    "GSPO": {"objective": {"name": "gspo"}, "normalizer": "seq_mean_token_mean"},
    "VCPO": {
        "objective": {"name": "vcpo", "baseline_weights": "score"},
        "normalizer": "seq_mean_token_mean",
    },
    "VCPO, proxy norms": {
        "objective": {"name": "vcpo", "baseline_weights": "score", "norms": "proxy"},
        "normalizer": "seq_mean_token_mean",
    },
    "VCPO, as published": {
        "objective": {"name": "vcpo", "baseline_weights": "gradient"},
        "normalizer": "seq_mean_token_mean",
    },
    "VESPO": {"objective": {"name": "vespo"}},
    "OAPL": {"objective": {"name": "oapl"}, "normalizer": "seq_mean_token_sum", "periodic": True},
}
FULL_METHODS: dict[str, dict[str, Any]] = {
    **PAGE_METHODS,
    "sequence TIS 8": {"objective": {"name": "tis", "level": "sequence", "cap": 8.0}},
    "geometric TIS": {"objective": {"name": "tis", "level": "geometric", "cap": 2.0}},
    "VCPO, leave one out": {
        "objective": {"name": "vcpo", "baseline_weights": "score", "leave_one_out": True},
        "normalizer": "seq_mean_token_mean",
    },
    "VCPO, as published, leave one out": {
        "objective": {"name": "vcpo", "baseline_weights": "gradient", "leave_one_out": True},
        "normalizer": "seq_mean_token_mean",
    },
    "VCPO, no baseline": {
        "objective": {"name": "vcpo", "baseline": "none"},
        "normalizer": "seq_mean_token_mean",
    },
    "token mask": {"objective": {"name": "tis", "level": "token", "mode": "mask"}},
    "sequence mask": {"objective": {"name": "tis", "level": "sequence", "mode": "mask"}},
    "KPop": {"objective": {"name": "tis", "level": "token", "cap": 5.0, "masks": [{"name": "kpop"}]}},
    "TRM": {"objective": {"name": "tis", "level": "token", "cap": 2.0, "masks": [{"name": "trust_region"}]}},
    "decoupled PPO": {"objective": {"name": "decoupled_ppo"}},
    "REINFORCE, single samples": {
        "objective": {"name": "tis", "level": "token", "cap": 2.0},
        "advantage": {"name": "running"},
        "groups_per_step": 64,
        "group_size": 1,
    },
    "online DPO": {"objective": {"name": "online_dpo"}, "normalizer": "seq_mean_token_sum"},
    "REBEL": {"objective": {"name": "rebel"}, "normalizer": "seq_mean_token_sum"},
    "SPPO": {"objective": {"name": "sppo"}, "normalizer": "seq_mean_token_sum"},
    "decoupled PPO, snapshot": {"objective": {"name": "decoupled_ppo", "prox": "snapshot"}},
    "PPO-EWMA": {"objective": {"name": "decoupled_ppo", "prox": "average"}},
    "A-3PO": {"objective": {"name": "decoupled_ppo", "prox": "interpolated"}},
    "SAPO": {"objective": {"name": "sapo"}, "normalizer": "seq_mean_token_mean"},
    "CISPO": {"objective": {"name": "cispo"}},
    "M2PO": {"objective": {"name": "m2po"}},
    "TOPR": {"objective": {"name": "topr"}},
    "DPPO": {"objective": {"name": "dppo_tv"}},
    "MASPO": {"objective": {"name": "maspo"}},
    "DCPO": {"objective": {"name": "dcpo"}},
    "LAD": {"objective": {"name": "lad"}},
    "OAPL, no sync": {"objective": {"name": "oapl"}, "normalizer": "seq_mean_token_sum"},
}
"""Settings of a Cell by label; an absent setting has the objective's default."""


def grid(*, full: bool, seeds: list[int], num_steps: int) -> list[Cell]:
    """All cells, in the order in which they are run."""
    methods, settings = (FULL_METHODS, FULL_SETTINGS) if full else (PAGE_METHODS, PAGE_SETTINGS)
    return [
        Cell(method=method, **own, mode=mode, lag=lag, lr=lr, seed=seed, num_steps=num_steps)
        for seed in seeds
        for mode, lag in settings
        for lr in LEARNING_RATES
        for method, own in methods.items()
    ]


def name_of(cell: Cell) -> str:
    """A cell's name, such as `PPO/fixed-16/0.0003/seed-0`."""
    return f"{cell.method}/{cell.mode}-{cell.lag}/{cell.lr:g}/seed-{cell.seed}"


C = TypeVar("C", bound="DataclassInstance")
"""Settings of one run."""
R = TypeVar("R", bound="DataclassInstance")
"""Its result."""


class Results(Generic[C, R]):
    """The file of finished cells, one JSON object per line. Lines are only appended."""

    def __init__(self, path: Path, read: Callable[[dict[str, Any]], R]) -> None:
        """Reads the file. Removes an incomplete last line, which a killed run may have left.

        `read`: makes a result from its JSON object.
        """
        self._path = path
        self._done: dict[str, R] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        for line in whole.splitlines():
            row = json.loads(line)
            self._done[_key(row["cell"])] = read(row["result"])

    def get(self, cell: C) -> R | None:
        """The result of exactly these settings, or None."""
        return self._done.get(_key(asdict(cell)))

    def of(self, cells: Iterable[C]) -> list[tuple[C, R]]:
        """The cells that have results, with them."""
        return [(cell, result) for cell in cells if (result := self.get(cell)) is not None]

    def all(self) -> list[tuple[dict[str, Any], R]]:
        """The settings of every finished cell, as JSON has them, with its result."""
        return [(json.loads(key), result) for key, result in self._done.items()]

    def add(self, cell: C, result: R) -> None:
        """Appends a result to the file."""
        self._done[_key(asdict(cell))] = result
        with self._path.open("a") as file:
            file.write(json.dumps({"cell": asdict(cell), "result": asdict(result)}) + "\n")


def _key(settings: dict[str, Any]) -> str:
    """The cell's settings, without an unset advantage, which older results do not have."""
    known = {name: value for name, value in settings.items() if name != "advantage" or value}
    return json.dumps(known, sort_keys=True)


def run(cells: list[Cell], results: Results[Cell, CellResult], *, num_jobs: int) -> None:
    """Runs cells in `num_jobs` worker processes at low priority, and records each when it finishes."""
    finished = in_workers(
        cells,
        num_jobs=num_jobs,
        model_of=lambda cell: (cell.seed, cell.warm_start_steps),
        build=_build,
        run_one=run_cell,
    )
    for number, (cell, result) in enumerate(finished, start=1):
        results.add(cell, result)
        print(
            f"{time.strftime('%H:%M:%S')} {number}/{len(cells)} {name_of(cell)}: "
            f"reward {result.reward:.3f} best {result.best:.3f} greedy {result.greedy:.3f} "
            f"ess {result.ess_ratio:.2f} {result.wall_s:.0f} s",
            flush=True,
        )


def in_workers(
    cells: list[C],
    *,
    num_jobs: int,
    model_of: Callable[[C], Hashable],
    build: Callable[[str, C], None],
    run_one: Callable[[C, str], R],
) -> Iterator[tuple[C, R]]:
    """Runs cells in `num_jobs` processes of low priority; yields each with its result when it finishes.

    `model_of`: cells with equal values start from the same model. `build(directory, cell)` writes the model
    of such cells, and `run_one(cell, directory)` runs one of them; both are functions of a module.
    """
    if not cells:
        return
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as scratch,
        ProcessPoolExecutor(num_jobs, mp_context=context, initializer=_start_worker) as pool,
    ):
        first_of = {model_of(cell): cell for cell in reversed(cells)}
        models = {kind: f"{scratch}/{number}" for number, kind in enumerate(first_of)}
        list(pool.map(build, models.values(), first_of.values()))
        futures = {pool.submit(run_one, cell, models[model_of(cell)]): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _build(out_dir: str, cell: Cell) -> None:
    build_model(Path(out_dir), seed=cell.seed, warm_start_steps=cell.warm_start_steps)


def _start_worker() -> None:
    die_with_parent()
    os.nice(10)
    # Turns off the trainer's warnings about settings that OAPL overrides, and the progress bar for each model
    # that is loaded.
    logging.disable(logging.WARNING)
    disable_progress_bar()


def main() -> None:
    """Runs the missing cells of the grid, then prints and draws all results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="every objective, and lags 1 2 8 32 in addition to those of docs/results.md",
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="cells whose name matches one of these"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of a cell")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS / "staleness.jsonl")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "staleness.png")
    args = parser.parse_args()
    cells = grid(full=args.full, seeds=args.seeds, num_steps=args.steps)
    results = Results[Cell, CellResult](args.results, CellResult.read)
    if not args.report:
        wanted = [
            cell
            for cell in cells
            if any(fnmatch.fnmatchcase(name_of(cell), pattern) for pattern in args.only)
        ]
        run([cell for cell in wanted if results.get(cell) is None], results, num_jobs=args.jobs)
    done = results.of(cells)
    if not done:
        raise SystemExit(
            f"{args.results} has no cell of this grid and no cell was run: omit --report, or check --only"
        )
    print(
        f"\n{len(done)} of {len(cells)} cells, {len(args.seeds)} seeds: "
        f"best of the learning rates {LEARNING_RATES} / at {COMMON_RATE:g} (smallest of the seeds)\n"
    )
    print(as_table(done, FULL_METHODS))
    draw(done, FULL_METHODS, args.figure)
    if args.results == RESULTS / "staleness.jsonl":
        write_bounds(results.of(grid(full=True, seeds=args.seeds, num_steps=args.steps)))


if __name__ == "__main__":
    main()
