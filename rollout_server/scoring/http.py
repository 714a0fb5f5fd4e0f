"""The HTTP server of scores.

    POST /score           {"prompt": text or messages, "completion": text, "timeout_s": number}
                          -> {"score": number, "num_tokens": number, "model": identity}
    POST /classify        SGLang's format: {"text": text or texts} or {"input_ids": ids or lists of ids}
                          -> {"embedding": [score], "meta_info": {...}}, or a list of these
    GET  /get_model_info  SGLang's format; `weight_version` is the model's identity
    GET  /health          200 while texts are scored

In /score the server makes the tokens, by the function that training uses (`scored_tokens`), so client and
server cannot disagree about the chat template. A refusal is `{"error": {"message": text}}`. Without keys only
loopback is bound; with keys, a request needs the token of a key of role `scorer` or `operator`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Scope

from areal_like.chat.openai import MAX_MESSAGES, most_bytes
from areal_like.chat.scored_text import scored_tokens
from areal_like.config import Config
from areal_like.errors import UserError
from areal_like.http.access import PROBE_PATHS, AccessRules, Reason, Refusal, RoleOfToken, host_names
from areal_like.http.bodies import ParamError, number, parse_bounded_object
from areal_like.http.guard import BodyLimits, Headers, HttpGuard
from areal_like.http.server import HttpConfig, HttpServer
from areal_like.security.binding import require_loopback_or_keys
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyRole
from areal_like.security.tls import tls_files
from areal_like.security.tokens import role_of_token
from rollout_server.listening import listening, url_of
from rollout_server.scoring.metrics import Refused
from rollout_server.scoring.service import STATUS, RefusedTextError, Scored, ScoreService

MAX_TEXTS = 256
"""Maximum number of texts in one request to /classify."""
_BODY_TIMEOUT_S = 30.0
_MAX_CONNECTIONS = 1024
_KEEP_ALIVE_S = 75
_WRITE_TIMEOUT_S = 60.0
_SHUTDOWN_S = 1
_DEFAULT_TIMEOUT_S = 600.0
_LONGEST_TIMEOUT_S = 3600.0


@dataclass(kw_only=True)
class ScoreRoutes:
    """The endpoints."""

    service: ScoreService
    tokenizer: Any
    pad_token_id: int | None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    path: str
    is_well: Callable[[], bool] = lambda: True
    """False while no text can be scored."""

    @property
    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/score", self._answered(self._score), methods=["POST"]),
                Route("/classify", self._answered(self._classify), methods=["POST", "PUT"]),
                Route("/get_model_info", self._info, methods=["GET"]),
                Route("/model_info", self._info, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
                *(Route(path, self._health, methods=["GET"]) for path in sorted(PROBE_PATHS)),
            ]
        )

    def _answered(
        self, handle: Callable[[dict[str, Any]], Awaitable[Any]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return JSONResponse(await handle(parse_bounded_object(await request.body())))
            except UserError as error:
                refused = self.service.refused(RefusedTextError(Refused.INVALID, str(error)))
            except RefusedTextError as error:
                refused = error
            status = STATUS[refused.reason]
            headers = {"retry-after": "1"} if status == STATUS[Refused.FULL] else {}
            content = {"error": {"message": str(refused), "reason": refused.reason.value}}
            return JSONResponse(content, status_code=status, headers=headers)

        return endpoint

    async def _score(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = _prompt(body), body.get("completion")
        if not isinstance(completion, str):
            raise ParamError("completion must be a text", param="completion")

        def tokens() -> list[int]:
            return scored_tokens(
                self.tokenizer,
                prompt,
                completion,
                pad_token_id=self.pad_token_id,
                template_kwargs=self.template_kwargs,
            )

        scored = await self.service.score(tokens, timeout_s=_timeout_s(body))
        return {"score": scored.score, "num_tokens": scored.num_tokens, "model": self.service.identity}

    async def _classify(self, body: dict[str, Any]) -> Any:
        texts, ids = body.get("text"), body.get("input_ids")
        if (texts is None) == (ids is None):
            raise UserError("give either `text` or `input_ids`")
        timeout_s = _timeout_s(body)
        if isinstance(texts, str):
            return self._embedding(await self.service.score(self._encoded(texts), timeout_s=timeout_s))
        if isinstance(ids, list) and _are_ids(ids):
            return self._embedding(await self.service.score(_known(ids), timeout_s=timeout_s))
        entries = texts if texts is not None else ids
        is_text = texts is not None
        if not isinstance(entries, list) or not 0 < len(entries) <= MAX_TEXTS:
            raise UserError(f"want a text, a list of token ids, or a list of 1 to {MAX_TEXTS} of these")
        if not all(isinstance(one, str) if is_text else _are_ids(one) for one in entries):
            raise UserError("want texts as `text`, and lists of token ids as `input_ids`")
        made = [self._encoded(one) if is_text else _known(one) for one in entries]
        # All of them are awaited, so that none of the errors is left without a reader.
        scored = await asyncio.gather(
            *(self.service.score(tokens, timeout_s=timeout_s) for tokens in made), return_exceptions=True
        )
        return [self._embedding(_result(one)) for one in scored]

    def _encoded(self, text: str) -> Callable[[], list[int]]:
        return lambda: list(self.tokenizer(text)["input_ids"])

    def _embedding(self, scored: Scored) -> dict[str, Any]:
        about = {"prompt_tokens": scored.num_tokens, "weight_version": self.service.identity}
        return {"embedding": [scored.score], "meta_info": about}

    async def _info(self, _: Request) -> Response:
        return JSONResponse(
            {
                "model_path": self.path,
                "tokenizer_path": self.path,
                "is_generation": False,
                "weight_version": self.service.identity,
                "max_length": self.service.max_length,
            }
        )

    async def _health(self, _: Request) -> Response:
        is_well = self.is_well()
        return PlainTextResponse("ok" if is_well else "not ready", status_code=200 if is_well else 503)


@dataclass(eq=False, kw_only=True)
class ScorePlane:
    """The HTTP server; call `start`, then `close`."""

    config: Config
    routes: ScoreRoutes
    keyring: Keyring | None
    index: int
    """Number of this score server, added to `scorer.port`."""
    on_refused: Callable[[Reason], None] = lambda reason: None
    url: str = field(default="", init=False)
    serving: asyncio.Task[None] | None = field(default=None, init=False)
    """Ends when the server does."""
    _server: HttpServer | None = field(default=None, init=False)

    def start(self) -> None:
        """Binds and serves. Raises ConfigError if the address cannot be bound or needs keys."""
        settings, security = self.config.scorer, self.config.security
        require_loopback_or_keys(security, settings.host, setting="scorer.host")
        certificate, private_key = tls_files(security)
        rules = AccessRules(
            hosts=host_names(settings.host, others=[*security.allowed_hosts, settings.advertise_host]),
            role_of=None if self.keyring is None else _asking_role(self.keyring),
            open_paths=PROBE_PATHS | {"/health"},
        )
        guard = HttpGuard(
            self.routes.app,
            rules,
            limits=BodyLimits(
                max_bytes=most_bytes(context_length=self.routes.service.max_length), timeout_s=_BODY_TIMEOUT_S
            ),
            on_refused=self.on_refused,
            describe=_described,
        )
        self._server = HttpServer(
            HttpConfig(
                guard,
                max_connections=_MAX_CONNECTIONS,
                shutdown_s=_SHUTDOWN_S,
                keep_alive_s=_KEEP_ALIVE_S,
                write_timeout_s=_WRITE_TIMEOUT_S,
                certificate=certificate,
                private_key=private_key,
            )
        )
        host = settings.host
        listener = listening(host, settings.port, self.index, setting="scorer.host")
        self.url = url_of(
            listener, host=host, advertise_host=settings.advertise_host, is_tls=bool(certificate)
        )
        self.serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="scores")

    async def close(self) -> None:
        """Stops the server; open requests get one second to finish."""
        if self._server is not None and self.serving is not None:
            self._server.should_exit = True
            await asyncio.wait([self.serving], timeout=_SHUTDOWN_S + 2)
            self.serving.cancel()


def _asking_role(keyring: Keyring) -> RoleOfToken:
    """On this server the holder of a scorer's token may ask, as the operator may."""

    def role_of(token: str) -> KeyRole | None:
        role = role_of_token(keyring, token)
        return KeyRole.OPERATOR if role is KeyRole.SCORER else role

    return role_of


