"""Finds the final answer in a completion, and brings answers into a form in which they can be compared. Pure.

Models are asked to end with a marker (`#### 42`, `<answer>42</answer>`, `\\boxed{42}`). The last marker
counts, because a model that corrects itself writes another one.
"""

from __future__ import annotations

import re
from fractions import Fraction

_CURRENCY = "$€£¥"
_MAX_NUMBER_CHARS = 1000
"""Matching and reading a longer one takes quadratic time."""


def after_marker(text: str, marker: str) -> str | None:
    """The text behind the last `marker`; None without one.

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
    """The last line that is not empty; empty without one."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def number_in(text: str) -> Fraction | None:
    """The number that the whole text is: `1,234.50`, `$12`, `7 %`, `-3/4`; None for any other text.

    A percentage is the number before its sign. A final period belongs to a sentence.
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
