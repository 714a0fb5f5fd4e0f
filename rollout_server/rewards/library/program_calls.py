"""Calls of functions of untrusted code in a sandbox, by `program_harness.py`. Pure.

The harness is the program, and its stdin has the code and the calls. Expected values stay outside, so that
the code can neither look them up nor claim to have returned them.
"""

from __future__ import annotations

import functools
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout_server.rewards.library import program_harness


@dataclass(frozen=True, kw_only=True)
class HarnessRun:
    """One run of the harness: run `program` with `stdin`, then `values` of its stdout."""

    source: str
    """The code, as one Python source."""
    function: str = ""
    """The function that is called; empty: statements are run instead."""
    calls: Sequence[Any] = ()
    """The list of arguments of each call."""
    statements: Sequence[str] = ()
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def program(self) -> str:
        """Returns the source of the harness."""
        return _harness_text()

    @property
    def stdin(self) -> str:
        setup: dict[str, Any] = {"source": self.source, "nonce": self.nonce, "statements": self.statements}
        if self.function:
            setup |= {"function": self.function, "calls": self.calls}
        return json.dumps(setup)

    def values(self, stdout: str) -> dict[int, Any]:
        """Returns the number of each call or statement that did not raise, and its value."""
        values: dict[int, Any] = {}
        for line in stdout.splitlines():
            fields = line.split(" ", 2)
            if len(fields) == 3 and fields[0] == self.nonce and fields[1].isdecimal():
                try:
                    values[int(fields[1])] = json.loads(fields[2])
                except (ValueError, RecursionError):
                    continue
        return values


@functools.cache
def _harness_text() -> str:
    return Path(str(program_harness.__file__)).read_text()
