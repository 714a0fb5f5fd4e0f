"""Packs the metadata of a record (records.py), and checks them before anything else of a record is read.

    [num_tokens, [[version, num_tokens], ...], reward, {component: reward}, finish_reason, generation_s,
     reward_s, is_greedy]  and, unless the trajectory is plain, a map with what it has of
    {"segments": [num_tokens, ...], "turns": [[end, reward], ...], "metrics": {name: number}, "label": text,
     "arrays": [[name, dtype, [size, ...]], ...]}

Plain is a trajectory of one segment and one turn without metrics, label and arrays: its eight fields are
those of earlier releases, so their ledgers are read, and a job with single-turn samples pays nothing.

Everything is bounded before it is unpacked. The metadata may be up to 64 KiB longer than the arrays: enough
for one version per token and for the names of a thousand reward components. Longer metadata would take many
times its size in memory. The dtype of an array is one of a fixed list, never `object`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.config.common import NAME
from areal_like.config.episode import MAX_TURNS
from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory
from areal_like.wire.unpacking import unpack

BYTES_PER_TOKEN = 8
"""Bytes of a record for each token: its id and its log-prob."""
MAX_ARRAYS = 16
MAX_DIMENSIONS = 8
MAX_LABEL_CHARS = 64
DTYPES = {
    np.dtype(code).name: np.dtype(code)
    for code in ("i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<f2", "<f4", "<f8")
}
"""Dtypes of further arrays by name. Floats must be finite; bfloat16, which numpy lacks, travels as uint16."""
_MAX_INT = (1 << 31) - 1
_MAX_OTHER_BYTES = 1 << 16
"""Limit of the metadata apart from the runs; most of it is reward components. The runs need no limit: a run
takes at most 7 bytes, and each of its tokens 8 bytes in the arrays."""
_MAX_RUNS = 1 << 16
"""Longer metadata is not unpacked, because it would occupy the event loop. The versions of a sample's tokens
change once for each push and turn, so a sample has tens of runs."""
_COST_PER_RUN, _OTHER_COST = 13, 100_000
"""For `unpack`: of a run with its two numbers, and of everything else in the metadata."""
_BAD_RUNS = "want a number of tokens and runs [version, number of tokens]"
_FINISH_REASONS = {reason.value: reason for reason in FinishReason}


class ArraySpec(NamedTuple):
    """Name, dtype and shape of a further array."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_items(self) -> int:
        """Product of the shape, as an integer without a limit."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes without padding."""
        return self.num_items * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What a trajectory has beyond one segment and one turn; fields as in `Trajectory`."""

    segments: tuple[int, ...] = ()
    turns: tuple[tuple[int, float], ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    label: str = ""
    arrays: tuple[ArraySpec, ...] = ()


PLAIN = Structure()
"""The structure of every plain trajectory."""


class Metadata(NamedTuple):
    """The fields of a record's metadata; see `Record`."""

    num_tokens: int
    runs: list[list[int]]
    reward: float
    reward_components: dict[str, float]
    finish_reason: FinishReason
    generation_s: float
    reward_s: float
    is_greedy: bool
    structure: Structure


def pack_metadata(trajectory: Trajectory) -> bytes:
    """The metadata of a trajectory. Raises ValueError for arrays that a record cannot have."""
    fields: list[Any] = [
        trajectory.num_tokens,
        _runs(trajectory.versions),
        float(trajectory.reward),
        {name: float(value) for name, value in trajectory.reward_components.items()},
        trajectory.finish_reason.value,
        float(trajectory.generation_s),
        float(trajectory.reward_s),
        trajectory.is_greedy,
    ]
    if structure := _structure_fields(trajectory):
        fields.append(structure)
    return msgpack.packb(fields)  # type: ignore[no-any-return]


