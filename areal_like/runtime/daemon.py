"""The common runtime of all daemons: logs, signals, HTTP endpoints, named waits, exit codes.

    STARTING -> READY <-> UNREADY -> DRAINING -> (process exits)

A daemon's own code is an `async def main(runtime)`. The runtime sets `stopping` on SIGTERM or SIGINT (a
second signal, or a drain longer than `daemon.drain_timeout_s`, kills the process). It serves /livez, /readyz,
/metrics, /status and /control on a free port; `<run>/endpoints/<daemon>.json` contains the address.

Exit codes: 0 the run is finished; `daemon.exit_code_on_drain` (by default 0 too) drained; 1 failed (the
reason is in the log, and in one line on stderr); 2 user error (one message on stderr).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, ClassVar, Self

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from areal_like.config import Config, to_mapping
from areal_like.errors import ArealError, ConfigError, UserError
from areal_like.http.access import AccessRules, Reason, host_names
from areal_like.http.discovery import DiscoveryFile, http_address, http_port
from areal_like.http.guard import BodyLimits, HttpGuard
from areal_like.http.server import HttpConfig, HttpServer
from areal_like.paths import RunPaths, read_endpoint, write_json
from areal_like.runtime.exhaustion import end_if_callbacks_fail, end_if_threads_fail
from areal_like.runtime.logs import configure_logging, exit_log
from areal_like.runtime.metrics import CONTENT_TYPE, DaemonSeries, Metrics
from areal_like.runtime.process import allow_many_files, die_with_launcher, keep_files_private
from areal_like.runtime.signals import handle_log_signals, show_tasks_of
from areal_like.runtime.waits import TICK_S, PendingWaits
from areal_like.security.binding import require_loopback_or_keys
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyRole
from areal_like.security.redaction import without_secrets
from areal_like.security.tls import tls_files
from areal_like.security.tokens import role_of_token
from areal_like.spans import recorder
from areal_like.terminal_text import harmless
from areal_like.wire.pump import set_io_threads
from areal_like.wire.sockets import bound_socket

log = logging.getLogger(__name__)

_READ_KEYS_S = 1.0
"""Interval at which a daemon rereads its keys if their files have changed."""
_BODY_LIMITS = BodyLimits(max_bytes=1 << 20, timeout_s=10.0)
"""Limits of a request body; `areal-like drop` with a hundred thousand tickets stays below them."""
_MAX_CONNECTIONS = 128

Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
Page = Callable[[], Awaitable[bytes]]


class Runtime:
    """HTTP endpoints, metrics and state of one daemon.

    Enter it with `async with` in the daemon's event loop.
    """

    def __init__(self, config: Config, *, role: str, name: str, waits: PendingWaits | None = None) -> None:
        """`waits`: the daemon's waits, if it has waited before. Raises ConfigError if `security.keys` has no
        usable key for this daemon."""
        self.config = config
        self.role = role
        self.name = name
        self.paths = RunPaths.of(config)
        self.metrics = Metrics()
        self.metrics.registry.register(
            DaemonSeries(self.paths.root, not_ready=lambda: self.not_ready_because)
        )
        self._discovery = DiscoveryFile(config, role=role, name=name)
        self.waits = waits or PendingWaits()
        self.keyring = Keyring.of(config.security, role=KeyRole(role)) if config.security.keys else None
        """The daemon's keys; None if the job has none."""
        self.stopping = asyncio.Event()
        """Set when the daemon must drain."""
        self.process = secrets.token_hex(16)
        """Identity of this process, by which a buffer tells it from others of the same name. Not in /status:
        a process with the same identity would be mistaken for this one."""
        self.is_finished = False
        """True when the run is finished: the exit code is then 0, even after a drain."""
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Receives the exception of a failed part that runs alongside `main`: the daemon must end."""
        self.status: Callable[[], dict[str, Any]] = dict
        """Returns the daemon's own part of /status."""
        self.trouble: Callable[[], str] = str
        """Returns why the daemon cannot work at the moment; empty if it can. Otherwise it is not ready,
        regardless of earlier calls of `ready`."""
        self.verbs: dict[str, Verb] = {"drain": self._on_drain_verb}
        """Handlers of `POST /control/<verb>`: JSON object in, JSON object out; UserError becomes a 400."""
        self.metrics_pages: dict[str, Page] = {}
        """Further pages in Prometheus' format, `/metrics/<name>`; an ArealError becomes a 503."""
        self.http_port = 0
        allow_many_files()
        set_io_threads(config.daemon.io_threads)
        self._loop = asyncio.get_running_loop()
        self._unready = "starting"
        self._endpoint: dict[str, Any] = {}
        self._plane: HttpPlane | None = None
        self._reading_keys: asyncio.TimerHandle | None = None
        self._ticking: asyncio.TimerHandle | None = None

    def ready(self) -> None:
        """Makes /readyz return 200 from now on (unless the daemon is draining)."""
        self._unready = ""

    def unready(self, reason: str) -> None:
        """Makes /readyz return 503; the reason is in /status."""
        self._unready = reason

    @property
    def http_address(self) -> str:
        """HOST:PORT at which others reach the daemon's HTTP server."""
        return http_address(self.config, self.http_port)

    @property
    def not_ready_because(self) -> str:
        """The reason in /status; empty when ready."""
        return "draining" if self.stopping.is_set() else self._unready or self.trouble()

    def advertise(self, **addresses: Any) -> None:
        """Adds addresses to the daemon's endpoint file."""
        self._endpoint |= addresses
        write_json(self.paths.endpoints / f"{self.name}.json", self._endpoint)

    def count_refused(self, reason: Reason) -> None:
        """Counts a request that an HTTP server of this daemon has refused."""
        assert self._plane is not None
        self._plane.count_refused(reason)

    def fail(self, error: Exception) -> None:
        """Ends the daemon with this error; later ones are ignored."""
        if not self.failed.done():
            self.failed.set_exception(error)

    def stop(self) -> None:
        """Begins the drain. Safe to call from any thread, and from a signal handler, even after the event
        loop has ended."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self.stopping.set)

    async def __aenter__(self) -> Self:
        max_bytes = round(1e6 * self.config.daemon.trace_mb)
        recorder.start(self.paths.spans, self.name, max_bytes=max_bytes)
        show_tasks_of(self._loop)
        end_if_callbacks_fail(self._loop)
        self._plane = HttpPlane(self)
        self.http_port = self._plane.start()
        self.advertise(
            role=self.role,
            pid=os.getpid(),
            http=self.http_address,
            started_unix_s=round(time.time(), 3),
        )
        try:
            self._discovery.write(self.http_address)
        except BaseException:
            await self.__aexit__()
            raise
        self._tick()
        if self.keyring is not None:
            self._reading_keys = self._loop.call_later(_READ_KEYS_S, self._read_keys, self.keyring)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._plane is not None
        for timer in (self._reading_keys, self._ticking):
            if timer is not None:
                timer.cancel()
        self.failed.cancel()
        self._discovery.remove()
        await self._plane.close()
        recorder.stop()
        file = self.paths.endpoints / f"{self.name}.json"
        written = read_endpoint(file) or {}
        # A successor may have written its own file: this process may have been considered dead.
        if all(written.get(key) == self._endpoint.get(key) for key in ("pid", "started_unix_s")):
            file.unlink(missing_ok=True)

    def _tick(self) -> None:
        self._ticking = self._loop.call_later(TICK_S, self._tick)
        self.waits.tick()

    def _read_keys(self, keyring: Keyring) -> None:
        self._reading_keys = self._loop.call_later(_READ_KEYS_S, self._read_keys, keyring)
        try:
            keyring.refresh()
        except Exception as error:  # the loop would only log it, and revoked keys would stay valid
            self.fail(error)

    def drain(self) -> None:
        """Does the same as SIGTERM, watchdog included. Call it in the daemon's event loop.

        A signal that follows counts as the first one: a launcher that ends a finished run must not kill its
        servers.
        """
        if not self.stopping.is_set():
            DrainSignals.request()

    def finish(self) -> None:
        """Drains because the run is finished."""
        self.is_finished = True
        self.drain()

    async def _on_drain_verb(self, _: dict[str, Any]) -> dict[str, Any]:
        self.drain()
        return {"draining": True}

    def describe(self) -> dict[str, Any]:
        """The JSON object of /status."""
        base = {"role": self.role, "name": self.name, "pid": os.getpid()}
        return (
            base | {"not_ready": self.not_ready_because, "waiting_on": self.waits.durations()} | self.status()
        )


class HttpPlane:
    """The HTTP server of one daemon, within the access rules of its job: `start`, then `close`."""

    def __init__(self, daemon: Runtime) -> None:
        """Raises ConfigError if TLS cannot be used."""
        config = daemon.config
        security = config.security
        self._port = http_port(config, role=daemon.role, name=daemon.name)
        others = [
            *security.allowed_hosts,
            config.daemon.advertise_host,
            config.buffer.advertise_host,
            config.rollout.advertise_host,
        ]
        keyring = daemon.keyring
        rules = AccessRules(
            hosts=host_names(config.daemon.http_host, others=others),
            role_of=None if keyring is None else lambda token: role_of_token(keyring, token),
        )
        self._refused = daemon.metrics.counter(
            "http_refused", "HTTP requests refused, by reason.", label="reason", values=list(Reason)
        )
        guard = HttpGuard(_pages(daemon), rules, limits=_BODY_LIMITS, on_refused=self.count_refused)
        certificate, private_key = tls_files(security)
        self._server = HttpServer(
            HttpConfig(
                guard, max_connections=_MAX_CONNECTIONS, certificate=certificate, private_key=private_key
            )
        )
        self._config = config
        self._serving: asyncio.Task[None] | None = None

    def start(self) -> int:
        """Binds the daemon's port, serves in a task of the running loop, and returns the port.

        Raises ConfigError if the address is not one of this machine or needs keys, or the port is taken.
        """
        host = self._config.daemon.http_host
        require_loopback_or_keys(self._config.security, host, setting="daemon.http_host")
        try:
            listener = bound_socket(host, self._port)
        except OSError as error:
            if self._port and error.errno == errno.EADDRINUSE:
                raise ConfigError(
                    f"port {self._port} is taken, which daemon.http_port={self._config.daemon.http_port} "
                    "gives to this daemon: choose another one, or 0 for a free one"
                ) from None
            raise ConfigError(
                f"cannot bind {host} ({error.strerror}): set daemon.http_host to an address of this machine"
            ) from None
        # From here on the kernel queues connections until the server accepts them; before, it refused them.
        listener.listen(128)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        return int(listener.getsockname()[1])

    def count_refused(self, reason: Reason) -> None:
        """Counts a request refused here, or by another HTTP server of the daemon."""
        self._refused.labels(reason.value).inc()

    async def close(self) -> None:
        """Stops the server, without waiting for open requests."""
        assert self._serving is not None
        self._server.should_exit = True
        self._server.force_exit = True
        await asyncio.wait([self._serving], timeout=2)


def _pages(daemon: Runtime) -> Starlette:
    async def livez(_: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(_: Request) -> Response:
        # The reason is in /status: this page needs no token.
        ready = not daemon.not_ready_because
        return PlainTextResponse("ok" if ready else "not ready", status_code=200 if ready else 503)

    async def metrics(_: Request) -> Response:
        return Response(daemon.metrics.exposition(), media_type=CONTENT_TYPE)

    async def metrics_of(request: Request) -> Response:
        page = daemon.metrics_pages.get(request.path_params["part"])
        if page is None:
            known = ", ".join(f"/metrics/{part}" for part in daemon.metrics_pages) or "/metrics only"
            return JSONResponse({"error": f"no such page; known: {known}"}, status_code=404)
        try:
            return Response(await page(), media_type=CONTENT_TYPE)
        except ArealError as error:
            return JSONResponse({"error": str(error)}, status_code=503)

    async def status(_: Request) -> Response:
        return JSONResponse(daemon.describe())

    async def config(_: Request) -> Response:
        return JSONResponse(without_secrets(to_mapping(daemon.config)))

    async def control(request: Request) -> Response:
        verb = daemon.verbs.get(request.path_params["verb"])
        if verb is None:
            return JSONResponse({"error": f"unknown verb; known: {sorted(daemon.verbs)}"}, status_code=404)
        try:
            body = json.loads(await request.body() or b"{}")
            if not isinstance(body, dict):
                raise ValueError("want a JSON object")
            return JSONResponse(await verb(body))
        except ValueError as error:  # UserError is one
            return JSONResponse({"error": str(error)}, status_code=400)
        except RecursionError:
            return JSONResponse({"error": "the body is nested too deeply"}, status_code=400)

    return Starlette(
        routes=[
            Route("/livez", livez),
            Route("/readyz", readyz),
            Route("/metrics", metrics),
            Route("/metrics/{part}", metrics_of),
            Route("/status", status),
            Route("/config", config),
            Route("/control/{verb}", control, methods=["POST"]),
        ]
    )


def exit_code_of(name: str, run: Callable[[], None]) -> int:
    """Runs a daemon's body and returns its exit code; reports a failure in the log and on stderr.

    The process ignores SIGTERM from then on: the interpreter's shutdown removes the handlers, and a launcher
    that ends a finished run could then kill a trainer whose exit code should report that the run is finished.
    """
    end_if_threads_fail()
    try:
        run()
    except UserError as error:
        exit_log.error("%s", error)
        sys.stderr.write(f"{name}: {harmless(str(error))}\n")
        return 2
    except ArealError as error:
        exit_log.error("%s: %s", type(error).__name__, error)
        sys.stderr.write(f"{name}: {harmless(str(error))}\n")
        return 1
    except Exception as error:  # the outermost frame of a process: the traceback must reach its log
        exit_log.exception("unexpected")
        text = f"{type(error).__name__}: {harmless(str(error))}"
        sys.stderr.write(f"{name}: unexpected {text} (traceback in its log)\n")
        return 1
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return 0


class DrainSignals:
    """Signal handlers: SIGTERM or SIGINT begins the drain, a second one kills the process.

        IDLE --signal or request()--> DRAINING --drain_timeout_s over--> (process killed)
                                         `--a signal 1 s or more after the first one--> (process killed)

    A terminal and a supervisor often deliver the same Ctrl-C twice, so repeats within a second count as one
    signal. The watchdog of `drain_timeout_s` is a kernel timer (SIGALRM): it ends the process even when the
    interpreter hangs in native code.
    """

    _is_requested: ClassVar[bool] = False
    """True from `request` until the handler runs."""

    def __init__(self, *, drain_timeout_s: float, on_drain: Callable[[], None]) -> None:
        self._drain_timeout_s = drain_timeout_s
        self._on_drain = on_drain
        self._is_draining = False
        self._signal_s: float | None = None
        """Time of the first signal from another process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    @classmethod
    def request(cls) -> None:
        """Begins the drain as a signal does, but does not count as one. Thread-safe."""
        cls._is_requested = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, _: object) -> None:
        was_requested, DrainSignals._is_requested = self._is_requested, False
        now_s = time.monotonic()
        if not self._is_draining:
            self._is_draining = True
            signal.setitimer(signal.ITIMER_REAL, self._drain_timeout_s)
            self._on_drain()
        if was_requested:
            return
        if self._signal_s is None:
            self._signal_s = now_s
        elif now_s - self._signal_s > 1.0:
            signal.raise_signal(signal.SIGKILL)


def run_daemon(
    config: Config, *, role: str, name: str, main: Callable[[Runtime], Coroutine[Any, Any, None]]
) -> int:
    """Runs an asyncio daemon to its end and returns its exit code."""
    is_drained = False

    async def body() -> None:
        nonlocal is_drained
        async with Runtime(config, role=role, name=name) as runtime:
            DrainSignals(drain_timeout_s=config.daemon.drain_timeout_s, on_drain=runtime.stop)
            log.info("%s started, pid %d", name, os.getpid())
            await _until_failed(runtime, main(runtime))
            is_drained = runtime.stopping.is_set() and not runtime.is_finished
            log.info("%s ended: %s", name, "drained" if is_drained else "the run is finished")

    def run() -> None:
        configure_logging(config, name)
        handle_log_signals()
        asyncio.run(body())

    die_with_launcher()
    keep_files_private(RunPaths.of(config).root)
    code = exit_code_of(name, run)
    return config.daemon.exit_code_on_drain if is_drained and code == 0 else code


async def _until_failed(runtime: Runtime, main: Coroutine[Any, Any, None]) -> None:
    """Runs `main` to its end, or cancels it and raises when the runtime has failed."""
    task = asyncio.create_task(main, name="main")
    async with cancelled_on_exit(task):
        await asyncio.wait([task, runtime.failed], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            runtime.failed.result()


@contextlib.asynccontextmanager
async def cancelled_on_exit(*tasks: asyncio.Task[Any]) -> AsyncIterator[None]:
    """Cancels the tasks when the block ends and waits for them; raises the exception of a failed task."""
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
