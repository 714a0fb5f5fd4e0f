"""One trajectory as bytes in a segment file: a header, a few numbers, then raw arrays. Nothing but this file knows the layout.

    0  magic "ATR1" | num_bytes u32 | crc32 u32 | sample_index u32 | ticket_id u64 | meta_bytes u32 | 0 u32      little-endian
    32 msgpack [num_tokens, [[version, num_tokens], ...], reward, {component: reward}, finish_reason, generation_s, reward_s,
       is_greedy]
       tokens int32[num_tokens], logprobs float32[num_tokens], each part padded to 8 bytes

The checksum covers everything behind it, whose sample it is included, so that neither a torn write nor a place that was used for something
else passes for the record. Versions are written as runs and the loss mask not at all (it is 1 exactly where a version is): what fsync
has to move is a third less than on the wire. Readers outside of the buffer (audit, replay) need no more than a directory and a ledger row.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.errors import StoreCorruptError
from areal_like.trajectory import FinishReason, Trajectory

_HEADER = struct.Struct("<4sIIIQII")
_MAGIC = b"ATR1"
_CHECKED_FROM = 12
_ALIGN = 8
_INT, _FLOAT = np.dtype("<i4"), np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is, as the ledger's row says."""

    segment: int
    offset: int
    num_bytes: int
    crc32: int


def segment_path(directory: Path, segment: int) -> Path:
    """File of a segment in a ledger's directory."""
    return directory / "segments" / f"{segment:06d}.seg"


def encode_record(ticket_id: int, sample_index: int, trajectory: Trajectory) -> bytes:
    """The whole record."""
    meta = msgpack.packb(
        [
            trajectory.num_tokens,
            _runs(trajectory.versions),
            trajectory.reward,
            trajectory.reward_components,
            trajectory.finish_reason.value,
            trajectory.generation_s,
            trajectory.reward_s,
            trajectory.is_greedy,
        ]
    )
    arrays = (np.ascontiguousarray(trajectory.tokens, dtype=_INT).data, np.ascontiguousarray(trajectory.logprobs, dtype=_FLOAT).data)
    parts = [meta, _padding(len(meta))]
    for array in arrays:
        parts += [array.cast("B"), _padding(array.nbytes)]
    body = b"".join(parts)
    identity = struct.pack("<IQII", sample_index, ticket_id, len(meta), 0)
    crc32 = zlib.crc32(body, zlib.crc32(identity))
    return struct.pack("<4sII", _MAGIC, _HEADER.size + len(body), crc32) + identity + body


def crc32_of(record: bytes) -> int:
    """The checksum that a record carries."""
    return int(_HEADER.unpack_from(record)[2])


def decode_record(record: bytes, *, ticket_id: int, sample_index: int, where: str) -> Trajectory:
    """The trajectory; its arrays are read-only views. Raises StoreCorruptError, which names the ticket and `where`."""
    whose = f"sample {sample_index} of ticket {ticket_id} ({where})"
    if len(record) < _HEADER.size:
        raise StoreCorruptError(f"{whose}: only {len(record)} bytes of its record are there")
    magic, num_bytes, crc32, found_index, found_ticket, meta_bytes, _ = _HEADER.unpack_from(record)
    if magic != _MAGIC or num_bytes != len(record):
        raise StoreCorruptError(f"{whose}: no record of {len(record)} bytes begins there")
    if zlib.crc32(memoryview(record)[_CHECKED_FROM:]) != crc32:
        raise StoreCorruptError(f"{whose}: its record does not match its checksum")
    if (found_ticket, found_index) != (ticket_id, sample_index):
        raise StoreCorruptError(f"{whose}: the record there is sample {found_index} of ticket {found_ticket}")
    num_tokens, runs, reward, components, finish_reason, generation_s, reward_s, is_greedy = msgpack.unpackb(
        memoryview(record)[_HEADER.size : _HEADER.size + meta_bytes]
    )
    tokens_at = _HEADER.size + meta_bytes + len(_padding(meta_bytes))
    logprobs_at = tokens_at + 4 * num_tokens + len(_padding(4 * num_tokens))
    versions = np.repeat(
        np.array([version for version, _ in runs], dtype=np.int32), np.array([length for _, length in runs], dtype=np.int64)
    )
    return Trajectory(
        tokens=np.frombuffer(record, dtype=_INT, count=num_tokens, offset=tokens_at),
        loss_mask=(versions >= 0).astype(np.uint8),
        logprobs=np.frombuffer(record, dtype=_FLOAT, count=num_tokens, offset=logprobs_at),
        versions=versions,
        reward=reward,
        reward_components=components,
        finish_reason=FinishReason(finish_reason),
        generation_s=generation_s,
        reward_s=reward_s,
        is_greedy=is_greedy,
    )


def read_record(directory: Path, place: Place, *, ticket_id: int, sample_index: int) -> Trajectory:
    """The trajectory that a ledger row names. Raises StoreCorruptError when it is not there as it was written."""
    path = segment_path(directory, place.segment)
    where = f"{path} at {place.offset}"
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise StoreCorruptError(f"sample {sample_index} of ticket {ticket_id}: its file {path} is missing") from None
    try:
        record = os.pread(file, place.num_bytes, place.offset)
    finally:
        os.close(file)
    trajectory = decode_record(record, ticket_id=ticket_id, sample_index=sample_index, where=where)
    if crc32_of(record) != place.crc32:
        raise StoreCorruptError(f"sample {sample_index} of ticket {ticket_id} ({where}): the record is not the one that the ledger names")
    return trajectory


def count_whole_records(data: bytes) -> tuple[int, int]:
    """(whole records from the beginning of `data`, their bytes): what is behind them is torn."""
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


def _runs(versions: NDArray[np.int32]) -> list[list[int]]:
    starts = [0, *((versions[1:] != versions[:-1]).nonzero()[0] + 1).tolist()]
    ends = [*starts[1:], len(versions)]
    return [[int(versions[start]), end - start] for start, end in zip(starts, ends, strict=True)]


def _padding(num_bytes: int) -> bytes:
    return bytes(-num_bytes % _ALIGN)
