"""Arbitrary and mutated requests to an engine: every one is answered in time, and it generates as before."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import msgpack
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_like.http.streams import FRAMES
from tests.support.engine_conformance import PROMPT
from tests.support.engine_harness import Engine

SAMPLING = {
    "max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "top_k": -1, "stop_token_ids": [3], "n": 1,
    "stream_interval": 2,
}  # fmt: skip
GROUP = {"group_name": "g", "timeout_s": 0.2}
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {
        "rid": "a", "input_ids": PROMPT, "sampling_params": SAMPLING, "return_logprob": True, "stream": False,
        "keep_prefix": True,
    },
    "/abort_request": {"rid": "a", "abort_all": False},
    "/pause_generation": {"mode": "retract"},
    "/continue_generation": {},
    "/init_weights_update_group": GROUP | {
        "master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "gloo",
    },
    "/destroy_weights_update_group": {"group_name": "g"},
    "/begin_weight_update": {"timeout_s": 0.2, "weight_version": "1", "integrity": "none"},
    "/update_weights_from_distributed": GROUP | {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]},
    "/receive_weights": GROUP
    | {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "weight_version": "1"},
    "/end_weight_update": {"weight_version": "1", "timeout_s": 0.2, "running": "recompute", "checksums": []},
    "/update_weights_from_disk": {"model_path": "/nowhere", "weight_version": "1"},
    "/flush_cache": {},
}  # fmt: skip
"""A body that the engine understands, for every path."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A path and a body in which up to three fields have arbitrary values or are absent."""
    path = draw(st.sampled_from(sorted(BODIES)))
    body = json.loads(json.dumps(BODIES[path]))
    for _ in range(draw(st.integers(0, 3))):
        nested = [value for value in body.values() if isinstance(value, dict)]
        place = draw(st.sampled_from([body, *nested]))
        # Without a time limit, or with a longer one, the engine rightly waits longer than this test.
        name = draw(st.sampled_from([name for name in (*place, "x") if name != "timeout_s"]))
        if draw(st.booleans()):
            place[name] = draw(JSON)
        else:
            place.pop(name, None)
    return path, body


def post(engine: Engine, path: str, content: bytes, **headers: str) -> tuple[int, bytes]:
    """Status and body of the answer."""
    connection = http.client.HTTPConnection(urlsplit(engine.url).netloc)
    try:
        connection.request("POST", path, body=content, headers=engine.headers | headers)
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    return response.status, answer


def assert_generates(engine: Engine) -> None:
    """The engine is not paused, and it generates."""
    assert post(engine, "/continue_generation", b"{}")[0] == 200
    status, answer = post(engine, "/generate", json.dumps(BODIES["/generate"]).encode())
    assert status == 200 and json.loads(answer)["output_ids"], answer


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(request=requests())
def test_arbitrary_bodies_are_answered(engine: Engine, request: tuple[str, dict[str, Any]]) -> None:
    path, body = request
    status, answer = post(engine, path, json.dumps(body).encode())
    # An exception that no handler expects is answered in plain text.
    assert status in (200, 400, 500) and isinstance(json.loads(answer), (dict, list)), (path, body, answer)
    assert_generates(engine)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    prompt=st.binary(max_size=24) | st.lists(st.integers() | st.binary(max_size=4), max_size=4),
    fields=st.dictionaries(st.sampled_from(["rid", "sampling_params", "stream"]), JSON, max_size=2),
    mutation=st.none() | st.tuples(st.integers(0, 200), st.integers(0, 255)),
)
def test_arbitrary_packed_bodies_are_answered(
    engine: Engine, prompt: Any, fields: dict[str, Any], mutation: tuple[int, int] | None
) -> None:
    body = {name: value for name, value in BODIES["/generate"].items() if name != "rid"}
    content = bytearray(msgpack.packb(body | packable({"input_ids": [prompt, prompt]} | fields)))
    if mutation is not None:
        content[mutation[0] % len(content)] = mutation[1]
    status, answer = post(engine, "/generate", bytes(content), **{"Content-Type": FRAMES})
    assert status in (200, 400), (content, answer)
    assert_generates(engine)


def packable(value: Any) -> Any:
    """`value` without what msgpack cannot hold."""
    if isinstance(value, dict):
        return {packable(key): packable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [packable(inner) for inner in value]
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    return value % (1 << 63) if type(value) is int else value


def test_mutated_requests_do_not_harm_an_engine(engine: Engine) -> None:
    rng = random.Random(0)
    statuses: Counter[bytes] = Counter()
    host, port = urlsplit(engine.url).netloc.split(":")
    for _ in range(150):
        path = rng.choice(sorted(BODIES))
        raw = bytearray(_raw_request(engine, path))
        for _ in range(rng.choice([1, 1, 2, 8])):
            raw[rng.randrange(len(raw))] = rng.choice([rng.randrange(32, 127), rng.randrange(256)])
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(raw)
            with contextlib.suppress(OSError):  # the engine has closed it already
                connection.shutdown(socket.SHUT_WR)
            statuses[_read_all(connection)[9:12]] += 1
    assert {b"400", b"401"} <= set(statuses), statuses
    assert_generates(engine)


def _raw_request(engine: Engine, path: str) -> bytes:
    content = json.dumps(BODIES[path]).encode()
    head = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(engine.url).netloc}", "Connection: close"]
    head += [
        f"Content-Length: {len(content)}",
        *(f"{name}: {value}" for name, value in engine.headers.items()),
    ]
    return "\r\n".join([*head, "", ""]).encode() + content


def _read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(1 << 16):
            received += chunk
    except ConnectionError:
        pass
    return received
