"""The record: one trajectory as bytes with a checksum, the same bytes at rollout server, ledger and trainer.

    0  magic "ATR1" | num_bytes u32 | crc32 u32 | sample_index u32 | ticket_id u64 | meta_bytes u32 | 0 u32
    32 msgpack metadata (record_metadata.py): number of tokens, versions, reward, ...
       tokens int32[num_tokens], logprobs float32[num_tokens], then the further arrays that the metadata name

Little-endian; metadata and arrays are each padded to 8 bytes. The checksum covers everything after it,
including ticket id and sample index, so neither a torn write nor an older record in the same bytes of a file
passes for this record. Versions are stored as runs, and the loss mask is not stored (it is 1 exactly where a
token has a version). This saves a third of the data, and the buffer gets a sample's weight versions without
reading its tokens. Wire and disk use the same format, so the buffer never encodes a record, and no process
between server and trainer can change what was sampled.

Segments and turns of a conversation are a few numbers, so they are in the metadata, where the buffer reads
them without the tokens. Further arrays (process rewards, routed experts, images) are named there with dtype
and shape, so that a new kind of data needs no new format.

No other module depends on the layout. Readers outside the buffer (audit, replay) need only a directory and a
row of the ledger.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from areal_like.errors import StoreCorruptError
from areal_like.trajectory import (
    LARGEST_METRIC,
    LARGEST_REWARD,
    LEAST_LOGPROB,
    MAX_SAMPLE_S,
    NOT_SAMPLED,
    TOKEN_REWARDS,
    FinishReason,
    Trajectory,
    are_logprobs,
)
from areal_like.wire.record_metadata import (
    BYTES_PER_TOKEN,
    PLAIN,
    ArraySpec,
    Structure,
    pack_metadata,
    unpack_metadata,
)

__all__ = [
    "BYTES_PER_TOKEN",
    "Record",
    "RecordLocation",
    "count_whole_records",
    "crc32_of",
    "read_record",
    "segment_path",
]

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
    structure: Structure
    """Segments, turns, metrics, label and arrays; `PLAIN` where there are none."""
    _tokens_at: int
    _logprobs_at: int

    @classmethod
    def of(cls, ticket_id: int, sample_index: int, trajectory: Trajectory) -> Self:
        """Packs a trajectory.

        Raises ValueError for numbers that are not finite, and for structure beyond the limits of a record.
        """
        meta = pack_metadata(trajectory)
        parts: list[bytes | memoryview[int]] = [meta, _padding(len(meta))]
        arrays: list[np.ndarray[Any, Any]] = [
            np.ascontiguousarray(trajectory.tokens, dtype=_INT),
            np.ascontiguousarray(trajectory.logprobs, dtype=_FLOAT),
        ]
        for array in trajectory.arrays.values():
            _check_finite(array)
            arrays.append(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")))
        for array in arrays:
            parts += [array.reshape(-1).data.cast("B"), _padding(array.nbytes)]
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
        end = _end_of_array(record._logprobs_at, record.num_tokens)
        if end + sum(_padded(spec) for spec in record.structure.arrays) != len(data):
            raise ValueError(f"{record.num_tokens} tokens do not make a record of {len(data)} bytes")
        if np.minimum.reduce(np.frombuffer(data, _INT, record.num_tokens, record._tokens_at)) < 0:
            raise ValueError("negative token id")
        if not are_logprobs(np.frombuffer(data, _FLOAT, record.num_tokens, record._logprobs_at)):
            raise ValueError("log-probs: want finite values that are at most 0")
        if record.structure is not PLAIN:
            for array in record.trajectory().arrays.values():  # checks segments and turns
                _check_finite(array)
        return record

    @classmethod
    def _made(cls, data: bytes, ticket_id: int, sample_index: int, crc32: int, meta: bytes) -> Self:
        fields = unpack_metadata(meta, rest_bytes=len(data) - _HEADER.size - len(meta))
        tokens_at = _HEADER.size + len(meta) + -len(meta) % _ALIGN
        return cls(
            data=data,
            ticket_id=ticket_id,
            sample_index=sample_index,
            crc32=crc32,
            num_tokens=fields.num_tokens,
            runs=fields.runs,
            reward=fields.reward,
            reward_components=fields.reward_components,
            finish_reason=fields.finish_reason,
            generation_s=fields.generation_s,
            reward_s=fields.reward_s,
            is_greedy=fields.is_greedy,
            structure=fields.structure,
            _tokens_at=tokens_at,
            _logprobs_at=_end_of_array(tokens_at, fields.num_tokens),
        )

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
        """True if all numbers are of a size that an honest server sends (`LARGEST_REWARD` and its neighbors).

        Not a condition of a valid record: ledgers of earlier releases may hold larger numbers.
        """
        logprobs = np.frombuffer(self.data, _FLOAT, self.num_tokens, self._logprobs_at)
        is_plain_plausible = (
            all(abs(reward) <= LARGEST_REWARD for reward in (self.reward, *self.reward_components.values()))
            and 0 <= self.generation_s <= MAX_SAMPLE_S
            and 0 <= self.reward_s <= MAX_SAMPLE_S
            and bool(np.minimum.reduce(logprobs) >= LEAST_LOGPROB)
        )
        if self.structure is PLAIN or not is_plain_plausible:
            return is_plain_plausible
        return (
            all(abs(reward) <= LARGEST_REWARD for _, reward in self.structure.turns)
            and all(abs(value) <= LARGEST_METRIC for value in self.structure.metrics.values())
            and all(
                np.abs(array).max() <= LARGEST_REWARD
                for name, array in self._arrays()
                if name == TOKEN_REWARDS
            )
        )

    def trajectory(self) -> Trajectory:
        """The trajectory; its arrays, but for mask and versions, are read-only views of the bytes."""
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


def _end_of_array(offset: int, num_tokens: int) -> int:
    """Offset after an array of `num_tokens` 4-byte numbers at `offset`, padding included."""
    return offset + 4 * num_tokens + -(4 * num_tokens) % _ALIGN


def _padding(num_bytes: int) -> bytes:
    return bytes(-num_bytes % _ALIGN)


def _padded(spec: ArraySpec) -> int:
    return spec.num_bytes + -spec.num_bytes % _ALIGN


def _check_finite(array: np.ndarray[Any, Any]) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("an array has numbers that are not finite")
