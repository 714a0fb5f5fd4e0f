"""`python -m areal_like.runtime.tied_exec COMMAND ...` runs COMMAND so that it dies with its parent.

It is for external programs, which cannot call `die_with_parent` themselves: the kernel keeps the setting
across exec. The signal is SIGKILL, because a program that drains on SIGTERM would outlive its parent during
the drain.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from areal_like.runtime.process import die_with_parent


def foreign_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables for a program of another Python environment.

    It must not import our packages (`tests`, `configs`) instead of its own, so it gets neither PYTHONPATH nor
    the current directory as an import path.
    """
    return {key: value for key, value in environment.items() if key != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}


if __name__ == "__main__":
    die_with_parent(signum=signal.SIGKILL)
    try:
        os.execvpe(sys.argv[1], sys.argv[1:], foreign_environment(os.environ))
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error.strerror}")
