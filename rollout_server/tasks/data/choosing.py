"""Selects the rows of a data set that a task uses: checks them, holds some out, drops long prompts.

Each pass over the rows is cached under a key of everything that it depends on (`areal_like.data.cache`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator

import numpy as np

from areal_like.data import RowFormat, Rows
from areal_like.data.cache import Numbers, remembered
from areal_like.errors import ConfigError
from rollout_server.tasks.base import FittingPrompts, Prompt

_BATCH = 512
"""Number of prompts tokenized at a time."""
_RULES = 1
"""Part of the cache keys: increase it when the rules of this module or of RowFormat change."""


def check_rows(rows: Rows, read: RowFormat, *, key: str) -> None:
    """Raises ConfigError with file and line for the first row without prompt, answer or label."""

    def check() -> Numbers:
        answered = None
        for index in range(len(rows)):
            try:
                row = rows[index]
                read.prompt_of(row)
                read.label_of(row)
                has_answer = read.answer_of(row) is not None
                if answered is None:
                    answered = has_answer
                if has_answer is not answered:
                    raise ConfigError(
                        "the row has no answer, and others do: set answer_key, or complete the row"
                        if answered
                        else "the row has an answer, and those before it do not: set answer_key"
                    )
            except ConfigError as error:
                raise ConfigError(f"{key}: {rows.place(index)}: {error}") from error
        return np.arange(0)

    remembered(_key("checked", rows, read), check)


def divide(rows: Rows, read: RowFormat, *, num_eval: int, share: float) -> tuple[Numbers, Numbers]:
    """Returns the rows to train on and the held-out rows: `num_eval` rows plus those with the same prompts,
    or, if it is 0, a share of all prompts (at least one).

    Prompts with the smallest hashes are held out, independently of their position in the file. Raises
    ConfigError if no row is left to train on.
    """
    if not (num_eval or share):
        return np.arange(len(rows)), np.arange(0)

    def held_out() -> Numbers:
        hashes = np.fromiter((_hash(prompt) for prompt in _prompts(rows, read)), np.uint64, len(rows))
        smallest = np.partition(hashes, min(num_eval, len(rows)) - 1 if num_eval else 0)
        least = smallest[min(num_eval, len(rows)) - 1 if num_eval else 0]
        bound = least if num_eval else max(least, np.uint64(share * (1 << 64)))
        return np.flatnonzero(hashes <= bound).astype(np.int64)

    numbers = remembered([*_key("held out", rows, read), num_eval, share], held_out)
    rest = np.setdiff1d(np.arange(len(rows)), numbers, assume_unique=True)
    if not len(rest):
        raise ConfigError(
            f"task.train: all {len(rows)} rows would be held out: name the held-out rows with task.eval, or "
            "lower task.num_eval"
        )
    return rest, numbers


def fitting_rows(rows: Rows, read: RowFormat, fitting: FittingPrompts, *, limit: int, key: str) -> Numbers:
    """Returns the rows whose prompts have at most `limit` tokens. Raises ConfigError with the place of a row
    that cannot be rendered."""

    def count() -> Numbers:
        kept: list[int] = []
        for first in range(0, len(rows), _BATCH):
            numbers = range(first, min(first + _BATCH, len(rows)))
            prompts = list(_prompts(rows, read, numbers))
            try:
                lengths = fitting.num_tokens(prompts)
            except ValueError:
                lengths = [_num_tokens(rows, i, read, fitting, key=key) for i in numbers]
            kept += [i for i, length in zip(numbers, lengths, strict=True) if 0 < length <= limit]
        return np.asarray(kept, np.int64)

    if not fitting.key:
        return count()
    return remembered([*_key("fitting", rows, read), limit, fitting.key], count)


def _num_tokens(rows: Rows, index: int, read: RowFormat, fitting: FittingPrompts, *, key: str) -> int:
    try:
        return fitting.num_tokens([read.prompt_of(rows[index])])[0]
    except ValueError as error:
        raise ConfigError(f"{key}: {rows.place(index)}: {error}") from error


def _prompts(rows: Rows, read: RowFormat, numbers: range | None = None) -> Iterator[Prompt]:
    for index in range(len(rows)) if numbers is None else numbers:
        yield read.prompt_of(rows[index])


def _hash(prompt: Prompt) -> int:
    """Returns a 64-bit hash of a prompt: of its text, or of its messages without the system message."""
    if isinstance(prompt, list):
        said = [message for message in prompt if message["role"] != "system"] or prompt
        prompt = said[0]["content"] if len(said) == 1 else json.dumps(said, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(prompt.strip().encode(), digest_size=8).digest(), "little")


def _key(rule: str, rows: Rows, read: RowFormat) -> list[object]:
    return [rule, _RULES, rows.fingerprint, dataclasses.asdict(read)]
