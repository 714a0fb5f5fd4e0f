"""Errors in the format of the client's API, which determine what an SDK raises and whether it retries: for
/v1/messages (and /messages) that of Anthropic's Messages, for all else OpenAI's.

    400 a request that cannot be served | 404 no such session or response | 410 the session has ended
    421 the session is at another server (`x-areal-server`)
    429 no session waits (Retry-After)  | 500 the engine failed, and the sample with it
    503 the session will continue at another server (Retry-After)

An SDK repeats a request after status 408, 409, 429 or 5xx, unless `x-should-retry` forbids it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from areal_like.chat.anthropic import anthropic_error
from areal_like.chat.openai import error_object
from areal_like.errors import (
    EngineError,
    EpisodeBudgetError,
    EpisodeError,
    PromptRefusedError,
    SessionGoneError,
    SessionMovedError,
    UserError,
)
from areal_like.http.bodies import ParamError
from areal_like.trajectory import FinishReason
from rollout_server.sessions.book import JOB_OVER

CONTEXT_LENGTH = "context_length_exceeded"
TURN_LIMIT = "turn_limit_exceeded"
MOVED, ELSEWHERE = "session_moved", "session_elsewhere"
RETRY_SOON: Mapping[str, str] = {"retry-after": "1"}
_ANTHROPIC = "/v1/messages"
_RESPONSES = "/v1/responses"


class NoSessionError(UserError):
    """No session has this id."""


class NoResponseError(ParamError):
    """A request refers to a response that its session does not have, or has forgotten."""


class UnknownResponseError(UserError):
    """A request is for a response that its session does not have, or has forgotten."""


def error_content(
    path: str, status: int, message: str, *, code: str | None = None, param: str | None = None
) -> bytes:
    """Returns the body of the response for an error. `path`: of the request."""
    if _ANTHROPIC in path or path.split("/")[3:4] == ["messages"]:
        return json.dumps(anthropic_error(status, message, code=code)).encode()
    if _RESPONSES in path and param == "messages":
        param = "input"
    return json.dumps(error_object(status, message, code=code, param=param)).encode()


def error_response(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    path: str = "",
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Returns the response for an error. Except for 429 and 503, it tells SDKs not to retry. `path`: of the
    request."""
    content = error_content(path, status, message, code=code, param=param)
    fixed = RETRY_SOON if status == 503 else {} if status == 429 else {"x-should-retry": "false"}
    return Response(content, status, headers={**fixed, **(headers or {})}, media_type="application/json")


def gone_code(message: str) -> str:
    """Returns the code of a response with status 410. `message`: why the session is gone."""
    return "job_over" if message == JOB_OVER else "session_gone"


def described(error: BaseException) -> dict[str, Any]:
    """Returns the arguments of `error_response` and `error_object` for an exception of a request. Raises
    `error` if it is unexpected."""
    message = str(error)
    match error:
        case SessionGoneError():
            return {"status": 410, "message": message, "code": gone_code(message)}
        case SessionMovedError():
            return {"status": 503, "message": message, "code": MOVED}
        case NoSessionError():
            return {"status": 404, "message": message, "code": "session_not_found"}
        case UnknownResponseError():
            return {"status": 404, "message": message, "code": "response_not_found", "param": "response_id"}
        case EpisodeBudgetError(reason=FinishReason.TURNS):
            return {"status": 400, "message": message, "code": TURN_LIMIT}
        case EpisodeBudgetError() | PromptRefusedError():
            return {"status": 400, "message": message, "code": CONTEXT_LENGTH, "param": "messages"}
        case NoResponseError():
            return {
                "status": 400,
                "message": message,
                "code": "previous_response_not_found",
                "param": error.param,
            }
        case ParamError():
            return {"status": 400, "message": message, "param": error.param}
        case EpisodeError() | UserError():
            return {"status": 400, "message": message}
        case EngineError():
            message = f"the engine failed, and the session's sample with it: {message}"
            return {"status": 500, "message": message, "code": "engine_error"}
    raise error
