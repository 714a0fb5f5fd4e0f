"""Sandboxes, which run programs written by the policy with limits. Read `base.py` first."""

from areal_like.errors import ConfigError
from rollout_server.sandbox.base import Limits, OpenSandbox, ProgramResult, Sandbox
from rollout_server.sandbox.bwrap import BwrapSandbox
from rollout_server.sandbox.rlimits import RlimitsSandbox

__all__ = [
    "BwrapSandbox",
    "Limits",
    "OpenSandbox",
    "ProgramResult",
    "RlimitsSandbox",
    "Sandbox",
    "make_sandbox",
]


def make_sandbox(kind: str) -> Sandbox:
    """Creates a sandbox. `kind`: the value of `rewards.sandbox`. Raises ConfigError for an unknown one."""
    match kind:
        case "bwrap":
            return BwrapSandbox()
        case "rlimits":
            return RlimitsSandbox()
        case _:
            raise ConfigError(f"rewards.sandbox={kind}: choose one of bwrap, rlimits")
