"""Reads back what trackers have written, and trackers that misbehave."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.trackers import TrackedRow, TrackedRun, Tracker

_BLOCK = 32768


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard shows them (of a step written twice: the last)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    tags = [tag for tag in reader.Tags()["tensors"] if tag not in ("config", "summary")]
    found = {
        tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]
    }
    assert not tags, tags
    return found


def texts(folder: Path) -> dict[str, str]:
    """Tag -> text."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {
        tag: reader.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in reader.Tags()["tensors"]
    }


def wandb_records(directory: Path) -> Iterator[Any]:
    """The records of an offline run of W&B: protobufs in the log format of LevelDB."""
    from wandb.proto import wandb_internal_pb2

    (path,) = directory.glob("run-*.wandb")
    data = path.read_bytes()
    offset, parts = 7, b""  # after the file's own header
    while offset + 7 <= len(data):
        if _BLOCK - offset % _BLOCK < 7:  # a record's header is never split
            offset += _BLOCK - offset % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def wandb_history(directory: Path) -> list[dict[str, Any]]:
    """The rows of an offline run of W&B."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(directory)
        if record.HasField("history")
    ]


def wandb_config(directory: Path) -> dict[str, Any]:
    """The configuration of an offline run of W&B."""
    return {
        item.key: json.loads(item.value_json)
        for record in wandb_records(directory)
        if record.HasField("run")
        for item in record.run.config.update
    }


class Kept(Tracker):
    """Keeps the rows in memory."""

    def open(self, run: TrackedRun) -> None:
        self.rows = list(run.earlier_rows())

    def log(self, row: TrackedRow) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.is_closed = True


class Raising(Kept):
    """Refuses every other row."""

    def log(self, row: TrackedRow) -> None:
        if row.step % 2:
            raise OSError(28, "No space left on device")
        super().log(row)


class Hanging(Kept):
    """Blocks at its first row, for ever."""

    is_abandoned = False

    def log(self, row: TrackedRow) -> None:
        threading.Event().wait()

    def abandon(self) -> None:
        self.is_abandoned = True
