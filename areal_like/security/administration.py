"""Changes to a directory of keys: making, adding, rotating and revoking them.

The commands of `areal-like keys` call these functions. Each holds a lock on the directory, so that concurrent
commands do not lose each other's changes. A rotation writes the new secret before public.json: a daemon uses
a new secret only when its public key is in public.json too, so it never connects with a key that the other
daemons do not have.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import zmq

from areal_like.config.common import NAME, NAME_RULE
from areal_like.errors import ConfigError
from areal_like.security.keys import (
    AllowedKey,
    Identity,
    KeyDirectory,
    KeyRole,
    token_digest,
    write_public,
    write_secret,
)

_TOKEN_BYTES = 32


def init_keys(path: Path, roles: Sequence[KeyRole], *, now_unix_s: float | None = None) -> list[AllowedKey]:
    """Makes a directory with one key for each role, named after it.

    Raises ConfigError if the directory holds anything: keys are never overwritten.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ConfigError(
                f"{path} is not empty: `areal-like keys rotate {path}` renews its keys, "
                "`keys add` adds one; or name a new directory"
            )
        path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    with _locked(path):
        now_s = time.time() if now_unix_s is None else now_unix_s
        identities = [_new_identity(role.value, role) for role in dict.fromkeys(roles)]
        keys = [_allowed(identity, added_unix_s=now_s) for identity in identities]
        for identity in identities:
            write_secret(path, identity)
        write_public(path, keys)
    return keys


def add_key(path: Path, name: str, role: KeyRole) -> AllowedKey:
    """Adds a key under its own name, so that it can be revoked alone.

    Raises ConfigError if the name is taken or not valid.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r}: {NAME_RULE}")
    with _locked(path):
        keys = KeyDirectory(path).allowed.keys
        if any(key.name == name for key in keys) or (path / f"{name}.secret").exists():
            raise ConfigError(
                f"{path} has a key {name!r}: `areal-like keys rotate {path} {name}` renews it, "
                "or choose another name"
            )
        identity = _new_identity(name, role)
        added = _allowed(identity, added_unix_s=time.time())
        write_secret(path, identity)
        write_public(path, [*keys, added])
    return added


def rotate_keys(
    path: Path, name: str = "", *, grace_s: float, now_unix_s: float | None = None
) -> list[AllowedKey]:
    """Renews one key, or all of them without a name, and returns the new ones. Old keys stay valid for
    `grace_s` seconds.

    Keys that have expired are removed. Raises ConfigError for an unknown name.
    """
    with _locked(path):
        now_s = time.time() if now_unix_s is None else now_unix_s
        keys = KeyDirectory(path).allowed.keys
        if name and not any(key.name == name for key in keys):
            raise ConfigError(_unknown(path, name, keys))
        roles = {key.name: key.role for key in keys if not name or key.name == name}
        kept, added = [], []
        for key in keys:
            if key.name in roles and (key.expires_unix_s is None or key.expires_unix_s > now_s + grace_s):
                key = AllowedKey(**(vars(key) | {"expires_unix_s": now_s + grace_s}))
            if key.is_valid(now_s):
                kept.append(key)
        for renewed, role in roles.items():
            identity = _new_identity(renewed, role)
            # Later than the key it replaces, whatever the clock says: the newest key is the one in use.
            newest_s = max(key.added_unix_s for key in keys if key.name == renewed)
            added.append(_allowed(identity, added_unix_s=max(now_s, newest_s + 1e-3)))
            write_secret(path, identity)
        write_public(path, [*kept, *added])
    return added


def revoke_key(path: Path, name: str) -> int:
    """Removes a name's keys, old and new, and its secret if it is here; returns how many keys were removed.

    Raises ConfigError for an unknown name.
    """
    with _locked(path):
        keys = KeyDirectory(path).allowed.keys
        kept = [key for key in keys if key.name != name]
        if len(kept) == len(keys):
            raise ConfigError(_unknown(path, name, keys))
        write_public(path, kept)
        for suffix in ("secret", "token"):
            (path / f"{name}.{suffix}").unlink(missing_ok=True)
    return len(keys) - len(kept)


def fingerprint(public: str) -> str:
    """A short form of a public key that people can compare."""
    return hashlib.sha256(public.encode()).hexdigest()[:16]


def has_secret(path: Path, key: AllowedKey) -> bool:
    """True if the secret of exactly this key is in the directory and readable."""
    try:
        return KeyDirectory(path).identity(key.name).public == key.public
    except ConfigError:
        return False


def _new_identity(name: str, role: KeyRole) -> Identity:
    public, secret = zmq.curve_keypair()
    return Identity(
        name=name,
        role=role,
        public=public.decode(),
        secret=secret.decode(),
        token=secrets.token_urlsafe(_TOKEN_BYTES),
    )


def _allowed(identity: Identity, *, added_unix_s: float) -> AllowedKey:
    return AllowedKey(
        name=identity.name,
        role=identity.role,
        public=identity.public,
        token_sha256=token_digest(identity.token),
        added_unix_s=added_unix_s,
    )


def _unknown(path: Path, name: str, keys: Sequence[AllowedKey]) -> str:
    known = ", ".join(sorted({key.name for key in keys})) or "none"
    return f"{path} has no key {name!r} (keys: {known})"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}; make keys with `areal-like keys init {path}`"
        ) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
