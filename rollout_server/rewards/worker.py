"""One reward process: `python -m rollout_server.rewards.worker`; pool.py drives it over its stdin and stdout.

    parent -> worker   {"task": {...}, "seed": n, "sandbox": kind}    first frame: the task to import
    worker -> parent   null | "error message"                         null if the task was imported
    parent -> worker   [[item, split, index, completion], ...]
    worker -> parent   [item, reward, components, seconds, error]     one frame per item, in order

Stdin and stdout are the two directions of one socket. A frame is a 4-byte little-endian length and msgpack.
Results are written one by one, so that the first item without a result is the one that hangs. The example is
rebuilt here from (split, index), so a task's answers need not be serialized. At its start the process moves
the socket from descriptors 0 and 1 to others, so that a reward that prints or reads stdin cannot corrupt it.
"""

from __future__ import annotations

import math
import numbers
import os
import signal
import struct
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO

import msgpack

from areal_like.errors import ConfigError, RewardError
from areal_like.runtime.process import die_with_parent
from rollout_server.tasks.base import Completion, Example, Split, Task, make_task

HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 20


def main() -> None:
    """Serves until stdin ends."""
    die_with_parent(signum=signal.SIGKILL)
    # Ctrl-C reaches the whole process group, but only the parent ends this worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = _claim_stream()
    setup = _read(requests)
    if setup is None:
        return
    try:
        task = make_task(setup["task"], seed=setup["seed"], sandbox=setup["sandbox"])
    except ConfigError as error:
        _write(replies, str(error))
        return
    _write(replies, None)
    example = lru_cache(maxsize=1024)(task.example)
    while (items := _read(requests)) is not None:
        for item, split, index, completion in items:
            started = time.perf_counter()
            reward, components, problem = _try_score(task, example, split, index, completion)
            _write(replies, [item, reward, components, time.perf_counter() - started, problem])


def _try_score(
    task: Task, example: Callable[[Split, int], Example], split: Split, index: int, completion: str
) -> tuple[float, dict[str, float], str]:
    try:
        return *_score(task, example(split, index), completion), ""
    except Exception as raised:  # a task's code may raise anything; only this sample fails
        return 0.0, {}, _one_line(raised)


def _score(task: Task, example: Example, completion: str) -> tuple[float, dict[str, float]]:
    value = task.reward(example, Completion(completion))
    if isinstance(value, dict):
        components = {str(name): _number(part, name=str(name)) for name, part in value.items()}
        if not components:
            raise RewardError("reward() returned an empty dict: name at least one part")
        return math.fsum(components.values()), components
    return _number(value, name="reward()"), {}


def _number(value: Any, *, name: str) -> float:
    if callable(item := getattr(value, "item", None)):
        value = item()  # numpy and torch scalars
    if not isinstance(value, numbers.Real):
        raise RewardError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise RewardError(f"{name} must be a finite number, got {value}")
    return float(value)


def _one_line(error: Exception) -> str:
    """The message of an exception, followed by the place where it was raised unless it is a RewardError."""
    message = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, RewardError):
        return message
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message} ({where.filename}:{where.lineno} in {where.name})"


def _claim_stream() -> tuple[BinaryIO, int]:
    """Moves the stream to new descriptors; stdin becomes /dev/null, stdout becomes stderr."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return os.fdopen(requests, "rb"), replies


def _read(stream: BinaryIO) -> Any:
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return msgpack.unpackb(stream.read(HEADER.unpack(header)[0]))


def _write(descriptor: int, message: Any) -> None:
    frame = pack(message)
    while frame:
        frame = frame[os.write(descriptor, frame) :]


def pack(message: Any) -> bytes:
    """The frame of a message: length and msgpack."""
    body = msgpack.packb(message)
    assert isinstance(body, bytes)
    return HEADER.pack(len(body)) + body


if __name__ == "__main__":
    main()
