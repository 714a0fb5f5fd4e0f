"""TensorBoard: scalars in event files, written with the package `tensorboard` alone.

torch.utils.tensorboard would do the same with more imports; the package's `EventFileWriter` writes in a
separate thread and reports a full disk one row late. So this module packs the records itself with the
package's `RecordWriter`. Every row is one event and is flushed.

A resume adds an event file that begins with a session start at the resumed step: TensorBoard then drops the
events of earlier files from that step on (the `purge_step` of other writers).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from areal_like.paths import RunPaths
from trainer.trackers.base import TRACKERS, Aliases, TrackedRow, TrackedRun, Tracker

_FILE_VERSION = "brain.Event:2"


@TRACKERS.register("tensorboard")
@dataclass(kw_only=True)
class TensorBoard(Tracker):
    """Writes event files: `tensorboard --logdir runs` shows all runs."""

    dir: str = ""
    """Directory of all runs' event files, which get a folder of the run's name there; empty: the folder
    `tensorboard` in the run's directory."""
    aliases: Aliases = "none"
    """`verl`: also verl's names of the numbers that both have."""
    package = "tensorboard"
    _file: BinaryIO = field(init=False, repr=False)
    _writer: Any = field(init=False, repr=False)

    def open(self, run: TrackedRun) -> None:
        """Creates an event file; it gets all earlier rows if there is no file of an earlier start."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = Path(self.dir).expanduser() / run.name if self.dir else RunPaths(run.root).tensorboard
        folder.mkdir(parents=True, exist_ok=True)
        is_first = not any(folder.glob("events.out.tfevents.*"))
        now_s = time.time()
        name = f"events.out.tfevents.{int(now_s):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = (folder / name).open("xb")
        self._writer = RecordWriter(self._file)
        self._write(wall_time=now_s, file_version=_FILE_VERSION)
        if not is_first:
            self._write(wall_time=now_s, step=run.start_step, session_log={"status": "START"})
        for row in run.earlier_rows():
            if is_first or row.step >= run.start_step:  # an evaluation of the step at which this start begins
                self.log(row)
        self._write_text("config", _fenced(run.config), step=run.start_step)

    def log(self, row: TrackedRow) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in row.numbers.items()]
        self._write(wall_time=row.time_unix_s, step=row.step, summary={"value": values})

    def summarize(self, summary: Mapping[str, Any]) -> None:
        self._write_text("summary", _fenced(summary), step=int(summary.get("steps") or 0))

    def close(self) -> None:
        self._writer.close()

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(**event).SerializeToString())
        self._writer.flush()

    def _write_text(self, tag: str, text: str, *, step: int) -> None:
        value = {
            "tag": tag,
            "metadata": {"plugin_data": {"plugin_name": "text"}},
            "tensor": {
                "dtype": "DT_STRING",
                "tensor_shape": {"dim": [{"size": 1}]},
                "string_val": [text.encode()],
            },
        }
        self._write(wall_time=time.time(), step=step, summary={"value": [value]})


def _fenced(value: Mapping[str, Any]) -> str:
    """Text as a Markdown code block, which TensorBoard's text page shows unchanged."""
    return "\n".join(f"    {line}" for line in json.dumps(value, indent=2, default=repr).splitlines())
