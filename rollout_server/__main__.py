"""`python -m rollout_server [--name rollout-0] [--config run/config.yaml] key=value ...`: one rollout server."""

from __future__ import annotations

import sys

from areal_like.cli import role_arguments, shows_help
from areal_like.daemon import run_daemon
from areal_like.errors import UserError
from areal_like.process import exit_at_once
from rollout_server.daemon import main as serve


def main() -> int:
    """Exit code: 0 drained, 1 failed, 2 the user's mistake."""
    if shows_help(sys.argv[1:], __doc__):
        return 0
    try:
        config, name = role_arguments(sys.argv[1:], default_name="rollout-0")
    except UserError as error:
        sys.stderr.write(f"rollout_server: {error}\n")
        return 2
    return run_daemon(config, role="rollout", name=name, main=serve)


if __name__ == "__main__":
    exit_at_once(main())
