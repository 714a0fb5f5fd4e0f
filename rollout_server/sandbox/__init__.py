"""Sandboxes: programs that the policy wrote, run with limits. Read `base.py` first."""

from rollout_server.sandbox.base import Limits, ProgramResult, Sandbox
from rollout_server.sandbox.bwrap import BwrapSandbox
from rollout_server.sandbox.choice import make_sandbox
from rollout_server.sandbox.rlimits import RlimitsSandbox

__all__ = ["BwrapSandbox", "Limits", "ProgramResult", "RlimitsSandbox", "Sandbox", "make_sandbox"]
