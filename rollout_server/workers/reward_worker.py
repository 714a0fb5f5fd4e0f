"""The process in which rewards are computed; reward_pool.py sends it completions.

    server -> worker   [item, split, index, completion...]            as packed by `pack_item`
    worker -> server   [item, seconds, score, error, is_timeout]      one frame for each item; score or error

Synchronous rewards are returned in the order of the items, so the first item without a result is the one that
hangs. Asynchronous rewards run concurrently, as many as the server sends; the time limit of each is enforced
here, and the server ends the process only if its event loop is blocked. The example is rebuilt here from
(split, index), so a task's reference answers need not be serializable.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
import traceback
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np

from areal_like.errors import RAISED_BY_TASKS, RewardError
from areal_like.trajectory import FinishReason
from rollout_server.frames import HEADER, MAX_ERROR_CHARS, described, messages, pack, read
from rollout_server.rewards.scores import as_score, score_fields
from rollout_server.rewards.time_limit import begin_reward
from rollout_server.tasks.base import Completion, Example, Score, Split, Task

_PACKER = msgpack.Packer()
_READ_BYTES = 1 << 16

Examples = Callable[[Split, int], Example]


def serve(task: Task, connection: socket.socket, *, timeout_s: float) -> None:
    """Serves until the server closes the socket: then raises EOFError or ConnectionError, or returns.

    `timeout_s`: `rollout.reward_timeout_s`.
    """
    # A fork copies the generators' states; without this all workers would draw the same numbers.
    random.seed()
    np.random.seed()
    connection.sendall(pack([task.has_async_reward, ""]))
    examples = lru_cache(maxsize=1024)(task.example)
    if task.has_async_reward:
        asyncio.run(_serve_async(connection, task, examples, timeout_s=timeout_s))
    else:
        with connection.makefile("rb", _READ_BYTES) as stream:
            while True:
                number, *packed = read(stream.read)
                connection.sendall(_scored(task, examples, number, packed, timeout_s=timeout_s))


def _scored(task: Task, examples: Examples, number: int, packed: list[Any], *, timeout_s: float) -> bytes:
    started = time.perf_counter()
    score: Score | None = None
    error = ""
    begin_reward(timeout_s)
    try:
        example, completion = _unpacked(examples, *packed)
        score = as_score(task.reward(example, completion), completion)
    except RAISED_BY_TASKS as raised:  # only this sample fails
        error = _described(raised)
    return _packed_result(number, time.perf_counter() - started, score, error)


async def _serve_async(
    connection: socket.socket, task: Task, examples: Examples, *, timeout_s: float
) -> None:
    """Scores all items concurrently."""
    reader, writer = await asyncio.open_connection(sock=connection)
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
        except RAISED_BY_TASKS as raised:  # only this sample fails
            error = _described(raised)
        seconds = time.perf_counter() - started
        writer.write(_packed_result(number, seconds, score, error, is_timeout=limit.expired()))

    async for item in messages(reader):
        scoring = asyncio.create_task(score_item(*item))
        running.add(scoring)
        scoring.add_done_callback(running.discard)


def pack_item(number: int, *, split: Split, index: int, completion: Completion) -> bytes:
    """Packs an item into a frame. Raises TypeError or ValueError for messages that msgpack cannot
    represent."""
    token_ids = np.asarray(completion.token_ids, np.int32)  # no copy if it is already an array
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
    return HEADER.pack(len(packed)) + packed


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
    if not messages:  # one prompt, one completion
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


def _packed_result(
    number: int, seconds: float, score: Score | None, error: str, *, is_timeout: bool = False
) -> bytes:
    return pack([number, seconds, score and score_fields(score), error, is_timeout])


def _described(raised: BaseException) -> str:
    is_from_here = isinstance(raised, RewardError)
    if not is_from_here:
        return described(raised)
    return traceback.format_exception_only(raised)[-1].strip()[:MAX_ERROR_CHARS]
