"""A router in the event loop of a test, with servers whose responses the test writes byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp

from areal_like.config import from_mapping
from areal_like.http.access import Reason
from areal_like.runtime.metrics import Metrics
from areal_like.security.keyring import Keyring
from rollout_server.router.daemon import client_of
from rollout_server.router.forwarding import Forwarding
from rollout_server.router.metrics import RouterSeries
from rollout_server.router.plane import RouterPlane
from rollout_server.router.table import Listed, RoutingTable

LEASE_S = 10.0


@dataclass(eq=False, kw_only=True)
class Arrived:
    """A request as it arrived at a server."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    """Names in lower case."""
    body: bytes
    writer: asyncio.StreamWriter

    def header(self, name: str) -> str:
        """The value of a header that must occur once."""
        (value,) = (value for key, value in self.headers if key == name)
        return value

    async def answer(self, status: int, body: Any, headers: str = "") -> None:
        """Sends a whole response."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n{headers}\r\n"
        self.writer.write(head.encode() + content)
        await self.writer.drain()

    async def refuse(self, status: int, code: str, headers: str = "") -> None:
        """Sends an error as a rollout server does."""
        await self.answer(status, {"error": {"message": "no", "code": code}}, headers)


Handle = Callable[[Arrived], Awaitable[None]]


class Named(Protocol):
    """A server for the router's list."""

    name: str
    url: str


@dataclass(eq=False)
class PlayedServer:
    """A server of sessions on a real socket; `handle` writes its responses."""

    name: str
    handle: Handle
    arrived: list[Arrived] = field(default_factory=list)
    url: str = ""
    num_ended: int = 0
    """Connections that the router has closed."""
    _connections: set[asyncio.StreamWriter] = field(default_factory=set)
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        port = int(self.url.rpartition(":")[2]) if self.url else 0
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def kill(self) -> None:
        """Breaks all connections; further ones are refused."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._connections):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = head[0].split()
                headers = [
                    (name.lower(), value)
                    for name, _, value in (line.partition(": ") for line in head[1:] if line)
                ]
                length = int(dict(headers).get("content-length", "0"))
                body = await reader.readexactly(length)
                one = Arrived(method=method, target=target, headers=headers, body=body, writer=writer)
                self.arrived.append(one)
                ended = asyncio.ensure_future(reader.read(1)) if target.endswith("watch") else None
                await self.handle(one)
                if ended is not None:
                    await ended
                    raise EOFError
        except (EOFError, ConnectionError):
            self.num_ended += 1
        finally:
            self._connections.discard(writer)
            writer.close()


@dataclass(eq=False, kw_only=True)
class Router:
    """The router: its table is told what buffers would say by `list`."""

    table: RoutingTable
    forwarding: Forwarding
    plane: RouterPlane
    client: aiohttp.ClientSession
    metrics: Metrics
    refused: list[Reason] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.plane.url

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def list(self, *servers: Named, silent_s: float = 0.0, num_waiting: int = 0) -> None:
        """The buffers' list has these servers now."""
        listed = [
            Listed(name=one.name, url=one.url, silent_s=silent_s, num_waiting=num_waiting) for one in servers
        ]
        self.forwarding.lost(self.table.see(listed, now_s=asyncio.get_running_loop().time()))

    async def ask(
        self, method: str, path: str, body: Any = None, *, key: str = "key", **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        """Status, JSON and headers of a response."""
        given = {"Authorization": f"Bearer {key}"} if key else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        async with self.client.request(
            method, f"{self.url}{path}", data=content, headers=given, allow_redirects=False
        ) as response:
            text = await response.read()
            return response.status, json.loads(text), {k.lower(): v for k, v in response.headers.items()}

    async def talk(self, *pieces: bytes) -> bytes:
        """Sends raw bytes; returns all that comes back until the router closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    def counted(self, series: str) -> float:
        """The value of a series, such as `router_requests_total{outcome="passed"}`."""
        page = self.metrics.exposition().decode()
        return next(
            float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"areal_{series} ")
        )


@contextlib.asynccontextmanager
async def routed(
    *servers: PlayedServer, keyring: Keyring | None = None, **settings: Any
) -> AsyncIterator[Router]:
    """A router, which knows these servers. `settings`: sections of the configuration."""
    config = from_mapping({"rollout": {"max_context": 4096}, **settings})
    metrics = Metrics()
    table = RoutingTable(lease_timeout_s=LEASE_S)
    refused: list[Reason] = []
    for server in servers:
        await server.start()
    async with (
        client_of(config) as servers_client,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as client,
    ):
        forwarding = Forwarding(
            table=table,
            client=servers_client,
            series=RouterSeries(metrics),
            advertise_host="",
            search_s=LEASE_S + 20.0,
        )
        plane = RouterPlane(
            config=config, app=forwarding, table=table, keyring=keyring, index=0, on_refused=refused.append
        )
        plane.start(shutdown_s=1)
        router = Router(
            table=table, forwarding=forwarding, plane=plane, client=client, metrics=metrics, refused=refused
        )
        router.list(*servers)
        try:
            yield router
        finally:
            forwarding.close()
            await plane.close(limit_s=2.0)
            for server in servers:
                await server.kill()


def session_of(server: PlayedServer, id: str, *, api_key: str = "key") -> dict[str, Any]:
    """What a server says of a claimed session."""
    return {"id": id, "base_url": f"{server.url}/sessions/{id}/v1", "api_key": api_key, "example": {}}
