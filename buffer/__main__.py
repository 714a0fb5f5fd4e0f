"""`python -m buffer [--config run/config.yaml] key=value ...`: the buffer of one job."""

from __future__ import annotations

import sys

from areal_like.cli import role_arguments
from areal_like.daemon import run_daemon
from areal_like.errors import UserError
from buffer.daemon import main as serve


def main() -> int:
    """Exit code: 0 drained, 1 failed, 2 the user's mistake."""
    try:
        config, name = role_arguments(sys.argv[1:], default_name="buffer")
    except UserError as error:
        sys.stderr.write(f"buffer: {error}\n")
        return 2
    return run_daemon(config, role="buffer", name=name, main=serve)


if __name__ == "__main__":
    sys.exit(main())
