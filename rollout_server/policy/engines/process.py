"""Runs an engine as a child process: starts, watches and stops it; and the embedded engine's process.

    STOPPED -> start() -> (port file appears, /health responds) -> RUNNING -> stop(), or it dies -> STOPPED

The engine is a separate process, so that decoding and the stream of samples do not share Python's interpreter
lock, and so that the server survives a crash of the engine, returns its leases and starts another engine. The
engine dies with this process. It binds loopback only, and each engine gets a new random API key through a
pipe, so that no other user of the machine can use it. For SGLang see sglang/process.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

from areal_like.automatic_settings import (
    compute_dtype,
    most_threads,
    router_dtype,
    start_limit_s,
    uses_fp32_head,
)
from areal_like.config import Config
from areal_like.errors import ConfigError, EngineError
from areal_like.hosts import LOOPBACK
from areal_like.paths import RunPaths
from areal_like.runtime.daemon import cancelled_on_exit
from areal_like.runtime.logs import OUTPUT_FILE, LogBounds, Outputs
from rollout_server.engine.options import ProcessOptions
from rollout_server.policy.batcher import MAX_BATCH
from rollout_server.policy.client import EmbeddedClient, EngineClient
from rollout_server.policy.routes import RoutesReader

_POLL_S = 0.05
_STOP_TIMEOUT_S = 5.0
_LOG_LINES, _LOG_LINE_CHARS = 8, 200
"""Number of log lines, and characters per line, quoted in an error message: SGLang logs all options in one
line."""
_TAIL_BYTES = 64 << 10
"""Bytes read from the end of the log to find those lines; limited because the read blocks the event loop and
a log may be large."""
_SPARE_CONNECTIONS = 256
"""Connections for weight updates, aborts and the engine's state, beyond those of generation."""
_PUSH_BODY_BYTES = 16 << 20
"""Names and shapes of the tensors of a push: about 100 bytes each."""
_BYTES_PER_TOKEN = 10
"""A token id and its comma in JSON."""
_BYTES_PER_PROMPT = 1024
"""Request id and sampling parameters of a prompt in JSON."""
_BAD_SETTINGS_EXIT_CODE = 2
"""The engine's exit code when it refuses its options, the model or the device. A restart would fail too."""


class EngineProcess(ABC):
    """An `Engine` that is a child process. Every `start` creates a new process on a new port."""

    def __init__(self, config: Config, *, name: str, model: str, context_tokens: int) -> None:
        """`model`: argument for `from_pretrained`; `context_tokens`: longest sequence in tokens."""
        self._config = config
        self._name = name
        self._model = model
        self._context_tokens = context_tokens
        self.log_path = RunPaths.of(config).logs / f"{name}-engine.log"
        Outputs.bound(self.log_path, LogBounds.of(config.daemon))
        self._process: subprocess.Popen[bytes] | None = None
        self.api_key = ""
        """The API key of the newest engine."""
        self.num_starts = 0

    @property
    def pid(self) -> int:
        """Process id; 0 when stopped."""
        return self._process.pid if self._process is not None else 0

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self, *, version: int) -> EngineClient:
        """Starts an engine with the model's weights as `version`; returns a client once it can generate.

        Raises EngineError, with the end of the engine's log, if it dies or if `start_limit_s` passes without
        progress, and ConfigError if it refuses its options. Until the engine listens, growth of its log
        counts as progress; after that it also logs the requests of this process.
        """
        assert not self.is_running
        self._launch(version=version)
        self.num_starts += 1
        timeout_s = start_limit_s(self._config)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                watching = asyncio.create_task(self._extend_while_logging(limit, timeout_s))
                async with cancelled_on_exit(watching):
                    port = await self._port()
                    await self._listening(port)
                    watching.cancel()
                    return await self._connect(port)
        except TimeoutError:
            await self.stop()
            raise EngineError(
                f"engine was not ready, and has not logged anything for {timeout_s:.0f} s "
                f"(rollout.start_timeout_s){self._log_end()}"
            ) from None

    async def died(self) -> str:
        """Waits until the process has ended; returns the reason for a log line or an error."""
        assert self._process is not None
        process = self._process
        while (code := process.poll()) is None:
            await asyncio.sleep(_POLL_S)
        return f"engine ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}{self._log_end()}"

    async def stop(self) -> None:
        """Kills the process, which has nothing to save, and waits for its end, for a limited time."""
        if self._process is None:
            return
        self.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self.died()
        self._process = None

    def kill(self) -> None:
        """Sends SIGKILL and does not wait: the process may be stuck in the kernel. `died` reaps it."""
        if self._process is not None:
            self._process.kill()

    @abstractmethod
    def _command(self, *, version: int, secret_file: str) -> list[str]:
        """Returns the command line of a new engine, which can read `_secret` once from `secret_file`."""

    def _secret(self, *, version: int) -> str:
        """Returns text that only the new engine may read, including its API key."""
        return self.api_key

    def _environment(self) -> dict[str, str]:
        threads = str(self._config.rollout.least_threads)
        return os.environ | {"OMP_NUM_THREADS": threads, OUTPUT_FILE: str(self.log_path)}

    @abstractmethod
    async def _port(self) -> int:
        """Waits for the port that the new engine listens on. Raises EngineError if it ends first."""

    @abstractmethod
    def _client(self, url: str) -> EngineClient:
        """Returns a client of the engine at `url`."""

    def _launch(self, *, version: int) -> None:
        self.api_key = secrets.token_hex(32)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        secret = self._secret(version=version)
        with _pipe_with(secret) as fd, self.log_path.open("ab") as log_file:
            command = self._command(version=version, secret_file=f"/dev/fd/{fd}")
            # A new process group: some engines consist of several processes, which are killed together.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                env=self._environment(),
                pass_fds=(fd,),
                start_new_session=True,
            )

    async def _extend_while_logging(self, limit: asyncio.Timeout, timeout_s: float) -> None:
        """Restarts the time limit of `timeout_s` each time the engine's log grows."""
        num_bytes = 0
        while True:
            grown = self.log_path.stat().st_size if self.log_path.exists() else 0
            if grown != num_bytes:
                num_bytes = grown
                limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
            await asyncio.sleep(_POLL_S)

    async def _listening(self, port: int) -> None:
        """Waits until the new engine accepts connections. Raises as `_check_alive` does."""
        while True:
            self._check_alive()
            try:
                _, writer = await asyncio.open_connection(LOOPBACK, port)
            except OSError:
                await asyncio.sleep(_POLL_S)
                continue
            writer.close()
            return

    async def _connect(self, port: int) -> EngineClient:
        client = self._client(f"http://{LOOPBACK}:{port}")
        try:
            while not await client.health():
                self._check_alive()
                await asyncio.sleep(_POLL_S)
            await client.fetch_info()
            check_routes_fit(self._config, client.routes, context_tokens=self._context_tokens)
        except BaseException:  # cancellation included: it must not leak the client's connections
            await client.close()
            raise
        return client

    def _check_alive(self) -> None:
        assert self._process is not None
        code = self._process.poll()
        if code == _BAD_SETTINGS_EXIT_CODE:
            last_line = _tail(self.log_path).rpartition("\n")[2].strip()
            raise ConfigError(f"the engine refuses its settings: {last_line} (log: {self.log_path})")
        if code is not None:
            raise EngineError(f"engine ended with code {code} before it was ready{self._log_end()}")

    def _log_end(self) -> str:
        return f" (log: {self.log_path}){_tail(self.log_path)}"


