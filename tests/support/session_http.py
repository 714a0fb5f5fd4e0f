"""The least HTTP server for sessions, for tests of what lies behind it: chat completions and rewards."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator
from typing import Any

from areal_like.errors import ArealError, SessionGoneError
from rollout_server.sessions.book import SessionBook


@contextlib.asynccontextmanager
async def serving(book: SessionBook) -> AsyncIterator[None]:
    """Serves the sessions of the book on loopback."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            body = await reader.readexactly(int(headers["content-length"]))
            _, _, id, _, route = lines[0].split()[1].split("/", 4)
            status, answer = await _answer(book, id, route, headers["authorization"], body)
            text = json.dumps(answer).encode()
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(text)) + text)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    book.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield


async def _answer(book: SessionBook, id: str, route: str, authorization: str, body: bytes) -> tuple[int, Any]:
    request = json.loads(body)
    try:
        session = book.find(id)
        assert session is not None and authorization == f"bearer {session.api_key}".lower()
        if route == "reward":
            session.set_reward(request["reward"])
            return 200, {}
        call = session.begin(
            hashlib.sha256(body).digest(),
            lambda: session.answer(request["messages"]),
            is_repetition=False,
        )
        answer = await call.answer()
    except SessionGoneError as error:
        return 410, str(error)
    except ArealError as error:
        return 400, str(error)
    call.is_delivered = True
    message = {"role": "assistant", "content": answer.reply.text}
    return 200, {"id": f"chatcmpl-{call.id}", "choices": [{"message": message}]}
