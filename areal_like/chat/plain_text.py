"""Encodes texts of others as plain text, so that what a policy writes is never a special token.

A tokenizer finds special tokens in any text: a completion with the characters `<|im_end|>` would end its turn
in a reward model's chat template, and could write the next one. Only the template writes special tokens:

    messages  ->  a mark inside each special token's text  ->  template  ->  text, places of the marks
    text, places  ->  all of it encoded, and again as plain text between the template's special tokens

Without such a text nothing differs from the tokenizer's own encoding.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from areal_like.errors import ConfigError

_MARKS = range(0xE000, 0xF900)
"""Characters without a meaning (Unicode's private use area)."""


@functools.lru_cache(maxsize=8)
def special_texts(tokenizer: Any) -> tuple[str, ...]:
    """The texts of all special tokens, longest first, also of those that have no name (`<|im_start|>`)."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted({*added, *tokenizer.all_special_tokens} - {""}, key=lambda text: (-len(text), text)))


def has_special(tokenizer: Any, value: Any) -> bool:
    """True if a string anywhere in `value` (messages, or a text) has the text of a special token."""
    # A search for each of hundreds of texts is a hundred times faster than one for a pattern of all.
    return any(special in text for text in _strings(value) for special in special_texts(tokenizer))


def mark_for(*values: Any) -> str:
    """A character that is in none of these values."""
    text = json.dumps(values, ensure_ascii=False, default=str)
    return next(mark for mark in map(chr, _MARKS) if mark not in text)


def with_marks(tokenizer: Any, value: Any, mark: str) -> Any:
    """The messages with `mark` after the first character of each special token's text."""
    pattern = _pattern(tokenizer)
    if isinstance(value, str):
        starts = [found.start() for found in pattern.finditer(value)] if pattern else []
        ends = [*(start + 1 for start in starts), len(value)]
        return mark.join(value[begin:end] for begin, end in zip([0, *ends], ends, strict=False))
    if isinstance(value, Mapping):
        return {with_marks(tokenizer, key, mark): with_marks(tokenizer, value[key], mark) for key in value}
    return [with_marks(tokenizer, each, mark) for each in value] if isinstance(value, list | tuple) else value


def without_marks(text: str, mark: str) -> tuple[str, list[int]]:
    """The text without marks, and the place of the character before each of them."""
    parts, places, length = text.split(mark), [], 0
    for part in parts[:-1]:
        length += len(part)
        places.append(length - 1)
    return "".join(parts), places


def encoded(
    tokenizer: Any, text: str, plain: Sequence[int] | range, *, add_special_tokens: bool
) -> list[int]:
    """The token ids of a text in which a special token that covers a place of `plain` is plain text.

    The text between two special tokens is encoded again as a whole, so that its tokens are those of plain
    text. Raises ConfigError if a tokenizer cannot tell where its tokens are.
    """
    if not plain:
        return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("the text has a special token's text, which a slow tokenizer cannot read as text")
    whole = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids, offsets = list(whole["input_ids"]), whole["offset_mapping"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    found = [
        (at, start, end)
        for at, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True))
        if token in special
        # The token of an unknown character is special too.
        and (token != tokenizer.unk_token_id or text[start:end].strip() in ("", tokenizer.unk_token))
    ]
    forged = {at for at, start, end in found if any(start <= place < end for place in plain)}
    # The tokenizer's own BOS and EOS have no place in the text: they are before and after it.
    kept = [
        (at, start, end) if end > start else (at, *(2 * [len(text) if at else 0]))
        for at, start, end in found
        if at not in forged
    ]
    tokens: list[int] = []
    first = begin = 0
    for at, start, end in [*kept, (len(ids), len(text), len(text))]:
        if forged.isdisjoint(range(first, at)):
            tokens += ids[first:at]
        else:
            part = tokenizer(text[begin:start], add_special_tokens=False, split_special_tokens=True)
            tokens += part["input_ids"]
        tokens += ids[at : at + 1]
        first, begin = at + 1, end
    return tokens


@functools.lru_cache(maxsize=8)
def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds where a special token's text starts, also inside of another's; None without special tokens."""
    texts = special_texts(tokenizer)
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, texts))}))") if texts else None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from (*_strings(key), *_strings(value[key]))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)
