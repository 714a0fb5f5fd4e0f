"""The cells of the real model's study, what each one runs, and how far it is.

    base -> start-0 -> rl-0
            start-1 -> rl-1
            start-2 -> rl-2, killed-2, sft-2, lag0-2, trl-2, lora-2
            tools-start-0 -> tools-0 ...
            distill-2, with rl-2 as its teacher

A cell is one training, from the model of another cell, and an evaluation of its last checkpoint. Its number
of steps is fixed here, before any run: no checkpoint is chosen by its score. Each cell's configuration is its
job's file with the settings of the cell, and is written to `<work>/configs`. Runs and evaluations are in
`<work>`, under the name of the cell and `<name>-eval`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from areal_like.paths import RunPaths, find_checkpoints, write_json
from benchmarks.report import RESULTS, ROOT
from launch.run_files import read_object, read_rows

Kind = Literal["base", "sft", "rl", "trl"]
NUM_STEPS, TOOL_STEPS, DISTILL_STEPS = 500, 200, 200
"""Optimizer steps of a cell. 500 steps of 12 questions are all 6,000 training questions, once."""
ROWS = "runs/real_model/rows"
"""Where the job's files expect the rows, relative to the repository."""
NUM_SAMPLES = 16
"""Completions of each held-out question at temperature 1, for pass@1 and pass@8."""
SAMPLED = "_sampled"
"""End of the name of a set with NUM_SAMPLES completions of each prompt; the others are greedy."""
GENTLE: Mapping[str, Any] = {"trainer.lr": 2e-5, "trainer.warmup_steps": 5}
"""Settings of supervised training."""
WINDOW = 50
"""Steps whose median gives the seconds of the steps that are left."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training of the study, or the published model."""

    name: str
    about: str
    kind: Kind
    seed: int = 0
    start: str = ""
    """The cell from whose last model it starts, and with which it is compared."""
    teacher: str = ""
    """The cell whose last model is the teacher, in the trainer."""
    job: str = "smollm2"
    """The file in configs/jobs."""
    num_steps: int = 0
    """0: as many as the job's file says."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value, in place of the job's."""
    kills: Sequence[int] = ()
    """Numbers of steps after which all processes of the training get SIGKILL."""

    @property
    def has_adapter(self) -> bool:
        return "model.lora.rank" in self.settings

    @property
    def group(self) -> str:
        """The name without the seed: cells whose gains are pooled."""
        return self.name.rpartition("-")[0] or self.name


