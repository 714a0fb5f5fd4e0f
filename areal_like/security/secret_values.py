"""The configuration as it may leave the machine, to a tracker's server or in a report: without secrets.

Passwords belong into files and variables, and no setting of ours has one. But tasks, rewards and the
environment of an engine have settings of their own (`task.reward.api_key`, `rollout.sglang.env.HF_TOKEN`). So
values are replaced by their names, also where a name only looks like that of a secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(hidden)"
_SECRET_NAME = re.compile(
    r"(^|[_\-.])(api[_\-]?key|access[_\-]?key|private[_\-]?key|token|secret|passw(or)?d|credentials?|auth"
    r"|authorization|cookie|bearer)s?$",
    re.I,
)
_ALL_HIDDEN = ("env", "environment", "headers")
"""Mappings of which every value is hidden."""
_SECRET_ARGUMENT = re.compile(r"(--?[\w-]*(?:key|token|secret|password)[ =]+)(?!-)\S+", re.I)
"""An option in a setting that holds a command line (`rollout.sglang.args`)."""
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_IN_QUERY = re.compile(r"([?&][^=&\s]*(?:key|token|secret|password|sig)[^=&\s]*=)[^&\s]+", re.I)


def without_secrets(value: Any, *, name: str = "") -> Any:
    """A copy of plain dicts and lists in which text that could be secret is `(hidden)`.

    Numbers are kept: `max_tokens` is none. `name`: the key of `value`.
    """
    if isinstance(value, Mapping):
        hides = name.lower() in _ALL_HIDDEN
        return {
            str(key): HIDDEN if hides and item != "" else without_secrets(item, name=str(key))
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, name=name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if _SECRET_NAME.search(name):
        return HIDDEN
    value = _SECRET_ARGUMENT.sub(rf"\1{HIDDEN}", value)
    return _IN_QUERY.sub(rf"\1{HIDDEN}", _IN_URL.sub(HIDDEN, value))
