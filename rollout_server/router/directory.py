"""The list of rollout servers, read from the buffers' /status with the router's own token.

    every POLL_S: GET http://BUFFER/status of each shard -> peers of role rollout that have sessions

The buffers are the only source: a response that names another server (status 421) is followed only to one of
this list. While no buffer responds, the list stays as it is, because the servers go on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, read_endpoint
from areal_like.security.keyring import Keyring
from areal_like.security.tls import client_context
from areal_like.shards import all_shards
from areal_like.wire.addresses import reachable_host
from areal_like.wire.limits import MAX_ADDRESS_CHARS, SESSIONS_URL
from rollout_server.router.table import Listed

log = logging.getLogger(__name__)

POLL_S = 1.0
_TIMEOUT_S = 3.0
_MAX_BYTES = 32 << 20
_MAX_SERVERS = 4096


def status_urls(config: Config) -> Callable[[], list[str]]:
    """A function that returns the URLs of the buffers' /status that are known now.

    Raises ConfigError if the configuration does not say where they are.
    """
    scheme = "https" if config.security.tls_certificate else "http"
    shards = all_shards(config.buffer.num_shards)
    if config.buffer.discovery == "run_dir":
        files = [RunPaths.of(config).endpoints / f"{shard.name}.json" for shard in shards]

        def found() -> list[str]:
            endpoints = [read_endpoint(file) or {} for file in files]
            return [f"{scheme}://{one['http']}/status" for one in endpoints if one.get("http")]

        return found
    port = config.daemon.http_port
    if not port:
        raise ConfigError(
            "a router reads the list of servers from the buffer's HTTP server: set daemon.http_port as for "
            "the buffer, or buffer.discovery=run_dir where the run's directory can be seen"
        )
    urls = []
    for shard in shards:
        host = reachable_host(config, shard)
        urls.append(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port + shard.index}/status")
    return lambda: urls


@dataclass(eq=False, kw_only=True)
class Directory:
    """Reads the list again and again: `run` in a task."""

    config: Config
    keyring: Keyring | None
    see: Callable[[list[Listed]], None]
    """Called with each new list."""
    is_read: bool = field(default=False, init=False)
    """True once a buffer has responded."""
    problem: str = field(default="", init=False)
    """Why the last attempt had no list; empty if it had one."""
    silent_since_s: float | None = field(default=None, init=False)
    """Since when no buffer has responded; None: one does."""

    async def run(self) -> None:
        """Until it is cancelled. Raises ConfigError as `status_urls`."""
        urls_of = status_urls(self.config)
        loop = asyncio.get_running_loop()
        tls = client_context(self.config.security)
        connector = aiohttp.TCPConnector(ssl=tls if tls is not None else True)
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while True:
                urls = urls_of()
                self.problem = "" if urls else "no buffer has written its address yet"
                found = await asyncio.gather(*(self._listed(session, url) for url in urls))
                lists = [one for one in found if one is not None]
                if lists:
                    self.is_read, self.silent_since_s = True, None
                    self.see([one for listed in lists for one in listed])
                elif self.silent_since_s is None:
                    self.silent_since_s = loop.time()
                    log.info("no buffer responds: %s", self.problem)
                await asyncio.sleep(POLL_S)

    async def _listed(self, session: aiohttp.ClientSession, url: str) -> list[Listed] | None:
        """The servers of one buffer; None if it does not respond as a buffer does."""
        headers = {}
        if self.keyring is not None:  # it may have been renewed; it may only read
            headers["Authorization"] = f"Bearer {self.keyring.identity.token}"
        try:
            async with session.get(url, headers=headers, allow_redirects=False) as response:
                if response.status != 200:
                    self.problem = f"{url}: HTTP status {response.status}"
                    return None
                content = await response.content.read(_MAX_BYTES + 1)
                while not response.content.at_eof() and len(content) <= _MAX_BYTES:
                    content += await response.content.read(_MAX_BYTES + 1 - len(content))
            if len(content) > _MAX_BYTES:
                raise ValueError("its response is too long")
            return listed_in(json.loads(content))
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as error:
            self.problem = f"{url}: {error or type(error).__name__}"
            return None


def listed_in(status: Any) -> list[Listed]:
    """The servers with sessions in the body of a buffer's /status. Raises ValueError if it is none."""
    if not isinstance(status, Mapping) or status.get("role") != "buffer":
        raise ValueError("this is no buffer")
    peers = status.get("peers")
    if not isinstance(peers, Sequence):
        raise ValueError("it has no list of peers")
    found = []
    for peer in peers[:_MAX_SERVERS]:
        if not isinstance(peer, Mapping) or peer.get("role") != "rollout":
            continue
        name, url, silent_s, stats = (peer.get(key) for key in ("name", "sessions", "silent_s", "stats"))
        if not (isinstance(name, str) and isinstance(url, str) and url and SESSIONS_URL.fullmatch(url)):
            continue
        if len(url) > MAX_ADDRESS_CHARS or not isinstance(silent_s, int | float):
            continue
        waiting = stats.get("sessions_waiting", 0) if isinstance(stats, Mapping) else 0
        is_number = isinstance(waiting, int | float) and math.isfinite(waiting)
        found.append(
            Listed(
                name=name,
                url=url.rstrip("/"),
                silent_s=max(0.0, silent_s),
                num_waiting=max(0, int(waiting)) if is_number else 0,
            )
        )
    return found
