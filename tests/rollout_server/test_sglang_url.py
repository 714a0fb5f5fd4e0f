"""An engine at a URL, over real sockets: one that stops listening, and one with a key behind TLS."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from areal_like.config import Config, from_mapping
from areal_like.errors import ConfigError, EngineError
from rollout_server.policy.engines.sglang.process import SglangAtUrl
from rollout_server.policy.sglang_client import SglangClient
from tests.support.certificates import make_certificate
from tests.support.served_app import served
from tests.support.waiting import HANG_LIMIT_S


def test_an_engine_that_stops_listening_is_lost_at_once(tmp_path: Path) -> None:
    async def model_info(_: web.Request) -> web.Response:
        return web.json_response({})

    async def body() -> None:
        async with served(model_info) as url:
            config = from_mapping(
                {"runs_dir": str(tmp_path), "rollout": {"engine": "sglang", "sglang": {"url": url}}}
            )
            dying = asyncio.create_task(
                SglangAtUrl(config, name="rollout-0", model="", context_tokens=9, vocab_size=10).died()
            )
            await asyncio.sleep(0.5)
            assert not dying.done()
        assert "no server listens" in await dying

    asyncio.run(body())


def at_url(
    directory: Path,
    *,
    model: dict[str, Any] | None = None,
    start_timeout_s: float = HANG_LIMIT_S,
    **sglang: str,
) -> SglangAtUrl:
    config: Config = from_mapping(
        {
            "runs_dir": str(directory),
            "model": model or {},
            "rollout": {"engine": "sglang", "start_timeout_s": start_timeout_s, "sglang": sglang},
        }
    )
    return SglangAtUrl(config, name="rollout-0", model="/model", context_tokens=100, vocab_size=10)


def test_an_engine_at_a_url_needs_the_trainers_head(tmp_path: Path) -> None:
    """Nothing is done to an engine whose log-probs would differ from the trainer's."""
    requests: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        requests.append(request.path)
        return web.json_response({"enable_fp32_lm_head": False, "load": {}})

    async def body() -> None:
        async with served(answer) as url:
            with pytest.raises(ConfigError, match=f"{url} runs without --enable-fp32-lm-head"):
                await at_url(tmp_path, url=url, model={"dtype": "bfloat16"}).start(version=0)
            assert requests == ["/ready", "/server_info"]
            for model in ({"dtype": "bfloat16", "fp32_head": False}, {"dtype": "float32"}):
                async with await at_url(tmp_path, url=url, model=model).start(version=0):
                    assert "/update_weights_from_disk" in requests
                requests.clear()

    asyncio.run(body())


def test_an_old_sglang_is_named_at_once(tmp_path: Path) -> None:
    """It never says that it is ready. A proxy without its engine has no server info either."""
    has_engine = True

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/server_info" and has_engine:
            return web.json_response({"version": "0.5.16"})
        raise web.HTTPNotFound

    async def body() -> None:
        nonlocal has_engine
        async with served(answer) as url:
            with pytest.raises(ConfigError, match=r"SGLang 0\.5\.16 at \S+ has no /ready.*0\.5\.23"):
                await at_url(tmp_path, url=url).start(version=0)
            has_engine = False
            async with SglangClient(url, vocab_size=10) as client:
                assert not await client.health()

    asyncio.run(body())


def test_engine_behind_tls_gets_the_key(tmp_path: Path) -> None:
    certificate, private_key = make_certificate(tmp_path, "tls")
    key = tmp_path / "engine.key"
    key.touch(mode=0o600)
    key.write_text("the key\n")
    requests: list[tuple[str, str | None]] = []

    async def answer(request: web.Request) -> web.Response:
        requests.append((request.path, request.headers.get("Authorization")))
        if request.path == "/model_info":
            raise web.HTTPFound(f"{request.scheme}://{request.host}/elsewhere")
        return web.json_response({"max_req_input_len": 94, "load": {}})

    async def body() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, private_key)
        async with served(answer, tls=context) as url:
            engine = at_url(tmp_path, url=url, api_key_file=str(key), ca_file=str(certificate))
            async with await engine.start(version=0) as client:
                assert ("/update_weights_from_disk", "Bearer the key") in requests
                assert {authorization for _, authorization in requests} == {"Bearer the key"}
                with pytest.raises(EngineError, match="302"):
                    await client.model_info()
                assert requests[-1][0] == "/model_info", "a redirection is not followed"
            num_requests = len(requests)
            with pytest.raises(EngineError, match="no engine was ready"):
                await at_url(tmp_path, url=url, api_key_file=str(key), start_timeout_s=2.0).start(version=0)
            assert len(requests) == num_requests, "the key goes to no engine whose certificate is unknown"

    asyncio.run(body())
    key.chmod(0o644)
    for setting, message in (("api_key_file", "chmod 600"), ("ca_file", "ca_file=")):
        with pytest.raises(ConfigError, match=message):
            at_url(tmp_path, url="https://localhost:1", **{setting: str(key)})


@pytest.mark.parametrize("load", [{}, [], {"loads": [{}]}, {"loads": [{"decode_moments": ["x"]}]}])
def test_a_load_of_another_form_ends_no_server(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in front of an engine may respond with a page of its own, and status 200."""

    async def body() -> None:
        async def call(method: str, path: str) -> Any:
            return load

        async with SglangClient("http://127.0.0.1:9", vocab_size=10) as client:
            monkeypatch.setattr(client._http, "call", call)
            with pytest.raises(EngineError, match="malformed load"):
                await client.load()

    asyncio.run(body())