def unpack_metadata(meta: bytes, *, rest_bytes: int) -> Metadata:
    """The fields of the metadata, which is followed by `rest_bytes` bytes of arrays.

    Raises ValueError if it is malformed or too long. Segments, turns and arrays are checked one by one; how
    they fit to the tokens is checked by `Trajectory`.
    """
    if len(meta) > rest_bytes + _MAX_OTHER_BYTES:
        raise ValueError(
            f"record metadata takes {len(meta)} bytes, more than its arrays and {_MAX_OTHER_BYTES}: "
            "use fewer reward components, metrics or turns"
        )
    try:
        max_runs = min(rest_bytes // BYTES_PER_TOKEN, _MAX_RUNS)
        raw: Any = unpack(meta, max_cost=_COST_PER_RUN * max_runs + _OTHER_COST)
    except ValueError as error:
        raise ValueError(f"record metadata is not msgpack: {error}") from None
    if type(raw) is not list or len(raw) not in (8, 9):
        got = len(raw) if type(raw) is list else type(raw).__name__
        raise ValueError(f"record metadata must have 8 or 9 fields, got {got}")
    structure = _read_structure(raw.pop(), rest_bytes=rest_bytes) if len(raw) == 9 else PLAIN
    num_tokens, runs, reward, components, finish_reason, generation_s, reward_s, is_greedy = raw
    if type(num_tokens) is not int or type(runs) is not list:
        raise ValueError(_BAD_RUNS)
    _check_runs(runs, num_tokens=num_tokens)
    if type(components) is not dict:
        raise ValueError("reward components: want names and numbers")
    for name in components:
        if type(name) is not str:
            raise ValueError("reward components: want names and numbers")
    for number in (reward, generation_s, reward_s, *components.values()):
        if type(number) is not float or not math.isfinite(number):
            raise ValueError(f"{number!r} is not a finite number")
    if type(finish_reason) is not str or finish_reason not in _FINISH_REASONS or type(is_greedy) is not bool:
        raise ValueError(f"finish reason {finish_reason!r}, is_greedy {is_greedy!r}")
    return Metadata(
        num_tokens,
        runs,
        reward,
        components,
        _FINISH_REASONS[finish_reason],
        generation_s,
        reward_s,
        is_greedy,
        structure,
    )


def _structure_fields(trajectory: Trajectory) -> dict[str, Any]:
    """The ninth field; empty for a plain trajectory."""
    fields: dict[str, Any] = {}
    if trajectory.segments:
        fields["segments"] = [int(length) for length in trajectory.segments]
    if trajectory.turns:
        fields["turns"] = [[int(end), float(reward)] for end, reward in trajectory.turns]
    if trajectory.metrics:
        fields["metrics"] = {name: float(value) for name, value in trajectory.metrics.items()}
    if trajectory.label:
        fields["label"] = trajectory.label
    if trajectory.arrays:
        fields["arrays"] = [
            [name, array.dtype.name, list(array.shape)] for name, array in trajectory.arrays.items()
        ]
        _read_arrays(fields["arrays"])
    return fields


def _read_structure(raw: Any, *, rest_bytes: int) -> Structure:
    if type(raw) is not dict or not raw or raw.keys() - _READERS.keys():
        raise ValueError(f"want a map with one or more of {', '.join(_READERS)}")
    structure = Structure(**{name: _READERS[name](value) for name, value in raw.items()})
    if sum(spec.num_bytes for spec in structure.arrays) > rest_bytes:
        raise ValueError("the arrays are longer than the record")
    return structure


def _read_segments(raw: Any) -> tuple[int, ...]:
    if type(raw) is not list or not 0 < len(raw) <= MAX_TURNS or not all(map(_is_size, raw)):
        raise ValueError(f"want 1 to {MAX_TURNS} lengths of segments")
    return tuple(raw)


def _read_turns(raw: Any) -> tuple[tuple[int, float], ...]:
    if type(raw) is not list or not 0 < len(raw) <= MAX_TURNS:
        raise ValueError(f"want 1 to {MAX_TURNS} turns")
    for turn in raw:
        if type(turn) is not list or len(turn) != 2 or not _is_size(turn[0]):
            raise ValueError("want turns [end, reward]")
        _check_finite(turn[1])
    return tuple((end, reward) for end, reward in raw)


def _read_metrics(raw: Any) -> dict[str, float]:
    if type(raw) is not dict or not raw or not all(type(name) is str for name in raw):
        raise ValueError("metrics: want names and numbers")
    for number in raw.values():
        _check_finite(number)
    return raw


def _read_label(raw: Any) -> str:
    if type(raw) is not str or not 0 < len(raw) <= MAX_LABEL_CHARS or not raw.isprintable():
        raise ValueError(f"label: want 1 to {MAX_LABEL_CHARS} printable characters")
    return raw


def _read_arrays(raw: Any) -> tuple[ArraySpec, ...]:
    if type(raw) is not list or not 0 < len(raw) <= MAX_ARRAYS:
        raise ValueError(f"want 1 to {MAX_ARRAYS} arrays")
    specs = tuple(map(_read_array, raw))
    if len({spec.name for spec in specs}) < len(specs):
        raise ValueError("two arrays have the same name")
    return specs


def _read_array(raw: Any) -> ArraySpec:
    if type(raw) is not list or len(raw) != 3:
        raise ValueError("want arrays [name, dtype, shape]")
    name, dtype, shape = raw
    if type(name) is not str or not NAME.fullmatch(name):
        raise ValueError("an array's name must be 1 to 64 of the characters A-Z a-z 0-9 . _ -")
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f"array {name}: its dtype must be one of {', '.join(DTYPES)}")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise ValueError(f"array {name}: want at most {MAX_DIMENSIONS} dimensions of at least 1")
    return ArraySpec(name, DTYPES[dtype], tuple(shape))


_READERS: dict[str, Any] = {
    "segments": _read_segments,
    "turns": _read_turns,
    "metrics": _read_metrics,
    "label": _read_label,
    "arrays": _read_arrays,
}


def _check_finite(number: Any) -> None:
    if type(number) is not float or not math.isfinite(number):
        raise ValueError(f"{number!r} is not a finite number")


def _is_size(raw: Any) -> bool:
    return type(raw) is int and 0 < raw <= _MAX_INT


def _check_runs(runs: list[Any], *, num_tokens: int) -> None:
    """Raises ValueError unless the runs cover the tokens. One loop without calls: every sample's, twice."""
    num_covered, before = 0, None
    for run in runs:
        if type(run) is not list or len(run) != 2:
            raise ValueError(_BAD_RUNS)
        version, length = run
        if type(version) is not int or type(length) is not int:
            raise ValueError(_BAD_RUNS)
        if length <= 0 or not NOT_SAMPLED <= version <= _MAX_INT:
            raise ValueError(_BAD_RUNS)
        # A sender has to merge them: unmerged runs would take memory that no limit counts.
        if version == before:
            raise ValueError("neighboring runs have the same version")
        num_covered, before = num_covered + length, version
    if not 0 < num_tokens == num_covered:
        raise ValueError(f"the runs of versions do not cover {num_tokens} tokens")


def _runs(versions: NDArray[np.int32]) -> list[list[int]]:
    starts = [0, *((versions[1:] != versions[:-1]).nonzero()[0] + 1).tolist()]
    ends = [*starts[1:], len(versions)]
    return [[int(versions[start]), end - start] for start, end in zip(starts, ends, strict=True)]
