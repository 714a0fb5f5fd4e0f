"""Directories of keys, and links and listeners that use them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from areal_like.errors import ArealError
from areal_like.security.administration import init_keys
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyDirectory, KeyRole
from areal_like.wire.channel import Envelope, Link, Listener
from areal_like.wire.curve import CurveClient, CurveServer


def new_keys(path: Path) -> Path:
    """A directory with one key for each role."""
    init_keys(path, list(KeyRole))
    return path


def make_keys(path: Path) -> dict[str, str]:
    """Writes one key for each role, named after it; returns their tokens by name, for HTTP."""
    keys = KeyDirectory(new_keys(path))
    return {role.value: keys.identity(role.value).token for role in KeyRole}


def keys_of_machine(source: Path, path: Path, *names: str) -> Path:
    """What an operator copies to a machine: public.json and the secrets of its own daemons."""
    path.mkdir(mode=0o700)
    for file in ("public.json", *(f"{name}.secret" for name in names)):
        shutil.copy2(source / file, path / file)
    return path


def keyring(
    path: Path, role: KeyRole, *, name: str = "", clock: Callable[[], float] | None = None
) -> Keyring:
    """The keyring of a daemon of this role."""
    named: dict[str, Any] = {"name": name or role.value, "role": role}
    return Keyring(KeyDirectory(path), **named, **({"clock": clock} if clock else {}))


def keyed_listener(
    keys: Keyring,
    handler: Callable[[Listener, Envelope], None],
    *,
    roles: tuple[KeyRole, ...] = (KeyRole.ROLLOUT, KeyRole.TRAINER),
    on_failure: Callable[[ArealError], None] = lambda error: None,
) -> Listener:
    """A Listener with CURVE on a free port."""

    def handle(envelope: Envelope) -> None:
        handler(listener, envelope)

    curve = CurveServer(keys, roles=roles, on_failure=on_failure)
    listener = Listener(host="127.0.0.1", port=0, handler=handle, max_message_bytes=1 << 20, curve=curve)
    return listener


def keyed_link(
    address: str,
    keys: Keyring | None,
    *,
    role: KeyRole = KeyRole.BUFFER,
    handler: Callable[[Any], None] = lambda message: None,
) -> Link:
    """A Link to a server of this role; without `keys`, an ordinary one."""
    return Link(address, handler=handler, curve=CurveClient(keys, role=role) if keys else None)
