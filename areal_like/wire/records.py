"""The record: one trajectory as bytes with a checksum, the same bytes at rollout server, ledger and trainer.

    0  magic "ATR1" | num_bytes u32 | crc32 u32 | sample_index u32 | ticket_id u64 | meta_bytes u32 | 0 u32
    32 msgpack metadata [num_tokens, [[version, num_tokens], ...], reward, {component: reward}, finish_reason,
       generation_s, reward_s, is_greedy]
       tokens int32[num_tokens], logprobs float32[num_tokens]

Little-endian; metadata and arrays are each padded to 8 bytes. The checksum covers everything after it,
including ticket id and sample index, so neither a torn write nor an older record in the same bytes of a file
passes for this record. Versions are stored as runs, and the loss mask is not stored (it is 1 exactly where a
token has a version). This saves a third of the data, and the buffer gets a sample's weight versions without
reading its tokens. Wire and disk use the same format, so the buffer never encodes a record, and no process
between server and trainer can change what was sampled.

The metadata may be up to 64 KiB longer than the arrays: enough for one version per token and for the names of
a thousand reward components. Longer metadata is refused before it is unpacked, because it would take many
times its size in memory.

No other module depends on the layout. Readers outside the buffer (audit, replay) need only a directory and a
row of the ledger.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.errors import StoreCorruptError
from areal_like.trajectory import NOT_SAMPLED, FinishReason, Trajectory, are_logprobs
from areal_like.wire.unpacking import unpack

_HEADER = struct.Struct("<4sIIIQII")
_MAGIC = b"ATR1"
_CHECKED_FROM = 12
_ALIGN = 8
_INT, _FLOAT = np.dtype("<i4"), np.dtype("<f4")
_MAX_INT = (1 << 31) - 1
BYTES_PER_TOKEN = _INT.itemsize + _FLOAT.itemsize
"""Bytes of a record's arrays for each token."""
_MAX_OTHER_BYTES = 1 << 16
"""Limit of the metadata apart from the runs; most of it is reward components. The runs need no limit: a run
takes at most 7 bytes, and each of its tokens 8 bytes in the arrays."""
_MAX_RUNS = 1 << 16
"""Longer metadata is not unpacked, because it would occupy the event loop. The versions of a sample's tokens
change once for each push and turn, so a sample has tens of runs."""
_COST_PER_RUN, _OTHER_COST = 13, 100_000
"""For `unpack`: of a run with its two numbers, and of everything else in the metadata."""
_FINISH_REASONS = {reason.value: reason for reason in FinishReason}


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
    """Prompt and response tokens."""
    runs: list[list[int]]
    """[version, number of tokens] from the first token to the last; NOT_SAMPLED for tokens that were not
    sampled."""
    reward: float
    reward_components: dict[str, float]
    finish_reason: FinishReason
    generation_s: float
    reward_s: float
    is_greedy: bool
    _tokens_at: int
    _logprobs_at: int

    @classmethod
    def of(cls, ticket_id: int, sample_index: int, trajectory: Trajectory) -> Self:
        """Packs a trajectory. Raises ValueError for numbers that are not finite."""
        meta = msgpack.packb(
            [
                trajectory.num_tokens,
                _runs(trajectory.versions),
                float(trajectory.reward),
                {name: float(value) for name, value in trajectory.reward_components.items()},
                trajectory.finish_reason.value,
                float(trajectory.generation_s),
                float(trajectory.reward_s),
                trajectory.is_greedy,
            ]
        )
        parts = [meta, _padding(len(meta))]
        for array in (
            np.ascontiguousarray(trajectory.tokens, dtype=_INT),
            np.ascontiguousarray(trajectory.logprobs, dtype=_FLOAT),
        ):
            parts += [array.data.cast("B"), _padding(array.nbytes)]
        body = b"".join(parts)
        identity = struct.pack("<IQII", sample_index, ticket_id, len(meta), 0)
        crc32 = zlib.crc32(body, zlib.crc32(identity))
        data = struct.pack("<4sII", _MAGIC, _HEADER.size + len(body), crc32) + identity + body
        return cls._made(data, ticket_id, sample_index, crc32, meta)

    @classmethod
    def opened(cls, data: bytes) -> Self:
        """Decodes and checks a record.

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
        if _end_of_array(record._logprobs_at, record.num_tokens) != len(data):
            raise ValueError(f"{record.num_tokens} tokens do not make a record of {len(data)} bytes")
        if np.minimum.reduce(np.frombuffer(data, _INT, record.num_tokens, record._tokens_at)) < 0:
            raise ValueError("negative token id")
        if not are_logprobs(np.frombuffer(data, _FLOAT, record.num_tokens, record._logprobs_at)):
            raise ValueError("log-probs: want finite values that are at most 0")
        return record

    @classmethod
    def _made(cls, data: bytes, ticket_id: int, sample_index: int, crc32: int, meta: bytes) -> Self:
        num_tokens, runs, reward, components, finish_reason, generation_s, reward_s, is_greedy = _metadata(
            meta, rest_bytes=len(data) - _HEADER.size - len(meta)
        )
        tokens_at = _HEADER.size + len(meta) + -len(meta) % _ALIGN
        return cls(
            data=data,
            ticket_id=ticket_id,
            sample_index=sample_index,
            crc32=crc32,
            num_tokens=num_tokens,
            runs=runs,
            reward=reward,
            reward_components=components,
            finish_reason=finish_reason,
            generation_s=generation_s,
            reward_s=reward_s,
            is_greedy=is_greedy,
            _tokens_at=tokens_at,
            _logprobs_at=_end_of_array(tokens_at, num_tokens),
        )

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return sum([length for version, length in self.runs if version != NOT_SAMPLED])

    def trajectory(self) -> Trajectory:
        """The trajectory; its tokens and log-probs are read-only views of the bytes."""
        runs = np.array(self.runs, dtype=np.int64)
        versions = np.repeat(runs[:, 0].astype(np.int32), runs[:, 1])
        return Trajectory(
            tokens=np.frombuffer(self.data, _INT, self.num_tokens, self._tokens_at),
            loss_mask=(versions >= 0).astype(np.uint8),
            logprobs=np.frombuffer(self.data, _FLOAT, self.num_tokens, self._logprobs_at),
            versions=versions,
            reward=self.reward,
            reward_components=self.reward_components,
            finish_reason=self.finish_reason,
            generation_s=self.generation_s,
            reward_s=self.reward_s,
            is_greedy=self.is_greedy,
        )


@dataclass(frozen=True, slots=True)
class RecordLocation:
    """Position of a record on disk, as the ledger's row states it."""

    segment: int
    offset: int
    num_bytes: int
    crc32: int


