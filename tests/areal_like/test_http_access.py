"""Attacks on a daemon's HTTP server over real connections, with keys and without."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from areal_like.http.access import AccessRules, Reason, host_names, single_key
from areal_like.runtime import daemon as daemon_runtime
from areal_like.security.administration import revoke_key
from tests.support.daemon_process import DaemonProcess
from tests.support.keys import make_keys

HUGE = 300_000_000


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """A daemon without keys."""
    daemon = DaemonProcess(tmp_path_factory.mktemp("open"), "serve", "security.allowed_hosts=[gpu7.cluster]")
    daemon.wait_ready()
    yield daemon
    assert daemon.process.poll() is None, "an attack has ended the daemon"
    daemon.close()


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A daemon with keys, its directory of keys, and the tokens by role."""
    root = tmp_path_factory.mktemp("keyed")
    tokens = make_keys(root / "keys")
    daemon = DaemonProcess(root, "serve", f"security.keys={root}/keys")
    daemon.wait_ready()
    yield SimpleNamespace(daemon=daemon, keys=root / "keys", tokens=tokens)
    assert daemon.process.poll() is None, "an attack has ended the daemon"
    daemon.close()


def refused(daemon: DaemonProcess, reason: Reason, **headers: str) -> int:
    """How many requests the daemon has refused for a reason."""
    page = daemon.get("/metrics", **headers)[1]
    found = re.search(rf'areal_http_refused_total{{reason="{reason.value}"}} (\d+)', page)
    assert found is not None, page
    return int(found[1])


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_requests_of_a_web_page_are_refused(daemon: DaemonProcess, headers: dict[str, str]) -> None:
    before = refused(daemon, Reason.ORIGIN)
    for path, body in (("/control/drain", b"{}"), ("/status", None), ("/livez", None)):
        assert daemon.get(path, body, **headers)[0] == 403
    assert refused(daemon, Reason.ORIGIN) == before + 3
    assert json.loads(daemon.get("/status")[1])["not_ready"] == ""


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 421),
        ("evil.example:80", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.2", 421),
        ("[::2]:80", 421),
        ("localhost@evil.example", 421),
        ("", 421),
        ("127.0.0.1", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:80", 200),
        ("gpu7.cluster:8000", 200),
    ],
)
def test_only_known_hosts_are_answered(daemon: DaemonProcess, host: str, status: int) -> None:
    assert daemon.get("/status", Host=host)[0] == status
    assert daemon.get("/readyz", Host=host) == (200, "ok")


def test_request_without_host_or_with_two_is_refused(daemon: DaemonProcess) -> None:
    for head in (
        b"GET /status HTTP/1.0\r\n\r\n",
        b"GET /status HTTP/1.1\r\nHost: localhost\r\nHost: x\r\n\r\n",
    ):
        assert talk(daemon.port, head).startswith(b"HTTP/1.1 421")


def test_two_headers_of_a_site_are_a_web_page(daemon: DaemonProcess) -> None:
    site = b"Sec-Fetch-Site: none\r\n"
    head = b"GET /status HTTP/1.1\r\nHost: localhost\r\n" + site + site + b"\r\n"
    assert talk(daemon.port, head).startswith(b"HTTP/1.1 403")


def talk(port: int, sent: bytes) -> bytes:
    """Sends raw bytes; returns all that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(sent)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


def memory_of(daemon: DaemonProcess) -> int:
    """Largest resident memory so far, in bytes."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


@pytest.mark.parametrize("chunked", [False, True])
def test_huge_body_costs_nothing(daemon: DaemonProcess, chunked: bool) -> None:
    before, num_sent = memory_of(daemon), 0
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port)
    connection.putrequest("POST", "/control/drain")
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
    else:
        connection.putheader("Content-Length", str(HUGE))
    connection.endheaders()
    piece = b" " * (1 << 20)
    try:
        while num_sent < HUGE:
            connection.send(b"100000\r\n" + piece + b"\r\n" if chunked else piece)
            num_sent += len(piece)
        raise AssertionError("the whole body was accepted")
    except (ConnectionError, TimeoutError):
        assert num_sent < 20 << 20
    connection.close()
    assert memory_of(daemon) - before < 16 << 20
    head = b"POST /control/drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\n"
    assert talk(daemon.port, head).startswith(b"HTTP/1.1 413")
    assert json.loads(daemon.get("/status")[1])["not_ready"] == ""


