"""The weight group: a torch.distributed group of trainer rank 0 and the engines, for broadcasts of weights.

    rank 0           create() -> connect() -> close_store() -> broadcast() ... -> close()
    other ranks      join() -> broadcast() ... -> close()

The group is independent of torch's default group, and compatible with SGLang's `init_custom_process_group`.
SGLang's receivers rendezvous at `tcp://address:port` and prefix the store's keys with the group's name, then
with name and device. We build the backend directly over a store with these prefixes instead of calling
torch's private `_new_process_group_helper`. This has three advantages: nothing is registered globally, so
names can be reused; neither the trainer's default group nor torchrun's agent store is involved, which a
`tcp://` rendezvous would silently use; and we choose the address that gloo listens on.

Left out: collectives other than broadcast, and reuse of a group after an error. A broken group is closed, and
another one is formed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from areal_like.errors import WeightSyncError, first_line
from areal_like.weights.rendezvous import AuthenticatedStore, open_store

if TYPE_CHECKING:
    from types import TracebackType

# torch exports stores, process groups and their options at run time, but its type stubs lack them.
_dist: Any = dist
_c10d: Any = distributed_c10d

_PREFIX_DEVICE = {"gloo": "cpu", "nccl": "cuda"}
"""First device that torch lists for a backend. It is part of the prefix of the store's keys, so all ranks
must use the same one."""
_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"
"""Environment variable that torch reads when a group is created. Without it, torch's watchdog ends the whole
process when a broadcast exceeds its time limit; with it, `wait` raises. Set for this group only: the
training's own collectives must not block the host."""


def device_facts(device: torch.device) -> dict[str, str]:
    """`device`, `device_uuid` and `nccl_version`, which decide whether ranks can form an NCCL group.

    Ranks of an NCCL group need the same NCCL version and different GPUs. UUID and version are empty on a CPU.
    """
    if device.type != "cuda":
        return {"device": device.type, "device_uuid": "", "nccl_version": ""}
    nccl: Any = torch.cuda.nccl
    version = ".".join(map(str, nccl.version())) if dist.is_nccl_available() else ""
    return {
        "device": str(device),
        "device_uuid": str(torch.cuda.get_device_properties(device).uuid),
        "nccl_version": version,
    }


