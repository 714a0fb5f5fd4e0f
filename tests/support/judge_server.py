"""A real HTTP server that answers as a judge, or fails in a given way."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rollout_server.rewards.library import Rewards
from rollout_server.rewards.library.judge import Judge
from rollout_server.rewards.library.model import ModelReward


@dataclass
class Answer:
    """What the server does with one request."""

    text: str = 'Good.\n{"score": 7}'
    """Content of the message."""
    status: int = 200
    body: bytes | None = None
    """Sent instead of a chat completion."""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    breaks: bool = False
    """The connection ends in the middle of the answer."""
    endless: bool = False
    """The answer does not end."""


@dataclass
class JudgeServer:
    """Requests and answers. The last answer is repeated."""

    answers: list[Answer]
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    """Requests that were open at the same time."""
    pages: dict[str, Any] = field(default_factory=dict)
    """Path -> its JSON, for GET; every other path has status 404."""


def completion(text: str) -> bytes:
    """A chat completion in OpenAI's format."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


@contextmanager
def judge_server(*answers: Answer, reply: Callable[[str], str] | None = None) -> Iterator[JudgeServer]:
    """A server in threads of its own. `reply`: the text of an answer, from the request's last message."""
    server = JudgeServer(list(answers) or [Answer()])
    lock = threading.Lock()
    ended = threading.Event()
    num_open = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal num_open
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(server.requests)
                server.requests.append({"path": self.path, **body})
                server.headers.append(dict(self.headers))
                num_open += 1
                server.most_at_once = max(server.most_at_once, num_open)
            answer = server.answers[min(number, len(server.answers) - 1)]
            ended.wait(answer.delay_s)
            # Before the answer: the client may send its next request as soon as it has that.
            with lock:
                num_open -= 1
            try:
                self._send(answer, reply(body["messages"][-1]["content"]) if reply else answer.text)
            except OSError:  # the client has gone
                self.close_connection = True

        def do_GET(self) -> None:
            page = server.pages.get(self.path)
            body = json.dumps(page).encode()
            self._send(Answer(body=body, status=404 if page is None else 200), "")

        def _send(self, answer: Answer, text: str) -> None:
            content = completion(text) if answer.body is None else answer.body
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.endless:
                self.end_headers()
                while not ended.is_set():
                    self.wfile.write(b"x" * 65536)
                return
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if answer.breaks:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: Any) -> None:
            pass

    http = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        ended.set()
        http.shutdown()
        thread.join()
        http.server_close()


def run_closed(rewards: Rewards, body: Callable[[], Any]) -> Any:
    """Runs a coroutine function and closes the services' connections in the same loop."""

    async def main() -> Any:
        try:
            return await body()
        finally:
            for function in rewards.functions.values():
                if isinstance(function, Judge | ModelReward):
                    await function.close()

    return asyncio.run(main())
