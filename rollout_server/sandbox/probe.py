"""The program that shows whether a sandbox works, and what its users may choose instead of it."""

from __future__ import annotations

from rollout_server.sandbox.base import Limits, Sandbox

ACCEPT_RLIMITS = (
    "set rewards.sandbox=rlimits, which gives up isolation: the policy's programs can then read every file "
    "that the server can read (keys and the run directory, too), use the network, and signal its processes"
)


def problem_of(sandbox: Sandbox) -> str:
    """Why the sandbox does not run a program; empty if it does."""
    result = sandbox.run("print(6 * 7)", limits=Limits(timeout_s=20.0))
    if result.stdout.strip() == "42" and result.succeeded:
        return ""
    if result.timed_out:
        return "a program that prints one line did not end within 20 s"
    lines = result.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {result.exit_code}"
