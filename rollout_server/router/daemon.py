"""One router as a daemon: one address for agents in front of all rollout servers of a job.

STARTING (binds its address) -> READY -> DRAINING (claims are sent away, open requests finish) -> exit

It has no state that is lost with it: a router that has just started hears from the servers where sessions
are.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from areal_like.config import Config
from areal_like.runtime.daemon import Runtime, cancelled_on_exit
from areal_like.security.tls import client_context
from rollout_server.policy.engines.sglang.process import server_index
from rollout_server.router.client import ServerClient
from rollout_server.router.directory import Directory, status_urls
from rollout_server.router.forwarding import Forwarding
from rollout_server.router.metrics import RouterSeries
from rollout_server.router.plane import RouterPlane
from rollout_server.router.table import Listed, RoutingTable

log = logging.getLogger(__name__)

_RESTORE_S = 20.0
"""How long a server may take to lease a session that has lost its server, and to restore it."""
_MAX_SHUTDOWN_S, _SHUTDOWN_SHARE = 10, 1 / 3


async def main(runtime: Runtime) -> None:
    """Serves until `runtime.stopping`. Raises ConfigError if it cannot bind its address, or if the settings
    do not say where the buffer is."""
    config = runtime.config
    status_urls(config)  # raises
    table = RoutingTable(lease_timeout_s=config.buffer.lease_timeout_s)
    loop = asyncio.get_running_loop()
    series = RouterSeries(runtime.metrics)
    async with client_of(config) as client:
        forwarding = Forwarding(
            table=table,
            client=client,
            series=series,
            advertise_host=config.sessions.router_advertise_host,
            search_s=config.buffer.lease_timeout_s + _RESTORE_S,
        )

        def see(listed: list[Listed]) -> None:
            forwarding.lost(table.see(listed, now_s=loop.time()))

        series.show(
            {
                "servers": lambda: len(table.available(now_s=loop.time())),
                "sessions": lambda: len(table.sessions),
                "claims": lambda: table.num_claims,
                "pending": lambda: forwarding.num_pending,
                "streams": lambda: forwarding.num_streams,
            }
        )
        directory = Directory(config=config, keyring=runtime.keyring, see=see)
        plane = RouterPlane(
            config=config,
            app=forwarding,
            table=table,
            keyring=runtime.keyring,
            index=server_index(runtime.name),
            on_refused=runtime.count_refused,
        )
        shutdown_s = max(1, min(_MAX_SHUTDOWN_S, round(config.daemon.drain_timeout_s * _SHUTDOWN_SHARE)))
        plane.start(shutdown_s=shutdown_s)
        assert plane.serving is not None
        runtime.status = lambda: _status(table, forwarding, directory, url=plane.url)
        runtime.waits.sources += [forwarding.waits, lambda: _waits(directory, now_s=loop.time())]
        reading = asyncio.create_task(directory.run(), name="directory")
        stopping = asyncio.ensure_future(runtime.stopping.wait())
        try:
            async with cancelled_on_exit(reading):
                runtime.advertise(sessions=plane.url)
                runtime.ready()
                log.info("agents claim sessions at %s", plane.url)
                watched: set[asyncio.Future[Any]] = {stopping, reading, plane.serving}
                done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                for ended in done:
                    ended.result()
                forwarding.close()
                loop.call_later(shutdown_s / 2, forwarding.give_up)
                await plane.close(limit_s=shutdown_s + 2)
        finally:
            stopping.cancel()
            await plane.close(limit_s=0.1)


def client_of(config: Config) -> ServerClient:
    """For requests to rollout servers."""
    return ServerClient(tls=client_context(config.security))


def _status(table: RoutingTable, forwarding: Forwarding, directory: Directory, *, url: str) -> dict[str, Any]:
    return {
        "sessions": url,
        "state": "serving" if table.servers else "no rollout server",
        "buffers": directory.problem or ("" if directory.is_read else "not asked yet"),
        "servers": {
            server.name: {
                "url": server.url,
                "claims": server.num_claims,
                "waiting": server.num_waiting,
                "failures": server.num_failures,
                "lost": server.is_lost,
            }
            for server in table.servers.values()
        },
        "sessions_known": len(table.sessions),
        "claims": table.num_claims,
        "pending": forwarding.num_pending,
        "streams": forwarding.num_streams,
    }


def _waits(directory: Directory, *, now_s: float) -> dict[str, float]:
    since_s = directory.silent_since_s
    return {} if since_s is None else {"buffer: the list of rollout servers": round(now_s - since_s, 3)}
