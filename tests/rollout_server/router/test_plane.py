"""A router in front of a real plane of sessions, with the job's keys and TLS; and how it reads its list."""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from areal_like.client.areal_like_client import claim, claim_group
from areal_like.config import from_mapping
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.security.keys import KeyRole
from rollout_server.router.directory import Directory, listed_in, status_urls
from rollout_server.router.table import Listed
from rollout_server.tasks.base import Example
from tests.support import moved_clock
from tests.support.certificates import make_certificate
from tests.support.keys import keyring, make_keys
from tests.support.router_plane import Arrived, PlayedServer, routed
from tests.support.session_plane import PlaneServer

WHAT = Example(prompt="what?", answer=1)


def test_agents_work_through_a_router_with_keys_and_tls(tmp_path: Path) -> None:
    tokens = make_keys(tmp_path / "keys")
    certificate, private_key = make_certificate(tmp_path, "job")
    security = {
        "keys": str(tmp_path / "keys"),
        "tls_certificate": str(certificate),
        "tls_private_key": str(private_key),
    }

    async def body(server: PlaneServer) -> None:
        place = SimpleNamespace(name="rollout-1", url=server.plane.external_url)
        assert place.url.startswith("https://")
        own = keyring(tmp_path / "keys", KeyRole.ROUTER)
        async with routed(keyring=own, security=security) as router:
            router.list(place)
            url = router.url.replace("127.0.0.1", "localhost")  # the certificate's name
            await asyncio.to_thread(work, server, url, tokens, ca_file=str(certificate))

    with PlaneServer({"security": security}, keys=tmp_path / "keys").serving() as server:
        moved_clock.run(body(server))


def work(server: PlaneServer, url: str, tokens: dict[str, str], *, ca_file: str) -> None:
    """An agent with the project's client, and another one with the wrong tokens."""
    context = ssl.create_default_context(cafile=ca_file)
    mine = server.add(example=WHAT)
    for role, status in (("router", 403), ("rollout", 403), ("scorer", 403), ("x", 401)):
        headers = {"Authorization": f"Bearer {tokens.get(role, 'x')}"}
        request = urllib.request.Request(f"{url}/sessions", b"{}", headers)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, context=context)
        assert refused.value.code == status, "nobody claims with the key of a router"
        refused.value.close()
    session = claim(url, token=tokens["agent"], name="me", ca_file=ca_file)
    assert session is not None and session.base_url == f"{url}/sessions/{mine.id}/v1"
    assert str(mine.claimant) == "'me' at 127.0.0.1 via 127.0.0.1"

    def asked(key: str, *, stream: bool = False) -> bytes:
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream}
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        target = f"{session.base_url}/chat/completions"
        request = urllib.request.Request(target, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, context=context) as response:
            return bytes(response.read())

    assert json.loads(asked(session.api_key))["choices"][0]["message"]["content"] == "ok"
    assert asked(session.api_key, stream=True).endswith(b"data: [DONE]\n\n")
    for key in (tokens["agent"], tokens["operator"], tokens["router"]):
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(key)
        assert refused.value.code == 401, "no token of the job opens a session"
        refused.value.close()
    session.heartbeat()
    session.reward(0.5)
    assert session.end() and mine.num_calls == 2 and mine.reward == 0.5
    for _ in range(3):
        server.add(example=WHAT, group=7)
    group = claim_group(url, token=tokens["agent"], ca_file=ca_file)
    assert group is not None and len(group.sessions) == 3
    assert {one.base_url for one in group.sessions} == {
        f"{url}/sessions/{one.id}/v1" for one in group.sessions
    }
    group.rank(group.sessions)


