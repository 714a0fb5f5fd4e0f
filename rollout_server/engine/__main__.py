"""`python -m rollout_server.engine`: runs one embedded engine as a process.

The options have the names of `sglang.launch_server`'s options. The API key comes from a file and not from the
command line, which every user of the machine can read; `/dev/fd/N` names an inherited pipe.

The process dies with its parent. With `--port 0` the kernel picks a port, which is written to `--port-file`
once the engine answers requests. Exit codes: 0 after SIGTERM or SIGINT, 1 if the engine failed, 2 if an
option or the model is wrong (one message on stderr). Options are checked and the port is bound before torch
is imported, so a mistake is reported at once.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from areal_like.errors import ConfigError, UserError
from areal_like.hosts import LOOPBACK
from areal_like.runtime.exhaustion import end_if_threads_fail
from areal_like.runtime.imports import uncollected
from areal_like.runtime.process import die_with_parent, exit_at_once, keep_files_private
from areal_like.runtime.signals import handle_log_signals
from areal_like.security.tokens import read_secret
from areal_like.wire.sockets import bound_socket


def _at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `minimum`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}")
        return value

    return integer


def parse(argv: list[str]) -> argparse.Namespace:
    """Parses the command line. A wrong option ends the process with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m rollout_server.engine", description="One embedded inference engine, as a process."
    )
    add = parser.add_argument
    positive, not_negative = _at_least(1), _at_least(0)
    add("--model-path", required=True, help="Hugging Face directory or name")
    add("--api-key-file", type=Path, required=True,
        help="file of mode 600 with the key that requests need (Authorization: Bearer KEY)")  # fmt: skip
    add("--port", type=int, default=30000, help="of 127.0.0.1; 0 picks a free one")
    add("--port-file", type=Path, help="the port is written here once the engine answers")
    add("--device", default="cpu", help="cpu | cuda | cuda:N")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="float32")
    add("--enable-fp32-lm-head", action="store_true", help="compute the logits in float32")
    add("--max-running-requests", type=positive, default=128, help="sequences decoded at a time (KV rows)")
    add(
        "--context-length", type=positive, default=1024, help="longest sequence, prompt and output, in tokens"
    )
    add(
        "--max-prefill-tokens",
        type=positive,
        default=8192,
        help="context tokens computed before a decode step",
    )
    add(
        "--prefix-cache-tokens",
        type=not_negative,
        default=16384,
        help="tokens of prompts kept for the other samples of their groups; 0: none",
    )
    add(
        "--conversation-cache-tokens",
        type=not_negative,
        help="tokens kept for the next turns of conversations; 0: none; default: as many as the rows hold",
    )
    add("--weights-from", action="append", default=[], metavar="DIR",
        help="directory that /update_weights_from_disk may load from, beside --model-path")  # fmt: skip
    add("--weight-version", default="default", help="version of the weights that --model-path holds")
    add("--random-seed", type=int, default=0)
    add("--num-threads", type=positive, default=1, help="CPU threads of the forward pass")
    add("--stream-interval", type=not_negative, default=0,
        help="tokens between streamed chunks; 0: only the end of each sequence")  # fmt: skip
    add("--max-body-bytes", type=positive, default=64 << 20, help="longest request body")
    add("--max-connections", type=positive, default=1024, help="above it, idle connections are closed")
    add("--weights-timeout-s", type=float, default=60.0,
        help="time limit of joining a weight group and of one broadcast")  # fmt: skip
    add("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser.parse_args(argv)


def bind(port: int) -> socket.socket:
    """A listening socket on loopback. Raises ConfigError if the port is in use."""
    try:
        return bound_socket(LOOPBACK, port)
    except OSError as error:
        raise ConfigError(
            f"--port {port}: cannot bind {LOOPBACK}:{port}: {error.strerror}; choose another, or 0"
        ) from None


def read_key(file: Path) -> str:
    """The API key. Raises ConfigError if the file is missing or others can read it."""
    try:
        return read_secret(file)
    except FileNotFoundError:
        raise ConfigError(f"--api-key-file {file}: no such file") from None


def check_model_path(path: str) -> None:
    """Raises ConfigError if a local path holds no model.

    A path that does not begin with `.`, `/` or `~` is taken as a name on the Hugging Face hub.
    """
    if path.startswith((".", "/", "~")) and not (Path(path).expanduser() / "config.json").is_file():
        raise ConfigError(f"--model-path {path}: no config.json there; give a Hugging Face directory")


def main(argv: list[str]) -> int:
    """Checks the options, serves, returns the exit code."""
    die_with_parent()
    keep_files_private()
    options = parse(argv)
    logging.basicConfig(
        level=options.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    handle_log_signals()
    end_if_threads_fail()
    try:
        check_model_path(options.model_path)
        api_key = read_key(options.api_key_file)
        listener = bind(options.port)
        with uncollected():
            # Imported here, because torch and transformers take seconds to import.
            from rollout_server.engine.http.app import run

        return run(options, listener, api_key=api_key)
    except UserError as error:
        sys.stderr.write(f"engine: {error}\n")
        return 2


if __name__ == "__main__":
    # A thread may still be inside torch, where it waits to join a weight group. The interpreter's own exit
    # would end that thread in the middle of C++ code, which aborts the process.
    exit_at_once(main(sys.argv[1:]))
