"""The stages of `areal-like doctor --gpu`: what each proves, its time limit, and what it hands back.

A stage is a function of a module in this package, which runs in its own process (`process.py`). It gets a
`Request`, writes what it measures through `Notes` as soon as it has it, and returns a `Verdict`. So a stage
that hangs or is killed loses neither its numbers nor the place where it was. No import of torch here.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import IO

TOTAL_S = 600.0
"""Time limit of all stages together; the limits of the stages add up to it."""

Measured = float | int | str
"""A value that a stage measures or finds."""


class Outcome(StrEnum):
    """How a stage ended."""

    OK = "ok"
    """Everything that it compares agrees."""
    FAILED = "failed"
    """Something differs, is too slow, or did not run."""
    SKIPPED = "skipped"
    """This machine, or the command line, lacks something that the stage needs."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of one stage."""

    outcome: Outcome
    reason: str = ""
    """Why it failed or was skipped."""
    remedy: str = ""
    """What to do about a failure."""


OK = Verdict(outcome=Outcome.OK)


def failed(reason: str, remedy: str) -> Verdict:
    """The verdict of a stage that found something wrong."""
    return Verdict(outcome=Outcome.FAILED, reason=reason, remedy=remedy)


def skipped(reason: str) -> Verdict:
    """The verdict of a stage that cannot run here."""
    return Verdict(outcome=Outcome.SKIPPED, reason=reason)


def within(errors: Mapping[str, float], limits: Mapping[str, float], *, remedy: str) -> Verdict:
    """Fails if an error is above the limit of its name, or is not a number."""
    wrong = [name for name, error in errors.items() if not error <= limits[name]]
    if not wrong:
        return OK
    text = ", ".join(f"{name} {errors[name]:.2g} (at most {limits[name]:.2g})" for name in wrong)
    return failed(f"differs: {text}", remedy)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the stages are asked to do, as the command line gives it."""

    device: str = "cuda"
    """`cuda`, or `cpu` for the small form of every stage that needs no GPU."""
    scratch: str
    """Directory for models, logs and results, removed at the end."""
    sglang: str = ""
    """Interpreter of an environment with SGLang; empty: its stage is skipped."""
    peer: str = ""
    """`HOST:PORT` of the one of two machines that listens; empty: its stage is skipped."""
    token: str = field(default="", repr=False)
    """The secret that both machines of `peer` have."""

    def to_json(self) -> str:
        """The text that `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """Inverse of `to_json`."""
        return cls(**json.loads(text))


class Notes:
    """Writes what a stage finds to a file, one JSON object in each line."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def measured(self, **values: Measured) -> None:
        """Adds numbers and names to the report."""
        self._write({"measured": values})

    def at(self, place: str) -> None:
        """Records what the stage does next: the report of a stage that hangs or dies names it."""
        self._write({"at": place})

    def verdict(self, verdict: Verdict) -> None:
        """Ends the stage."""
        self._write({"verdict": asdict(verdict)})

    def _write(self, line: dict[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


StageFunction = Callable[[Request, Notes], Verdict]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage."""

    name: str
    function: str
    """`MODULE:FUNCTION` below this package."""
    proves: str
    limit_s: float
    is_needed: bool = False
    """True if no later stage can run after it failed."""

    def load(self) -> StageFunction:
        """Imports its function, which may import torch."""
        module, _, name = self.function.partition(":")
        function: StageFunction = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return function


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="devices",
            function="devices:check_devices",
            proves="torch sees the GPUs",
            limit_s=30,
            is_needed=True,
        ),
        Stage(
            name="versions",
            function="versions:check",
            proves="driver, torch, NCCL and SGLang fit each other",
            limit_s=20,
        ),
        Stage(
            name="peer",
            function="peer:check_peer",
            proves="another machine is reached with the same NCCL, and at what rate",
            limit_s=110,
        ),
        Stage(
            name="bandwidth",
            function="devices:check_bandwidth",
            proves="data is copied unchanged between host and GPUs, and at what rate",
            limit_s=20,
        ),
        Stage(
            name="attention",
            function="attention:check_attention",
            proves="the kernels (varlen, FlashAttention 3) have the outputs and gradients of exact attention",
            limit_s=40,
        ),
        Stage(
            name="step",
            function="step:check_step",
            proves="a step over all ranks has the gradient of one float32 rank on the CPU",
            limit_s=80,
        ),
        Stage(
            name="engine",
            function="engine:check_embedded",
            proves="the embedded engine has the trainer's log-probs, before and after a push",
            limit_s=70,
        ),
        Stage(
            name="sglang",
            function="engine:check_sglang",
            proves="SGLang has the trainer's log-probs, before and after a push",
            limit_s=140,
        ),
        Stage(
            name="speed",
            function="speed:check_speed",
            proves="memory, tokens/s and MFU of a step are those that `areal-like plan` predicts",
            limit_s=90,
        ),
    )
}
"""In the order in which they run."""
