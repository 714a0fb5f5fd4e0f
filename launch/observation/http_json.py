"""Sends JSON requests to the daemons' HTTP servers: GET for a status, POST for a control request.

The operator's token is sent only with a change, and only to buffers and ranks of the trainer; changes are
never sent to a server (`drain_server` goes to the buffer). A GET carries the token of `monitor`, or else that
of a daemon's key. Both may only read, because every rollout server can write files into the run's directory:
one may give its own address as that of a rank.

Addresses come from the run's endpoint files, which the daemons write themselves, and never from one daemon's
report about another. On this machine, the process at an address must belong to the user who wrote the file.
The operator's token goes only to the address in a file that the directory's owner wrote and that nobody else
can write. A user may name further addresses.

Left out: a proof that an address on another machine is a buffer's. A process of the user who runs the job can
replace `buffer.json`, and then receives the token of the next change.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import os
import re
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from areal_like.config.security import SecurityConfig
from areal_like.errors import ConfigError
from areal_like.security.keys import KeyDirectory, KeyRole
from areal_like.security.tls import client_context
from areal_like.security.tokens import MONITOR_FILE, any_token, monitor_token, operator_token
from areal_like.terminal_text import harmless
from launch.observation.responses import checked_status, harmless_object, parsed_object
from launch.run_files import read_object

REQUEST_TIMEOUT_S = 1.0
"""Time limit of a request of the launcher, which polls again."""
COMMAND_TIMEOUT_S = 5.0
"""Time limit of a request of a command, which asks once: the machine may be busy, or behind a tunnel."""
_MAX_RESPONSE_BYTES = 64 << 20
_REFUSED = (401, 403, 421)
"""HTTP statuses that mean that a daemon refuses this caller, whatever the request is."""
IS_BUFFER_OR_RANK = re.compile(r"(buffer|trainer)(-\d+)?")
"""Names of the daemons to which commands send changes."""
_ADDRESS = re.compile(r".+:[0-9]{1,5}")
"""An address in an endpoint file, which any rollout server may have written."""
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp."""
_ANY = (ipaddress.ip_address("0.0.0.0"), ipaddress.ip_address("::"))


class _Daemon(NamedTuple):
    """The daemon at an address, according to the endpoint files."""

    user: int
    """User id of the file's owner."""
    may_be_changed: bool
    problem: str
    """Why the file may be another user's; empty if only its directory's owner can have written it."""


class Operator:
    """The operator's access to the daemons of one run: tokens, and the certificate to expect."""

    def __init__(
        self, security: SecurityConfig, endpoints: Path | None, *, given: Iterable[str] = ()
    ) -> None:
        """`endpoints`: the run's directory of endpoint files. `given`: addresses that a user has named; that
        user may have only the monitor's token.

        Raises ConfigError if the token or the certificate is missing.
        """
        self._endpoints = endpoints
        self._given = frozenset(given)
        self._token_of = any_token if self._given else operator_token
        self._keys, self._identity = security.keys, security.identity
        self._known: dict[str, _Daemon] = {}
        """Address in an endpoint file -> its daemon."""
        self._tls = client_context(security)
        if security.keys:
            self._token_of(security.keys)

    @property
    def has_keys(self) -> bool:
        """True on a job with keys."""
        return bool(self._keys)

    def headers(self, address: str, *, changes: bool) -> dict[str, str]:
        """The headers of a request to `host:port`. `changes`: the request is for a change.

        They have no token if the address is not a daemon's. The token is read again, because it may have been
        rotated. Raises ConfigError if it is gone, or if no token that may only read is on this machine.
        """
        token = self._token(address, changes=changes) if self._keys else None
        return {} if token is None else {"Authorization": f"Bearer {token}"}

    def _token(self, address: str, *, changes: bool) -> str | None:
        may_be_changed, problem = address in self._given, ""
        if not may_be_changed:
            if address not in self._known or self._known[address].problem:
                self._known = self._addresses()
            daemon = self._known.get(address)
            if daemon is None or not may_belong_to(address, daemon.user):
                return None
            may_be_changed, problem = daemon.may_be_changed, daemon.problem
        if changes:
            if may_be_changed and problem:
                raise ConfigError(problem)
            return self._token_of(self._keys) if may_be_changed else None
        if (token := monitor_token(self._keys) or self._token_of_a_daemon()) is not None:
            return token
        if address in self._given:
            return self._token_of(self._keys)
        raise ConfigError(
            f"{self._keys} has no token to read with: copy {MONITOR_FILE} there, or create it with "
            f"`areal-like keys add {self._keys} monitor --role monitor` and copy public.json to every machine"
        )

    def _token_of_a_daemon(self) -> str | None:
        """The token of a daemon's key, which may only read; None if none is on this machine. A rollout
        server's first: those that could forge an endpoint file have it anyway."""
        daemons = (KeyRole.ROLLOUT, KeyRole.BUFFER, KeyRole.TRAINER)
        for name in (self._identity, *(role.value for role in daemons)):
            with contextlib.suppress(ConfigError):
                identity = KeyDirectory(self._keys).identity(name) if name else None
                if identity is not None and identity.role in daemons:
                    return identity.token
        return None

    def connection(self, host: str, port: int, *, timeout_s: float) -> http.client.HTTPConnection:
        """A connection that is not open yet; over TLS if the job has a certificate."""
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=timeout_s)
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._tls)

    def _addresses(self) -> dict[str, _Daemon]:
        found: dict[str, _Daemon] = {}
        for path in self._endpoints.glob("*.json") if self._endpoints is not None else ():
            try:
                address, file = str(read_object(path)["http"]), path.stat()
                problem = _problem_of(path, file, owner=path.parent.stat().st_uid)
            except (OSError, KeyError):
                continue  # the daemon has just ended and removed its file
            may_be_changed = IS_BUFFER_OR_RANK.fullmatch(path.stem) is not None
            daemon = _Daemon(user=file.st_uid, may_be_changed=may_be_changed, problem=problem)
            if address not in found or daemon.may_be_changed:  # a forged file must not replace a buffer's
                found[address] = daemon
        return found


