"""The weight groups that a receiver of pushes is in: joined and left without blocking the event loop.

Joining, receiving and leaving block, so each runs in a thread. A thread cannot be interrupted, only
abandoned: it runs to its end, at the latest at its own time limit, and its result is discarded.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from areal_like.errors import WeightSyncError
from areal_like.runtime.threads import in_thread
from areal_like.weights.weight_group import WeightGroup
from areal_like.wire.messages.weights import group_name_of

T = TypeVar("T")
_MAX_JOINS = 8
"""Maximum number of threads that wait to join a group at the same time, including abandoned ones."""
_JOIN_GRACE_S = 1.0
"""Time after a join's time limit in which torch can still report its own error."""


@dataclass(eq=False)
class _Join:
    """One attempt to join a group, in a thread that cannot be interrupted."""

    group_name: str
    is_abandoned: bool = False
    """True once no caller waits for its result; if it still joins a group, it leaves that group at once."""


class AbandonableThreads:
    """Threads for blocking work (broadcasts, group set-up, file reads) that can all be abandoned at once.

    All methods must be called on the event loop.
    """

    def __init__(self) -> None:
        self._pending: set[asyncio.Future[Any]] = set()

    async def run(self, work: Callable[[], T]) -> T:
        """Returns the result of `work`.

        Raises its exception, or WeightSyncError if `abandon` is called first.
        """

        def main() -> T:
            with torch.inference_mode():
                return work()

        future = in_thread(main, name="weights")
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return await future

    def abandon(self, reason: str) -> None:
        """Fails every pending `run` with WeightSyncError.

        The threads run to their end, and their results are discarded.
        """
        for future in list(self._pending):
            # The set may still contain a future that is done: the callback that removes it runs later.
            if not future.done():
                future.set_exception(WeightSyncError(reason))


class JoinedGroups:
    """The weight groups of one receiver. All methods must be called on the event loop."""

    def __init__(self, device: torch.device) -> None:
        """`device`: of the weights, which decides the backends that can be used."""
        self.threads = AbandonableThreads()
        """Run the joining and leaving of groups, and everything that receives."""
        self._device = device
        self._groups: dict[str, tuple[WeightGroup, ...]] = {}
        """By name, the groups of all senders; more than one name only while one is being left."""
        self._join: _Join | None = None
        """The join that is waiting for the other ranks."""
        self._join_slots = threading.BoundedSemaphore(_MAX_JOINS)

    def find(self, group_name: str) -> tuple[WeightGroup, ...]:
        """Returns what was joined under a name: one group for each sender. Raises WeightSyncError."""
        if (groups := self._groups.get(group_name)) is None:
            raise WeightSyncError(
                f"weight group {group_name!r} does not exist: call /init_weights_update_group first"
            )
        return groups

    async def join(
        self,
        *,
        master_address: str,
        master_port: int,
        rank: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_s: float,
        secret: str = "",
        more_senders: Sequence[tuple[str, int]] = (),
    ) -> None:
        """Joins a weight group; first leaves any other group and abandons a pending join.

        `more_senders`: address and port of the stores of senders 1, 2, ...: their groups are joined after the
        first one, in this order, and belong to the same name. Raises WeightSyncError, also when torch does
        not return within `timeout_s` (it waits without a time limit for a store that accepts the connection
        and never responds).
        """
        if backend == "nccl" and self._device.type != "cuda":
            raise WeightSyncError(
                f"backend nccl needs a CUDA engine, this one runs on {self._device}: use gloo"
            )
        for name in list(self._groups):
            await self.leave(name)
        if not self._join_slots.acquire(blocking=False):
            raise WeightSyncError(
                f"{_MAX_JOINS} earlier attempts to join a weight group wait for stores that do not reply"
            )
        self._abandon_join()
        join = self._join = _Join(group_name)

        def work() -> tuple[WeightGroup, ...]:
            joined: list[WeightGroup] = []
            try:
                for number, (address, port) in enumerate([(master_address, master_port), *more_senders]):
                    joined.append(
                        WeightGroup.join(
                            master_address=address,
                            master_port=port,
                            rank=rank,
                            world_size=world_size,
                            group_name=group_name_of(group_name, sender=number),
                            backend=backend,
                            timeout_s=timeout_s,
                            secret=secret,
                        )
                    )
                    if join.is_abandoned:
                        raise _left_while_joining(group_name)
            except WeightSyncError:
                _close(joined)
                raise
            finally:
                self._join_slots.release()
            return tuple(joined)

        try:
            async with asyncio.timeout(timeout_s + _JOIN_GRACE_S):
                groups = await self.threads.run(work)
        except TimeoutError:
            join.is_abandoned = True
            raise WeightSyncError(
                f"weight group {group_name}: {master_address}:{master_port} timed out after {timeout_s:g} s"
            ) from None
        finally:
            if self._join is join:
                self._join = None
        if join.is_abandoned:
            in_thread(partial(_close, groups), name="weights")
            raise _left_while_joining(group_name)
        self._groups[group_name] = groups

    async def leave(self, group_name: str) -> None:
        """Leaves a group. Raises WeightSyncError if no group has that name."""
        groups = self._groups.pop(group_name, None)
        if groups is None and self._join is not None and self._join.group_name == group_name:
            self._abandon_join()
            return
        if groups is None:
            raise WeightSyncError(f"weight group {group_name!r} does not exist")
        # In a thread: NCCL's abort may wait for a peer that hangs.
        await self.threads.run(partial(_close, groups))

    def close(self) -> None:
        """Fails everything that runs in a thread, and leaves all groups without waiting."""
        self.threads.abandon("the engine is shutting down")
        for groups in self._groups.values():
            in_thread(partial(_close, groups), name="weights")
        self._groups.clear()

    def _abandon_join(self) -> None:
        if self._join is not None:
            self._join.is_abandoned = True
            self._join = None


def _close(groups: Sequence[WeightGroup]) -> None:
    for group in groups:
        group.close()


def _left_while_joining(group_name: str) -> WeightSyncError:
    return WeightSyncError(f"weight group {group_name}: this engine has left it while joining")
