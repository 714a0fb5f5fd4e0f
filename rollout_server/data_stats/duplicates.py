"""Finds repeated prompts within a split, and prompts of a held-out split that also occur in training.

A prompt is represented by 64-bit hashes of its text and of its normalised text, so memory use is 32 bytes per
row regardless of the length of prompts. Among a million prompts, the probability of any collision is 3e-8.
Near duplicates (a changed number, another word order) are not found.
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUM_EXAMPLES = 5


_SENTENCE_MARKS = str.maketrans(dict.fromkeys(".,;:!?\"'`“”‘’„«»…", " "))


def normalised(text: str) -> str:
    """Returns the text in lower case and Unicode form NFKC, without punctuation and quotation marks, with
    words separated by one space. Mathematical signs stay: `3-1` and `3*1` are different prompts."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_SENTENCE_MARKS).split())


class PromptHashes:
    """The hashes of a split's prompts and answers, in the order of the rows."""

    def __init__(self) -> None:
        self._rows = array("L")
        """Row number of each prompt."""
        self._exact, self._normalised, self._answers = array("Q"), array("Q"), array("Q")
        self._num_rows = 0

    def add(self, prompt: str, *, answer: str = "") -> None:
        self._rows.append(self._num_rows)
        self._num_rows += 1
        self._exact.append(_hash(prompt))
        self._normalised.append(_hash(normalised(prompt)))
        self._answers.append(_hash(answer))

    def skip(self) -> None:
        """Records that the next row has no prompt."""
        self._num_rows += 1

    def duplicates(self) -> dict[str, Any]:
        """Counts rows that repeat an earlier row of the split.

        `exact`, `normalised`: number of rows whose prompt, or normalised prompt, occurs in an earlier row.
        `conflicting`: normalised prompts whose rows have different answers. `examples`: some groups of row
        numbers with the same normalised prompt.
        """
        exact, same = _view(self._exact), _view(self._normalised)
        answers = _view(self._answers)
        groups = list(_groups(same))
        conflicting = [group for group in groups if len(np.unique(answers[group])) > 1]
        return {
            "exact": len(exact) - len(np.unique(exact)),
            "normalised": sum(len(group) - 1 for group in groups),
            "conflicting": len(conflicting),
            "examples": [self._numbers(group) for group in groups[:_NUM_EXAMPLES]],
            "conflicting_examples": [self._numbers(group) for group in conflicting[:_NUM_EXAMPLES]],
        }

    def overlap(self, train: PromptHashes) -> dict[str, Any]:
        """Counts rows of this held-out split whose prompt also occurs in `train`.

        `exact` and `normalised` as in `duplicates`; `examples`: some pairs (row here, row in `train`).
        """
        here, there = _view(self._normalised), _view(train._normalised)
        found = np.flatnonzero(np.isin(here, there))
        order = np.argsort(there, kind="stable")
        places = order[np.searchsorted(there, here[found[:_NUM_EXAMPLES]], sorter=order)]
        return {
            "exact": int(np.isin(_view(self._exact), _view(train._exact)).sum()),
            "normalised": len(found),
            "examples": [[self._rows[a], train._rows[b]] for a, b in zip(found, places, strict=False)],
        }

    def _numbers(self, places: NDArray[np.int64]) -> list[int]:
        return [self._rows[place] for place in places[:_NUM_EXAMPLES]]


def _groups(hashes: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """Yields the ascending row numbers of each hash that occurs more than once, in the order of the first
    rows."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(hashes) else np.array([], int)
    ends = np.r_[starts[1:], len(hashes)]
    is_repeated = ends - starts > 1
    firsts = order[starts[is_repeated]]
    for rank in np.argsort(firsts):
        yield order[starts[is_repeated][rank] : ends[is_repeated][rank]]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest())


def _view(hashes: array[int]) -> NDArray[np.uint64]:
    return np.frombuffer(hashes, dtype=np.uint64) if hashes else np.array([], dtype=np.uint64)
