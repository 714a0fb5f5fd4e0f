"""Claims samples of a running job for agents anywhere: one file that needs only the standard library.

    pip install ./areal_like/client         # or copy this file

    session = claim("http://server:7700", wait_s=30, restart_s=300)  # None: no sample is wanted now
    model = OpenAI(base_url=session.base_url, api_key=session.api_key)
    with session.heartbeats():                               # while the agent works without the model
        ...
    session.reward(1.0, metrics={"tool_errors": 2})
    session.end()

    session = session.find(urls=[...], wait_s=60)            # its server has died: where is it now?

    group = claim_group("http://server:7700", wait_s=30)     # all samples of one prompt
    group.rank([best, second, worst])                        # or group.reward({session.id: 0.7, ...})
    group.end()

Every error is a ClientError whose message says what to do:

    RefusedError      the request is wrong, or this agent's sessions keep failing: correct the agent
    SessionOverError  the session has ended, or its sample is no longer wanted: claim another one
        JobOverError  the job has ended: stop
    UnreachableError  (also an OSError) no response: the server has ended, or is starting again

All calls block and may be made from any thread; an asynchronous agent uses `asyncio.to_thread(claim, ...)`.
A server gives out only as many sessions as the job has samples to make, so agents cannot run ahead of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import logging
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "ClaimedGroup",
    "ClaimedSession",
    "ClientError",
    "JobOverError",
    "RefusedError",
    "SessionOverError",
    "UnreachableError",
    "claim",
    "claim_group",
]

_LOG = logging.getLogger("areal_like_client")
_MAX_HOST_CHARS = 64
_MAX_BODY_BYTES = 1 << 28
_NUM_TRIES = 4
_RETRY_S = 0.5
_TIMEOUT_S = 60.0
_LONGEST_WAIT_S = 30.0
"""Seconds that a server waits within one request."""
_PAUSE_S = 1.0
"""Pause between two such requests."""
_BEATS = 3
"""Heartbeats sent in each `idle_timeout_s`."""
_MOVES_S = 60.0
"""How long a session may take to move to another server."""
_OF_PROXIES = (502, 503, 504)
"""Statuses of a proxy that does not reach the server; the server itself has others."""


class ClientError(Exception):
    """Root of this module's errors."""


class RefusedError(ClientError, ValueError):
    """The server refuses a request, and would refuse it again. The message says why."""


class SessionOverError(ClientError):
    """The session has ended, its sample is no longer wanted, or nothing could continue it: claim another
    session."""


class JobOverError(SessionOverError):
    """The job has ended: there is nothing left to claim."""


class UnreachableError(ClientError, OSError):
    """The server does not respond. It has ended or is starting again: claim again for a while, or look for
    the session (`ClaimedSession.find`); if no server of the job comes back, the job is over."""

    is_moving = False
    """True if the server has said that another one will continue the session."""


class _ElsewhereError(Exception):
    """Status 421: the session is at another server. `url`: of that server."""

    def __init__(self, message: str, *, url: str) -> None:
        super().__init__(message)
        self.url = url


