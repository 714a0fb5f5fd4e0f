"""Finds the final answer in a completion, and normalizes answers for comparison. Pure.

Models are asked to end with a marker (`#### 42`, `<answer>42</answer>`, `\\boxed{42}`). The last marker
counts, because a model that corrects itself writes a new one.
"""

from __future__ import annotations

import re
from fractions import Fraction

_CURRENCY = "$€£¥"
_MAX_NUMBER_CHARS = 1000
"""Longer numbers are not parsed, because matching and parsing take quadratic time."""


def after_marker(text: str, marker: str) -> str | None:
    """Returns the text after the last `marker`; None if there is none.

    A marker `<tag>` ends at `</tag>`, a marker that ends with `{` at its closing brace, any other at the end
    of its line.
    """
    start = text.rfind(marker)
    if start < 0:
        return None
    rest = text[start + len(marker) :]
    if tag := re.fullmatch(r"<([A-Za-z][\w-]*)>", marker):
        return rest.partition(f"</{tag[1]}>")[0].strip()
    if marker.endswith("{"):
        return _until_brace(rest).strip()
    return rest.strip().partition("\n")[0].strip()


def _until_brace(text: str) -> str:
    depth = 1
    for position, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[:position]
    return text


def last_line(text: str) -> str:
    """Returns the last non-empty line; empty if there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def number_in(text: str) -> Fraction | None:
    """Parses a text that is a number as a whole: `1,234.50`, `$12`, `7 %`, `-3/4`; None for any other text.

    A percentage is the number before the sign. A final period is ignored.
    """
    text = text.strip().rstrip(".").strip().replace("−", "-")
    sign, text = (text[0], text[1:].strip()) if text[:1] in ("-", "+") else ("", text)
    text = text.strip(_CURRENCY).removesuffix("%").strip()
    text = re.sub(r"(?<=\d),(?=\d{3}(\D|$))", "", text)
    numerator, slash, denominator = text.partition("/")
    value, divisor = _fraction(numerator), _fraction(denominator) if slash else Fraction(1)
    if value is None or not divisor:
        return None
    return (-value if sign == "-" else value) / divisor


def _fraction(text: str) -> Fraction | None:
    text = text.strip()
    if len(text) > _MAX_NUMBER_CHARS:
        return None
    is_number = re.fullmatch(r"-?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,4})?", text, re.ASCII)
    return Fraction(text) if is_number else None
