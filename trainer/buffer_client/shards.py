"""All buffers of a job (`buffer.num_shards`) as the one that the rest of the trainer talks to.

| what | goes to |
|---|---|
| a group of a step | the shard whose place it is |
| where training starts, steps, commits, the bound on lag, admission | every shard |
| a version | the first shard gives it out; every other has adopted it before anybody is sent its weights |
| evaluations, the directory of servers | the first shard |
| books, the state of the stream | every shard; merged here |

What every shard has to answer waits for the last of them: a shard that is away stalls the step. The others go on and fill their own places,
which is all that their budgets allow. Nothing is undone when one answers and another does not: every request is idempotent, and it is asked
again, also by the trainer that comes next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from areal_like.errors import RefusedError
from areal_like.shards import Shard, add_up
from areal_like.wire.messages.consumer import (
    AdoptVersion,
    AllocVersion,
    CloseAdmission,
    CommitStep,
    CompleteStep,
    Fetch,
    GetRunCounters,
    GetStreamState,
    RunCounters,
    SetMaxStaleness,
    StartTraining,
    StreamState,
    VersionGranted,
)
from areal_like.wire.messages.hello import Goodbye

Stream = dict[str, int | list[int]]
Ask = Callable[[Any], Awaitable[Any]]

_SEEN_BY_ALL = ("tokens_generated", "generation_busy_s", "generation_idle_s", "max_trained_lag")
"""Counters that are no sums: what servers tell every shard of themselves, and a maximum."""
_MEANS = {
    "mean_trained_lag": "samples_trained",
    "mean_trained_token_lag": "tokens_trained",
    "mean_trained_sample_tokens": "samples_trained",
    "mean_dropped_sample_tokens": "samples_dropped",
}
"""Counters that are means -> what they are means over."""


async def ask_buffers(message: Any, asks: Sequence[Ask]) -> Any:
    """The job's answer to a request. `asks`: how to ask each shard, in order. Raises what any of them does."""
    first, *others = asks
    match message:
        case Fetch():
            return await asks[Shard.of(message.position, count=len(asks)).index](message)
        case AllocVersion():
            granted: VersionGranted = await first(message)
            await _all(ask(AdoptVersion(version=granted.version, step=message.step)) for ask in others)
            return granted
        case StartTraining():
            streams = split_stream(message.stream, num_shards=len(asks))
            welcomes = await _all(
                ask(StartTraining(step=message.step, stream=part))
                for ask, part in zip(asks, streams, strict=True)
            )
            return welcomes[0]
        case CompleteStep() | SetMaxStaleness() | CommitStep() | CloseAdmission() | Goodbye():
            return (await _all(ask(message) for ask in asks))[0]
        case GetStreamState():
            return StreamState(
                stream=merge_streams([state.stream for state in await _all(ask(message) for ask in asks)])
            )
        case GetRunCounters():
            return merge_run_counters(await _all(ask(message) for ask in asks))
        case _:
            return await first(message)


def merge_streams(streams: Sequence[Stream]) -> Stream:
    """One mapping for a checkpoint, from which `split_stream` makes the shards' own again."""
    if len(streams) == 1:
        return streams[0]
    merged: Stream = {
        f"{index}:{key}": value for index, stream in enumerate(streams) for key, value in stream.items()
    }
    return merged | {"num_shards": len(streams)}


def split_stream(stream: Stream, *, num_shards: int) -> list[Stream]:
    """What each shard said. Raises RefusedError when they were not so many."""
    were = stream.get("num_shards", 1)
    if stream and were != num_shards:
        raise RefusedError(
            f"the checkpoint was made with buffer.num_shards={were}, not {num_shards}: set that again"
        )
    if num_shards == 1:
        return [stream]
    parts: list[Stream] = [{} for _ in range(num_shards)]
    for key, value in stream.items():
        shard, colon, name = key.partition(":")
        if colon:
            parts[int(shard)][name] = value
    return parts


def merge_run_counters(books: Sequence[RunCounters]) -> RunCounters:
    """The account of the whole job."""
    every = [one.counters for one in books]
    counters = {name: sum(one[name] for one in every) for name in every[0]}
    counters |= {name: max(one[name] for one in every) for name in _SEEN_BY_ALL}
    for name, over in _MEANS.items():
        counters[name] = (
            sum(one[name] * one[over] for one in every) / counters[over] if counters[over] else 0.0
        )
    return RunCounters(
        tickets=add_up(one.tickets for one in books),
        drops=add_up(one.drops for one in books),
        counters=counters,
    )


async def _all(requests: Iterable[Awaitable[Any]]) -> list[Any]:
    """Every answer. What any of them raises is raised when all have ended; several refusals are one."""
    answers = await asyncio.gather(*requests, return_exceptions=True)
    errors = [answer for answer in answers if isinstance(answer, BaseException)]
    if len(errors) > 1 and all(isinstance(error, RefusedError) for error in errors):
        raise RefusedError("; ".join(dict.fromkeys(map(str, errors))))
    for error in errors:
        raise error
    return answers
