"""`python -m rollout_server.engine`: runs one embedded engine as a process. Its options: `engine/options.py`.

The process dies with its parent. With `--port 0` the kernel picks a port, which is written to `--port-file`
once the engine accepts requests. Exit codes: 0 after SIGTERM or SIGINT, 1 if the engine failed, 2 if an
option or the model is wrong (one message on stderr). Options are checked and the port is bound before torch
is imported, so a mistake is reported at once.
"""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path

from areal_like.errors import ConfigError, UserError
from areal_like.hosts import LOOPBACK
from areal_like.runtime.exhaustion import end_if_threads_fail
from areal_like.runtime.imports import uncollected
from areal_like.runtime.process import die_with_parent, exit_at_once, keep_files_private
from areal_like.runtime.signals import handle_log_signals
from areal_like.wire.sockets import bound_socket
from rollout_server.engine.options import ProcessOptions


def bind(port: int) -> socket.socket:
    """Returns a listening socket on loopback. Raises ConfigError if the port is in use."""
    try:
        return bound_socket(LOOPBACK, port)
    except OSError as error:
        raise ConfigError(
            f"--port {port}: cannot bind {LOOPBACK}:{port}: {error.strerror}; choose another, or 0"
        ) from None


def check_model_path(path: str) -> None:
    """Raises ConfigError if a local path does not contain a model.

    A path that does not begin with `.`, `/` or `~` is taken as a name on the Hugging Face hub.
    """
    if path.startswith((".", "/", "~")) and not (Path(path).expanduser() / "config.json").is_file():
        raise ConfigError(f"--model-path {path}: no config.json there; give a Hugging Face directory")


def main(argv: list[str]) -> int:
    """Checks the options, serves, returns the exit code."""
    die_with_parent()
    keep_files_private()
    try:
        options = ProcessOptions.from_command_line(argv)
        logging.basicConfig(
            level=options.log_level,
            format="%(asctime)s %(levelname)s %(name)s %(message)s",
            stream=sys.stderr,
        )
        handle_log_signals()
        end_if_threads_fail()
        check_model_path(options.model_path)
        listener = bind(options.port)
        with uncollected():
            # Imported here, because torch and transformers take seconds to import.
            from rollout_server.engine.http.app import run

        return run(options, listener)
    except UserError as error:
        sys.stderr.write(f"engine: {error}\n")
        return 2


if __name__ == "__main__":
    # A thread may still be inside torch, where it waits to join a weight group. The interpreter's own exit
    # would end that thread in the middle of C++ code, which aborts the process.
    exit_at_once(main(sys.argv[1:]))
