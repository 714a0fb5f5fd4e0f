"""The directory of a job's keys: who may connect, in which role, and this process's own secret.

    public.json         the allow list: name, role, public key and a hash of the token of every key. It has no
                        secrets, and each machine needs a copy.
    <name>.secret       the key pair and the token of one identity, mode 0600; only where it is used
    operator.token      the tokens of `operator`, `monitor`, `agent` and `scorer` alone, for curl, for
    monitor.token       Prometheus's credentials_file, for programs that claim sessions, and for rewards that
    agent.token         ask score servers, mode 0600
    scorer.token

Each key has one role. A key of role `rollout` cannot register as a trainer, whoever holds it. `KeyDirectory`
is reread when public.json changes, so that keys are added, rotated and revoked while the job runs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from areal_like.config.common import NAME
from areal_like.errors import ConfigError
from areal_like.paths import private_descriptor, replacing, require_private

_PUBLIC_KEY = re.compile(r"[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}")
_TOKEN_DIGEST = re.compile(r"[0-9a-f]{64}")
_PUBLIC_FILE = "public.json"
_MAX_PUBLIC_BYTES = 1 << 20
_FORMAT = 1


class KeyRole(StrEnum):
    """The permissions of a key's holder."""

    BUFFER = "buffer"
    """Serve the stream: the key of the buffer's ROUTER."""
    TRAINER = "trainer"
    """Connect to buffers as a trainer rank, and push weights to rollout servers."""
    ROLLOUT = "rollout"
    """Connect to buffers as a rollout server, and receive weights."""
    OPERATOR = "operator"
    """All HTTP requests, /control included."""
    MONITOR = "monitor"
    """GET requests, for Prometheus."""
    AGENT = "agent"
    """Claim sessions of rollout servers, and nothing else: for external agents."""
    SCORER = "scorer"
    """Be a score server, or ask one for scores, and nothing else."""
    ROUTER = "router"
    """Read the list of rollout servers from the buffers (GET requests), and nothing else: a router passes on
    the keys of agents, and opens no session itself."""


