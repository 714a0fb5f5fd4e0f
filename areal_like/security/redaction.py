"""Removes secrets from a configuration before it leaves the job: on the page /config, in a report, at a
tracker.

The settings of this project name files of secrets and contain none. The settings of a task, a tracker or an
engine's environment are open, and users write keys into them. So every setting with the name of a secret is
hidden, whatever its value, and so are the values of environments and headers, users and passwords in
addresses, query parameters, command-line options, and bearer tokens. Left out: secrets whose names do not
show that they are secrets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
PUBLIC = frozenset({"security.keys", "security.tls_private_key"})
"""Settings that have the name of a secret but hold a file name."""
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SECRET_VALUE = re.compile(
    r"secret|passw|passphrase|credential|authorization|private_?key|cookie|bearer", re.IGNORECASE
)
"""Matches within the name of a setting: hides values of every type."""
_SECRET_TEXT = re.compile(
    r"(^|[_.-])(auth|token)s?$"
    r"|(^|[_.-])(api|access|account|master|signing|storage|openai|anthropic|hf|wandb)[_-]?keys?$|^keys?$",
    re.IGNORECASE,
)
"""Matches at the end of the name: hides everything except numbers. `max_new_tokens` is a number, and
`prompt_key` names a column."""
_ALL_HIDDEN = ("env", "environment", "headers")
"""Mappings in which every value is hidden."""
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]+@")
_IN_QUERY = re.compile(r"([?&][^=&\s]*(?:key|token|secret|password|sig|auth)[^=&\s]*=)[^&\s]+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic)\s+[^\s'\"]{8,}", re.IGNORECASE)
_SECRET_OPTION = r"--?[\w-]*(?:key|token|secret|password|passwd|passphrase|auth)"
_OPTION = re.compile(rf"({_SECRET_OPTION})([ =]+)('[^']*'|\"[^\"]*\"|(?!-)\S+)", re.IGNORECASE)
"""An option with its value, in a setting that is a command line."""
_BARE_OPTION = re.compile(_SECRET_OPTION, re.IGNORECASE)


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy for JSON: secrets are HIDDEN, and numbers that JSON does not have are texts (`inf`)."""
    return {str(name): _shown(value, path=str(name), name=str(name)) for name, value in settings.items()}


def has_secret_name(name: str, value: Any) -> bool:
    """True if this setting's value must be hidden."""
    if value is None or isinstance(value, bool) or value in ("", [], {}, ()):
        return False
    words = _CAMEL.sub("_", name)
    if _SECRET_VALUE.search(words) is not None:
        return True
    if _SECRET_TEXT.search(words) is None:
        return False
    # Numbers are not secrets here: `stop_tokens: [1, 2]`.
    items = value if isinstance(value, (list, tuple)) else [value]
    return not all(isinstance(item, (int, float)) for item in items)


def _shown(value: Any, *, path: str, name: str) -> Any:
    if path not in PUBLIC and has_secret_name(name, value):
        return HIDDEN
    if isinstance(value, Mapping):
        if name.lower() in _ALL_HIDDEN:
            return {str(key): item if item in ("", None) else HIDDEN for key, item in value.items()}
        return {str(key): _shown(item, path=f"{path}.{key}", name=str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _shown_items(value, path=path, name=name)
    if isinstance(value, str):
        for pattern, shown in _PARTS:
            value = pattern.sub(shown, value)
        return value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shown_items(items: Sequence[Any], *, path: str, name: str) -> list[Any]:
    """The items of a list. In a command line given as words, the word after a secret's option is hidden."""
    shown: list[Any] = []
    is_secret = False
    for item in items:
        is_text = isinstance(item, str)
        shown.append(HIDDEN if is_secret and is_text else _shown(item, path=path, name=name))
        is_secret = is_text and _BARE_OPTION.fullmatch(item) is not None
    return shown


_PARTS = (
    (_USER_OF_URL, f"{HIDDEN}@"),
    (_IN_QUERY, rf"\1{HIDDEN}"),
    (_BEARER, rf"\1 {HIDDEN}"),
    (_OPTION, rf"\1\2{HIDDEN}"),
)
"""Patterns of secrets in a text, and the text that replaces each."""
