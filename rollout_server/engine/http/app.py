"""The engine process: loads the model, starts the engine's thread, serves HTTP, stops on signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from areal_like.errors import ConfigError
from areal_like.http.access import AccessRules, host_names, single_key
from areal_like.http.guard import BodyLimits, HttpGuard
from areal_like.http.server import HttpConfig, HttpServer
from areal_like.runtime.exhaustion import end_if_callbacks_fail
from rollout_server.engine.core import EngineCore
from rollout_server.engine.http.generate_request import RequestLimits
from rollout_server.engine.http.generation_routes import deliver
from rollout_server.engine.http.server import EngineServer
from rollout_server.engine.loop import EngineLoop, SequenceOutput
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import ProcessOptions
from rollout_server.engine.threads import ThreadCount
from rollout_server.engine.weights.updater import WeightUpdater

logger = logging.getLogger(__name__)

SHUTDOWN_S = 3
_BODY_TIMEOUT_S = 60.0
"""A server that sends a body may be suspended for half a minute and then continue."""


def run(options: ProcessOptions, listener: socket.socket) -> int:
    """Loads the model, serves requests that have the key until a signal, returns the exit code.

    Raises ConfigError if the model or the device cannot be used.
    """
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(options.num_threads)
    model, weights = load(
        options.model_path,
        dtype=getattr(torch, options.dtype),
        fp32_head=options.enable_fp32_lm_head,
        router_dtype=options.router_dtype,
        device=_checked_device(options.device),
        context_length=options.context_length,
        records_routes=options.enable_return_routed_experts,
    )
    core = EngineCore(model, weights, options, version=options.weight_version)
    logger.info(
        "%d rows of %d tokens: %d bytes of KV, %d bytes of recurrent states",
        options.max_running_requests,
        options.context_length,
        core.kv_bytes,
        core.state_bytes,
    )
    return asyncio.run(serve(options, core, listener))


def _checked_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: this machine or this torch has no CUDA; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, counted from 0"
        )
    return device


class _Server(HttpServer):
    """Writes its port to a file once it accepts requests."""

    def __init__(self, config: HttpConfig, *, port_file: str, port: int) -> None:
        super().__init__(config)
        self._port_file = Path(port_file) if port_file else None
        self._port = port

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accepts requests, then publishes the port."""
        await super().startup(sockets)
        if self._port_file is not None:
            # Renamed into place, so that a process that polls the file never reads half a number.
            temporary = self._port_file.with_name(f"{self._port_file.name}.{os.getpid()}")
            temporary.write_text(f"{self._port}\n")
            temporary.replace(self._port_file)
        logger.info("ready on port %d", self._port)


async def serve(options: ProcessOptions, core: EngineCore, listener: socket.socket) -> int:
    """Serves until SIGTERM, SIGINT or a failure of the engine; returns the exit code, 0 or 1."""
    main_loop = asyncio.get_running_loop()
    end_if_callbacks_fail(main_loop)
    port = listener.getsockname()[1]
    failures: list[str] = []

    def on_output(outputs: list[SequenceOutput]) -> None:
        main_loop.call_soon_threadsafe(deliver, outputs)

    def on_failure(reason: str) -> None:
        failures.append(reason)
        main_loop.call_soon_threadsafe(stop)

    threads = ThreadCount(least=options.num_threads, most=options.max_threads)
    engine = EngineLoop(core, threads=threads, on_output=on_output, on_failure=on_failure)
    facts = core.model.facts
    updater = WeightUpdater(engine, facts)
    limits = RequestLimits(
        vocab_size=facts.vocab_size,
        context_length=options.context_length,
        eos_token_ids=facts.eos_token_ids,
        stream_interval=options.stream_interval,
    )
    recorder = core.model.routes
    server = EngineServer(
        engine,
        updater,
        limits,
        options,
        model_type=facts.model_type,
        routes_shape=None if recorder is None else recorder.shape,
    )
    guard = HttpGuard(
        server.app,
        AccessRules(
            hosts=host_names(listener.getsockname()[0]),
            role_of=single_key(options.api_key),
            open_paths=frozenset(),
        ),
        limits=BodyLimits(max_bytes=options.max_body_bytes, timeout_s=_BODY_TIMEOUT_S),
    )
    config = HttpConfig(guard, max_connections=options.max_connections, shutdown_s=SHUTDOWN_S)
    http = _Server(config, port_file=options.port_file, port=port)

    def stop() -> None:
        """Stops the server, after ending every sequence and update so that open requests get their
        responses."""
        engine.abort(lambda core: core.all_sequences)
        updater.close()
        http.should_exit = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        main_loop.add_signal_handler(signum, stop)
    engine.start()
    await http.serve(sockets=[listener])
    engine.stop(timeout_s=SHUTDOWN_S)
    return 1 if failures else 0