def test_deeply_nested_body_is_a_400(daemon: DaemonProcess) -> None:
    status, text = daemon.get("/control/double", b'{"n":' + b"[" * 500_000)
    assert status == 400 and "nested" in text


def test_token_is_needed_for_all_but_the_probes(keyed: SimpleNamespace) -> None:
    daemon = keyed.daemon
    assert daemon.get("/livez") == daemon.get("/readyz") == (200, "ok")
    for path in ("/status", "/metrics", "/metrics/engine", "/control/double", "/nope"):
        for authorization in (
            "",
            "Bearer",
            "Bearer x",
            f"Basic {keyed.tokens['operator']}",
            keyed.tokens["operator"],
        ):
            assert daemon.get(path, Authorization=authorization)[0] == 401, (path, authorization)
    assert daemon.get("/control/drain", b"{}")[0] == 401
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port)
    connection.request("GET", "/status")
    assert connection.getresponse().getheader("WWW-Authenticate") == "Bearer"
    connection.close()


def test_only_the_operator_may_change_something(keyed: SimpleNamespace) -> None:
    for role, token in keyed.tokens.items():
        bearer = f"Bearer {token}"
        if role in ("agent", "scorer"):  # they are for sessions and scores only: unknown here
            assert keyed.daemon.get("/status", Authorization=bearer)[0] == 401
            assert keyed.daemon.get("/control/double", b"{}", Authorization=bearer)[0] == 401
            continue
        assert keyed.daemon.get("/status", Authorization=bearer)[0] == 200
        wanted = (200, '{"n":8}') if role == "operator" else (403,)
        assert keyed.daemon.get("/control/double", b'{"n": 4}', Authorization=bearer)[: len(wanted)] == wanted
    operator = f"Bearer {keyed.tokens['operator']}"
    assert refused(keyed.daemon, Reason.ROLE, Authorization=operator) == len(keyed.tokens) - 3
    assert keyed.daemon.get("/status", Authorization=operator, Host="evil.example")[0] == 421
    assert keyed.daemon.get("/status", Authorization=operator, Origin="http://127.0.0.1")[0] == 403


def test_revoked_token_is_refused_within_5_s(keyed: SimpleNamespace) -> None:
    bearer = {"Authorization": f"Bearer {keyed.tokens['monitor']}"}
    operator = {"Authorization": f"Bearer {keyed.tokens['operator']}"}
    connection = http.client.HTTPConnection("127.0.0.1", keyed.daemon.port)

    def status_of(headers: dict[str, str]) -> int:
        """On the connection that was opened before."""
        connection.request("GET", "/status", headers=headers)
        response = connection.getresponse()
        response.read()
        return response.status

    assert status_of(bearer) == 200
    revoke_key(keyed.keys, "monitor")
    assert daemon_runtime._READ_KEYS_S < 5
    while status_of(bearer) == 200:
        time.sleep(0.1)
    assert status_of(operator) == 200
    public = (keyed.keys / "public.json").read_text()
    (keyed.keys / "public.json").write_text("{")  # a broken list changes nothing
    time.sleep(1.3)
    assert status_of(operator) == 200 and status_of(bearer) == 401
    (keyed.keys / "public.json").write_text(public)
    connection.close()


def test_daemon_with_an_absent_directory_of_keys_does_not_start(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, "serve", f"security.keys={tmp_path}/nowhere")
    _, stderr = daemon.process.communicate()
    assert daemon.process.returncode == 2 and f"areal-like keys init {tmp_path}/nowhere" in stderr


def test_server_of_all_addresses_answers_to_its_own_names() -> None:
    rules = AccessRules(hosts=host_names("0.0.0.0", others=["gpu7"]), role_of=single_key("secret"))

    def status_of(host: str, *more: tuple[bytes, bytes]) -> int:
        refusal = rules.refusal(
            {
                "path": "/status",
                "method": "GET",
                "server": ("10.0.0.7", 80),
                "headers": [(b"host", host.encode()), *more],
            }
        )
        return 200 if refusal is None else refusal.status

    key = (b"authorization", b"bearer secret")
    for host in ("10.0.0.7:80", "GPU7", socket.gethostname(), "localhost"):
        assert status_of(host, key) == 200
        assert status_of(host) == status_of(host, (b"authorization", b"Bearer secre")) == 401
        assert status_of(host, key, key) == 401
        assert status_of(host, key, (b"x", b"y" * 70_000)) == 431
    assert status_of("10.0.0.8", key) == status_of("evil.example", key) == 421
