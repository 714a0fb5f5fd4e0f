"""The endpoints of a session that sample: /v1/chat/completions, /v1/completions and /inference/v1/generate.

The last two take prompts that the client rendered itself. A prompt whose token ids start with all tokens
through the end of an earlier turn continues that turn's segment. Any other prompt starts a new segment,
including a text that is tokenized differently from how the policy sampled it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from areal_like.chat.openai import ChatRequest, ChatRules, model_object, parse_chat
from areal_like.http.bodies import parse_bounded_object
from rollout_server.conversation.turns import SampledTurn
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.calls import Call
from rollout_server.sessions.http.call_response import CallResponse, begin_call, session_of
from rollout_server.sessions.http.requests import CompletionRequest, parse_completion, parse_tokens
from rollout_server.sessions.http.responses import chat_body, completion_body, tokens_body
from rollout_server.sessions.open_session import OpenSession

R = TypeVar("R", ChatRequest, CompletionRequest)


@dataclass(frozen=True, kw_only=True)
class ModelRoutes:
    """The handlers of these endpoints. They raise UserError and SessionGoneError."""

    book: SessionBook
    rules: ChatRules
    max_context: int
    """Longest sequence in tokens."""
    keep_alive_s: float
    on_ignored: Callable[[str], None]
    """Counts a field that has no effect."""

    async def models(self, request: Request) -> Response:
        session_of(request, self.book).hear()
        return JSONResponse({"object": "list", "data": [self._described(self.rules.default_model)]})

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME: the policy, whatever the name is, because requests may use any name."""
        session_of(request, self.book).hear()
        return JSONResponse(self._described(request.path_params["name"]))

    async def chat(self, request: Request) -> CallResponse:
        return await self._served(request, parse_chat, _next_turn, chat_body)

    async def complete(self, request: Request) -> CallResponse:
        return await self._served(request, parse_completion, _continuation, completion_body)

    async def generate(self, request: Request) -> CallResponse:
        return await self._served(request, parse_tokens, _continuation, tokens_body)

    async def _served(
        self,
        request: Request,
        parse: Callable[[Mapping[str, Any], ChatRules], R],
        sample: Callable[[OpenSession, R], Coroutine[Any, Any, SampledTurn]],
        write: Callable[..., bytes],
    ) -> CallResponse:
        """Parses a body, samples its turn and writes the response. `write`: one of the functions in
        `responses`."""
        session = session_of(request, self.book)
        conversation, content = session.conversation, await request.body()
        parsed = await conversation.large_work.run(
            lambda: parse(parse_bounded_object(content), self.rules), size=len(content)
        )
        for name in parsed.options.ignored:
            self.on_ignored(name)

        def body_of(call: Call, turn: SampledTurn) -> bytes:
            return write(turn, parsed, id=call.id, created_s=int(time.time()), conversation=conversation)

        call = begin_call(request, session, content, lambda: sample(session, parsed))
        return CallResponse(
            call=call, write=body_of, is_stream=parsed.options.stream, keep_alive_s=self.keep_alive_s
        )

    def _described(self, name: str) -> dict[str, Any]:
        return model_object(name, max_context=self.max_context)


async def _next_turn(session: OpenSession, chat: ChatRequest) -> SampledTurn:
    options = chat.options
    return await session.sample_turn(
        chat.messages, tools=chat.tools, stop=options.stop, max_new_tokens=options.max_new_tokens
    )


async def _continuation(session: OpenSession, request: CompletionRequest) -> SampledTurn:
    """Samples the turn after a prompt; a text is tokenized as is, without a chat template."""
    prompt, conversation = request.prompt, session.conversation
    if isinstance(prompt, str):
        text, tokenizer = prompt, conversation.renderer.tokenizer

        def tokenized() -> list[int]:
            return list(tokenizer(text, add_special_tokens=request.add_special_tokens)["input_ids"])

        prompt = await conversation.large_work.run(tokenized, size=len(text))
    options = request.options
    return await session.continue_tokens(prompt, stop=options.stop, max_new_tokens=options.max_new_tokens)
