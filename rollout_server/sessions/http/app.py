"""The endpoints of sessions as one ASGI application. Keys and body sizes are checked before it (rules.py).

Every refusal has OpenAI's format, including that of a path that does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from areal_like.errors import ArealError
from areal_like.http.bodies import ParamError, parse_bounded_object, text
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.call_response import KEEP_ALIVE_S, session_of
from rollout_server.sessions.http.claims import ClaimRoutes
from rollout_server.sessions.http.errors import error_response, response_of
from rollout_server.sessions.http.model_routes import ModelRoutes
from rollout_server.sessions.http.requests import session_rules

_THERE = (
    "there are chat/completions, completions, models, reward, heartbeat and end under /sessions/ID/v1, and "
    "/sessions/ID/inference/v1/generate; not the Responses API, nor Anthropic's"
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
    on_ignored: Callable[[str], None] = lambda name: None,
) -> Starlette:
    """Builds the application. `model`: the model's name in responses. `max_context`: longest sequence in
    tokens. `sample_timeout_s`, `idle_timeout_s`: time limits of a session, told to external agents.
    `advertise_host`: host in their base URL; empty: the one by which they reached the server. `on_ignored`
    counts fields that have no effect."""
    claims = ClaimRoutes(
        book=book,
        advertise_host=advertise_host,
        sample_timeout_s=sample_timeout_s,
        idle_timeout_s=idle_timeout_s,
    )
    policy = ModelRoutes(
        book=book,
        rules=session_rules(model),
        max_context=max_context,
        keep_alive_s=keep_alive_s,
        on_ignored=on_ignored,
    )
    life = _LifeRoutes(book)
    session = "/sessions/{id}"
    routes = [
        Route(f"{session}/v1/chat/completions", policy.chat, methods=["POST"]),
        Route(f"{session}/v1/completions", policy.complete, methods=["POST"]),
        Route(f"{session}/inference/v1/generate", policy.generate, methods=["POST"]),
        Route(f"{session}/v1/models", policy.models, methods=["GET"]),
        Route(f"{session}/v1/models/{{name:path}}", policy.model, methods=["GET"]),
        *(Route(f"{session}{v1}/reward", life.reward, methods=["POST"]) for v1 in ("", "/v1")),
        *(Route(f"{session}{v1}/heartbeat", life.heartbeat, methods=["POST"]) for v1 in ("", "/v1")),
        *(Route(f"{session}{v1}/end", life.end, methods=["POST"]) for v1 in ("", "/v1")),
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
    return app


@dataclass(frozen=True)
class _LifeRoutes:
    """The endpoints for reward, heartbeat and end of a session. Each request may be repeated."""

    book: SessionBook

    async def reward(self, request: Request) -> Response:
        """Sets the `reward` of the sample, or of the turn `completion_id`."""
        session = session_of(request, self.book)
        body = parse_bounded_object(await request.body())
        value = body.get("reward")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ParamError("reward must be a number", param="reward")
        id = "" if body.get("completion_id") is None else text(body, "completion_id")
        try:
            session.set_reward(float(value), completion_id=id)
        except (ValueError, OverflowError) as error:
            raise ParamError(str(error), param="completion_id" if id else "reward") from None
        session.hear()
        return JSONResponse({"id": session.id, "reward": value})

    async def heartbeat(self, request: Request) -> Response:
        """Records that the agent is working without the model."""
        session = session_of(request, self.book)
        parse_bounded_object(await request.body())
        session.hear()
        return JSONResponse({"id": session.id})

    async def end(self, request: Request) -> Response:
        """Ends the session; the sample is made from the turns so far."""
        session = session_of(request, self.book)
        parse_bounded_object(await request.body())
        problem = session.problem
        session.end()
        return JSONResponse({"id": session.id, "ended": True, "problem": problem or None})


async def _failed(request: Request, error: Exception) -> Response:
    return response_of(error)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path:.200}: {error.detail.lower()}"
    if error.status_code == 404:
        message += f"; {_THERE}"
    return error_response(error.status_code, message, headers=error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    """Responds to a bug in this code; uvicorn logs it."""
    return error_response(500, f"the server made a mistake: {type(error).__name__}", code="internal_error")
