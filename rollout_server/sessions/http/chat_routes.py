"""/v1/chat/completions and /v1/models of a session."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rollout_server.conversation.turns import Answer
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.calls import Call
from rollout_server.sessions.http.answering import CallResponse, begin_call, parse_json, session_of
from rollout_server.sessions.http.chat_answer import chat_events, chat_object
from rollout_server.sessions.http.chat_request import parse_chat


class ChatRoutes:
    """The endpoints."""

    def __init__(
        self,
        book: SessionBook,
        *,
        model: str,
        max_context: int,
        keep_alive_s: float,
        on_ignored: Callable[[str], None],
    ) -> None:
        self._book = book
        self._model = model
        self._max_context = max_context
        self._keep_alive_s = keep_alive_s
        self._on_ignored = on_ignored

    async def models(self, request: Request) -> Response:
        """/v1/models: the policy."""
        session_of(request, self._book).hear()
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME: the policy, whatever the name is, as requests may have any."""
        session_of(request, self._book).hear()
        return JSONResponse({**self._described(), "id": request.path_params["name"]})

    async def complete(self, request: Request) -> CallResponse:
        """/v1/chat/completions. Raises UserError, SessionGoneError."""
        session = session_of(request, self._book)
        content = await request.body()
        chat = await session.conversation.large_work.run(
            lambda: parse_chat(parse_json(content), default_model=self._model), size=len(content)
        )
        for name in chat.options.ignored:
            self._on_ignored(name)
        call = begin_call(
            request,
            session,
            content,
            lambda: session.answer(
                chat.messages,
                tools=chat.tools,
                stop=chat.options.stop,
                max_new_tokens=chat.options.max_new_tokens,
            ),
        )
        write = chat_events if chat.options.stream else chat_object

        def written(call: Call, answer: Answer) -> bytes:
            decode = session.conversation.decode
            return write(answer, chat, id=call.id, created_s=int(time.time()), decode=decode)

        return CallResponse(call, written, is_stream=chat.options.stream, keep_alive_s=self._keep_alive_s)

    def _described(self) -> dict[str, str | int]:
        return {
            "id": self._model,
            "object": "model",
            "created": 0,
            "owned_by": "areal-like",
            "max_model_len": self._max_context,
        }
