"""`python -m rollout_server.engine`: one engine as a process, with options named like `sglang.launch_server`'s.

Dies with its parent. With `--port 0` the kernel picks a port, which is written to `--port-file` once the engine answers. Exit codes: 0
after SIGTERM or SIGINT, 1 if the engine failed, 2 if an option or the model is wrong (one message on stderr). Options are checked and the
port is bound before torch is imported, so that mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from pathlib import Path

from areal_like.errors import ConfigError, UserError
from areal_like.runtime.imports import uncollected
from areal_like.runtime.process import die_with_parent
from areal_like.wire.sockets import bound_socket


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m rollout_server.engine", description=__doc__)
    parser.add_argument("--model-path", required=True, help="Hugging Face directory or name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000, help="0 picks a free one")
    parser.add_argument("--port-file", type=Path, help="the port is written here once the engine answers")
    parser.add_argument("--device", default="cpu", help="cpu | cuda | cuda:N")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="float32")
    parser.add_argument(
        "--max-running-requests", type=int, default=128, help="sequences decoded at a time (KV rows)"
    )
    parser.add_argument(
        "--context-length", type=int, default=1024, help="longest sequence, prompt and output, in tokens"
    )
    parser.add_argument(
        "--max-prefill-tokens", type=int, default=8192, help="context tokens computed before one decode step"
    )
    parser.add_argument(
        "--prefix-cache-tokens", type=int, default=16384, help="tokens of shared prompts kept; 0: none"
    )
    parser.add_argument(
        "--weight-version", default="default", help="version of the weights that --model-path holds"
    )
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads of the forward pass")
    parser.add_argument(
        "--stream-interval",
        type=int,
        default=0,
        help="tokens between streamed chunks; 0: only the end of each sequence",
    )
    parser.add_argument("--max-body-bytes", type=int, default=64 << 20)
    parser.add_argument(
        "--weights-timeout-s", type=float, default=60.0, help="bound of joining a group and of one broadcast"
    )
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    options = parser.parse_args(argv)
    for name in (
        "max_running_requests",
        "context_length",
        "max_prefill_tokens",
        "num_threads",
        "max_body_bytes",
    ):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("prefix_cache_tokens", "stream_interval"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0")
    return options


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything slow is done: a port in use is reported at once."""
    try:
        return bound_socket(host, port)
    except OSError as error:
        raise ConfigError(
            f"--port {port}: cannot bind {host}:{port}: {error.strerror}; choose another, or 0"
        ) from None


def check_model_path(path: str) -> None:
    """A local path must hold a model; anything else is a name for the hub or its cache."""
    if path.startswith((".", "/", "~")) and not (Path(path).expanduser() / "config.json").is_file():
        raise ConfigError(f"--model-path {path}: no config.json there; give a Hugging Face directory")


def main(argv: list[str]) -> int:
    """Checks the options, serves, returns the exit code."""
    die_with_parent()
    options = parse(argv)
    logging.basicConfig(
        level=options.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr
    )
    try:
        check_model_path(options.model_path)
        listener = bind(options.host, options.port)
        with uncollected():
            from rollout_server.engine.http.app import run  # imports torch and transformers: seconds

        return run(options, listener)
    except UserError as error:
        sys.stderr.write(f"engine: {error}\n")
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
