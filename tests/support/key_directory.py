"""A directory of keys as `areal-like keys init` makes it, with keys that need no ZeroMQ."""

from __future__ import annotations

import time
from pathlib import Path

from areal_like.security.keys import AllowedKey, Identity, KeyRole, token_digest, write_public, write_secret


def make_keys(directory: Path) -> dict[str, str]:
    """Writes one key for each role, named after it; returns their tokens by name."""
    directory.mkdir(mode=0o700)
    identities = [
        Identity(name=role.value, role=role, public=f"{role.value:P<40}", secret=f"{role.value:S<40}",
                 token=f"token-of-{role.value}")
        for role in KeyRole
    ]  # fmt: skip
    for identity in identities:
        write_secret(directory, identity)
    allow(directory, *(identity.name for identity in identities))
    return {identity.name: identity.token for identity in identities}


def allow(directory: Path, *names: str) -> None:
    """Makes these the only keys that are allowed."""
    keys = [
        AllowedKey(name=name, role=KeyRole(name), public=f"{name:P<40}",
                   token_sha256=token_digest(f"token-of-{name}"), added_unix_s=time.time())
        for name in names
    ]  # fmt: skip
    write_public(directory, keys)
