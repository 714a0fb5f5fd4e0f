"""A real HTTP server of sessions in a thread; its policy says what a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from areal_like.errors import EngineTimeoutError
from areal_like.http.access import AccessRules, host_names
from areal_like.http.guard import BodyLimits, HttpGuard
from areal_like.http.server import HttpConfig, HttpServer
from areal_like.trajectory import FinishReason
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.policy.generation import Generation, Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.rendering.jinja import JinjaRenderer
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.app import session_app
from rollout_server.sessions.open_session import OpenSession
from rollout_server.tasks.base import Example
from tests.support.chat_models import APPENDING, jinja_renderer, tokens_in
from tests.support.moved_clock import MovedLoop, advance
from tests.support.waiting import HANG_LIMIT_S

Result = TypeVar("Result")
MAX_CONTEXT = 4096


class SayingPolicy:
    """Says the next text, one character a token, and an end of turn unless it ends with a backslash."""

    cache_salt = ""

    def __init__(self, renderer: JinjaRenderer) -> None:
        self.renderer = renderer
        self.texts: list[str] = []
        """Of the next requests; empty: `ok`."""
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []
        self.open = threading.Event()
        """Requests are answered while it is set."""
        self.open.set()
        self.fails = False

    async def generate(self, input_ids: Sequence[int], *, sampling: Sampling, **options: Any) -> Generation:
        """As an engine's."""
        self.prompts.append(list(input_ids))
        self.samplings.append(sampling)
        text = self.texts.pop(0) if self.texts else "ok"
        while not self.open.is_set():
            await asyncio.sleep(0.01)
        if self.fails:
            raise EngineTimeoutError("the engine said nothing")
        ids = tokens_in(self.renderer, text.removesuffix("\\"))
        if not text.endswith("\\"):
            ids.append(self.renderer.stop_token_ids[0])
        reason = FinishReason.LENGTH if len(ids) > sampling.max_new_tokens else FinishReason.STOP
        ids = ids[: sampling.max_new_tokens]
        first = len(input_ids)
        return Generation(
            output_ids=np.array(ids, np.int32),
            logprobs=-np.arange(first, first + len(ids)).astype(np.float32),
            versions=np.zeros(len(ids), np.int32),
            finish_reason=reason,
        )


class SessionServer:
    """The server, from another thread's point of view."""

    def __init__(self, *, keep_alive_s: float = 5.0, max_turns: int = 64) -> None:
        self.renderer = jinja_renderer(APPENDING)
        self.policy = SayingPolicy(self.renderer)
        self.sessions: list[OpenSession] = []
        self._max_turns = max_turns
        self._keep_alive_s = keep_alive_s
        self._loop = MovedLoop()
        self.book = SessionBook()
        self.port = 0

    @property
    def url(self) -> str:
        """Of the server."""
        return f"http://127.0.0.1:{self.port}"

    def base_url(self, session: OpenSession) -> str:
        """Of a session, for clients of OpenAI's API."""
        return f"{self.url}/sessions/{session.id}/v1"

    def add(
        self,
        *,
        example: Example | None = None,
        max_new_tokens: int = 256,
        group: int | None = None,
        needs_reward: bool = False,
    ) -> OpenSession:
        """A session; with an example, one that waits for an agent. `group`: its own if it is None."""

        def make() -> OpenSession:
            policy = PolicyClient(
                self.policy,
                sampling=Sampling(max_new_tokens=max_new_tokens, sampling_seed=1),
                rid="1",
                gate=GenerationGate(),
            )
            number = len(self.sessions)
            session = OpenSession(
                id=f"{number}-0-{number}",
                api_key=f"key-{number}",
                conversation=Conversation(
                    self.renderer, policy, context_tokens=MAX_CONTEXT, max_tokens=MAX_CONTEXT
                ),
                max_turns=self._max_turns,
                group=number if group is None else group,
                sample=0 if group is None else number,
                split="train",
                index=number if group is None else group,
                example=example,
                is_waiting=example is not None,
                needs_reward=needs_reward,
            )
            self.sessions.append(session)
            self.book.add(session)
            return session

        return self.call(make)

    def call(self, function: Callable[[], Result]) -> Result:
        """Runs a function in the server's loop."""

        async def called() -> Result:
            return function()

        return self.run(called())

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def advance(self, seconds: float) -> None:
        """Moves the clock of the server's loop."""
        self.call(lambda: advance(seconds))

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until it is true in the server's loop."""

        async def poll() -> None:
            while not condition():
                await asyncio.sleep(0.01)

        self.run(poll())

    @contextlib.contextmanager
    def serving(self) -> Iterator[SessionServer]:
        """Until the end of the block."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        app = session_app(
            self.book,
            model="policy",
            max_context=MAX_CONTEXT,
            idle_timeout_s=500.0,
            sample_timeout_s=600.0,
            keep_alive_s=self._keep_alive_s,
        )
        guard = HttpGuard(
            app,
            AccessRules(hosts=host_names("127.0.0.1"), role_of=None),
            limits=BodyLimits(max_bytes=1 << 20, timeout_s=HANG_LIMIT_S),
        )
        server = HttpServer(HttpConfig(guard, max_connections=200, shutdown_s=1))
        thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        thread.start()
        serving = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), self._loop)
        try:
            yield self
        finally:
            self.policy.open.set()
            server.should_exit = True
            serving.result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()
