"""Text that others wrote, made safe to print on a terminal.

Policies, rewards, agents and peers write texts that end in logs, errors and the responses of daemons. They
may contain terminal escape sequences, so each control character, and each invisible one that changes the
order of text, is shown as its escape (`\\x1b`).
"""

from __future__ import annotations

import unicodedata
from typing import Any

_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def harmless(text: str) -> str:
    """The text with its control and invisible characters as escapes; line ends and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in _HIDDEN_CATEGORIES
        else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def harmless_name(text: str) -> str:
    """A label or name without line ends too: a new line could look like another entry."""
    return harmless(text).replace("\n", "\\n").replace("\t", "\\t")


def harmless_values(value: Any) -> Any:
    """A JSON value in which every text is harmless, and every key a harmless name."""
    if isinstance(value, str):
        return harmless(value)
    if isinstance(value, dict):
        return {harmless_name(key): harmless_values(each) for key, each in value.items()}
    return [harmless_values(each) for each in value] if isinstance(value, list) else value
