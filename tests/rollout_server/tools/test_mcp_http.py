"""MCP servers over HTTP: a good one of the official SDK, and one that misbehaves."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import uvicorn

from areal_like.errors import ToolServerError
from rollout_server.environments.scripted import play
from rollout_server.tools.mcp import MCPServer
from tests.support.certificates import make_certificate
from tests.support.mcp_servers import PATIENT, Asking, answers
from tests.support.ports import held_port
from tests.support.waiting import HANG_LIMIT_S


def web(url: str, **settings: Any) -> MCPServer:
    return MCPServer(server="web", url=url, **{**PATIENT, **settings})


@pytest.mark.parametrize("json_response", [False, True])
def test_a_server_of_the_official_sdk(json_response: bool) -> None:
    from tests.support.mcp_good import server

    app = server.streamable_http_app(json_response=json_response)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        served = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=served.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            contents, episode = answers(
                web(f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"),
                ("add", {"a": 1, "b": 2}),
                ("picture", {}),
                ("unknown", {}),
            )
        finally:
            served.should_exit = True
            thread.join(HANG_LIMIT_S)
    assert contents[:2] == ["3", "Error: the result has content of type image; only text is supported"]
    assert contents[2].startswith('Error: there is no tool "unknown". Tools: add, note')
    assert episode.metrics["tool_server_failures"] == 0


class Misbehaving(BaseHTTPRequestHandler):
    """The path says how a call is answered."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[str]] = []
    keys: ClassVar[set[str | None]] = set()
    elsewhere: ClassVar[str] = ""

    def do_GET(self) -> None:
        self.seen.append("GET")
        self.answer(405)

    def do_DELETE(self) -> None:
        self.seen.append("DELETE")
        self.answer(200)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(request["method"])
        self.keys.add(self.headers.get("Authorization"))
        match request["method"]:
            case "initialize":
                result: Any = {
                    "protocolVersion": "2025-06-18",
                    "capabilities": {"tools": {}},
                    "serverInfo": {"name": "x", "version": "1"},
                }
            case "tools/list":
                result = {"tools": [{"name": "say", "inputSchema": {"type": "object"}}]}
            case "tools/call":
                result = {"content": [{"type": "text", "text": "said"}]}
                if self.misbehaves(request["id"]):
                    return
            case _:
                return self.answer(202)
        self.answer(200, self.message(request["id"], result), Mcp_Session_Id="s1")

    def misbehaves(self, number: int) -> bool:
        """Answers a call; False if it should be answered as it should be."""
        match self.path:
            case "/elsewhere":
                self.answer(307, Location=self.elsewhere)
            case "/moved":
                self.answer(307, Location="/")
            case "/huge":
                text = {"content": [{"type": "text", "text": "x" * (3 << 20)}]}
                self.answer(200, self.message(number, text))
            case "/packed":
                self.answer(200, b"x", Content_Encoding="gzip")
            case "/gone":
                self.answer(404)
            case "/html":
                self.answer(200, b"<html>")
            case "/endless":
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                while True:
                    self.wfile.write(b"event: news\nid: 3\nretry: 1\ndata: x\n\n" * 100)
            case "/stall":
                threading.Event().wait(0.6)
            case _:
                return False
        return True

    @staticmethod
    def message(number: int, result: Any) -> bytes:
        return json.dumps({"jsonrpc": "2.0", "id": number, "result": result}).encode()

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, address: Any) -> None:
        """The client closes connections in the middle of a response."""


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with Quiet(("127.0.0.1", 0), Misbehaving) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/elsewhere", "it responded with a redirect (HTTP 307), which is not followed"),
        ("/moved", "it responded with a redirect (HTTP 307), which is not followed"),
        ("/huge", "it sent more than max_response_bytes=1048576 for one request"),
        ("/packed", "it sent a body with content-encoding gzip"),
        ("/gone", "it responded with HTTP 404"),
        ("/html", "its response is not valid"),
        ("/endless", "it sent more than max_response_bytes=1048576 for one request"),
    ],
)
def test_what_a_server_does_in_a_call(service: str, path: str, content: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        Misbehaving.elsewhere = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/"
        contents, episode = answers(web(service + path), ("say", {}), ("say", {}))
        with pytest.raises(BlockingIOError):  # nothing has connected
            elsewhere.accept()
    failed = (
        f"Error: the server of this tool failed ({content}); the next call starts it again, without its state"
    )
    assert contents == [failed, failed] and episode.metrics["tool_server_failures"] == 2


def test_a_server_that_stalls(service: str) -> None:
    contents, episode = answers(web(f"{service}/stall", timeout_s=0.2), ("say", {}))
    assert contents == ["Error: no result within 0.2 s"]
    assert episode.metrics["tool_server_failures"] == 1


def test_keys_and_proxies(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("KEY_OF_THE_TEST", "secret")
    Misbehaving.seen.clear()
    Misbehaving.keys.clear()
    contents, _ = answers(web(f"{service}/", key_variable="KEY_OF_THE_TEST"), ("say", {}))
    assert contents == ["said"] and Misbehaving.keys == {"Bearer secret"}
    assert Misbehaving.seen == [
        "initialize",
        "notifications/initialized",
        "tools/list",
        "tools/call",
        "DELETE",
    ]


def test_certificates_are_verified(tmp_path: Path) -> None:
    certificate, private_key = make_certificate(tmp_path, "server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, private_key)
    with Quiet(("127.0.0.1", 0), Misbehaving) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ToolServerError, match="CERTIFICATE_VERIFY_FAILED"):
            play(Asking("", [web(f"https://localhost:{server.server_port}/")]), [])
        server.shutdown()


def test_nobody_listens() -> None:
    with (
        held_port() as port,
        pytest.raises(ToolServerError, match="MCP server web: the connection failed: ConnectError"),
    ):
        play(Asking("", [web(f"http://127.0.0.1:{port}/")]), [])
