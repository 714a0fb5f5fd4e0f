"""The endpoints of sessions as one ASGI application. Keys and body sizes are checked before it (rules.py).

/v1/completions and /inference/v1/generate take prompts that the client rendered itself. A prompt whose token
ids start with all tokens through the end of an earlier turn continues that turn's segment. Any other prompt
starts a new segment, including a text that is tokenized differently from how the policy sampled it.

Every refusal has the format of the client's API, including that of a path that does not exist.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from areal_like.chat.anthropic import MessageRequest, parse_count, parse_message
from areal_like.chat.openai import ChatRequest, ChatRules, model_object, parse_chat
from areal_like.chat.responses import (
    ItemReference,
    ResponsesRequest,
    bare_id,
    input_items,
    item_page,
    page_of,
    parse_responses,
)
from areal_like.errors import ArealError
from areal_like.http.bodies import ParamError, parse_bounded_object
from areal_like.trajectory import FinishReason
from rollout_server.conversation.turns import SampledTurn
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.call_response import KEEP_ALIVE_S, CallResponse, begin_call, session_of
from rollout_server.sessions.http.claims import ClaimRoutes
from rollout_server.sessions.http.errors import (
    NoResponseError,
    UnknownResponseError,
    described,
    error_response,
)
from rollout_server.sessions.http.formats import (
    CompletionRequest,
    chat_body,
    completion_body,
    messages_body,
    messages_failure,
    openai_failure,
    parse_completion,
    parse_tokens,
    responses_body,
    responses_failure,
    session_rules,
    tokens_body,
)
from rollout_server.sessions.http.groups import GroupRoutes
from rollout_server.sessions.http.rewards import parse_reward
from rollout_server.sessions.kept_responses import KeptResponse
from rollout_server.sessions.open_session import Call, OpenSession

R = TypeVar("R", ChatRequest, CompletionRequest, ResponsesRequest, MessageRequest)
_FIRST_ERROR = 400
_THERE = (
    "there are chat/completions, completions, responses, responses/input_tokens, responses/RESPONSE, "
    "responses/RESPONSE/input_items, messages, messages/count_tokens, models, reward, heartbeat and end "
    "under /sessions/ID/v1, and /sessions/ID/inference/v1/generate"
)


def session_app(
    book: SessionBook,
    *,
    model: str,
    max_context: int,
    idle_timeout_s: float,
    sample_timeout_s: float | None = None,
    advertise_host: str = "",
    keep_alive_s: float = KEEP_ALIVE_S,
    elsewhere: Callable[[ASGIApp], ASGIApp] | None = None,
    has_routers: bool = False,
) -> ASGIApp:
    """Builds the application. `model`: the model's name in responses. `max_context`: longest sequence in
    tokens. `sample_timeout_s`, `idle_timeout_s`: time limits of a session, told to external agents.
    `advertise_host`: host in their base URL; empty: the one by which they reached the server. `elsewhere`:
    wraps the application to respond for sessions that this server does not have; None: there are none.
    `has_routers`: claims may come through routers."""
    claims = ClaimRoutes(
        book=book,
        advertise_host=advertise_host,
        sample_timeout_s=sample_timeout_s,
        idle_timeout_s=idle_timeout_s,
        has_routers=has_routers,
    )
    one = _SessionRoutes(
        book=book, rules=session_rules(model), max_context=max_context, keep_alive_s=keep_alive_s
    )
    group = GroupRoutes(book=book)
    session = "/sessions/{id}"
    routes = [
        Route(f"{session}/v1/chat/completions", one.chat, methods=["POST"]),
        Route(f"{session}/v1/completions", one.complete, methods=["POST"]),
        Route(f"{session}/v1/responses", one.respond, methods=["POST"]),
        Route(f"{session}/v1/responses/input_tokens", one.count_input, methods=["POST"]),
        Route(f"{session}/v1/responses/{{response_id}}", one.response, methods=["GET"]),
        Route(f"{session}/v1/responses/{{response_id}}", one.delete_response, methods=["DELETE"]),
        Route(f"{session}/v1/responses/{{response_id}}/input_items", one.input_items, methods=["GET"]),
        # Vercel's provider for Anthropic takes ANTHROPIC_BASE_URL with /v1, all other clients without it.
        *(Route(f"{session}{v1}/messages", one.message, methods=["POST"]) for v1 in ("", "/v1")),
        *(
            Route(f"{session}{v1}/messages/count_tokens", one.count_message, methods=["POST"])
            for v1 in ("", "/v1")
        ),
        Route(f"{session}/inference/v1/generate", one.generate, methods=["POST"]),
        Route(f"{session}/v1/models", one.models, methods=["GET"]),
        Route(f"{session}/v1/models/{{name:path}}", one.model, methods=["GET"]),
        *(
            Route(f"{session}{v1}{of}/{name}", endpoint, methods=["POST"])
            for of, to in (("", one), ("/group", group))
            for name, endpoint in (("reward", to.reward), ("heartbeat", to.heartbeat), ("end", to.end))
            for v1 in ("", "/v1")
        ),
        Route("/sessions", claims.claim, methods=["POST"]),
        Route("/sessions", claims.counts, methods=["GET"]),
    ]

    async def refused(request: Request, error: Exception) -> Response:
        _, found, rest = request.url.path.partition("/sessions/")
        id, has_route, route = rest.partition("/")
        if found and has_route:
            book.note_wrong_route(id, f"{request.method} /{route}")
        return await _refused(request, error)

    app = Starlette(
        routes=routes, exception_handlers={ArealError: _failed, HTTPException: refused, Exception: _broken}
    )
    app.router.redirect_slashes = False  # a redirect would not have the error format
    return _counted(app if elsewhere is None else elsewhere(app), book)


def _counted(app: ASGIApp, book: SessionBook) -> ASGIApp:
    """Wraps the application to count its refusals. (`SessionPlane.on_refused` counts those before it.)"""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= _FIRST_ERROR:
                book.num_refused[message["status"]] += 1
            await send(message)

        await app(scope, receive, sent)

    return call


@dataclass(frozen=True, kw_only=True)
class _SessionRoutes:
    """The endpoints of a session: the policy, and the session's reward, heartbeat and end, which may be
    repeated. They raise UserError and SessionGoneError."""

    book: SessionBook
    rules: ChatRules
    max_context: int
    """Longest sequence in tokens."""
    keep_alive_s: float

    async def models(self, request: Request) -> Response:
        session_of(request, self.book).hear()
        return JSONResponse({"object": "list", "data": [self._described(self.rules.default_model)]})

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME: the policy, whatever the name is, because requests may use any name."""
        session_of(request, self.book).hear()
        return JSONResponse(self._described(request.path_params["name"]))

    async def chat(self, request: Request) -> CallResponse:
        return await self._served(request, parse_chat, _next_turn, chat_body)

    async def respond(self, request: Request) -> CallResponse:
        kept = session_of(request, self.book).kept

        def write(
            turn: SampledTurn, parsed: ResponsesRequest, *, id: str, created_s: int, **options: Any
        ) -> bytes:
            if parsed.is_stored and turn.turn is not None:
                kept.keep(id, KeptResponse.of(turn, parsed, created_s=created_s))
            return responses_body(turn, parsed, id=id, created_s=created_s, **options)

        return await self._served(request, parse_responses, _next_response, write, responses_failure)

    async def response(self, request: Request) -> Response:
        """A kept response, as it was sent."""
        session, id, kept = self._kept_response(request)
        if request.query_params.get("stream", "false") != "false":
            raise ParamError("stream is not supported here: the response is one object", param="stream")
        body = responses_body(
            kept.turn, kept.request, id=id, created_s=kept.created_s, conversation=session.conversation
        )
        return Response(body, media_type="application/json")

    async def delete_response(self, request: Request) -> Response:
        session, id, _ = self._kept_response(request)
        await session.delete_response(id)
        return JSONResponse({"id": f"resp_{id}", "object": "response", "deleted": True})

    async def input_items(self, request: Request) -> Response:
        """The items of the conversation before a kept response, a page of them."""
        session, id, kept = self._kept_response(request)
        page = page_of(request.query_params)

        def write() -> bytes:
            return json.dumps(item_page(input_items(kept.messages[:-1], id=id), page)).encode()

        size = sum(len(message["content"]) for message in kept.messages)
        body = await session.conversation.large_work.run(write, size=size)
        return Response(body, media_type="application/json")

    def _kept_response(self, request: Request) -> tuple[OpenSession, str, KeptResponse]:
        """Returns the session, and the response in the path with its id without prefix; a sign of life.
        Raises UnknownResponseError."""
        session, name = session_of(request, self.book), request.path_params["response_id"]
        session.hear()
        id = bare_id(name) if name.startswith("resp_") else ""
        if (kept := session.kept.find(id)) is None:
            raise UnknownResponseError(f"there is no response {name!r:.100}: {_not_kept(session)}")
        return session, id, kept

    async def message(self, request: Request) -> CallResponse:
        return await self._served(request, parse_message, _next_turn, messages_body, messages_failure)

    async def count_input(self, request: Request) -> Response:
        """OpenAI's count of the tokens of a request."""
        session, parsed = await self._parsed(request, parse_responses)
        num_tokens = await session.count_tokens(_whole_messages(session, parsed), tools=parsed.tools)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": num_tokens})

    async def count_message(self, request: Request) -> Response:
        """Anthropic's count of the tokens of a request."""
        session, parsed = await self._parsed(request, parse_count)
        num_tokens = await session.count_tokens(parsed.messages, tools=parsed.tools)
        return JSONResponse({"input_tokens": num_tokens})

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
        write_failure: Callable[..., bytes] = openai_failure,
    ) -> CallResponse:
        """Parses a body, samples its turn and writes the response (`write`)."""
        session, parsed = await self._parsed(request, parse)
        self.book.num_ignored.update(parsed.options.ignored)

        def body_of(call: Call, turn: SampledTurn) -> bytes:
            conversation, created_s = session.conversation, int(time.time())
            return write(turn, parsed, id=call.id, created_s=created_s, conversation=conversation)

        def failure_of(call: Call, error: dict[str, Any]) -> bytes:
            return write_failure(parsed, id=call.id, created_s=int(time.time()), error=error)

        content = await request.body()
        kept = parsed if isinstance(parsed, ResponsesRequest) and parsed.is_stored else None
        return CallResponse(
            call=begin_call(request, session, content, lambda: sample(session, parsed), response=kept),
            write=body_of,
            write_failure=failure_of,
            is_stream=parsed.options.stream,
            keep_alive_s=self.keep_alive_s,
        )

    async def _parsed(
        self, request: Request, parse: Callable[[Mapping[str, Any], ChatRules], R]
    ) -> tuple[OpenSession, R]:
        session, content = session_of(request, self.book), await request.body()
        parsed = await session.conversation.large_work.run(
            lambda: parse(parse_bounded_object(content), self.rules), size=len(content)
        )
        return session, parsed

    def _described(self, name: str) -> dict[str, Any]:
        return model_object(name, max_context=self.max_context)

    async def reward(self, request: Request) -> Response:
        """Sets the `reward` of the sample or of the turn `completion_id`; its `turns`, `metrics`, `label`."""
        session = session_of(request, self.book)
        posted = parse_reward(parse_bounded_object(await request.body()))
        try:
            await session.post_reward(**posted)
        except ValueError as error:
            param = "completion_id" if posted["completion_id"] else "reward"
            raise ParamError(str(error), param=param) from None
        session.hear()
        return JSONResponse({"id": session.id, "reward": posted["value"]})

    async def heartbeat(self, request: Request) -> Response:
        """Records that the agent is working without the model."""
        session = session_of(request, self.book)
        parse_bounded_object(await request.body())
        session.hear()
        return JSONResponse({"id": session.id})

    async def end(self, request: Request) -> Response:
        """Ends the session; the sample is made from the turns so far. A repetition gets the response to the
        first request."""
        parse_bounded_object(await request.body())
        answer = self.book.end_answer(request.path_params["id"])
        if answer is None or "problem" not in answer:
            session = session_of(request, self.book)
            await session.end_recorded()
            answer = session.end_answer
        return JSONResponse(answer)


