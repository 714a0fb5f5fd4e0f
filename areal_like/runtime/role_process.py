"""The process of a daemon whose command line has only its name and settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from areal_like.errors import UserError
from areal_like.runtime.command_line import role_arguments, shows_help
from areal_like.runtime.process import early_signals


def run_role(
    *, role: str, program: str, default_name: str, description: str | None, load: Callable[[], Any]
) -> int:
    """Runs the daemon; returns the exit code (see `areal_like.runtime.daemon`).

    `program`: begins the line of an error. `load`: imports the daemon and returns its `main`, after signals
    are handled: that takes seconds. `description`: of `--help`.
    """
    if shows_help(sys.argv[1:], description):
        return 0
    early_signals()
    from areal_like.runtime.daemon import run_daemon

    serve = load()
    try:
        config, name = role_arguments(sys.argv[1:], default_name=default_name)
        early_signals(config.daemon.exit_code_on_drain)
    except UserError as error:
        sys.stderr.write(f"{program}: {error}\n")
        return 2
    return run_daemon(config, role=role, name=name, main=serve)
