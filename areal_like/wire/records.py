"""The record: one trajectory as bytes with a checksum, the same bytes at rollout server, ledger and trainer.

    0  magic "ATR1" | num_bytes u32 | crc32 u32 | sample_index u32 | ticket_id u64 | meta_bytes u32 | 0 u32
    32 msgpack metadata: number of tokens, versions, reward, ... (below)
       tokens int32[num_tokens], logprobs float32[num_tokens], then the further arrays that the metadata name

Little-endian; metadata and arrays are each padded to 8 bytes. The checksum covers everything after it,
including ticket id and sample index, so neither a torn write nor an older record in the same bytes of a file
passes for this record. Versions are stored as runs, and the loss mask is not stored (it is 1 exactly where a
token has a version). This saves a third of the data, and the buffer gets a sample's weight versions without
reading its tokens. Wire and disk use the same format, so the buffer never encodes a record, and no process
between server and trainer can change what was sampled.

The metadata are

    [num_tokens, [[version, num_tokens], ...], reward, {component: reward}, finish_reason, generation_s,
     reward_s, is_greedy]  and, unless the trajectory is plain, a map with what it has of
    {"segments": [num_tokens, ...], "turns": [[end, reward], ...], "metrics": {name: number}, "label": text,
     "arrays": [[name, dtype, [size, ...]], ...], "routes": [crc32, num_bytes, [tokens, layers, experts]]}

A trajectory of one segment and one turn without metrics, label and arrays is plain: its eight fields are
those of earlier releases, so their ledgers can be read, and single-turn samples have no overhead. Segments
and turns of a conversation are a few numbers, which the buffer reads without the tokens. Further arrays
(process rewards, images) are named with dtype and shape, so that a new kind of data needs no new format; the
dtype is one of a fixed list, never `object`.

The routes of a sample (routes.py) are far larger than all of this and are not in the record, which only names
their block. On disk the block follows its record. In memory a `Record` may have it (`routes`) or not.

All data are bounded before they are unpacked. The metadata may be up to 64 KiB longer than the arrays: enough
for one version per token and for the names of a thousand reward components. Longer metadata would take many
times its size in memory.

No other module depends on the layout. Readers outside the buffer (audit, replay) need only a directory and a
row of the ledger.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.config.common import NAME
from areal_like.config.episode import MAX_TURNS
from areal_like.errors import StoreCorruptError
from areal_like.trajectory import (
    LARGEST_METRIC,
    LARGEST_REWARD,
    LEAST_LOGPROB,
    MAX_SAMPLE_S,
    NOT_SAMPLED,
    STEP_REWARDS,
    TEACHER_LOGPROBS,
    TOKEN_REWARDS,
    FinishReason,
    Trajectory,
    least_logprob,
)
from areal_like.wire.routes import MAGIC as ROUTES_MAGIC
from areal_like.wire.routes import Routes, RoutesSpec
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
"""Costs for `unpack`: of a run with its two numbers, and of everything else in the metadata."""
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
    """The parts of a trajectory beyond one segment and one turn; fields as in `Trajectory`."""

    segments: tuple[int, ...] = ()
    turns: tuple[tuple[int, float], ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    label: str = ""
    arrays: tuple[ArraySpec, ...] = ()
    routes: RoutesSpec | None = None
    """The block of the sample's routes; None: it has none."""


PLAIN = Structure()
"""The structure of every plain trajectory."""


def _pack_metadata(trajectory: Trajectory) -> bytes:
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


