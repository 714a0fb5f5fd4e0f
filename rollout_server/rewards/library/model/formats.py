"""The two formats in which a scorer is asked: that of our score server, and SGLang's /classify."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from areal_like.chat.scored_text import scored_tokens
from areal_like.errors import ConfigError, RewardError
from rollout_server.rewards.library.service import ServiceClient, TryAgainError

Prompt = str | Sequence[dict[str, Any]]
_IDENTITY_CHARS = 16
_MAX_IDENTITY_CHARS = 64
UNKNOWN = "unknown"
"""The identity, if the server does not tell one."""
_MODELS_PATH = "/v1/models"
_INFO_PATHS = ("/model_info", "/get_model_info", _MODELS_PATH)
"""Of SGLang, of SGLang before 0.5.6, and of other servers with /classify."""


class Response(NamedTuple):
    """What a server returned for one text."""

    score: float
    version: str
    """Of the reward model, as the server tells it; empty if it does not."""


class Format(Protocol):
    """How to ask one kind of server."""

    path: str

    def write(self, prompt: Prompt, completion: str, *, timeout_s: float) -> bytes:
        """Returns the body of a request. Raises RewardError."""

    def read(self, content: bytes) -> Response:
        """Reads a response. Raises TryAgainError, and RewardError if the server is not a scorer."""

    async def identity(self, response: Response, service: ServiceClient, *, had_failures: bool) -> str:
        """Returns the identity of the model that gave a response. `had_failures`: requests failed since the
        last one, so another server may run there now."""


class ScoreFormat:
    """Our score server, which makes the tokens."""

    path = "/score"

    def write(self, prompt: Prompt, completion: str, *, timeout_s: float) -> bytes:
        body = {"prompt": prompt, "completion": completion, "timeout_s": timeout_s}
        return json.dumps(body).encode()

    def read(self, content: bytes) -> Response:
        body = _parsed(content)
        if not isinstance(body, dict) or not isinstance(identity := body.get("model"), str):
            raise TryAgainError("a response that has no score")
        return Response(_finite(body.get("score")), _short(identity))

    async def identity(self, response: Response, service: ServiceClient, *, had_failures: bool) -> str:
        return response.version


class ClassifyFormat:
    """A server with SGLang's /classify. The tokens are made here, by the reward model's own tokenizer: a
    server that got text would add a second BOS to that of the chat template. A token outside the model's
    vocabulary is not sent: it would end an SGLang server."""

    path = "/classify"

    def __init__(
        self,
        tokenizer: Any,
        *,
        pad_token_id: int | None,
        vocab_size: int,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        """`pad_token_id`, `vocab_size`: of the model's config.json; None and 0: not known."""
        self._tokenizer, self._pad_token_id, self._vocab_size = tokenizer, pad_token_id, vocab_size
        self._template_kwargs = template_kwargs
        self._info: Mapping[str, Any] | None = None
        """What the server tells about its model; None: not asked yet."""

    def write(self, prompt: Prompt, completion: str, *, timeout_s: float) -> bytes:
        try:
            ids = scored_tokens(
                self._tokenizer,
                prompt,
                completion,
                pad_token_id=self._pad_token_id,
                vocab_size=self._vocab_size,
                template_kwargs=self._template_kwargs,
            )
        except ConfigError as error:
            raise RewardError(f"the reward model cannot read this text: {error}") from None
        return json.dumps({"input_ids": ids}).encode()

    def read(self, content: bytes) -> Response:
        body = _parsed(content)
        if isinstance(body, list) and len(body) == 1:
            body = body[0]
        numbers = body.get("embedding") if isinstance(body, dict) else None
        if not isinstance(numbers, list):
            raise TryAgainError("a response without `embedding`")
        if len(numbers) != 1:
            raise RewardError(
                f"the scorer returned {len(numbers)} numbers for a text: a reward model has one label"
            )
        about = body.get("meta_info")
        version = about.get("weight_version") if isinstance(about, dict) else None
        return Response(_finite(numbers[0]), str(version or ""))

    async def identity(self, response: Response, service: ServiceClient, *, had_failures: bool) -> str:
        """A hash of the path and the version that the server tells: it has no hash of its weights."""
        if self._info is None or had_failures:
            try:
                self._info = await _model_info(service)
            except (TryAgainError, TimeoutError):
                return UNKNOWN
        if not self._info:
            return UNKNOWN
        told = [self._info.get("model_path"), response.version or self._info.get("weight_version")]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:_IDENTITY_CHARS]


async def _model_info(service: ServiceClient) -> Mapping[str, Any]:
    """What a server tells about its model; empty if it has none of the routes. Raises TryAgainError and
    TimeoutError."""
    for path in _INFO_PATHS:
        try:
            info = _parsed(await service.get(path))
        except RewardError:  # it has no such route, or keeps it to itself
            continue
        if path == _MODELS_PATH:  # OpenAI's list of models, of which it has one
            models = info.get("data") if isinstance(info, dict) else None
            first = models[0] if isinstance(models, list) and models else None
            info = {"model_path": first.get("root") or first.get("id")} if isinstance(first, dict) else None
        if isinstance(info, dict) and isinstance(info.get("model_path"), str):
            return info
    return {}


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise TryAgainError("a response that is not JSON") from None


def _finite(value: Any) -> float:
    try:
        score = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    except OverflowError:  # an integer of hundreds of digits
        score = math.inf
    if not math.isfinite(score):
        raise TryAgainError(f"a score that is not a finite number: {str(value)[:40]}")
    return score


def _short(identity: str) -> str:
    plain = "".join(char for char in identity[:_MAX_IDENTITY_CHARS] if char.isalnum() or char in "._-")
    return plain or UNKNOWN
