"""Runs one router: `python -m rollout_server.router [--name NAME] [--config FILE] key=value ...`."""

from __future__ import annotations

from typing import Any

from areal_like.runtime.process import exit_at_once
from areal_like.runtime.role_process import run_role


def _load() -> Any:
    from rollout_server.router.daemon import main as serve

    return serve


def main() -> int:
    """Runs the router; returns the exit code."""
    return run_role(role="router", program="router", default_name="router-0", description=__doc__, load=_load)


if __name__ == "__main__":
    exit_at_once(main())