_TOKEN_ROLES = (KeyRole.OPERATOR, KeyRole.MONITOR, KeyRole.AGENT, KeyRole.SCORER)
"""Roles that use HTTP only."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """The content of one `<name>.secret`."""

    name: str
    role: KeyRole
    public: str
    """CURVE public key, 40 characters of Z85."""
    secret: str = field(repr=False)
    """CURVE secret key, 40 characters of Z85."""
    token: str = field(repr=False)
    """Bearer token for HTTP."""


@dataclass(frozen=True, kw_only=True)
class AllowedKey:
    """One entry of public.json."""

    name: str
    role: KeyRole
    public: str
    token_sha256: str
    """Hex digest of the token."""
    added_unix_s: float
    expires_unix_s: float | None = None
    """When a rotated key is refused; None: never."""

    def is_valid(self, now_unix_s: float) -> bool:
        """True unless the key has expired."""
        return self.expires_unix_s is None or now_unix_s < self.expires_unix_s


class AllowList:
    """The keys that may connect: an immutable snapshot of public.json. Times are Unix seconds."""

    def __init__(self, keys: Sequence[AllowedKey]) -> None:
        self.keys = tuple(keys)
        self._by_public = {key.public: key for key in keys}

    def key(self, public: str, *, now_unix_s: float) -> AllowedKey | None:
        """The entry of a public key; None if it is unknown, revoked or expired."""
        found = self._by_public.get(public)
        return found if found is not None and found.is_valid(now_unix_s) else None

    def key_of_token(self, token: str, *, now_unix_s: float) -> AllowedKey | None:
        """The entry of a bearer token; None if it is unknown, revoked or expired."""
        digest = token_digest(token)
        found = None
        # All entries are compared, in constant time each, so that the time reveals nothing about the tokens.
        for key in self.keys:
            if hmac.compare_digest(key.token_sha256, digest) and key.is_valid(now_unix_s):
                found = key
        return found

    def valid(self, role: KeyRole, *, now_unix_s: float) -> list[AllowedKey]:
        """The valid keys of a role, newest first."""
        keys = [key for key in self.keys if key.role is role and key.is_valid(now_unix_s)]
        return sorted(keys, key=lambda key: key.added_unix_s, reverse=True)


class KeyDirectory:
    """A directory of keys. `refresh` reads it again when it has changed."""

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError if the directory has no readable public.json."""
        self.path = Path(path).expanduser()
        self._stamp: tuple[int, int, int] | None = None
        self.allowed = AllowList(())
        self.refresh()

    def refresh(self) -> None:
        """Reads public.json again if the file has changed.

        Raises ConfigError if the file is absent or broken; `allowed` then stays as it was.
        """
        file = self.path / _PUBLIC_FILE
        try:
            status = file.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            if stamp == self._stamp:
                return
            if status.st_size > _MAX_PUBLIC_BYTES:
                raise ConfigError(f"{file} has {status.st_size} bytes, at most {_MAX_PUBLIC_BYTES} are read")
            allowed = _allow_list(json.loads(file.read_text()), file)
        except OSError as error:
            raise ConfigError(
                f"security.keys={self.path}: {error.strerror or error} ({_PUBLIC_FILE}); "
                f"make the keys with `areal-like keys init {self.path}`"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from None
        self.allowed, self._stamp = allowed, stamp

    def identity(self, name: str) -> Identity:
        """The secret of one identity.

        Raises ConfigError if there is none, or if other users of this machine can read it.
        """
        file = self.path / f"{name}.secret"
        try:
            require_private(file)
            fields = json.loads(file.read_text())
            return Identity(**(fields | {"role": KeyRole(fields["role"])}))
        except OSError as error:
            raise ConfigError(
                f"{file}: {error.strerror or error}; this daemon needs the key {name!r} "
                "(security.identity names another one)"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{file} is not a key file ({error})") from None


def token_digest(token: str) -> str:
    """Hex SHA-256 of a token, as stored in public.json."""
    return hashlib.sha256(token.encode()).hexdigest()


def write_public(directory: Path, keys: Sequence[AllowedKey]) -> None:
    """Writes public.json atomically."""
    entries = [vars(key) | {"role": key.role.value} for key in keys]
    _write(directory / _PUBLIC_FILE, json.dumps({"format": _FORMAT, "keys": entries}, indent=2) + "\n")


def write_secret(directory: Path, identity: Identity) -> None:
    """Writes `<name>.secret`, and `<name>.token` for the roles that use HTTP only."""
    fields = vars(identity) | {"role": identity.role.value}
    _write(directory / f"{identity.name}.secret", json.dumps(fields, indent=2) + "\n")
    if identity.role in _TOKEN_ROLES:
        _write(directory / f"{identity.name}.token", identity.token + "\n")


def _write(path: Path, text: str) -> None:
    with replacing(path) as partial, os.fdopen(private_descriptor(partial), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _is_well_formed(key: AllowedKey) -> bool:
    """True if an entry is well formed: what passes is used without further checks, in daemons that must not
    fail because of it."""
    times = (key.added_unix_s, 0.0 if key.expires_unix_s is None else key.expires_unix_s)
    return (
        NAME.fullmatch(key.name) is not None
        and _PUBLIC_KEY.fullmatch(key.public) is not None
        and _TOKEN_DIGEST.fullmatch(key.token_sha256) is not None
        and all(type(time) in (int, float) for time in times)
    )


def _allow_list(document: Any, file: Path) -> AllowList:
    if not isinstance(document, Mapping) or document.get("format") != _FORMAT:
        raise ConfigError(
            f"{file} is not a list of keys of format {_FORMAT}: was it made by another release?"
        )
    try:
        keys = [AllowedKey(**(fields | {"role": KeyRole(fields["role"])})) for fields in document["keys"]]
        if not all(map(_is_well_formed, keys)):
            raise ValueError("a key has a malformed name, public key, token hash or time")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {type(error).__name__}: {error}") from None
    return AllowList(keys)
