"""Runs one score server: `python -m rollout_server.scoring [--name NAME] [--config FILE] key=value ...`."""

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
    from rollout_server.scoring.daemon import main as serve

    try:
        config, name = role_arguments(sys.argv[1:], default_name="scorer-0")
        early_signals(config.daemon.exit_code_on_drain)
    except UserError as error:
        sys.stderr.write(f"scorer: {error}\n")
        return 2
    return run_daemon(config, role="scorer", name=name, main=serve)


if __name__ == "__main__":
    exit_at_once(main())
