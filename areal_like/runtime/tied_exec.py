"""`python -m areal_like.runtime.tied_exec COMMAND ...`: becomes COMMAND, which then dies with the process that started it.

For programs that are not ours and cannot call `die_with_parent` themselves: the kernel keeps the request across exec. The
signal is SIGKILL, because a program that drains on SIGTERM would outlive its parent by as long as that takes. A Python program of
another environment must not find our packages (`tests`, `configs`) before its own, so neither PYTHONPATH nor the directory is passed on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from areal_like.runtime.process import die_with_parent


def foreign_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a program of another Python environment may inherit."""
    return {key: value for key, value in environment.items() if key != "PYTHONPATH"} | {"PYTHONSAFEPATH": "1"}


if __name__ == "__main__":
    die_with_parent(signum=signal.SIGKILL)
    try:
        os.execvpe(sys.argv[1], sys.argv[1:], foreign_environment(os.environ))
    except OSError as error:
        sys.exit(f"{sys.argv[1]}: {error.strerror}")
