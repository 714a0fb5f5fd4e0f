"""`python -m launch.doctor.gpu.process STAGE SCRATCH`: one stage of `areal-like doctor --gpu`.

It reads its request from SCRATCH/request.json, which only the user can read, and writes to
SCRATCH/STAGE.jsonl. An error ends it with a traceback on stderr, whose last line the doctor reports.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from areal_like.config import from_mapping
from areal_like.runtime.imports import uncollected
from areal_like.runtime.process import die_with_parent, exit_at_once, keep_files_private
from launch.doctor.gpu.stages import STAGES, Notes, Request
from trainer.distributed.variables import set_torch_variables

_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that a scheduler may have set for ranks of its own."""


def main(argv: list[str]) -> int:
    """Runs the stage; returns 0, whatever its verdict."""
    die_with_parent(signum=signal.SIGKILL)
    keep_files_private()
    name, scratch = argv[0], Path(argv[1])
    request = Request.from_json((scratch / "request.json").read_text())
    set_variables(name, request)
    with (scratch / f"{name}.jsonl").open("a") as file:
        notes = Notes(file)
        notes.at("importing torch")
        with uncollected():
            check = STAGES[name].load()
        notes.at("the beginning of the stage")
        notes.verdict(check(request, notes))
    return 0


def set_variables(name: str, request: Request) -> None:
    """Sets torch's variables as for the ranks of a job, before torch is imported.

    An engine that the stage starts inherits them: it gets only those of NCCL, which both have in a job too.
    """
    for variable in _OF_RANKS:
        os.environ.pop(variable, None)
    starts_engine = name in ("engine", "sglang")
    engine = "sglang" if name == "sglang" else "embedded"
    config = from_mapping(
        {
            "runs_dir": request.scratch,
            "name": name,
            "rollout": {"engine": engine, "engine_device": request.device},
            "trainer": {"device": request.device},
        }
    )
    wanted = dict(os.environ)
    set_torch_variables(config, wanted)
    os.environ.update({key: wanted[key] for key in wanted if key.startswith("NCCL_") or not starts_engine})


if __name__ == "__main__":
    # NCCL and gloo may still have threads, which the interpreter's own exit would end inside C++ code.
    exit_at_once(main(sys.argv[1:]))