def _described(refusal: Refusal, _: Scope) -> tuple[bytes, Headers]:
    content = {"error": {"message": refusal.message, "reason": refusal.reason.value}}
    return json.dumps(content).encode() + b"\n", []


def _prompt(body: dict[str, Any]) -> str | Sequence[dict[str, Any]]:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if (
        isinstance(prompt, list)
        and 0 < len(prompt) <= MAX_MESSAGES
        and all(isinstance(one, dict) and isinstance(one.get("role"), str) for one in prompt)
        and all(_is_content(one.get("content", 0)) for one in prompt)
    ):
        return prompt
    raise ParamError(
        f"prompt must be a text, or a list of 1 to {MAX_MESSAGES} messages with `role` and `content`",
        param="prompt",
    )


def _is_content(value: Any) -> bool:
    return isinstance(value, str | None) or (
        isinstance(value, list) and all(isinstance(part, dict) for part in value)
    )


def _known(ids: list[int]) -> Callable[[], list[int]]:
    return lambda: ids


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def _timeout_s(body: dict[str, Any]) -> float:
    # A client with a longer time limit (`task.reward.timeout_s`) is no mistake.
    return min(number(body, "timeout_s", _DEFAULT_TIMEOUT_S, low=0), _LONGEST_TIMEOUT_S)


def _result(scored: Scored | BaseException) -> Scored:
    if isinstance(scored, BaseException):
        raise scored
    return scored
