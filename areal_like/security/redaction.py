"""A configuration without its secrets, for the HTTP page /config.

The settings of this project name files of secrets and contain none. Those of a task, a tracker or an engine's
environment are open, and users write keys into them. What has the name of a secret is therefore hidden, and
so are user names and passwords in addresses. Left out: secrets under names that do not say so.
"""

from __future__ import annotations

import math
import re
from typing import Any

HIDDEN = "***"
PUBLIC = frozenset({"security.keys", "security.tls_private_key"})
"""Settings with the name of a secret that are the name of a file."""
_SECRET_VALUE = re.compile(r"secret|passw|credential|authorization|private_?key", re.IGNORECASE)
"""In the name of a setting: hides values of every type."""
_SECRET_TEXT = re.compile(
    r"(^|[_-])(auth|token|passphrase)s?$|(^|_|-)(api|access|account|master|signing|storage)[_-]?keys?$|^keys?$",
    re.IGNORECASE,
)
"""At the end of the name: hides texts. `max_new_tokens` is a number, and `prompt_key` names a column."""
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+@")
_OPTION = re.compile(
    r"(--[\w-]*(?:key|token|secret|password|passwd|auth))([ =]+)('[^']*'|\"[^\"]*\"|\S+)", re.IGNORECASE
)
"""An option with its value, in a setting that is a command line."""


def without_secrets(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy for JSON: secrets are HIDDEN, and numbers that JSON does not have are texts (`inf`)."""
    return {name: _shown(value, path=str(name), name=str(name)) for name, value in settings.items()}


def has_secret_name(name: str, value: Any) -> bool:
    """True if this setting's value is to be hidden."""
    if value is None or isinstance(value, (bool, dict, list, tuple)) or value == "":
        return False
    is_text = isinstance(value, str)
    return _SECRET_VALUE.search(name) is not None or (is_text and _SECRET_TEXT.search(name) is not None)


def _shown(value: Any, *, path: str, name: str) -> Any:
    if isinstance(value, dict):
        return {str(key): _shown(item, path=f"{path}.{key}", name=str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(item, path=path, name=name) for item in value]
    if path not in PUBLIC and has_secret_name(name, value):
        return HIDDEN
    if isinstance(value, str):
        return _OPTION.sub(rf"\1\2{HIDDEN}", _USER_OF_URL.sub(f"{HIDDEN}@", value))
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
