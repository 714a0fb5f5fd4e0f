"""Runs one rollout server: `python -m rollout_server [--name rollout-0] [--config FILE] key=value ...`."""

from __future__ import annotations

import sys

from areal_like.errors import UserError
from areal_like.runtime.command_line import role_arguments, shows_help
from areal_like.runtime.process import early_signals, exit_at_once


def main() -> int:
    """Runs the server; returns the exit code (see `areal_like.runtime.daemon`)."""
    if shows_help(sys.argv[1:], __doc__):
        return 0
    early_signals()
    from areal_like.runtime.daemon import run_daemon
    from rollout_server.daemon import main as serve

    try:
        config, name = role_arguments(sys.argv[1:], default_name="rollout-0")
        early_signals(config.daemon.exit_code_on_drain)
    except UserError as error:
        sys.stderr.write(f"rollout_server: {error}\n")
        return 2
    return run_daemon(config, role="rollout", name=name, main=serve)


if __name__ == "__main__":
    exit_at_once(main())