def segment_path(directory: Path, segment: int) -> Path:
    """The file of a segment in a ledger's directory."""
    return directory / "segments" / f"{segment:06d}.seg"


def crc32_of(record: bytes) -> int:
    """The checksum in a record's header."""
    return int(_HEADER.unpack_from(record)[2])


def read_record(directory: Path, location: RecordLocation, *, ticket_id: int, sample_index: int) -> Record:
    """Reads the record of a ledger row. Raises StoreCorruptError if it is absent or differs from the row."""
    path = segment_path(directory, location.segment)
    what = f"sample {sample_index} of ticket {ticket_id} ({path} at {location.offset})"
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise StoreCorruptError(
            f"sample {sample_index} of ticket {ticket_id}: its file {path} is missing"
        ) from None
    try:
        data = os.pread(file, location.num_bytes, location.offset)
    finally:
        os.close(file)
    try:
        record = Record.opened(data)
    except ValueError as error:
        raise StoreCorruptError(f"{what}: {error}") from None
    if (record.ticket_id, record.sample_index) != (ticket_id, sample_index):
        raise StoreCorruptError(
            f"{what}: the record on disk is sample {record.sample_index} of ticket {record.ticket_id}"
        )
    if record.crc32 != location.crc32:
        raise StoreCorruptError(f"{what}: the record's checksum is not the ledger's")
    return record


