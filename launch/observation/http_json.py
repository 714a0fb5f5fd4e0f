"""JSON requests to the daemons' HTTP servers: GET for a status, POST for a control request."""

from __future__ import annotations

import http.client
import json
from typing import Any

from areal_like.errors import ConfigError

REQUEST_TIMEOUT_S = 1.0


def fetch_json(address: str, path: str) -> dict[str, Any] | None:
    """GET http://address/path; returns the JSON object, or None if none arrives within REQUEST_TIMEOUT_S."""
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
    """POST http://address/path; returns the JSON object in the answer.

    Raises OSError if the daemon does not answer, ConfigError with the daemon's reason if it refuses.
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