def _problem_of(path: Path, file: os.stat_result, *, owner: int) -> str:
    if file.st_uid not in (owner, 0):
        return f"{path} belongs to another user than its directory: the operator's token is not sent there"
    if file.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return (
            f"{path} can be written by other users: chmod 600 it, or the operator's token is not sent there"
        )
    return ""


NO_OPERATOR = Operator(SecurityConfig(), Path())
"""The operator of a job without keys and certificate."""


def fetch_json(
    address: str, path: str, *, operator: Operator = NO_OPERATOR, timeout_s: float = REQUEST_TIMEOUT_S
) -> dict[str, Any] | None:
    """GET http://address/path; returns the JSON object, or None if none arrives within `timeout_s`.

    Also None if the daemon wants a token and this operator has none for it. Raises ConfigError if the daemon
    refuses this caller.
    """
    if not _ADDRESS.fullmatch(address):
        return None
    headers = operator.headers(address, changes=False)
    try:
        status, found = _exchange(
            "GET", address, path, operator=operator, headers=headers, timeout_s=timeout_s
        )
    except OSError:
        return None
    if status in _REFUSED:
        if operator.has_keys and not headers:
            return None
        raise ConfigError(_refusal(address, found))
    return checked_status(found) if path == "/status" else found


def post_json(
    address: str,
    path: str,
    body: dict[str, Any],
    *,
    operator: Operator = NO_OPERATOR,
    timeout_s: float = 5.0,
) -> dict[str, Any]:
    """POST http://address/path; returns the JSON object in the response.

    Raises OSError if the daemon does not respond, ConfigError with the daemon's reason if it refuses.
    """
    if not _ADDRESS.fullmatch(address):
        raise ConnectionError(f"its address {address!r:.80} is not HOST:PORT")
    headers = operator.headers(address, changes=True)
    text = json.dumps(body)
    status, found = _exchange(
        "POST", address, path, operator=operator, headers=headers, timeout_s=timeout_s, body=text
    )
    if status in _REFUSED:
        raise ConfigError(_refusal(address, found))
    if status != 200:
        raise ConfigError(_error_of(found))
    return harmless_object(found)


def _exchange(
    method: str,
    address: str,
    path: str,
    *,
    operator: Operator,
    headers: dict[str, str],
    timeout_s: float,
    body: str | None = None,
) -> tuple[int, dict[str, Any]]:
    """Sends a request; returns the status and the JSON object of the response. Raises OSError."""
    host, _, port = address.rpartition(":")
    try:
        connection = operator.connection(host.strip("[]"), int(port), timeout_s=timeout_s)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers)
            response = connection.getresponse()
            content = response.read(_MAX_RESPONSE_BYTES + 1)
        if len(content) > _MAX_RESPONSE_BYTES:
            raise ValueError(f"longer than {_MAX_RESPONSE_BYTES} bytes")
        return response.status, parsed_object(content)
    except (ValueError, http.client.HTTPException) as error:
        raise ConnectionError(f"its response is not a JSON object: {error}") from None


def _refusal(address: str, found: dict[str, Any]) -> str:
    return f"the daemon at {address} refuses this command: {_error_of(found)}"


def _error_of(found: dict[str, Any]) -> str:
    return harmless(str(found.get("error", found)))


def may_belong_to(address: str, user: int) -> bool:
    """False if `host:port` is a loopback address at which no process of this user listens.

    A killed daemon leaves its endpoint file, and another user's process may get its port. Linux shows the
    user of every listening socket, also to other users. Returns True for other addresses, and on systems
    without these tables, where the owner is not known.
    """
    host, _, port = address.rpartition(":")
    try:
        parsed = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host.strip("[]"))
    except ValueError:
        return True
    if not (parsed.is_loopback or parsed.is_unspecified) or not _TABLES[0].exists():
        return True
    ends = {f"{_as_shown(each)}:{int(port):04X}" for each in (parsed, *_ANY)}
    users = [
        int(fields[7])
        for table in _TABLES
        if table.exists()
        for fields in map(str.split, table.read_text().splitlines()[1:])
        if fields[3] == _LISTEN and fields[1] in ends
    ]
    return bool(users) and all(found == user for found in users)


def _as_shown(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """An address as in /proc/net/tcp: words of 32 bits, each in this machine's byte order."""
    packed = address.packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words)