class _BusyError(Exception):
    """Status 429. `wait_s`: after how many seconds the server wants the request again."""

    def __init__(self, message: str, *, code: str, wait_s: float) -> None:
        super().__init__(message)
        self.code, self.wait_s = code, wait_s


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

    def reward(
        self,
        value: float | None = None,
        *,
        completion_id: str = "",
        turns: Mapping[str, float] | None = None,
        metrics: Mapping[str, float] | None = None,
        label: str = "",
    ) -> None:
        """Sets the reward of the sample, or of the turn whose completion has this id; the last call counts.

        `turns`: rewards of turns by the ids of their completions. `metrics`: named numbers that are not part
        of the reward. `label`: the samples' kind in metrics, if the example has no label. `value` may be None
        if one of these is given. Raises SessionOverError, RefusedError, UnreachableError.
        """
        body: dict[str, Any] = {}
        if value is not None:
            body["reward"] = value
        for name, given in (
            ("completion_id", completion_id),
            ("turns", dict(turns or {})),
            ("metrics", dict(metrics or {})),
            ("label", label),
        ):
            if given:
                body[name] = given
        self._post("reward", body)

    def heartbeat(self) -> None:
        """Keeps the session alive while the agent works without the model, for example in a long tool call.

        Call it more often than every `idle_timeout_s`. Raises SessionOverError, UnreachableError.
        """
        self._post("heartbeat", {})

    @contextlib.contextmanager
    def heartbeats(self) -> Iterator[None]:
        """Sends heartbeats inside the block, from a thread. It raises nothing: if the session ends meanwhile,
        the next request says so."""
        with _beating(self.heartbeat, every_s=self.idle_timeout_s / _BEATS):
            yield

    def end(self) -> bool:
        """Reports that the sample is complete.

        Returns False, and logs why, if there is no sample: the session was already over, the model answered
        no request, or there is no reward although the task computes none. Raises JobOverError,
        UnreachableError.
        """
        try:
            problem = self._post("end", {}).get("problem")
        except JobOverError:
            raise
        except SessionOverError as over:
            problem = str(over)
        if problem:
            _LOG.warning("session %s is no sample: %s", self.id, problem)
        return not problem

    def find(self, urls: Sequence[str] = (), *, wait_s: float = 60.0) -> ClaimedSession:
        """Returns this session with the base URL of the server that has it now, after a request to the model
        got no response, or status 421 or 503.

        If its server dies, another one continues the session, with the same id and key. `urls`: the other
        servers of the job, any of which says where the session is. `wait_s`: how long to look, in seconds; it
        takes at least `buffer.lease_timeout_s` until the job gives up a server that does not end cleanly.
        Raises SessionOverError, JobOverError, UnreachableError.
        """
        end_s = time.monotonic() + wait_s
        path = self.base_url[self.base_url.index("/sessions/") :]
        bases = dict.fromkeys([self.base_url, *(f"{url.rstrip('/')}{path}" for url in urls)])
        while True:
            problem: Exception | None = None
            for base in list(bases):
                found = dataclasses.replace(self, base_url=base)
                try:
                    _posted(f"{base}/heartbeat", {}, key=self.api_key, ca_file=self.ca_file)
                    return found
                except _ElsewhereError as elsewhere:
                    bases = {f"{elsewhere.url}{path}": None, **bases}
                    problem = elsewhere
                except (UnreachableError, _BusyError) as error:
                    problem = error
            if time.monotonic() >= end_s:
                raise UnreachableError(f"the session {self.id} was not found: {problem}") from problem
            time.sleep(_PAUSE_S)

    def _post(self, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
        # All requests may be sent again: only the last reward counts, and ending twice does no harm.
        url = f"{self.base_url}/{verb}"
        left, end_s = _NUM_TRIES, time.monotonic() + _MOVES_S
        while True:
            left -= 1
            try:
                return _posted(url, body, key=self.api_key, ca_file=self.ca_file)
            except _ElsewhereError as elsewhere:
                url = f"{elsewhere.url}{url[url.index('/sessions/') :]}"
                if time.monotonic() >= end_s:
                    raise UnreachableError(f"{url}: {elsewhere}") from None
            except _BusyError as busy:
                if left <= 0:
                    raise UnreachableError(f"{url}: too many requests of the session: {busy}") from None
            except UnreachableError as error:
                if left <= 0 and not (error.is_moving and time.monotonic() < end_s):
                    raise
            time.sleep(_RETRY_S)


@dataclass(frozen=True, kw_only=True)
class ClaimedGroup:
    """The samples of one prompt that waited for an agent, each with a session of its own.

    Requests in one session, and heartbeats of the group, keep all of them open; `deadline_s` counts for each.
    So work on them at the same time.
    """

    group: int
    example: Mapping[str, Any]
    sessions: tuple[ClaimedSession, ...]

    def reward(self, values: Mapping[str, float]) -> list[str]:
        """Sets the rewards of all sessions that are not over, by their ids, in one request.

        Returns the ids of the sessions that were over. Raises RefusedError if an open session is missing,
        SessionOverError if all are over, UnreachableError.
        """
        return self._rewarded({"rewards": dict(values)})

    def rank(self, best_first: Sequence[ClaimedSession | Sequence[ClaimedSession]]) -> list[str]:
        """Like `reward`, by a ranking: evenly spaced from 1 (best) to 0 (worst). A list inside the list is a
        tie, whose samples get the mean of their places."""
        ranking = [
            one.id if isinstance(one, ClaimedSession) else [tied.id for tied in one] for one in best_first
        ]
        return self._rewarded({"ranking": ranking})

    def heartbeat(self) -> None:
        """Keeps all sessions alive. Raises SessionOverError if all are over, UnreachableError."""
        self._post("group/heartbeat", {})

    @contextlib.contextmanager
    def heartbeats(self) -> Iterator[None]:
        """See `ClaimedSession.heartbeats`."""
        every_s = min(session.idle_timeout_s for session in self.sessions) / _BEATS
        with _beating(self.heartbeat, every_s=every_s):
            yield

    def end(self) -> list[str]:
        """Reports that all samples are complete. Returns the ids of those that are no samples, and logs
        why; of all, if all sessions were over before. Raises JobOverError, UnreachableError."""
        try:
            problems = self._post("group/end", {})["problems"]
        except JobOverError:
            raise
        except SessionOverError as over:
            problems = {session.id: str(over) for session in self.sessions}
        for id, problem in problems.items():
            _LOG.warning("session %s is no sample: %s", id, problem)
        return list(problems)

    def _rewarded(self, body: Mapping[str, Any]) -> list[str]:
        return list(self._post("group/reward", body)["over"])

    def _post(self, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Sends it in the first session that is not over; it stands for the group."""
        for session in self.sessions[:-1]:
            try:
                return session._post(verb, body)
            except JobOverError:
                raise
            except SessionOverError:
                continue
        return self.sessions[-1]._post(verb, body)


def claim(
    url: str,
    *,
    token: str = "",
    wait_s: float = 0.0,
    restart_s: float = 0.0,
    ca_file: str = "",
    name: str = "",
    deadline_s: float | None = None,
    idle_timeout_s: float | None = None,
) -> ClaimedSession | None:
    """Claims a session of the rollout server at `url`; None if none was free within `wait_s` seconds.

    `restart_s`: how long to try again while the server does not respond, because it may be starting again, in
    seconds. `token`: of role agent or operator, if the job has keys. `ca_file`: PEM file with the authority
    of the server's certificate; empty: the system's authorities. `name`: this agent's name; empty: machine
    and process. A server identifies agents by name, and gives fewer sessions, and in the end none, to an
    agent whose sessions fail. `deadline_s`, `idle_timeout_s`: limits of this session, if below the job's.
    Raises RefusedError, JobOverError, UnreachableError.
    """
    body = {"deadline_s": deadline_s, "idle_timeout_s": idle_timeout_s}
    claimed = _claimed(url, body, token=token, wait_s=wait_s, restart_s=restart_s, ca_file=ca_file, name=name)
    return None if claimed is None else _session(claimed, claimed, ca_file=ca_file)


def claim_group(
    url: str,
    *,
    token: str = "",
    wait_s: float = 0.0,
    restart_s: float = 0.0,
    ca_file: str = "",
    name: str = "",
    deadline_s: float | None = None,
    idle_timeout_s: float | None = None,
) -> ClaimedGroup | None:
    """Claims all samples of one prompt that wait for an agent; see `claim`.

    They are a whole group, unless other agents have claimed or made samples of it.
    """
    body = {"group": True, "deadline_s": deadline_s, "idle_timeout_s": idle_timeout_s}
    claimed = _claimed(url, body, token=token, wait_s=wait_s, restart_s=restart_s, ca_file=ca_file, name=name)
    if claimed is None:
        return None
    return ClaimedGroup(
        group=claimed["group"],
        example=claimed["example"],
        sessions=tuple(_session(one, claimed, ca_file=ca_file) for one in claimed["sessions"]),
    )


def _session(own: Mapping[str, Any], shared: Mapping[str, Any], *, ca_file: str) -> ClaimedSession:
    names = set(ClaimedSession.__dataclass_fields__) - {"ca_file"}
    fields = {**shared, **own}
    return ClaimedSession(**{name: fields[name] for name in names}, ca_file=ca_file)


def _claimed(
    url: str,
    body: Mapping[str, Any],
    *,
    token: str,
    wait_s: float,
    restart_s: float,
    ca_file: str,
    name: str,
) -> dict[str, Any] | None:
    name = name or f"{socket.gethostname()[:_MAX_HOST_CHARS]}:{os.getpid()}"
    given = {field: value for field, value in body.items() if value is not None}
    end_s = time.monotonic() + wait_s
    gone_s: float | None = None  # when the server stopped responding
    is_slowed = False
    while True:
        left_s = max(0.0, end_s - time.monotonic())
        asked = {"wait_s": min(left_s, _LONGEST_WAIT_S), "name": name, **given}
        try:
            return _posted(f"{url.rstrip('/')}/sessions", asked, key=token, ca_file=ca_file)
        except UnreachableError as error:
            now_s = time.monotonic()
            if restart_s <= 0 or _is_certificate(error):
                raise
            if gone_s is None:
                gone_s = now_s
                _LOG.warning("%s; trying again for %g s", error, restart_s)
            if now_s >= gone_s + restart_s:
                raise UnreachableError(
                    f"{url}: no response for {restart_s:g} s: the job has ended, or its server has moved"
                ) from error
            time.sleep(min(_PAUSE_S, gone_s + restart_s - now_s))
        except _BusyError as busy:
            gone_s = None
            pause_s = busy.wait_s if busy.code == "agent_slowed" else _PAUSE_S
            if busy.code == "agent_slowed" and not is_slowed:
                is_slowed = True
                _LOG.warning("%s: %s", url, busy)
            if time.monotonic() >= end_s:
                return None
            time.sleep(min(pause_s, max(0.0, end_s - time.monotonic())))


def _is_certificate(error: UnreachableError) -> bool:
    """True if the server has no valid certificate, which another try does not change."""
    cause = error.__cause__
    return isinstance(getattr(cause, "reason", cause), ssl.SSLCertVerificationError)


@contextlib.contextmanager
def _beating(beat: Callable[[], None], *, every_s: float) -> Iterator[None]:
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every_s):
            try:
                beat()
            except UnreachableError:
                continue
            except ClientError:
                return

    threading.Thread(target=run, name="heartbeats", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _posted(url: str, body: Mapping[str, Any], *, key: str, ca_file: str) -> dict[str, Any]:
    """Returns the body of the response. Raises ClientError, or _BusyError for status 429."""
    if not url.startswith(("http://", "https://")):
        raise RefusedError(f"{url}: want the URL of a rollout server, http://HOST:PORT or https://HOST:PORT")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    context = ssl.create_default_context(cafile=ca_file or None) if url.startswith("https:") else None
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context) as response:
            content = response.read(_MAX_BODY_BYTES + 1)
            if len(content) > _MAX_BODY_BYTES:
                raise RefusedError(f"{url}: the response has more than {_MAX_BODY_BYTES} bytes")
            parsed = json.loads(content)
            if not isinstance(parsed, dict):
                raise RefusedError(f"{url}: the response is no JSON object: is this a rollout server?")
            return parsed
    except urllib.error.HTTPError as error:
        with error:
            raise _error_of(error, url) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, ClientError):
            raise
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            raise UnreachableError(
                f"{url}: {error}: give `ca_file`, or the name of the certificate"
            ) from error
        raise UnreachableError(
            f"{url}: no complete response ({type(error).__name__}: {error}). The server has ended or is "
            "starting again: claim again for a while; if no server of the job comes back, the job is over"
        ) from error


def _error_of(error: urllib.error.HTTPError, url: str) -> Exception:
    try:
        told = json.load(error)["error"]
        message, code = str(told["message"]), str(told.get("code") or "")
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, AttributeError):
        message, code = str(error.reason), ""
    if error.code == 429:
        return _BusyError(message, code=code, wait_s=_seconds(error.headers.get("Retry-After")))
    if code == "job_over":
        return JobOverError(message)
    if error.code == 421 and (at := error.headers.get("x-areal-server")):
        return _ElsewhereError(message, url=str(at).rstrip("/"))
    if code == "session_moved":
        moving = UnreachableError(f"{url}: {error.code}: {message}")
        moving.is_moving = True
        return moving
    if error.code in _OF_PROXIES:
        return UnreachableError(f"{url}: {error.code}: {message}: the server has ended or is starting again")
    # The session's key came from the job: if no server knows it, the run has been started again since.
    if error.code == 410 or (error.code == 401 and "/sessions/" in url):
        advice = "" if "claim another" in message else ": claim another session"
        return SessionOverError(f"{message}{advice}")
    return RefusedError(f"{url}: {error.code}: {message}")


def _seconds(header: str | None) -> float:
    try:
        return min(max(float(header or 1.0), 0.0), 60.0)
    except ValueError:
        return 1.0
