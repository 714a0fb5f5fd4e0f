"""An aiohttp application on a free port of loopback."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def served(
    what: web.Application | Handler, *, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """Serves an application, or what responds to every request; gives the URL."""
    if isinstance(what, web.Application):
        app = what
    else:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", what)
    runner = web.AppRunner(app, shutdown_timeout=0.01)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=tls).start()
        origin = "http://127.0.0.1" if tls is None else "https://localhost"
        yield f"{origin}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
