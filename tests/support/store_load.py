"""A reproducible load on a durable store: the samples of a ticket are a function of its id.

`python -m tests.support.store_load DIRECTORY DURABILITY NUM_TICKETS` writes, batches, trains and releases
tickets as a ledger does, continues from the files in DIRECTORY, and prints one line `TICKET INDEX` for each
acknowledged sample.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from areal_like.config import BufferConfig
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.messages.producer import Purpose
from areal_like.wire.records import Record
from areal_like.wire.routes import Routes
from buffer.storage.durable import DurableStore
from buffer.tickets import SampleSummary, State, Ticket

SIZE = 2
"""Samples in a ticket."""
KEPT = 6
"""A ticket is released when this many newer ones are trained."""
_SEGMENT_BYTES = 1 << 16


def trajectory_of(ticket_id: int, sample_index: int) -> Trajectory:
    """The trajectory of this sample."""
    rng = np.random.default_rng([ticket_id, sample_index])
    num_prompt, num_sampled = int(rng.integers(1, 20)), int(rng.integers(1, 600))
    versions = np.concatenate([np.full(num_prompt, -1), np.sort(rng.integers(0, 3, num_sampled))]).astype(
        np.int32
    )
    return Trajectory(
        tokens=rng.integers(0, 1 << 30, num_prompt + num_sampled, dtype=np.int32),
        loss_mask=(versions >= 0).astype(np.uint8),
        logprobs=np.where(versions >= 0, -rng.random(num_prompt + num_sampled), 0).astype(np.float32),
        versions=versions,
        reward=float(rng.standard_normal()),
        reward_components={"exact": float(ticket_id), "format": 0.1},
        finish_reason=FinishReason.LENGTH if ticket_id % 3 else FinishReason.STOP,
        generation_s=0.1 * sample_index,
        is_greedy=sample_index == 1,
        routes=routes_of(ticket_id, num_tokens=num_prompt + num_sampled - 1),
    )


def routes_of(ticket_id: int, *, num_tokens: int) -> Routes | None:
    """Of every other ticket: with as many bytes as the tokens and log-probs."""
    if ticket_id % 2:
        return None
    rng = np.random.default_rng([ticket_id, num_tokens])
    return Routes(rng.integers(0, 8, (num_tokens, 2, 4), dtype=np.uint8), 8)


def is_same(left: Trajectory, right: Trajectory) -> bool:
    """True if two trajectories are equal bit for bit."""
    arrays = ("tokens", "loss_mask", "logprobs", "versions")
    fields = ("reward", "reward_components", "finish_reason", "generation_s", "reward_s", "is_greedy")
    routes = [None if one.routes is None else one.routes.to_bytes() for one in (left, right)]
    if routes[0] != routes[1]:
        return False
    return all(getattr(left, name).tobytes() == getattr(right, name).tobytes() for name in arrays) and all(
        getattr(left, name) == getattr(right, name) for name in fields
    )


def store_settings(**changes: Any) -> BufferConfig:
    """The defaults with these changes, and without the reserve of free space."""
    return BufferConfig(**({"min_free_bytes": 0} | changes))


def new_ticket(ticket_id: int, *, num_samples: int = SIZE) -> Ticket:
    """A ticket as `TicketTable.issue` makes it."""
    return Ticket(
        ticket_id=ticket_id,
        purpose=Purpose.TRAIN,
        prompt_index=ticket_id % 7,
        num_samples=num_samples,
        max_staleness=4,
    )


def sample_of(ticket_id: int, sample_index: int, trajectory: Trajectory) -> SampleSummary:
    """The summary of a trajectory."""
    return SampleSummary(
        lease_id=100 + ticket_id,
        oldest_step=0,
        sum_token_steps=sample_index,
        oldest_version=trajectory.oldest_version,
        newest_version=trajectory.newest_version,
        num_sampled=trajectory.num_sampled,
        reward=trajectory.reward,
    )


def put_sample(store: DurableStore, ticket: Ticket, sample_index: int) -> None:
    """Accepts a sample."""
    trajectory = trajectory_of(ticket.ticket_id, sample_index)
    sample = ticket.samples[sample_index] = sample_of(ticket.ticket_id, sample_index, trajectory)
    store.put_sample(sample, Record.of(ticket.ticket_id, sample_index, trajectory))


def move(store: DurableStore, ticket: Ticket, state: State) -> None:
    """Writes a ticket's new state."""
    ticket.state = state
    store.put_ticket(ticket)


async def durable(store: DurableStore) -> None:
    """Returns when everything written so far is durable."""
    done = asyncio.get_running_loop().create_future()
    store.when_durable(lambda: done.set_result(None))
    await done


def raising(error: Exception) -> None:
    """`on_error` for tests that expect no error."""
    raise error


async def load(directory: Path, *, durability: str, num_tickets: int) -> None:
    """Continues from the files in the directory until `num_tickets` more are trained."""
    store = DurableStore(
        directory, store_settings(durability=durability, segment_bytes=_SEGMENT_BYTES), on_error=raising
    )
    recovered = store.recover()
    trained = list(recovered.trained)
    # Complete the tickets that an earlier process left unfinished.
    for ticket in recovered.tickets:
        for index in sorted(set(range(SIZE)) - set(ticket.samples)):
            put_sample(store, ticket, index)
            store.when_durable(_acknowledge(ticket.ticket_id, index))
        train(store, ticket, trained)
    for ticket_id in range(recovered.num_issued + 1, recovered.num_issued + num_tickets + 1):
        ticket = new_ticket(ticket_id)
        store.put_ticket(ticket)
        for index in range(SIZE):
            put_sample(store, ticket, index)
            store.when_durable(_acknowledge(ticket_id, index))
            await asyncio.sleep(0)
        train(store, ticket, trained)
        if ticket_id % 5 == 0:
            await durable(store)
    await durable(store)
    store.close()


def train(store: DurableStore, ticket: Ticket, trained: list[Ticket]) -> None:
    """Batches and trains a complete ticket, and releases the oldest trained ticket beyond KEPT.

    The scalar `committed_step` is written in the same transaction.
    """
    move(store, ticket, State.READY)
    ticket.step, ticket.position = ticket.ticket_id, 0
    move(store, ticket, State.BATCHED)
    move(store, ticket, State.TRAINED)
    store.put_scalar("committed_step", ticket.step)
    trained.append(ticket)
    if len(trained) > KEPT:
        store.release(trained.pop(0))


def _acknowledge(ticket_id: int, sample_index: int) -> object:
    line = f"{ticket_id} {sample_index}\n".encode()
    return lambda: os.write(1, line)


if __name__ == "__main__":
    # Ends this process when its test has ended.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    asyncio.run(load(Path(sys.argv[1]), durability=sys.argv[2], num_tickets=int(sys.argv[3])))
