"""An engine at a URL that stops listening, over real sockets."""

import asyncio
import time
from pathlib import Path

from aiohttp import web

from areal_like.config import from_mapping
from rollout_server.inference.sglang.process import SglangAtUrl


def test_an_engine_that_stops_listening_is_lost_at_once(tmp_path: Path) -> None:
    async def model_info(_: web.Request) -> web.Response:
        return web.json_response({})

    async def body() -> float:
        app = web.Application()
        app.router.add_get("/model_info", model_info)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://localhost:{runner.addresses[0][1]}"
        config = from_mapping(
            {"runs_dir": str(tmp_path), "rollout": {"engine": "sglang", "sglang": {"url": url}}}
        )
        dying = asyncio.create_task(SglangAtUrl(config, name="rollout-0", model="", vocab_size=10).died())
        await asyncio.sleep(0.5)
        assert not dying.done()
        await runner.cleanup()
        gone_s = time.monotonic()
        assert "no server listens" in await dying
        return time.monotonic() - gone_s

    assert asyncio.run(body()) < 8
