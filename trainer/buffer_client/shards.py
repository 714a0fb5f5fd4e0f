"""Makes all buffers of a job (`buffer.num_shards`) look like one buffer to the rest of the trainer.

| request | goes to |
|---|---|
| Fetch (one group of a step) | the shard that fills that position of the step |
| StartTraining, CompleteStep, CommitStep, SetMaxStaleness, CloseAdmission, FinishRun | every shard |
| AllocVersion | the first shard allocates; all others adopt the version before any server gets its weights |
| RequestEval, GetStepSettings | the first shard, which also sends the directory of servers |
| GetRunCounters, GetStreamState | every shard; the replies are merged here |

A request to every shard waits for the last reply, so a shard that is down stalls the step. The other shards
continue to fill their own positions, as far as their budgets allow. If one shard replies and another does
not, the request is not undone: every request is idempotent and is sent again, if necessary by the next
trainer.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from areal_like.errors import RefusedError, RunFinishedError
from areal_like.shards import Shard, add_up
from areal_like.wire.messages.consumer import (
    AdoptVersion,
    AllocVersion,
    CloseAdmission,
    CommitStep,
    CompleteStep,
    Fetch,
    FinishRun,
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
Call = Callable[[Any], Awaitable[Any]]

_MERGED_BY_MAX = (
    *("tokens_generated", "generation_busy_s", "generation_idle_s"),
    *("max_trained_lag", "held_back_s"),
)
"""Counters that must not be added up: every server reports the same figures to every shard, `max_trained_lag`
is a maximum, and the trainer may wait for several shards at once."""
_MEANS = {
    "mean_trained_lag": "samples_trained",
    "mean_trained_token_lag": "tokens_trained",
    "mean_trained_sample_tokens": "samples_trained",
    "mean_dropped_sample_tokens": "samples_dropped",
}
"""Counter that is a mean -> counter of the items averaged, the weight of a shard's mean."""


async def call_shards(message: Any, calls: Sequence[Call]) -> Any:
    """The job's reply to a request.

    `calls`: functions that send a request to one shard each, in the order of shards. Their errors propagate.
    """
    first, *others = calls
    match message:
        case Fetch():
            return await calls[Shard.of(message.position, count=len(calls)).index](message)
        case AllocVersion():
            granted: VersionGranted = await first(message)
            await _all(call(AdoptVersion(version=granted.version, step=message.step)) for call in others)
            return granted
        case StartTraining():
            streams = split_stream(message.stream, num_shards=len(calls))
            welcomes = await _all(
                call(dataclasses.replace(message, stream=part))
                for call, part in zip(calls, streams, strict=True)
            )
            return welcomes[0]
        case CompleteStep() | SetMaxStaleness() | CommitStep() | CloseAdmission() | FinishRun() | Goodbye():
            return (await _all(call(message) for call in calls))[0]
        case GetStreamState():
            return StreamState(
                stream=merge_streams([state.stream for state in await _all(call(message) for call in calls)])
            )
        case GetRunCounters():
            return merge_run_counters(await _all(call(message) for call in calls))
        case _:
            return await first(message)


def merge_streams(streams: Sequence[Stream]) -> Stream:
    """Merges the shards' stream states into one for a checkpoint; `split_stream` is the inverse."""
    if len(streams) == 1:
        return streams[0]
    merged: Stream = {
        f"{index}:{key}": value for index, stream in enumerate(streams) for key, value in stream.items()
    }
    return merged | {"num_shards": len(streams)}


def split_stream(stream: Stream, *, num_shards: int) -> list[Stream]:
    """The stream state of each shard.

    Raises RefusedError if the checkpoint was made with another number of shards.
    """
    num_saved = stream.get("num_shards", 1)
    if stream and num_saved != num_shards:
        raise RefusedError(
            f"the checkpoint was made with buffer.num_shards={num_saved}, not {num_shards}: set that again"
        )
    if num_shards == 1:
        return [stream]
    parts: list[Stream] = [{} for _ in range(num_shards)]
    for key, value in stream.items():
        shard, colon, name = key.partition(":")
        if colon:
            parts[int(shard)][name] = value
    return parts


def merge_run_counters(parts: Sequence[RunCounters]) -> RunCounters:
    """The counters of the whole job."""
    each = [part.counters for part in parts]
    # A shard leaves out counters of lengths and failures that are zero.
    names = dict.fromkeys(name for part in each for name in part)
    counters = {name: sum(part.get(name, 0.0) for part in each) for name in names}
    counters |= {name: max(part.get(name, 0.0) for part in each) for name in _MERGED_BY_MAX}
    for name, over in _MEANS.items():
        total = sum(part[name] * part[over] for part in each)
        counters[name] = total / counters[over] if counters[over] else 0.0
    return RunCounters(
        tickets=add_up(part.tickets for part in parts),
        drops=add_up(part.drops for part in parts),
        counters=counters,
    )


async def _all(requests: Iterable[Awaitable[Any]]) -> list[Any]:
    """All replies. Raises the first error when all requests have ended; several refusals become one."""
    replies = await asyncio.gather(*requests, return_exceptions=True)
    errors = [reply for reply in replies if isinstance(reply, BaseException)]
    if finished := [error for error in errors if isinstance(error, RunFinishedError)]:
        raise finished[0]
    if len(errors) > 1 and all(isinstance(error, RefusedError) for error in errors):
        raise RefusedError("; ".join(dict.fromkeys(map(str, errors))))
    for error in errors:
        raise error
    return replies
