"""`python -m rollout_server.engine`: one engine as a process, with options named like `sglang.launch_server`'s.

Dies with its parent. With `--port 0` the kernel picks a port, which is written to `--port-file` once the engine answers. Exit codes: 0
after SIGTERM or SIGINT, 1 if the engine failed, 2 if an option or the model is wrong (one message on stderr).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import uvicorn
from transformers.utils import logging as transformers_logging

from areal_like.errors import ConfigError, UserError
from areal_like.process import die_with_parent
from rollout_server.engine.core import EngineCore, EngineOptions
from rollout_server.engine.loop import EngineLoop, Report
from rollout_server.engine.models.loading import load
from rollout_server.engine.protocol import Limits
from rollout_server.engine.server import EngineServer, ServerOptions
from rollout_server.engine.updates import WeightUpdater

logger = logging.getLogger("rollout_server.engine")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHUTDOWN_S = 3


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m rollout_server.engine", description=__doc__)
    parser.add_argument("--model-path", required=True, help="Hugging Face directory or name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=30000, help="0 picks a free one")
    parser.add_argument("--port-file", type=Path, help="the port is written here once the engine answers")
    parser.add_argument("--device", default="cpu", help="cpu | cuda | cuda:N")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--max-running-requests", type=int, default=128, help="sequences decoded at a time (KV rows)")
    parser.add_argument("--context-length", type=int, default=1024, help="longest sequence, prompt and output, in tokens")
    parser.add_argument("--max-prefill-tokens", type=int, default=8192, help="context tokens computed before one decode step")
    parser.add_argument("--prefix-cache-tokens", type=int, default=16384, help="tokens of shared prompts kept; 0: none")
    parser.add_argument("--weight-version", default="default", help="version of the weights that --model-path holds")
    parser.add_argument("--random-seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads of the forward pass")
    parser.add_argument("--stream-interval", type=int, default=0, help="tokens between streamed chunks; 0: only the end of each sequence")
    parser.add_argument("--max-body-bytes", type=int, default=64 << 20)
    parser.add_argument("--weights-timeout-s", type=float, default=60.0, help="bound of joining a group and of one broadcast")
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    options = parser.parse_args(argv)
    for name in ("max_running_requests", "context_length", "max_prefill_tokens", "num_threads", "max_body_bytes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("prefix_cache_tokens", "stream_interval"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0")
    return options


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, before anything slow is done: a port in use is reported at once."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"--port {port}: cannot bind {host}:{port}: {error.strerror}; choose another, or 0") from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn that leaves signals to us and says when it answers."""

    def __init__(self, config: uvicorn.Config, *, port_file: Path | None, port: int) -> None:
        super().__init__(config)
        self._port_file = port_file
        self._port = port

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Installs no handlers."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to answer, then publishes the port; the rename makes it whole for whoever polls the file."""
        await super().startup(sockets)
        if self._port_file is not None:
            temporary = self._port_file.with_name(f"{self._port_file.name}.{os.getpid()}")
            temporary.write_text(f"{self._port}\n")
            temporary.replace(self._port_file)
        logger.info("ready on port %d", self._port)


async def serve(options: argparse.Namespace, core: EngineCore, listener: socket.socket) -> int:
    """Runs until a signal or the engine's failure; returns the exit code."""
    main_loop = asyncio.get_running_loop()
    port = listener.getsockname()[1]
    failures: list[str] = []

    def on_report(reports: list[Report]) -> None:
        main_loop.call_soon_threadsafe(EngineServer.deliver, reports)

    def on_failure(reason: str) -> None:
        failures.append(reason)
        main_loop.call_soon_threadsafe(stop)

    engine = EngineLoop(core, num_threads=options.num_threads, on_report=on_report, on_failure=on_failure)
    facts = core.model.facts
    updater = WeightUpdater(engine, facts)
    limits = Limits(
        vocab_size=facts.vocab_size,
        context_length=options.context_length,
        eos_token_ids=facts.eos_token_ids,
        stream_interval=options.stream_interval,
    )
    server_options = ServerOptions(
        model_path=options.model_path, max_body_bytes=options.max_body_bytes, weights_timeout_s=options.weights_timeout_s
    )
    server = EngineServer(engine, updater, limits, server_options, model_type=facts.model_type)
    config = uvicorn.Config(
        server.app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=SHUTDOWN_S, http="httptools"
    )
    http = _Server(config, port_file=options.port_file, port=port)

    def stop() -> None:
        """Ends every sequence and update, so that whoever waits is answered, and then the server."""
        engine.abort(lambda core: core.all_sequences)
        updater.close()
        http.should_exit = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        main_loop.add_signal_handler(signum, stop)
    engine.start()
    await http.serve(sockets=[listener])
    engine.stop(timeout_s=SHUTDOWN_S)
    return 1 if failures else 0


def main(argv: list[str]) -> int:
    """Loads, serves, returns the exit code."""
    die_with_parent()
    options = parse(argv)
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(options.num_threads)
    try:
        device = torch.device(options.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"--device {options.device}: this machine or this torch has no CUDA; use cpu")
        listener = bind(options.host, options.port)
        model, weights = load(options.model_path, dtype=DTYPES[options.dtype], device=device, context_length=options.context_length)
    except (UserError, RuntimeError) as error:
        sys.stderr.write(f"engine: {str(error).splitlines()[0]}\n")
        return 2
    engine_options = EngineOptions(
        max_running=options.max_running_requests,
        context_length=options.context_length,
        max_prefill_tokens=options.max_prefill_tokens,
        prefix_cache_tokens=options.prefix_cache_tokens,
        random_seed=options.random_seed,
    )
    core = EngineCore(model, weights, engine_options, version=options.weight_version)
    return asyncio.run(serve(options, core, listener))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
