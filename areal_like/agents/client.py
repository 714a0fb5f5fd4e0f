"""Claims sessions for external agents. Needs nothing but Python's standard library.

    session = claim("http://server:7700", token=..., wait_s=30)     # None: no sample is wanted now
    model = OpenAI(base_url=session.base_url, api_key=session.api_key)
    ...
    session.reward(1.0)
    session.end()

All calls block; an asynchronous agent uses `asyncio.to_thread(claim, ...)`. A server gives out as many
sessions as the job has samples to make, so a job never trains on samples that are too old for it.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from areal_like.errors import SessionGoneError, UserError

_MAX_HOST_CHARS = 64
_NUM_TRIES = 4
_RETRY_S = 0.5
_TIMEOUT_S = 60.0
_LONGEST_WAIT_S = 30.0
"""Seconds that a server waits within one request."""


@dataclass(frozen=True, kw_only=True)
class ClaimedSession:
    """One sample to make. The session ends with a call of `end`, or at one of the server's time limits."""

    id: str
    base_url: str
    """Base URL for clients of OpenAI's API."""
    api_key: str = field(repr=False)
    """Secret of this session."""
    example: Mapping[str, Any]
    """`split`, `index`, and those of `prompt`, `answer`, `metadata`, `label` that the task provides."""
    group: int
    """Shared by all samples of one prompt."""
    sample: int
    deadline_s: float | None
    """Seconds from the first request to the model until the sample is cut off; None: no limit."""
    idle_timeout_s: float
    """Seconds without a request after which the session ends; a heartbeat counts as a request."""
    ca_file: str = ""

    @property
    def anthropic_base_url(self) -> str:
        """Base URL for clients of Anthropic's API."""
        return self.base_url.removesuffix("/v1")

    def reward(self, value: float, *, completion_id: str = "") -> None:
        """Sets the reward of the sample, or of the turn whose completion has this id; the last call counts.

        Raises SessionGoneError if the session is over, UserError if it is refused, OSError if the server
        cannot be reached.
        """
        body: dict[str, Any] = {"reward": value}
        if completion_id:
            body["completion_id"] = completion_id
        self._post("reward", body)

    def heartbeat(self) -> None:
        """Keeps the session alive while the agent works without the model, for example in a long tool call.

        Call it more often than every `idle_timeout_s`.
        Raises SessionGoneError if the session is over, OSError if the server cannot be reached.
        """
        self._post("heartbeat", {})

    def end(self) -> bool:
        """Reports that the sample is complete. Returns False if there is no sample: the session was already
        over, made no request to the model, or has no reward although the task computes none.

        Raises OSError if the server cannot be reached.
        """
        try:
            return not self._post("end", {}).get("problem")
        except SessionGoneError:
            return False

    def _post(self, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
        # All requests may be sent again: only the last reward counts, and ending twice does no harm.
        for left in reversed(range(_NUM_TRIES)):
            try:
                posted = _posted(f"{self.base_url}/{verb}", body, key=self.api_key, ca_file=self.ca_file)
                if posted is None:
                    raise OSError(f"{self.base_url}: too many requests of the session are in progress")
                return posted
            except OSError:
                if not left:
                    raise
                time.sleep(_RETRY_S)
        raise AssertionError("the last attempt has raised")


def claim(
    url: str, *, token: str = "", wait_s: float = 0.0, ca_file: str = "", name: str = ""
) -> ClaimedSession | None:
    """Claims a session of the rollout server at `url`; None if none was free within `wait_s`.

    `token`: of role agent or operator, if the job has keys. `ca_file`: PEM file with the authority of the
    server's certificate; empty: the system's authorities. `name`: this agent's name; empty: machine and
    process. A server identifies agents by name, and gives fewer sessions, and in the end none, to an agent
    whose sessions fail. Raises UserError if the server refuses, OSError if it cannot be reached.
    """
    name = name or f"{socket.gethostname()[:_MAX_HOST_CHARS]}:{os.getpid()}"
    end_s = time.monotonic() + wait_s
    while True:
        left_s = max(0.0, end_s - time.monotonic())
        body = {"wait_s": min(left_s, _LONGEST_WAIT_S), "name": name}
        claimed = _posted(f"{url.rstrip('/')}/sessions", body, key=token, ca_file=ca_file)
        if claimed is not None:
            names = set(ClaimedSession.__dataclass_fields__) - {"ca_file"}
            return ClaimedSession(**{name: claimed[name] for name in names}, ca_file=ca_file)
        if time.monotonic() >= end_s:
            return None
        time.sleep(min(1.0, max(0.0, end_s - time.monotonic())))


def _posted(url: str, body: Mapping[str, Any], *, key: str, ca_file: str) -> dict[str, Any] | None:
    """The body of the response; None for status 429. Raises OSError, also if the connection breaks midway."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    context = ssl.create_default_context(cafile=ca_file or None) if url.startswith("https:") else None
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context) as response:
            parsed: dict[str, Any] = json.load(response)
            return parsed
    except urllib.error.HTTPError as error:
        with error:
            message = _message(error)
        if error.code == 429:
            return None
        # The session's key came from the server: if the server does not know it, it has been restarted since.
        if error.code == 410 or (error.code == 401 and "/sessions/" in url):
            raise SessionGoneError(message) from None
        raise UserError(f"{url}: {error.code}: {message}") from None
    except (http.client.HTTPException, ConnectionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{url}: no complete response ({type(error).__name__}: {error})") from error


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return str(error.reason)
