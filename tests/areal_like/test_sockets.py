"""Listening sockets of the HTTP servers."""

from __future__ import annotations

import asyncio
import socket

import pytest

from areal_like.wire.sockets import bound_socket
from tests.support.waiting import HANG_LIMIT_S


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_accepted_connections_have_nagle_turned_off(host: str) -> None:
    async def body() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(
                writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            )
            writer.close()

        async with await asyncio.start_server(serve, sock=bound_socket(host, 0)) as server:
            _, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
            answer = await asyncio.wait_for(found, HANG_LIMIT_S)
            writer.close()
        return answer

    assert asyncio.run(body()) == 1