async def _next_turn(session: OpenSession, chat: ChatRequest | MessageRequest) -> SampledTurn:
    options = chat.options
    return await session.sample_turn(
        chat.messages, tools=chat.tools, stop=options.stop, max_new_tokens=options.max_new_tokens
    )


async def _next_response(session: OpenSession, request: ResponsesRequest) -> SampledTurn:
    turn = await session.sample_turn(
        _whole_messages(session, request),
        tools=request.tools,
        max_new_tokens=request.options.max_new_tokens,
    )
    if turn.reply.finish_reason is not FinishReason.STOP:
        session.incomplete = turn.reply.finish_reason  # some frameworks raise
    return turn


def _whole_messages(session: OpenSession, request: ResponsesRequest) -> list[dict[str, Any]]:
    """Returns the instructions, the earlier messages that a request refers to, and its own. Raises
    NoResponseError."""
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    earlier: set[str] = set()
    if previous := request.previous_response_id:
        messages += _kept(session, bare_id(previous), "previous_response_id")
        if any(isinstance(one, ItemReference) for one in request.messages):
            earlier = session.kept.replies_in(bare_id(previous))
    for message in request.messages:
        if isinstance(message, ItemReference):
            reply = _kept(session, message.response_id, message.where)[-1]
            if message.response_id not in earlier:  # its place is in the earlier conversation
                messages.append(reply)
        else:
            messages.append(message)
    return messages


def _kept(session: OpenSession, response_id: str, where: str) -> Sequence[dict[str, Any]]:
    kept = session.kept.find(response_id)
    if kept is None:
        raise NoResponseError(
            f"{where} names no response of this session: {_not_kept(session)}. Send its items in input",
            param=where,
        )
    return kept.messages


def _not_kept(session: OpenSession) -> str:
    return (
        "those with store=false, deleted ones, and older ones once all have more than "
        f"{session.kept.max_bytes} bytes are not kept, nor are those of other sessions"
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


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(**described(error), path=request.url.path)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path:.200}: {error.detail.lower()}"
    if error.status_code == 404:
        message += f"; {_THERE}"
    return error_response(error.status_code, message, path=request.url.path, headers=error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    """Responds to a bug in this code; uvicorn logs it."""
    message = f"the server made a mistake: {type(error).__name__}"
    return error_response(500, message, code="internal_error", path=request.url.path)
