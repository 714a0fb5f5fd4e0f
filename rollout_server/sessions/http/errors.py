"""Errors in OpenAI's format, which determine what an SDK raises and whether it retries.

    400 a request that cannot be served | 404 no such session | 410 the session has ended
    429 no session waits (Retry-After)    | 500 the engine failed, and the sample with it

An SDK repeats a request after status 408, 409, 429 or 5xx, unless `x-should-retry` forbids it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from starlette.responses import Response

from areal_like.chat.openai import error_object
from areal_like.errors import (
    EngineError,
    EpisodeBudgetError,
    EpisodeError,
    PromptRefusedError,
    SessionGoneError,
    UserError,
)
from areal_like.http.bodies import ParamError
from areal_like.trajectory import FinishReason

CONTEXT_LENGTH = "context_length_exceeded"
TURN_LIMIT = "turn_limit_exceeded"


class NoSessionError(UserError):
    """No session has this id."""


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Returns the response for an error. Except for 429, it tells SDKs not to retry."""
    content = json.dumps(error_object(status, message, code=code, param=param)).encode()
    fixed = {} if status == 429 else {"x-should-retry": "false"}
    return Response(content, status, headers={**fixed, **(headers or {})}, media_type="application/json")


def described(error: BaseException) -> tuple[int, str, str | None, str | None]:
    """Returns status, message, code and param of an exception. Raises `error` if it is unexpected."""
    message = str(error)
    match error:
        case SessionGoneError():
            return 410, message, "session_gone", None
        case NoSessionError():
            return 404, message, "session_not_found", None
        case EpisodeBudgetError(reason=FinishReason.TURNS):
            return 400, message, TURN_LIMIT, None
        case EpisodeBudgetError() | PromptRefusedError():
            return 400, message, CONTEXT_LENGTH, "messages"
        case ParamError():
            return 400, message, None, error.param
        case EpisodeError() | UserError():
            return 400, message, None, None
        case EngineError():
            message = f"the engine failed, and the session's sample with it: {message}"
            return 500, message, "engine_error", None
    raise error


def response_of(error: BaseException) -> Response:
    """Returns the response for an exception of a request. Raises `error` if it is unexpected."""
    status, message, code, param = described(error)
    return error_response(status, message, code=code, param=param)