def _unpack_metadata(meta: bytes, *, rest_bytes: int) -> dict[str, Any]:
    """The fields of `Record` in the metadata, which is followed by `rest_bytes` bytes of arrays.

    Raises ValueError if it is malformed or too long. Segments, turns and arrays are checked one by one;
    `Trajectory` checks whether they fit the tokens.
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
    return {
        "num_tokens": num_tokens,
        "runs": runs,
        "reward": reward,
        "reward_components": components,
        "finish_reason": _FINISH_REASONS[finish_reason],
        "generation_s": generation_s,
        "reward_s": reward_s,
        "is_greedy": is_greedy,
        "structure": structure,
    }


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
    if trajectory.routes is not None:
        crc32, num_bytes, shape = trajectory.routes.spec
        fields["routes"] = [crc32, num_bytes, list(shape)]
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


def _read_routes(raw: Any) -> RoutesSpec:
    if type(raw) is not list or len(raw) != 3 or type(raw[2]) is not list or len(raw[2]) != 3:
        raise ValueError("want routes [crc32, num_bytes, [tokens, layers, experts]]")
    crc32, num_bytes, (num_tokens, num_layers, num_chosen) = raw
    if not all(type(number) is int for number in (crc32, num_bytes, num_tokens, num_layers, num_chosen)):
        raise ValueError("routes: want integers")
    spec = RoutesSpec(crc32, num_bytes, (num_tokens, num_layers, num_chosen))
    spec.check()
    return spec


_READERS: dict[str, Any] = {
    "segments": _read_segments,
    "turns": _read_turns,
    "metrics": _read_metrics,
    "label": _read_label,
    "arrays": _read_arrays,
    "routes": _read_routes,
}


def _check_finite(number: Any) -> None:
    if type(number) is not float or not math.isfinite(number):
        raise ValueError(f"{number!r} is not a finite number")


def _is_size(raw: Any) -> bool:
    return type(raw) is int and 0 < raw <= _MAX_INT


def _check_runs(runs: list[Any], *, num_tokens: int) -> None:
    """Raises ValueError unless the runs cover the tokens. A single loop without calls, because it runs twice
    for every sample."""
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


_LARGEST = {TOKEN_REWARDS: LARGEST_REWARD, STEP_REWARDS: LARGEST_REWARD, TEACHER_LOGPROBS: -LEAST_LOGPROB}
"""Array with a meaning of its own -> largest size of its numbers."""
_HEADER = struct.Struct("<4sIIIQII")
_MAGIC = b"ATR1"
_CHECKED_FROM = 12
_ALIGN = 8
_MANY_RUNS = 16
"""More runs are expanded by numpy, which costs as much as this many assignments."""
_INT, _FLOAT = np.dtype("<i4"), np.dtype("<f4")


@dataclass(kw_only=True, slots=True, eq=False)
class Record:
    """The bytes of a trajectory and their decoded metadata.

    Construction checks everything, so every Record is valid.
    """

    data: bytes
    ticket_id: int
    sample_index: int
    crc32: int
    num_tokens: int
    """Prompt and completion tokens."""
    runs: list[list[int]]
    """[version, number of tokens] from the first token to the last; NOT_SAMPLED for tokens that were not
    sampled."""
    reward: float
    reward_components: dict[str, float]
    finish_reason: FinishReason
    generation_s: float
    reward_s: float
    is_greedy: bool
    structure: Structure
    """Segments, turns, metrics, label and arrays; `PLAIN` where there are none."""
    least_logprob: float
    """Smallest log-prob of a token."""
    _tokens_at: int
    _logprobs_at: int
    routes: Routes | None = None
    """The routes that `structure.routes` names, if this process has them."""

    @classmethod
    def of(cls, ticket_id: int, sample_index: int, trajectory: Trajectory) -> Self:
        """Packs a trajectory.

        Raises ValueError for numbers that are not finite, and for structure beyond the limits of a record.
        """
        meta = _pack_metadata(trajectory)
        parts: list[bytes | memoryview[int]] = [meta, _padding(len(meta))]
        arrays: list[np.ndarray[Any, Any]] = [
            np.ascontiguousarray(trajectory.tokens, dtype=_INT),
            np.ascontiguousarray(trajectory.logprobs, dtype=_FLOAT),
        ]
        for array in trajectory.arrays.values():
            _check_finite_array(array)
            arrays.append(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")))
        for array in arrays:
            parts += [array.reshape(-1).data.cast("B"), _padding(array.nbytes)]
        body = b"".join(parts)
        identity = struct.pack("<IQII", sample_index, ticket_id, len(meta), 0)
        crc32 = zlib.crc32(body, zlib.crc32(identity))
        data = struct.pack("<4sII", _MAGIC, _HEADER.size + len(body), crc32) + identity + body
        record = cls._made(data, ticket_id, sample_index, crc32, meta)
        record.routes = trajectory.routes
        return record

    @classmethod
    def opened(cls, data: bytes) -> Self:
        """Decodes and checks a record, without its routes.

        Raises ValueError for bytes that are not a record, and for an invalid trajectory.
        """
        if len(data) < _HEADER.size:
            raise ValueError(f"the record is cut off after {len(data)} bytes")
        magic, num_bytes, crc32, sample_index, ticket_id, meta_bytes, reserved = _HEADER.unpack_from(data)
        if magic != _MAGIC or num_bytes != len(data) or reserved:
            raise ValueError(f"{len(data)} bytes are not a record: wrong magic or length")
        if zlib.crc32(memoryview(data)[_CHECKED_FROM:]) != crc32:
            raise ValueError("the record does not match its checksum")
        record = cls._made(
            data, ticket_id, sample_index, crc32, data[_HEADER.size : _HEADER.size + meta_bytes]
        )
        if np.minimum.reduce(np.frombuffer(data, _INT, record.num_tokens, record._tokens_at)) < 0:
            raise ValueError("negative token id")
        if record.structure is not PLAIN:
            for array in record.trajectory().arrays.values():  # checks segments and turns
                _check_finite_array(array)
        return record

    @classmethod
    def _made(cls, data: bytes, ticket_id: int, sample_index: int, crc32: int, meta: bytes) -> Self:
        fields = _unpack_metadata(meta, rest_bytes=len(data) - _HEADER.size - len(meta))
        tokens_at = _HEADER.size + len(meta) + -len(meta) % _ALIGN
        num_tokens = fields["num_tokens"]
        logprobs_at = _end_of_array(tokens_at, num_tokens)
        end = _end_of_array(logprobs_at, num_tokens)
        if end + sum(_padded(spec) for spec in fields["structure"].arrays) != len(data):
            raise ValueError(f"{num_tokens} tokens do not make a record of {len(data)} bytes")
        structure = fields["structure"]
        if structure.routes is not None:
            num_rows = num_tokens - (len(structure.segments) or 1)
            if structure.routes.shape[0] != num_rows:
                raise ValueError(f"routes of {structure.routes.shape[0]} tokens, want those of {num_rows}")
        return cls(
            data=data,
            ticket_id=ticket_id,
            sample_index=sample_index,
            crc32=crc32,
            least_logprob=least_logprob(np.frombuffer(data, _FLOAT, num_tokens, logprobs_at)),
            _tokens_at=tokens_at,
            _logprobs_at=logprobs_at,
            **fields,
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the record, and of the routes that this process has of it."""
        return len(self.data) + (0 if self.routes is None else len(self.routes.to_bytes()))

    @property
    def lacks_routes(self) -> bool:
        """True if the sample has routes, and this process does not have them."""
        return self.structure.routes is not None and self.routes is None

    def with_routes(self, data: bytes) -> Self:
        """The record with its routes, from the bytes of their block.

        Raises ValueError for bytes that are not the block which the record names.
        """
        routes = Routes.from_bytes(data)
        if routes.spec != self.structure.routes:
            raise ValueError("the routes are not those that the record names")
        return replace(self, routes=routes)

    def without_routes(self) -> Self:
        """The record alone."""
        return self if self.routes is None else replace(self, routes=None)

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum([length for version, length in self.runs if version != NOT_SAMPLED])

    @property
    def oldest_version(self) -> int:
        """Smallest version among sampled tokens (NOT_SAMPLED if there is none)."""
        return min([version for version, _ in self.runs if version != NOT_SAMPLED], default=NOT_SAMPLED)

    @property
    def longest_segment(self) -> int:
        """Tokens of the longest sequence that the model gets."""
        return max(self.structure.segments, default=self.num_tokens)

    @property
    def is_plausible(self) -> bool:
        """True if all numbers have magnitudes that an honest server sends (`LARGEST_REWARD` and its
        neighbors).

        Not a condition of a valid record: ledgers of earlier releases may hold larger numbers.
        """
        is_plain_plausible = (
            all(abs(reward) <= LARGEST_REWARD for reward in (self.reward, *self.reward_components.values()))
            and 0 <= self.generation_s <= MAX_SAMPLE_S
            and 0 <= self.reward_s <= MAX_SAMPLE_S
            and self.least_logprob >= LEAST_LOGPROB
        )
        if self.structure is PLAIN or not is_plain_plausible:
            return is_plain_plausible
        return (
            all(abs(reward) <= LARGEST_REWARD for _, reward in self.structure.turns)
            and all(abs(value) <= LARGEST_METRIC for value in self.structure.metrics.values())
            and all(
                np.abs(array).max() <= _LARGEST[name] for name, array in self._arrays() if name in _LARGEST
            )
        )

    def trajectory(self) -> Trajectory:
        """The trajectory; its arrays, except mask and versions, are read-only views of the bytes."""
        versions, loss_mask = self._versions_and_mask()
        # Tokens, log-probs and numbers were checked when the record was made; how segments and turns fit to
        # the tokens, only Trajectory checks.
        made = Trajectory.unchecked if self.structure is PLAIN else Trajectory
        return made(
            tokens=np.frombuffer(self.data, _INT, self.num_tokens, self._tokens_at),
            loss_mask=loss_mask,
            logprobs=np.frombuffer(self.data, _FLOAT, self.num_tokens, self._logprobs_at),
            versions=versions,
            reward=self.reward,
            reward_components=self.reward_components,
            segments=self.structure.segments,
            turns=self.structure.turns,
            metrics=self.structure.metrics,
            label=self.structure.label,
            arrays=dict(self._arrays()) if self.structure.arrays else {},
            finish_reason=self.finish_reason,
            generation_s=self.generation_s,
            reward_s=self.reward_s,
            is_greedy=self.is_greedy,
            routes=self.routes,
        )

    def _versions_and_mask(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        if len(self.runs) > _MANY_RUNS:
            runs = np.array(self.runs, dtype=np.int64)
            versions = np.repeat(runs[:, 0].astype(np.int32), runs[:, 1])
            return versions, (versions >= 0).astype(np.uint8)
        versions = np.empty(self.num_tokens, np.int32)
        loss_mask = np.zeros(self.num_tokens, np.uint8)
        start = 0
        for version, length in self.runs:
            end = start + length
            versions[start:end] = version
            if version != NOT_SAMPLED:
                loss_mask[start:end] = 1
            start = end
        return versions, loss_mask

    def _arrays(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        offset = _end_of_array(self._logprobs_at, self.num_tokens)
        for spec in self.structure.arrays:
            array = np.frombuffer(self.data, spec.dtype, spec.num_items, offset)
            yield spec.name, array.reshape(spec.shape)
            offset += _padded(spec)


@dataclass(frozen=True, slots=True)
class RecordLocation:
    """Position of a record on disk, as the ledger's row states it."""

    segment: int
    offset: int
    num_bytes: int
    crc32: int


def sampled_versions(records: Iterable[Record]) -> list[int]:
    """All weight versions that sampled a token of these records, ascending."""
    runs = (run for record in records for run in record.runs)
    return sorted({version for version, _ in runs if version != NOT_SAMPLED})


def segment_path(directory: Path, segment: int) -> Path:
    """The file of a segment in a ledger's directory."""
    return directory / "segments" / f"{segment:06d}.seg"


def crc32_of(record: bytes) -> int:
    """The checksum in a record's header."""
    return int(_HEADER.unpack_from(record)[2])


def read_record(
    directory: Path,
    location: RecordLocation,
    *,
    ticket_id: int,
    sample_index: int,
    with_routes: bool = False,
) -> Record:
    """Reads the record of a ledger row, and with `with_routes` also its routes, if it has some.

    Raises StoreCorruptError if it is absent or differs from the row, or its routes from the record.
    """
    path = segment_path(directory, location.segment)
    what = f"sample {sample_index} of ticket {ticket_id} ({path} at {location.offset})"
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise StoreCorruptError(
            f"sample {sample_index} of ticket {ticket_id}: its file {path} is missing"
        ) from None
    try:
        record = Record.opened(os.pread(file, location.num_bytes, location.offset))
        spec = record.structure.routes
        if with_routes and spec is not None:
            record = record.with_routes(_pread(file, spec.num_bytes, location.offset + location.num_bytes))
    except ValueError as error:
        raise StoreCorruptError(f"{what}: {error}") from None
    finally:
        os.close(file)
    if (record.ticket_id, record.sample_index) != (ticket_id, sample_index):
        raise StoreCorruptError(
            f"{what}: the record on disk is sample {record.sample_index} of ticket {record.ticket_id}"
        )
    if record.crc32 != location.crc32:
        raise StoreCorruptError(f"{what}: the record's checksum is not the ledger's")
    return record


def count_whole_records(data: bytes) -> tuple[int, int]:
    """(number of complete records at the beginning of `data`, their bytes and those of their routes); what
    follows is a torn write."""
    num_records = offset = 0
    while offset + _HEADER.size <= len(data):
        magic, num_bytes, crc32, *_ = _HEADER.unpack_from(data, offset)
        end = offset + num_bytes
        if magic not in (_MAGIC, ROUTES_MAGIC) or num_bytes < _HEADER.size or end > len(data):
            break
        if zlib.crc32(memoryview(data)[offset + _CHECKED_FROM : end]) != crc32:
            break
        num_records, offset = num_records + (magic == _MAGIC), end
    return num_records, offset


def _pread(file: int, num_bytes: int, offset: int) -> bytes:
    """Reads bytes of a file: a single read returns at most 2 GiB. Fewer if the file ends before."""
    parts: list[bytes] = []
    while num_bytes > 0 and (part := os.pread(file, num_bytes, offset)):
        parts.append(part)
        num_bytes, offset = num_bytes - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _end_of_array(offset: int, num_tokens: int) -> int:
    """Offset after an array of `num_tokens` 4-byte numbers at `offset`, padding included."""
    return offset + 4 * num_tokens + -(4 * num_tokens) % _ALIGN


def _padding(num_bytes: int) -> bytes:
    return bytes(-num_bytes % _ALIGN)


def _padded(spec: ArraySpec) -> int:
    return spec.num_bytes + -spec.num_bytes % _ALIGN


def _check_finite_array(array: np.ndarray[Any, Any]) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("an array has numbers that are not finite")