def address_toward(host: str, port: int) -> str:
    """This machine's address on the route to another one. Nothing is sent. Raises OSError."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    family, kind, proto, _, target = infos[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(target)
        local: str = probe.getsockname()[0]
    return local


@dataclass(eq=False, kw_only=True)
class WeightGroup:
    """One rank's end of a weight group. Rank 0 (the trainer) sends, all others receive.

    `create` (rank 0) opens the store and returns at once with the port, so that it can be sent to the other
    ranks; `connect` waits for them. `join` (all other ranks) connects to the store and waits for all ranks.
    Every wait ends after `timeout_s`. The death of a peer fails a broadcast at once, except in a receiver
    that was in the middle of that peer's message: gloo loses the operation, so a caller that learns of the
    death in another way should close the group instead of waiting. All failures raise WeightSyncError. Not
    thread-safe, but may be used from a thread other than the one that created it.
    """

    address: str
    """Address of the store, which joiners connect to."""
    port: int
    rank: int
    world_size: int
    group_name: str
    backend: str
    timeout_s: float
    secret: str = field(repr=False)
    """Key of the rendezvous; empty: its values are not authenticated."""
    _store: Any = field(repr=False)
    _server: Any = field(default=None, repr=False)
    _group: Any = field(default=None, init=False, repr=False)

    @classmethod
    def create(
        cls,
        *,
        host: str = "127.0.0.1",
        ports: Sequence[int] = (0,),
        world_size: int,
        group_name: str,
        backend: str = "gloo",
        timeout_s: float,
        secret: str = "",
    ) -> WeightGroup:
        """Rank 0: opens the store on `host`, the address that other ranks connect to, and does not wait.

        `ports`: the first free one is used; 0 is any. `secret`: key of the rendezvous, which every rank must
        have (`rendezvous.AuthenticatedStore`); empty: values are not authenticated. Raises ConfigError if
        `host` is not an address of this machine, WeightSyncError if every port is taken.
        """
        _check(rank=0, world_size=world_size, backend=backend)
        server, store, bound_port = open_store(host=host, ports=ports, timeout_s=timeout_s)
        return cls(
            _store=store,
            _server=server,
            address=host,
            port=bound_port,
            rank=0,
            world_size=world_size,
            group_name=group_name,
            backend=backend,
            timeout_s=timeout_s,
            secret=secret,
        )

    @classmethod
    def join(
        cls,
        *,
        master_address: str,
        master_port: int,
        rank: int,
        world_size: int,
        group_name: str,
        backend: str = "gloo",
        timeout_s: float,
        secret: str = "",
    ) -> WeightGroup:
        """Rank 1 and up: connects to rank 0's store and waits for all ranks."""
        _check(rank=rank, world_size=world_size, backend=backend)
        try:
            store = _dist.TCPStore(
                master_address,
                master_port,
                world_size,
                False,
                timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise WeightSyncError(
                f"weight group {group_name}: no store at {master_address}:{master_port}: {first_line(error)}"
            ) from None
        group = cls(
            _store=store,
            address=master_address,
            port=master_port,
            rank=rank,
            world_size=world_size,
            group_name=group_name,
            backend=backend,
            timeout_s=timeout_s,
            secret=secret,
        )
        group.connect()
        return group

    def connect(self) -> None:
        """Waits until all `world_size` ranks have connected to each other."""
        assert self._store is not None and self._group is None, "connect() once, before close()"
        # Kept in a variable during the call: torch's C++ calls the methods of this Python object.
        store: Any = self._store
        if self.secret and self.backend == "gloo":
            store = AuthenticatedStore(store, bytes.fromhex(self.secret))
        prefixed: Any = _dist.PrefixStore(self.group_name, store)
        for prefix in (f"{self.group_name}/", f"{_PREFIX_DEVICE[self.backend]}/"):
            prefixed = _dist.PrefixStore(prefix, prefixed)
        try:
            self._group = self._gloo(prefixed) if self.backend == "gloo" else self._nccl(prefixed)
        except (RuntimeError, ValueError, MemoryError, WeightSyncError) as error:
            # gloo raises a ValueError or MemoryError for a value that it cannot parse.
            self.close()
            raise WeightSyncError(
                f"weight group {self.group_name}: rank {self.rank} of {self.world_size} could not connect: "
                f"{first_line(error)}"
            ) from None

    def close_store(self) -> None:
        """Ends rank 0's store; call it when every rank has joined. Does nothing for NCCL.

        gloo no longer reads the store; NCCL reads it again at the first broadcast. Once the store has ended,
        an unauthorized peer finds no open port, and anything it had written is freed.
        """
        if self.backend == "gloo":
            self._server = self._store = None

    def broadcast(self, tensor: torch.Tensor, *, timeout_s: float | None = None) -> None:
        """Sends `tensor` (rank 0) or receives into it (other ranks); returns when this rank is done with it.

        Any contiguous tensor: on a CPU for gloo, on a GPU for nccl. `timeout_s` replaces the group's time
        limit. After a failure the group is closed, and a new one has to be created.
        """
        self.begin_broadcast(tensor, timeout_s=timeout_s)()

    def begin_broadcast(self, tensor: torch.Tensor, *, timeout_s: float | None = None) -> Callable[[], None]:
        """Starts a `broadcast` in the background; call the returned function once to wait for its end."""
        if self._group is None:
            raise WeightSyncError(f"weight group {self.group_name} is not connected")
        if not tensor.is_contiguous():
            raise WeightSyncError(f"weight group {self.group_name}: a broadcast needs a contiguous tensor")
        options = _dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = timedelta(seconds=self.timeout_s if timeout_s is None else timeout_s)
        # Keeps the group alive during the wait. Otherwise, after a close() from another thread, its
        # destructor would join a worker thread that waits for a hung peer, while holding the GIL.
        held: list[Any] = [self._group]
        try:
            held.append(held[0].broadcast([tensor], options))  # the work has the group's connections too
        except RuntimeError as error:
            held.clear()
            raise self._broken(error) from None

        def wait() -> None:
            try:
                if self.backend == "gloo":
                    held[1].wait()
                else:
                    held[1].wait(options.timeout)  # NCCL ignores the timeout in the options
                if tensor.is_cuda:
                    # NCCL's wait only orders streams, but the caller uses the buffer as soon as we return.
                    torch.cuda.current_stream(tensor.device).synchronize()
            except RuntimeError as error:
                # The traceback keeps this frame alive: with the group in it, connections would stay open and
                # block the surviving ranks.
                held.clear()
                raise self._broken(error) from None
            held.clear()
            if self._group is None:  # an aborted NCCL broadcast returns without an error
                raise WeightSyncError(f"weight group {self.group_name} was closed during a broadcast")

        return wait

    def _broken(self, error: RuntimeError) -> WeightSyncError:
        self.close()
        return WeightSyncError(f"weight group {self.group_name}: broadcast failed: {first_line(error)}")

    def close(self) -> None:
        """Leaves the group; peers that wait for this rank fail at once. The name can be reused.

        May be called twice, and from another thread. A broadcast in progress ends at its timeout at the
        latest. If rank 0 leaves during a rendezvous, the rendezvous ends for all ranks.
        """
        self._server = None
        group, self._group, self._store = self._group, None, None
        if group is not None and self.backend == "nccl":
            group.abort()

    def __enter__(self) -> WeightGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _gloo(self, store: Any) -> Any:
        options = _c10d.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=self.timeout_s)
        options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=self._local_address())]
        return _c10d.ProcessGroupGloo(store, self.rank, self.world_size, options)

    def _nccl(self, store: Any) -> Any:
        if not dist.is_nccl_available():
            raise WeightSyncError("weights.backend=nccl: this torch has no NCCL; use gloo")
        options = _c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self.timeout_s)
        before = os.environ.get(_BLOCKING_WAIT)
        os.environ[_BLOCKING_WAIT] = "1"
        try:
            return _c10d.ProcessGroupNCCL(store, self.rank, self.world_size, options)
        finally:
            if before is None:
                del os.environ[_BLOCKING_WAIT]
            else:
                os.environ[_BLOCKING_WAIT] = before

    def _local_address(self) -> str:
        """This host's address on the route to rank 0.

        Gloo would otherwise resolve this host's name, which on many machines gives 127.0.1.1 or nothing, and
        peers on other machines could not connect.
        """
        return self.address if self.rank == 0 else address_toward(self.address, self.port)


def _check(*, rank: int, world_size: int, backend: str) -> None:
    if backend not in _PREFIX_DEVICE:
        raise WeightSyncError(f"weight group: backend {backend!r} is not one of {', '.join(_PREFIX_DEVICE)}")
    if not 0 <= rank < world_size:
        raise WeightSyncError(f"weight group: rank {rank} is not below world_size {world_size}")
