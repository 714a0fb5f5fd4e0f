"""/v1/completions and /inference/v1/generate of a session: prompts that the client has rendered itself.

A prompt whose token ids begin with all those up to and of an earlier turn continues its segment. Any other
prompt begins a new one; so does a text whose tokens are other ones than the policy has sampled for it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from starlette.requests import Request

from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.turns import Answer
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.calls import Call
from rollout_server.sessions.http.answering import CallResponse, begin_call, parse_json, session_of
from rollout_server.sessions.http.chat_request import RequestOptions
from rollout_server.sessions.http.token_answers import (
    completion_events,
    completion_object,
    generate_object,
)
from rollout_server.sessions.http.token_requests import CompletionRequest, parse_completion, parse_generate
from rollout_server.sessions.open_session import OpenSession


@dataclass(frozen=True, kw_only=True)
class TokenRoutes:
    """The endpoints."""

    book: SessionBook
    model: str
    """Its name in answers."""
    keep_alive_s: float
    on_ignored: Callable[[str], None]
    """Counts a field that has no effect."""

    async def complete(self, request: Request) -> CallResponse:
        """/v1/completions. Raises UserError, SessionGoneError."""
        session = session_of(request, self.book)
        content = await request.body()
        conversation = session.conversation
        completion = await conversation.large_work.run(
            lambda: parse_completion(parse_json(content), default_model=self.model), size=len(content)
        )
        options = completion.options
        call = self._begin(request, session, content, options, lambda: _prompt_of(completion, conversation))
        write = completion_events if options.stream else completion_object

        def written(call: Call, answer: Answer) -> bytes:
            text = conversation.renderer.decode(answer.token_ids.tolist(), skip_special_tokens=True)
            now_s, decode = int(time.time()), conversation.decode
            return write(answer, completion, id=call.id, created_s=now_s, text=text, decode=decode)

        return CallResponse(call, written, is_stream=options.stream, keep_alive_s=self.keep_alive_s)

    async def generate(self, request: Request) -> CallResponse:
        """/inference/v1/generate, as the train client of verifiers uses it. Raises UserError,
        SessionGoneError."""
        session = session_of(request, self.book)
        content = await request.body()
        generate = await session.conversation.large_work.run(
            lambda: parse_generate(parse_json(content), default_model=self.model), size=len(content)
        )

        async def prompt() -> list[int]:
            return generate.token_ids

        call = self._begin(request, session, content, generate.options, prompt)
        return CallResponse(call, lambda call, answer: generate_object(answer, id=call.id), is_stream=False)

    def _begin(
        self,
        request: Request,
        session: OpenSession,
        content: bytes,
        options: RequestOptions,
        prompt: Callable[[], Awaitable[list[int]]],
    ) -> Call:
        async def ask() -> Answer:
            return await session.continue_tokens(
                await prompt(), stop=options.stop, max_new_tokens=options.max_new_tokens
            )

        for name in options.ignored:
            self.on_ignored(name)
        return begin_call(request, session, content, ask)


async def _prompt_of(request: CompletionRequest, conversation: Conversation) -> list[int]:
    """The prompt; a text is tokenized as it is, without a chat template."""
    prompt, tokenizer = request.prompt, conversation.renderer.tokenizer
    if not isinstance(prompt, str):
        return prompt

    def tokenized() -> list[int]:
        return list(tokenizer(prompt, add_special_tokens=request.add_special_tokens)["input_ids"])

    return await conversation.large_work.run(tokenized, size=len(prompt))
