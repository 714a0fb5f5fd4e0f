"""Bearer tokens of the HTTP planes: a server checks those of its clients, a client reads its own."""

from __future__ import annotations

import time
from pathlib import Path

from areal_like.errors import ConfigError
from areal_like.paths import require_private
from areal_like.security.keyring import Keyring
from areal_like.security.keys import KeyRole

OPERATOR_FILE = "operator.token"
MONITOR_FILE = "monitor.token"
_MAX_TOKEN_BYTES = 4096


def role_of_token(keys: Keyring, token: str) -> KeyRole | None:
    """The role of a bearer token; None if it is unknown, revoked or expired."""
    key = keys.directory.allowed.key_of_token(token, now_unix_s=time.time())
    return key.role if key is not None else None


def operator_token(directory: str | Path) -> str:
    """The operator's token. Raises ConfigError if it is absent or if other users can read it."""
    file = Path(directory).expanduser() / OPERATOR_FILE
    try:
        return read_secret(file)
    except FileNotFoundError:
        raise ConfigError(
            f"this needs the operator's token, and {file} does not exist: run it where the file is, "
            f"or copy it from the directory in which `areal-like keys init` created it"
        ) from None


def monitor_token(directory: str | Path) -> str | None:
    """The token of `monitor`; None if its file is not there. Raises ConfigError if others can read it."""
    try:
        return read_secret(Path(directory).expanduser() / MONITOR_FILE)
    except FileNotFoundError:
        return None


def any_token(directory: str | Path) -> str:
    """The operator's token, or that of `monitor` if the operator's is absent. Raises ConfigError."""
    folder = Path(directory).expanduser()
    for name in (OPERATOR_FILE, MONITOR_FILE):
        if (folder / name).exists():
            return read_secret(folder / name)
    raise ConfigError(f"{folder} has neither {OPERATOR_FILE} nor {MONITOR_FILE}: copy one of them there")


def read_secret(file: Path) -> str:
    """The content of a file of one line, without the line break.

    Raises FileNotFoundError, and ConfigError if the file is empty, too long, unreadable or readable by other
    users.
    """
    try:
        require_private(file)
        with file.open("rb") as stream:
            content = stream.read(_MAX_TOKEN_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    text = content.decode("latin-1").strip()
    if not text.isascii() or not text.isprintable() or not text or len(content) > _MAX_TOKEN_BYTES:
        raise ConfigError(f"{file} must contain one line of printable characters")
    return text