def test_the_list_of_a_buffer() -> None:
    server = {"name": "a", "role": "rollout", "sessions": "http://a:1", "silent_s": 0.5}
    wrong: list[dict[str, Any]] = [
        {"role": "trainer"},
        {"sessions": ""},
        {"sessions": "http://a:1/x"},
        {"sessions": "file:///etc/passwd"},
        {"sessions": 7},
        {"silent_s": "1"},
        {"name": None},
    ]
    status = {
        "role": "buffer",
        "peers": [
            {**server, "stats": {"sessions_waiting": 3.0}},
            {**server, "name": "b", "stats": {"sessions_waiting": float("nan")}},
            *({**server, **one} for one in wrong),
            7,
        ],
    }
    assert listed_in(status) == [
        Listed(name="a", url="http://a:1", silent_s=0.5, num_waiting=3),
        Listed(name="b", url="http://a:1", silent_s=0.5),
    ]
    for other in ({**status, "role": "rollout"}, [], {"role": "buffer"}, {"role": "buffer", "peers": 7}):
        with pytest.raises(ValueError, match=r"buffer|peers"):
            listed_in(other)


def test_where_the_buffers_are(tmp_path: Path) -> None:
    settings = {"name": "x", "runs_dir": str(tmp_path), "buffer": {"num_shards": 2, "discovery": "run_dir"}}
    urls = status_urls(from_mapping(settings))
    assert urls() == []
    (tmp_path / "x" / "endpoints").mkdir(parents=True)
    (tmp_path / "x" / "endpoints" / "buffer-1.json").write_text('{"http": "10.0.0.1:80"}')
    assert urls() == ["http://10.0.0.1:80/status"]
    fixed = {"buffer": {"num_shards": 2, "advertise_host": "node{shard}", "port": 7}}
    with pytest.raises(ConfigError, match=r"set daemon\.http_port"):
        status_urls(from_mapping(fixed))
    fixed["daemon"] = {"http_port": 8000}
    assert status_urls(from_mapping(fixed))() == ["http://node0:8000/status", "http://node1:8001/status"]


def test_the_list_is_read_with_the_router_s_own_token(tmp_path: Path) -> None:
    tokens = make_keys(tmp_path / "keys")
    server = {"name": "a", "role": "rollout", "sessions": "http://a:1", "silent_s": 0.5}
    answers: list[tuple[int, Any, str]] = [
        (200, {"role": "buffer", "peers": [server]}, ""),
        (302, {}, "Location: http://127.0.0.1:1/\r\n"),
        (401, {}, ""),
        (200, [[]], ""),
        (200, {"role": "buffer", "peers": []}, ""),
    ]
    seen: list[list[Listed]] = []

    async def handle(one: Arrived) -> None:
        await one.answer(*answers[min(len(buffer.arrived), len(answers)) - 1])

    buffer = PlayedServer("buffer", handle)

    async def body() -> None:
        await buffer.start()
        config = from_mapping(
            {
                "buffer": {"port": 1},
                "daemon": {"http_port": int(buffer.url.rpartition(":")[2])},
            }
        )
        own = keyring(tmp_path / "keys", KeyRole.ROUTER)
        directory = Directory(config=config, keyring=own, see=seen.append)
        reading = asyncio.create_task(directory.run())
        while len(buffer.arrived) < len(answers) or len(seen) < 2:
            await asyncio.sleep(0.01)
            moved_clock.advance(0.2)
        reading.cancel()
        await buffer.kill()
        assert [[one.name for one in listed] for listed in seen] == [["a"], []]
        assert {one.header("authorization") for one in buffer.arrived} == {f"Bearer {tokens['router']}"}

    moved_clock.run(body())


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", "null", "[" * 100_000])
def test_a_damaged_endpoint_file_is_no_buffer(text: str, tmp_path: Path) -> None:
    config = from_mapping({"name": "x", "runs_dir": str(tmp_path), "buffer": {"discovery": "run_dir"}})
    file = RunPaths.of(config).endpoints / "buffer.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert status_urls(config)() == []
    file.write_text('{"http": "127.0.0.1:7"}')
    assert status_urls(config)() == ["http://127.0.0.1:7/status"]
