"""Tokens of a directory of keys, as HTTP clients send them."""

from __future__ import annotations

from pathlib import Path

from areal_like.security.keys import KeyDirectory, KeyRole
from tests.support.keys import new_keys


def make_keys(directory: Path) -> dict[str, str]:
    """Writes one key for each role, named after it; returns their tokens by name."""
    keys = KeyDirectory(new_keys(directory))
    return {role.value: keys.identity(role.value).token for role in KeyRole}
