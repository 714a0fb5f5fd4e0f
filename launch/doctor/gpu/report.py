"""The verdict of `areal-like doctor --gpu`: a table, and a file that can be attached to a report.

The file has what the stages measured, and nothing about who ran them: no path, no environment, no token, no
host name. Texts that a library wrote (errors above all) may contain any of these, so every text is cleaned:
a path is cut to its last part, and values of environment variables, addresses and secrets are hidden.
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from areal_like.security.redaction import HIDDEN, without_secrets
from launch.doctor.gpu.stages import Measured, Outcome, Stage, Verdict
from launch.view.status import plain_table

FORMAT = 1
_LONGEST_TEXT = 400
_SHORTEST_HIDDEN = 8
"""A shorter value of an environment variable is a word such as `xterm` or `1`."""
_VERSION = re.compile(r"v?\d+(?:\.\d+)+[\w.+-]{0,12}")
"""Images set variables to the versions that they contain, which the report needs."""
_PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?~?/(?:[^\s'\":,;()<>]*/)+")
_ADDRESS = re.compile(
    r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?(?![\d.])|\[?[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){3,7}\]?"
    r"|\[?\b[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{1,4})*::(?:[0-9a-fA-F]{1,4}\b|(?!\w))\]?"
)
_STYLES = {Outcome.OK: "green", Outcome.FAILED: "red", Outcome.SKIPPED: "yellow"}


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """One stage's verdict and numbers."""

    stage: Stage
    verdict: Verdict
    seconds: float
    measured: Mapping[str, Measured] = field(default_factory=dict)


class Cleaner:
    """Removes from texts what must not leave this machine."""

    def __init__(
        self,
        *,
        secrets: Sequence[str] = (),
        hosts: Sequence[str] = (),
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """`secrets`: texts that are hidden wherever they occur. `hosts`: names of other machines."""
        values = {each for each in environment.values() if not _VERSION.fullmatch(each)}
        known = {*secrets, *values, socket.getfqdn()}
        # The longest first: one may contain another.
        self._hidden = sorted((each for each in known if len(each) >= _SHORTEST_HIDDEN), key=len)[::-1]
        names = (*hosts, socket.gethostname(), Path.home().name)
        self._names = [name for name in names if len(name) > 2]

    def clean(self, text: str) -> str:
        """The text on one line without secrets, paths, addresses, host and user."""
        text = str(without_secrets({"text": " ".join(text.split())})["text"])
        for value in self._hidden:
            text = text.replace(value, HIDDEN)
        for name in self._names:
            text = re.sub(rf"\b{re.escape(name)}\b", HIDDEN, text)
        return _ADDRESS.sub(HIDDEN, _PATH.sub("", text))[:_LONGEST_TEXT]


def report_of(
    results: Iterable[StageResult], *, device: str, version: str, date: str, cleaner: Cleaner
) -> dict[str, Any]:
    """The content of the file. `date`: day in ISO 8601, UTC."""
    stages = [
        {
            "name": each.stage.name,
            "proves": each.stage.proves,
            "verdict": each.verdict.outcome.value,
            "reason": cleaner.clean(each.verdict.reason),
            "remedy": cleaner.clean(each.verdict.remedy),
            "seconds": round(each.seconds, 1),
            "measured": {
                cleaner.clean(name): cleaner.clean(str(value)) if _is_text(value) else value
                for name, value in each.measured.items()
            },
        }
        for each in results
    ]
    outcomes = {stage["verdict"] for stage in stages}
    return {
        "format": FORMAT,
        "areal_like": version,
        "date": date,
        "device": device,
        "verdict": (Outcome.FAILED if Outcome.FAILED in outcomes else Outcome.OK).value,
        "stages": stages,
    }


def _is_text(value: Measured) -> bool:
    """True also for infinity and NaN, which JSON does not have."""
    return isinstance(value, str) or not math.isfinite(value)


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints the verdict of each stage."""
    rows = []
    for stage in report["stages"]:
        outcome = Outcome(stage["verdict"])
        found = stage["reason"] or _summary(stage["measured"])
        rows.append((stage["name"], Text(outcome.value, style=_STYLES[outcome]), found, stage["remedy"]))
    cells = [tuple(cell if isinstance(cell, Text) else Text(cell) for cell in row) for row in rows]
    console.print(plain_table(("stage", "verdict", "found", "what to do"), cells))


def _summary(measured: Mapping[str, Measured]) -> str:
    shown = {
        name.replace("_", " "): f"{value:.3g}" if isinstance(value, float) else str(value)
        for name, value in measured.items()
    }
    return ", ".join(f"{name} {value}" for name, value in shown.items())
