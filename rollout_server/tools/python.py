"""A Python interpreter for the policy: each call runs a separate program in the job's sandbox."""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.errors import ConfigError
from rollout_server.sandbox import Limits, ProgramResult, make_sandbox
from rollout_server.tools.named import NamedTool
from rollout_server.tools.tool import Tool

_EXTRA_TIME_S = 10.0
"""Extra time, because starting and ending a program in the sandbox take longer on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Python(NamedTool):
    """`{name: python, timeout_s: 5}`."""

    sandbox: str = "bwrap"
    """The job's `rewards.sandbox`."""
    timeout_s: float = 5.0
    """Time limit of one program, in seconds."""
    memory_mb: int = 512
    """Address space of one process, in MiB."""
    max_output_bytes: int = 8192
    """Bytes of stdout passed to the policy, and the same number of stderr."""

    def __post_init__(self) -> None:
        make_sandbox(self.sandbox)
        if self.timeout_s <= 0 or self.memory_mb < 32 or self.max_output_bytes < 1:
            raise ConfigError("tool python: timeout_s and max_output_bytes above 0, memory_mb at least 32")

    def tool(self) -> Tool:
        sandbox = make_sandbox(self.sandbox)
        limits = Limits(
            timeout_s=self.timeout_s, memory_mb=self.memory_mb, output_bytes=self.max_output_bytes
        )

        def python(code: str) -> str:
            """Runs a Python program and returns what it prints. Nothing is kept between two programs.

            Args:
                code: Source of the program. It has to print its results.
            """
            return describe(sandbox.run(code, limits=limits), limits)

        return Tool.of(
            python,
            timeout_s=self.timeout_s + _EXTRA_TIME_S,
            max_chars=2 * self.max_output_bytes + 1000,
            check=sandbox.check,
        )


def describe(result: ProgramResult, limits: Limits) -> str:
    parts = [result.stdout.rstrip("\n")]
    if result.stderr.strip():
        parts.append(result.stderr.strip())
    if result.output_was_cut:
        parts.append(f"[the output is cut after {limits.output_bytes} bytes]")
    if result.timed_out:
        parts.append(f"[killed after {limits.timeout_s:g} s]")
    elif result.exit_code:
        parts.append(f"[exit code {result.exit_code}]")
    return "\n".join(part for part in parts if part)
