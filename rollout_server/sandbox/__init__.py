"""Sandboxes, which run programs written by the policy with limits. Read `base.py` first."""

from areal_like.errors import ConfigError
from rollout_server.sandbox.base import Limits, OpenSandbox, ProgramResult, Sandbox
from rollout_server.sandbox.bwrap import BwrapSandbox
from rollout_server.sandbox.containers import ContainerSandbox
from rollout_server.sandbox.e2b import E2BSandbox
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
    name, _, argument = kind.partition(":")
    match name:
        case "bwrap" if not argument:
            return BwrapSandbox()
        case "rlimits" if not argument:
            return RlimitsSandbox()
        case "docker" | "podman" if argument:
            return ContainerSandbox(name, argument)
        case "e2b":
            return E2BSandbox(argument)
    raise ConfigError(
        f"rewards.sandbox={kind}: choose one of bwrap, rlimits, docker:IMAGE, podman:IMAGE, e2b, e2b:TEMPLATE"
    )