class EmbeddedProcess(EngineProcess):
    """The embedded engine as a child process. The kernel picks its port; the engine writes it to a file."""

    @property
    def _port_file(self) -> Path:
        return RunPaths.of(self._config).endpoints / f"{self._name}-engine.port"

    def _command(self, *, version: int, secret_file: str) -> list[str]:
        self._port_file.parent.mkdir(parents=True, exist_ok=True)
        self._port_file.unlink(missing_ok=True)
        return [sys.executable, "-m", "rollout_server.engine", "--options", secret_file]

    def _environment(self) -> dict[str, str]:
        # A thread that waits for another one spins for about 300,000 turns by default: on a core that another
        # process wants, too, a decode step of SmolLM2 then takes up to 970 ms in place of 200. Without any
        # turns it sleeps hundreds of times in a step, and two threads on two idle cores take 215 ms in place
        # of 155. With this many they take 149. Beside another process a step of 64 rows takes 271 ms (159 on
        # one thread), until the engine returns the core.
        spins = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
        return spins | super()._environment()

    def _secret(self, *, version: int) -> str:
        rollout = self._config.rollout
        return ProcessOptions(
            model_path=self._model,
            api_key=self.api_key,
            port=0,
            port_file=str(self._port_file),
            device=rollout.engine_device,
            dtype=compute_dtype(self._config),
            enable_fp32_lm_head=uses_fp32_head(self._config),
            router_dtype=router_dtype(self._config),
            max_running_requests=rollout.max_running,
            context_length=self._context_tokens,
            weights_from=(str(RunPaths.of(self._config).checkpoints),),
            max_body_bytes=longest_body(self._context_tokens),
            max_connections=_SPARE_CONNECTIONS + 4 * (rollout.max_running + rollout.queue_samples),
            weight_version=str(version),
            random_seed=self._config.seed,
            max_adapters=self._config.num_adapters,
            enable_return_routed_experts=self._config.model.router_replay,
            num_threads=rollout.least_threads,
            max_threads=most_threads(self._config),
        ).to_json()

    def _client(self, url: str) -> EngineClient:
        return EmbeddedClient(url, api_key=self.api_key)

    async def _port(self) -> int:
        while True:
            self._check_alive()
            if self._port_file.exists():
                return int(self._port_file.read_text())
            await asyncio.sleep(_POLL_S)


def check_routes_fit(config: Config, routes: RoutesReader | None, *, context_tokens: int) -> None:
    """Raises ConfigError if the routes of a sample do not fit into a message to the buffer: those of a whole
    sequence, or of all segments of a conversation (`episode.max_tokens`)."""
    most, num_tokens = config.buffer.max_message_bytes, max(context_tokens, config.episode.max_tokens)
    if routes is None or (num_bytes := routes.shape.block_bytes(num_tokens)) <= most:
        return
    raise ConfigError(
        f"with model.router_replay a sample of {num_tokens} tokens has routes of {num_bytes} bytes "
        f"({routes.shape.bytes_per_token} a token), and one message has at most "
        f"buffer.max_message_bytes={most}: raise it in all roles, or use shorter sequences "
        "(rollout.max_context, episode.max_tokens)"
    )


def longest_body(context_tokens: int) -> int:
    """Returns the largest body of a request to the engine, in bytes: a full batch of prompts, or the tensors
    of a push."""
    return _PUSH_BODY_BYTES + MAX_BATCH * (_BYTES_PER_TOKEN * context_tokens + _BYTES_PER_PROMPT)


@contextlib.contextmanager
def _pipe_with(text: str) -> Iterator[int]:
    """Yields the descriptor of a pipe from which the text can be read once."""
    reading, writing = os.pipe()
    try:
        os.write(writing, text.encode())
        os.close(writing)
        yield reading
    finally:
        os.close(reading)


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    return "".join(f"\n    {line[:_LOG_LINE_CHARS]}" for line in lines)
