"""One reward process: `python -m rollout_server.workers.reward_worker`.

reward_pool.py drives it over its stdin and stdout.

    parent -> worker   {"task": {...}, "seed": n, "timeout_s": s}     first frame: the task to import
    worker -> parent   ["" | error message, is_async]                 is_async: `async def reward`
    parent -> worker   [[item, split, index, completion...], ...]     the completion as packed by `pack_item`
    parent -> worker   []                                             drop the items that are not begun
    worker -> parent   null                                           they are dropped
    worker -> parent   [item, seconds, score, error, is_timeout]      one frame per item; score or error

Stdin and stdout are the two directions of one socket. A frame is a 4-byte little-endian length and msgpack.
Results are written one by one. A synchronous reward answers in the order of the items, so the first item
without a result is the one that hangs. Asynchronous rewards run at the same time, as many as the parent
sends; each has the time limit here, and the parent ends the process only if its event loop is blocked. The
example is rebuilt here from (split, index), so a task's answers need not be serialized. At its start the
process moves the socket from descriptors 0 and 1 to another, so that a reward that prints or reads stdin
cannot corrupt it.
"""

from __future__ import annotations

import asyncio
import select
import signal
import socket
import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np

from areal_like.errors import ConfigError, RewardError
from areal_like.runtime.process import die_with_parent
from areal_like.trajectory import FinishReason
from rollout_server.frames import HEADER, claim_stdin, pack
from rollout_server.rewards.scores import as_score
from rollout_server.rewards.time_limit import begin_reward
from rollout_server.tasks.base import Completion, Example, Score, Split, Task, make_task

MAX_FRAME_BYTES = 64 << 20
_PACKER = msgpack.Packer()

Examples = Callable[[Split, int], Example]


def main() -> None:
    """Serves until stdin ends."""
    die_with_parent(signum=signal.SIGKILL)
    # Ctrl-C reaches the whole process group, but only the parent ends this worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stream = claim_stdin()
    setup = _read(stream)
    if setup is None:
        return
    try:
        task = make_task(setup["task"], seed=setup["seed"], sandbox=setup["sandbox"])
    except ConfigError as error:
        stream.sendall(pack([str(error), False]))
        return
    is_async = task.has_async_reward
    stream.sendall(pack(["", is_async]))
    examples = lru_cache(maxsize=1024)(task.example)
    if is_async:
        asyncio.run(_serve_async(stream, task, examples, timeout_s=setup["timeout_s"]))
    else:
        _serve(stream, task, examples, timeout_s=setup["timeout_s"])


def _serve(stream: socket.socket, task: Task, examples: Examples, *, timeout_s: float) -> None:
    """Scores one item after the other. Before each one it reads what the parent has sent meanwhile."""
    items: deque[Sequence[Any]] = deque()
    frames = select.poll()
    frames.register(stream, select.POLLIN)
    while True:
        while not items or frames.poll(0):
            new = _read(stream)
            if new is None:
                return
            if not new:
                items.clear()
                stream.sendall(pack(None))
            items += new
        number, *packed = items.popleft()
        started = time.perf_counter()
        score: Score | None = None
        error = ""
        begin_reward(timeout_s)
        try:
            example, completion = _unpacked(examples, *packed)
            score = as_score(task.reward(example, completion), completion)
        except Exception as raised:  # a task's code may raise anything; only this sample fails
            error = _one_line(raised)
        stream.sendall(_answer(number, time.perf_counter() - started, score, error))


async def _serve_async(stream: socket.socket, task: Task, examples: Examples, *, timeout_s: float) -> None:
    """Scores all items that it has been sent at the same time."""
    reader, writer = await asyncio.open_connection(sock=stream)
    running: set[asyncio.Task[None]] = set()

    async def score_item(number: int, *packed: Any) -> None:
        started = time.perf_counter()
        score: Score | None = None
        error = ""
        limit = asyncio.timeout(timeout_s)
        begin_reward(timeout_s)
        try:
            example, completion = _unpacked(examples, *packed)
            async with limit:
                returned = await task.reward(example, completion)  # type: ignore[misc]  # it is async
            score = as_score(returned, completion)
        except Exception as raised:  # as above
            error = _one_line(raised)
        seconds = time.perf_counter() - started
        writer.write(_answer(number, seconds, score, error, is_timeout=limit.expired()))

    while True:
        try:
            (size,) = HEADER.unpack(await reader.readexactly(HEADER.size))
            items = msgpack.unpackb(await reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        for item in items:
            scoring = asyncio.create_task(score_item(*item))
            running.add(scoring)
            scoring.add_done_callback(running.discard)


def pack_item(number: int, *, split: Split, index: int, completion: Completion) -> bytes:
    """An item as msgpack. Raises TypeError or ValueError for messages that msgpack cannot hold."""
    token_ids = np.asarray(completion.token_ids, np.int32)  # the array itself if it is one already
    packed = _PACKER.pack(
        [
            number,
            split,
            index,
            str(completion),
            "" if completion.raw_text == completion else completion.raw_text,
            completion.finish_reason.value,
            token_ids.tobytes(),
            completion.turn_lengths,
            completion.messages,
        ]
    )
    assert isinstance(packed, bytes)
    return packed


def _unpacked(
    examples: Examples,
    split: Split,
    index: int,
    text: str,
    raw_text: str,
    finish_reason: str,
    token_ids: bytes,
    turn_lengths: list[int],
    messages: list[dict[str, Any]],
) -> tuple[Example, Completion]:
    example = examples(split, index)
    if not messages:  # one prompt, one answer
        prompt = example.prompt
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = [*before, {"role": "assistant", "content": text}]
    completion = Completion(
        text,
        raw_text=raw_text,
        messages=messages,
        token_ids=array("i", token_ids),
        turn_lengths=turn_lengths,
        finish_reason=FinishReason(finish_reason),
    )
    return example, completion


def _answer(
    number: int, seconds: float, score: Score | None, error: str, *, is_timeout: bool = False
) -> bytes:
    fields = score and [
        score.value,
        dict(score.parts),
        dict(score.metrics),
        list(score.turns),
        np.asarray(score.tokens, np.float32).tobytes() if len(score.tokens) else b"",
    ]
    return pack([number, seconds, fields, error, is_timeout])


def score_of(fields: list[Any]) -> Score:
    """The score of an answer. Raises ValueError or TypeError for anything else."""
    value, parts, metrics, turns, tokens = fields
    return Score(
        value=value,
        parts=parts,
        metrics=metrics,
        turns=tuple(turns),
        tokens=np.frombuffer(tokens, np.float32) if tokens else (),  # type: ignore[arg-type]
    )


def _one_line(error: Exception) -> str:
    """The message of an exception, followed by the place where it was raised unless it is a RewardError."""
    message = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, RewardError):
        return message
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message} ({where.filename}:{where.lineno} in {where.name})"


def _read(stream: socket.socket) -> Any:
    """The next message; None at the end."""
    header = _exactly(stream, HEADER.size)
    body = _exactly(stream, HEADER.unpack(header)[0]) if header else None
    # The task's settings may have keys that are no texts (YAML: `{1: a}`).
    return None if body is None else msgpack.unpackb(body, strict_map_key=False)


def _exactly(stream: socket.socket, size: int) -> bytes | None:
    parts = []
    while size:
        part = stream.recv(min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def pack_items(items: Sequence[bytes]) -> bytes:
    """The frame of a list of packed items."""
    body: bytes = msgpack.Packer().pack_array_header(len(items)) + b"".join(items)
    return HEADER.pack(len(body)) + body


if __name__ == "__main__":
    main()
