"""The endpoints of a session that sample: /v1/chat/completions, /v1/completions and /inference/v1/generate.

The last two take prompts that the client has rendered itself. A prompt whose token ids begin with all those
up to and of an earlier turn continues its segment. Any other prompt begins a new one; so does a text whose
tokens are other ones than the policy has sampled for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from areal_like.chat.openai import ChatRules, RequestOptions, model_object, parse_chat
from areal_like.http.bodies import parse_bounded_object
from rollout_server.sample.conversation import Conversation
from rollout_server.sample.turns import Answer
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.calls import Call
from rollout_server.sessions.http.call_response import CallResponse, WriteBody, begin_call, session_of
from rollout_server.sessions.http.requests import CompletionRequest, parse_completion, parse_tokens
from rollout_server.sessions.http.responses import chat_body, completion_body, tokens_body
from rollout_server.sessions.open_session import OpenSession

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ModelRoutes:
    """The endpoints. They raise UserError and SessionGoneError."""

    book: SessionBook
    rules: ChatRules
    max_context: int
    """Longest sequence in tokens."""
    keep_alive_s: float
    on_ignored: Callable[[str], None]
    """Counts a field that has no effect."""

    async def models(self, request: Request) -> Response:
        """/v1/models: the policy."""
        session_of(request, self.book).hear()
        return JSONResponse({"object": "list", "data": [self._described(self.rules.default_model)]})

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME: the policy, whatever the name is, as requests may have any."""
        session_of(request, self.book).hear()
        return JSONResponse(self._described(request.path_params["name"]))

    async def chat(self, request: Request) -> CallResponse:
        """/v1/chat/completions."""
        session, content, chat = await self._read(request, parse_chat)

        def write(call: Call, turn: Answer) -> bytes:
            decode = session.conversation.decode
            return chat_body(turn, chat, id=call.id, created_s=int(time.time()), decode=decode)

        def ask() -> Coroutine[Any, Any, Answer]:
            options = chat.options
            return session.answer(
                chat.messages, tools=chat.tools, stop=options.stop, max_new_tokens=options.max_new_tokens
            )

        return self._response(request, session, content, chat.options, ask, write)

    async def complete(self, request: Request) -> CallResponse:
        """/v1/completions."""
        session, content, completion = await self._read(request, parse_completion)
        conversation, options = session.conversation, completion.options

        def write(call: Call, turn: Answer) -> bytes:
            text = conversation.renderer.decode(turn.token_ids.tolist(), skip_special_tokens=True)
            now_s, decode = int(time.time()), conversation.decode
            return completion_body(turn, completion, id=call.id, created_s=now_s, text=text, decode=decode)

        async def ask() -> Answer:
            prompt = await _prompt_of(completion, conversation)
            return await session.continue_tokens(
                prompt, stop=options.stop, max_new_tokens=options.max_new_tokens
            )

        return self._response(request, session, content, options, ask, write)

    async def generate(self, request: Request) -> CallResponse:
        """/inference/v1/generate."""
        session, content, asked = await self._read(request, parse_tokens)

        def ask() -> Coroutine[Any, Any, Answer]:
            return session.continue_tokens(
                asked.token_ids, stop=asked.options.stop, max_new_tokens=asked.options.max_new_tokens
            )

        def write(call: Call, turn: Answer) -> bytes:
            return tokens_body(turn, id=call.id)

        return self._response(request, session, content, asked.options, ask, write)

    async def _read(
        self, request: Request, parse: Callable[[Mapping[str, Any], ChatRules], T]
    ) -> tuple[OpenSession, bytes, T]:
        session = session_of(request, self.book)
        content = await request.body()
        parsed = await session.conversation.large_work.run(
            lambda: parse(parse_bounded_object(content), self.rules), size=len(content)
        )
        return session, content, parsed

    def _response(
        self,
        request: Request,
        session: OpenSession,
        content: bytes,
        options: RequestOptions,
        ask: Callable[[], Coroutine[Any, Any, Answer]],
        write: WriteBody,
    ) -> CallResponse:
        for name in options.ignored:
            self.on_ignored(name)
        call = begin_call(request, session, content, ask)
        return CallResponse(call, write, is_stream=options.stream, keep_alive_s=self.keep_alive_s)

    def _described(self, name: str) -> dict[str, Any]:
        return model_object(name, max_context=self.max_context)


async def _prompt_of(request: CompletionRequest, conversation: Conversation) -> list[int]:
    """The prompt; a text is tokenized as it is, without a chat template."""
    prompt, tokenizer = request.prompt, conversation.renderer.tokenizer
    if not isinstance(prompt, str):
        return prompt

    def tokenized() -> list[int]:
        return list(tokenizer(prompt, add_special_tokens=request.add_special_tokens)["input_ids"])

    return await conversation.large_work.run(tokenized, size=len(prompt))
