"""JSON requests to the daemons' HTTP planes: GET of a status, POST of a control verb."""

from __future__ import annotations

import http.client
import json
from typing import Any

from areal_like.errors import ConfigError

REQUEST_TIMEOUT_S = 1.0


def fetch_json(address: str, path: str) -> dict[str, Any] | None:
    """GET http://address/path as a JSON object; None without such an answer within REQUEST_TIMEOUT_S."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return None
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else None


def post_json(address: str, path: str, body: dict[str, Any], *, timeout_s: float = 5.0) -> dict[str, Any]:
    """POST http://address/path and return the JSON object of the answer.

    Raises OSError without an answer, ConfigError with the daemon's reason for a refusal.
    """
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    try:
        connection.request("POST", path, body=json.dumps(body))
        response = connection.getresponse()
        answer = dict(json.loads(response.read()))
    finally:
        connection.close()
    if response.status != 200:
        raise ConfigError(str(answer.get("error", answer)))
    return answer
