"""JSON requests to the daemons' HTTP servers: GET for a status, POST for a control request.

The operator's token goes only to addresses in the run's endpoint files, which the daemons themselves write:
never to an address that a daemon reports for another one, and on this machine only to processes of the user
who has written the file. A user may name further addresses.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from areal_like.config.security import SecurityConfig
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.security.tls import client_context
from areal_like.security.tokens import any_token, operator_token
from launch.observation.listening_user import may_belong_to

REQUEST_TIMEOUT_S = 1.0
_MAX_ANSWER_BYTES = 64 << 20
_REFUSED = (401, 403, 421)
"""Statuses of a daemon that refuses this caller whatever the request is."""


class Operator:
    """The operator's access to the daemons of one run: a token, and the certificate to expect."""

    def __init__(
        self, security: SecurityConfig, endpoints: Path | None, *, given: Iterable[str] = ()
    ) -> None:
        """`endpoints`: the run's directory of endpoint files. `given`: addresses that a user has named, who
        may have the monitor's token only.

        Raises ConfigError if the token or the certificate is missing.
        """
        self._endpoints = endpoints
        self._given = frozenset(given)
        self._token_of = any_token if self._given else operator_token
        self._keys = security.keys
        self._known: dict[str, int] = {}
        """Address in an endpoint file -> user who has written the file."""
        self._tls = client_context(security)
        if security.keys:
            self._token_of(security.keys)

    def headers(self, address: str) -> dict[str, str]:
        """The headers of a request to `host:port`; without a token if it is no daemon's.

        Reads the token again, because it may have been rotated. Raises ConfigError if it is gone.
        """
        if self._keys and address in self._given:
            return {"Authorization": f"Bearer {self._token_of(self._keys)}"}
        if self._keys and address not in self._known:
            self._known = self._addresses()
        if address not in self._known or not may_belong_to(address, self._known[address]):
            return {}
        return {"Authorization": f"Bearer {self._token_of(self._keys)}"}

    def connection(self, host: str, port: int, *, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that is not open yet; over TLS where the job has a certificate."""
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=timeout_s)
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._tls)

    def _addresses(self) -> dict[str, int]:
        found = {}
        for path in self._endpoints.glob("*.json") if self._endpoints is not None else ():
            try:
                found[str(json.loads(path.read_text())["http"])] = path.stat().st_uid
            except (OSError, ValueError, KeyError, TypeError):
                continue  # the daemon has just ended and removed its file
        return found


NO_OPERATOR = Operator(SecurityConfig(), Path())
"""For jobs without keys and certificate."""


def operator_of(root: Path) -> Operator:
    """The operator of the run in the directory `root`, by the settings stored there. Raises ConfigError."""
    paths = RunPaths(root)
    return Operator(load_config(["--config", str(paths.config)]).security, paths.endpoints)


def fetch_json(
    address: str, path: str, *, operator: Operator = NO_OPERATOR, timeout_s: float = REQUEST_TIMEOUT_S
) -> dict[str, Any] | None:
    """GET http://address/path; returns the JSON object, or None if none arrives within `timeout_s`.

    Raises ConfigError if the daemon refuses this caller.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return None
    headers = operator.headers(address)
    connection = operator.connection(host.strip("[]"), int(port), timeout_s=timeout_s)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        answer = _object(response)
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    if response.status in _REFUSED:
        raise ConfigError(_refusal(address, answer))
    return answer


def post_json(
    address: str,
    path: str,
    body: dict[str, Any],
    *,
    operator: Operator = NO_OPERATOR,
    timeout_s: float = 5.0,
) -> dict[str, Any]:
    """POST http://address/path; returns the JSON object in the answer.

    Raises OSError if the daemon does not answer, ConfigError with the daemon's reason if it refuses.
    """
    host, _, port = address.rpartition(":")
    headers = operator.headers(address)
    connection = operator.connection(host.strip("[]"), int(port), timeout_s=timeout_s)
    try:
        connection.request("POST", path, body=json.dumps(body), headers=headers)
        response = connection.getresponse()
        answer = _object(response)
    except (ValueError, http.client.HTTPException) as error:
        raise ConnectionError(f"its answer is no JSON object: {error}") from None
    finally:
        connection.close()
    if response.status in _REFUSED:
        raise ConfigError(_refusal(address, answer))
    if response.status != 200:
        raise ConfigError(str(answer.get("error", answer)))
    return answer


def _object(response: http.client.HTTPResponse) -> dict[str, Any]:
    """The JSON object in an answer. Raises ValueError."""
    content = response.read(_MAX_ANSWER_BYTES + 1)
    if len(content) > _MAX_ANSWER_BYTES:
        raise ValueError(f"longer than {_MAX_ANSWER_BYTES} bytes")
    try:
        answer = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(answer, dict):
        raise ValueError("not an object")
    return answer


def _refusal(address: str, answer: dict[str, Any]) -> str:
    return f"the daemon at {address} refuses this command: {answer.get('error', answer)}"