def cells_of(
    *,
    num_steps: int = NUM_STEPS,
    tool_steps: int = TOOL_STEPS,
    distill_steps: int = DISTILL_STEPS,
    seeds: Sequence[int] = (0, 1, 2),
    tool_seeds: Sequence[int] = (0, 1),
) -> dict[str, Cell]:
    """Name -> cell, in an order in which each comes after its start. The single cells have the last seed."""
    last = seeds[-1]
    own: dict[str, Any] = {"start": f"start-{last}", "seed": last, "num_steps": num_steps}
    names = ("chain_sum", "word_sequence_reversal", "number_sequence")
    supervised = {
        **GENTLE,
        "sft.train": [f"{ROWS}/{name}.train.jsonl" for name in names],
        "sft.batch_rows": 12,
        "sft.num_epochs": 1000,
        "sft.num_steps": num_steps,
    }
    # Merged weights in bfloat16 would hide small updates from the engine.
    adapter = {
        "model.lora.rank": 16,
        "model.lora.alpha": 32.0,
        "weights.lora": "adapter",
        "trainer.lr": 1.2e-4,
    }
    # The KL needs no group of completions of one question, so a step has more questions instead.
    distilled = {
        "objective.name": "distill",
        "distill.loss": "full",
        "sampling.group_size": 2,
        "trainer.groups_per_step": 24,
        "trainer.lr": 2e-5,
    }
    cells = [Cell(name="base", about="the published model", kind="base")]
    for seed in seeds:
        cells.append(
            Cell(
                name=f"start-{seed}", about="supervised start: 192 examples, three epochs", kind="sft",
                seed=seed, start="base", settings=GENTLE,
            )
        )  # fmt: skip
    for seed in seeds:
        about = "reinforcement learning: GSPO, groups closed, lag up to 4"
        start = f"start-{seed}"
        cells.append(
            Cell(name=f"rl-{seed}", about=about, kind="rl", seed=seed, start=start, num_steps=num_steps)
        )
    cells += [
        Cell(
            name=f"killed-{last}", about="the same once more, killed three times with SIGKILL", kind="rl",
            kills=[num_steps * share // 100 for share in (22, 47, 73)], **own,
        ),
        Cell(
            name=f"sft-{last}", about="as many supervised steps on the same questions, with their answers",
            kind="sft", settings=supervised, **own,
        ),
        Cell(
            name=f"lag0-{last}", about="no staleness: max_staleness=0", kind="rl",
            settings={"max_staleness": 0}, **own,
        ),
        Cell(name=f"trl-{last}", about="TRL's GRPOTrainer on the same prompts", kind="trl", **own),
        Cell(
            name=f"lora-{last}", about="an adapter of rank 16, at ten times the rate", kind="rl",
            settings=adapter, **own,
        ),
    ]  # fmt: skip
    for seed in tool_seeds:
        about = "supervised start with a calculator in half of 64 examples"
        cells.append(
            Cell(
                name=f"tools-start-{seed}", about=about, kind="sft", seed=seed, start="base",
                job="smollm2_tools", settings=GENTLE,
            )
        )  # fmt: skip
    for seed in tool_seeds:
        cells.append(
            Cell(
                name=f"tools-{seed}", about="reinforcement learning with a calculator", kind="rl", seed=seed,
                start=f"tools-start-{seed}", job="smollm2_tools", num_steps=tool_steps,
            )
        )  # fmt: skip
    cells.append(
        Cell(
            name=f"distill-{last}", about=f"the published model, distilled from rl-{last}", kind="rl",
            seed=last, start="base", teacher=f"rl-{last}", num_steps=distill_steps, settings=distilled,
        )
    )  # fmt: skip
    return {cell.name: cell for cell in cells}


@dataclass(frozen=True, kw_only=True)
class Study:
    """Where a study is, and its cells."""

    work: Path = ROOT / "runs" / "real_model"
    results: Path = RESULTS / "real_model"
    cells: Mapping[str, Cell] = field(default_factory=cells_of)
    model: str = "smollm2"
    """`model.path` of the published model."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value, of all cells: for a machine that needs others, and for tests."""
    num_samples: int = NUM_SAMPLES

    @property
    def rows(self) -> Path:
        return self.work / "rows"

    def run(self, cell: Cell) -> Path:
        """Directory of its training."""
        return self.work / cell.name

    def evaluation(self, cell: Cell) -> Path:
        """Directory of the evaluation of its last model."""
        return self.work / f"{cell.name}-eval"

    def config(self, cell: Cell) -> dict[str, Any]:
        """The settings of its training, without those that name the run."""
        config = OmegaConf.load(ROOT / "configs" / "jobs" / f"{cell.job}.yaml")
        own: dict[str, Any] = {"seed": cell.seed, "model.path": self.model}
        if cell.num_steps:
            own["trainer.num_steps"] = cell.num_steps
        for key, value in {**own, **cell.settings, **self.settings}.items():
            OmegaConf.update(config, key, value)
        text = json.dumps(OmegaConf.to_container(config, resolve=True))
        plain: dict[str, Any] = json.loads(text.replace(ROWS, str(self.rows)))
        return plain

    def evaluation_config(self, cell: Cell) -> dict[str, Any]:
        """The settings of the evaluation: each set of the job greedily, and sampled at temperature 1. The
        seed is the same for all cells."""
        config = self.config(cell) | {"seed": 0}
        config.pop("objective", None)  # it may need a teacher
        sets = dict(config["eval"]["sets"])
        for name, one in list(sets.items()):
            k = sorted({1, min(8, self.num_samples)})
            sets[name + SAMPLED] = {**one, "num_samples": self.num_samples, "temperature": 1.0, "k": k}
        model = {key: value for key, value in config["model"].items() if key != "lora"}
        weights = {key: value for key, value in config.get("weights", {}).items() if key != "lora"}
        return config | {"model": model, "weights": weights, "eval": config["eval"] | {"sets": sets}}

    def checkpoint(self, cell: Cell) -> str:
        """The newest model of its training; that of `base` is `model`. Empty if there is none yet."""
        if cell.kind == "base":
            return self.model
        if cell.kind == "trl":
            weights = self.run(cell) / "weights"
            return str(weights) if (weights / "config.json").exists() else ""
        found = find_checkpoints(RunPaths(self.run(cell)).checkpoints)
        return str(found[max(found)]) if found else ""

    def is_trained(self, cell: Cell) -> bool:
        """True if its training has made its last step."""
        return cell.kind == "base" or bool(read_object(self.run(cell) / "summary.json").get("finished"))

    def is_evaluated(self, cell: Cell) -> bool:
        """True if every set of its evaluation has a result."""
        summary = read_object(self.evaluation(cell) / "summary.json")
        return bool(summary.get("finished")) and all("avg" in one for one in summary.get("sets", {}).values())

    def step_rows(self, cell: Cell) -> list[dict[str, Any]]:
        """The rows of its steps so far. Those of TRL have `step_s` too, and its reward as `reward_mean`."""
        if cell.kind != "trl":
            return [row for row in read_rows(self.run(cell) / "metrics.jsonl") if row]
        rows = [row for row in read_rows(self.run(cell) / "rows.jsonl") if row and "seconds" in row]
        began = [0.0, *(row["seconds"] for row in rows)]
        return [
            {
                "step": row["step"] - 1,
                "step_s": row["seconds"] - begun_s,
                "reward_mean": row["reward"],
                "response_length_mean": row["sampled_tokens"] / row["samples"],
            }
            for row, begun_s in zip(rows, began, strict=False)
        ]

    def progress(self, cell: Cell) -> Progress:
        """How far it is, from its files."""
        rows = self.step_rows(cell)
        known = read_object(self.run(cell) / "rows.json").get("num_steps")
        num_steps = cell.num_steps or int(known or 0)
        attempts = [read_object(path) for path in sorted(self._attempts.glob(f"{cell.name}.*.json"))]
        seconds = [row["step_s"] for row in rows[-WINDOW:]]
        return Progress(
            steps=len(rows),
            num_steps=num_steps,
            is_trained=self.is_trained(cell),
            is_evaluated=self.is_evaluated(cell),
            seconds_per_step=statistics.median(seconds) if seconds else None,
            evaluation_s=read_object(self.evaluation(cell) / "summary.json").get("wall_seconds"),
            hours=sum(one.get("wall_s", 0.0) for one in attempts) / 3600,
            peak_gib=max((one.get("peak_mib", 0.0) for one in attempts), default=0.0) / 1024,
        )

    def note_attempt(self, cell: Cell, *, began_unix_s: float, wall_s: float, peak_mib: float) -> None:
        """Keeps how long a call of `run` has worked on a cell so far; written again and again, because the
        machine may be cut off."""
        path = self._attempts / f"{cell.name}.{began_unix_s:.0f}.json"
        peak_mib = max(peak_mib, read_object(path).get("peak_mib", 0.0))
        write_json(path, {"wall_s": round(wall_s, 1), "peak_mib": round(peak_mib, 1)})

    def kills(self, cell: Cell) -> list[int]:
        """The numbers of steps after which it has been killed."""
        return list(read_object(self._kills(cell)).get("steps", []))

    def note_kill(self, cell: Cell, step: int) -> None:
        """Keeps that it is killed now."""
        write_json(self._kills(cell), {"steps": [*self.kills(cell), step]})

    def _kills(self, cell: Cell) -> Path:
        return self.work / "kills" / f"{cell.name}.json"

    @property
    def _attempts(self) -> Path:
        return self.work / "attempts"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a cell is."""

    steps: int
    num_steps: int
    """0: not known before its rows are read."""
    is_trained: bool
    is_evaluated: bool
    seconds_per_step: float | None
    """Median over the last steps; None before the first."""
    evaluation_s: float | None
    hours: float
    """Time in which `run` has worked on it."""
    peak_gib: float
    """Largest memory of its processes, GiB (proportional set sizes)."""


def hours_left(study: Study) -> dict[str, float | None]:
    """Cell -> hours of this machine that it still needs; None while nothing like it has run.

    A step takes the median of the cell's own last steps, or else of those of a cell of the same kind and job;
    an evaluation as long as another one of its job.
    """
    progress = {name: study.progress(cell) for name, cell in study.cells.items()}

    def like(cell: Cell, *, exactly: bool) -> list[Progress]:
        """Progress of the cells of the same group, or of the same kind and job."""
        return [
            progress[name]
            for name, other in study.cells.items()
            if (other.job, other.kind) == (cell.job, cell.kind) and (other.group == cell.group or not exactly)
        ]

    left: dict[str, float | None] = {}
    for name, cell in study.cells.items():
        own = progress[name]
        paces = [own, *like(cell, exactly=True), *like(cell, exactly=False)]
        pace = next((one.seconds_per_step for one in paces if one.seconds_per_step), None)
        totals = [own.num_steps, *(one.num_steps for one in like(cell, exactly=True))]
        total = next((number for number in totals if number), None)
        of_job = [one for other, one in progress.items() if study.cells[other].job == cell.job]
        evaluation_s = next((one.evaluation_s for one in of_job if one.evaluation_s), None)
        training_s = 0.0 if own.is_trained else None
        if not own.is_trained and pace is not None and total is not None:
            training_s = (total - own.steps) * pace
        rest_s = 0.0 if own.is_evaluated else evaluation_s
        left[name] = None if training_s is None or rest_s is None else (training_s + rest_s) / 3600
    return left


def write_config(path: Path, settings: Mapping[str, Any]) -> Path:
    """Writes a configuration for `--config`, as JSON, which is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(settings, indent=1) + "\n")
    return partial.replace(path)