def count_whole_records(data: bytes) -> tuple[int, int]:
    """(number of complete records at the beginning of `data`, their bytes); what follows is a torn write."""
    num_records = offset = 0
    while offset + _HEADER.size <= len(data):
        magic, num_bytes, crc32, *_ = _HEADER.unpack_from(data, offset)
        end = offset + num_bytes
        if magic != _MAGIC or num_bytes < _HEADER.size or end > len(data):
            break
        if zlib.crc32(memoryview(data)[offset + _CHECKED_FROM : end]) != crc32:
            break
        num_records, offset = num_records + 1, end
    return num_records, offset


def _metadata(
    meta: bytes, *, rest_bytes: int
) -> tuple[int, list[list[int]], float, dict[str, float], FinishReason, float, float, bool]:
    """The fields of the metadata, which is followed by `rest_bytes` bytes of arrays.

    Raises ValueError if it is malformed or too long.
    """
    if len(meta) > rest_bytes + _MAX_OTHER_BYTES:
        raise ValueError(
            f"record metadata takes {len(meta)} bytes, more than its arrays and {_MAX_OTHER_BYTES}: "
            "use fewer reward components"
        )
    try:
        max_runs = min(rest_bytes // BYTES_PER_TOKEN, _MAX_RUNS)
        raw: Any = unpack(meta, max_cost=_COST_PER_RUN * max_runs + _OTHER_COST)
    except ValueError as error:
        raise ValueError(f"record metadata is not msgpack: {error}") from None
    if type(raw) is not list or len(raw) != 8:
        got = len(raw) if type(raw) is list else type(raw).__name__
        raise ValueError(f"record metadata must have 8 fields, got {got}")
    num_tokens, runs, reward, components, finish_reason, generation_s, reward_s, is_greedy = raw
    if type(num_tokens) is not int or type(runs) is not list or not all(map(_is_run, runs)):
        raise ValueError("want a number of tokens and runs [version, number of tokens]")
    if not 0 < num_tokens == sum([length for _, length in runs]):
        raise ValueError(f"the runs of versions do not cover {num_tokens} tokens")
    # A sender has to merge them: unmerged runs would take memory that no limit counts.
    if any(left[0] == right[0] for left, right in pairwise(runs)):
        raise ValueError("neighboring runs have the same version")
    if type(components) is not dict or not all(type(name) is str for name in components):
        raise ValueError("reward components: want names and numbers")
    for number in (reward, generation_s, reward_s, *components.values()):
        if type(number) is not float or not math.isfinite(number):
            raise ValueError(f"{number!r} is not a finite number")
    if type(finish_reason) is not str or finish_reason not in _FINISH_REASONS or type(is_greedy) is not bool:
        raise ValueError(f"finish reason {finish_reason!r}, is_greedy {is_greedy!r}")
    return (
        num_tokens,
        runs,
        reward,
        components,
        _FINISH_REASONS[finish_reason],
        generation_s,
        reward_s,
        is_greedy,
    )


def _is_run(run: Any) -> bool:
    return (
        type(run) is list
        and len(run) == 2
        and type(run[0]) is int
        and type(run[1]) is int
        and NOT_SAMPLED <= run[0] <= _MAX_INT
        and run[1] > 0
    )


def _runs(versions: NDArray[np.int32]) -> list[list[int]]:
    starts = [0, *((versions[1:] != versions[:-1]).nonzero()[0] + 1).tolist()]
    ends = [*starts[1:], len(versions)]
    return [[int(versions[start]), end - start] for start, end in zip(starts, ends, strict=True)]


def _end_of_array(offset: int, num_tokens: int) -> int:
    """Offset after an array of `num_tokens` 4-byte numbers at `offset`, padding included."""
    return offset + 4 * num_tokens + -(4 * num_tokens) % _ALIGN


def _padding(num_bytes: int) -> bytes:
    return bytes(-num_bytes % _ALIGN)
