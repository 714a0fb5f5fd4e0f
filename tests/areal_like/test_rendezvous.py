"""The store of a weight group: where it listens, and what a stranger who reaches it can do."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_like.errors import ConfigError, WeightSyncError
from areal_like.weights.weight_group import WeightGroup
from tests.support.ports import free_ports
from tests.support.waiting import HANG_LIMIT_S

OTHER_LOOPBACK = "127.0.0.2"
SECRET = secrets.token_hex(32)


def accepts(host: str, port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.settimeout(HANG_LIMIT_S)
        return probe.connect_ex((host, port)) == 0


def listening_addresses(port: int) -> list[str]:
    """Local addresses of the IPv4 sockets that listen on a port; any IPv6 socket is listed as `v6`."""
    found = []
    for table, is_v6 in (("tcp", False), ("tcp6", True)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, port_hex = local.rpartition(":")
            if state == "0A" and int(port_hex, 16) == port:
                found.append("v6" if is_v6 else socket.inet_ntoa(bytes.fromhex(address)[::-1]))
    return found


def intruder_of(group: WeightGroup) -> Any:
    stores: Any = dist
    return stores.TCPStore(
        group.address, group.port, None, False, timedelta(seconds=HANG_LIMIT_S), wait_for_workers=False
    )


@contextmanager
def joined(group: WeightGroup, **settings: Any) -> Iterator[WeightGroup]:
    """Rank 1 of a group of two, while rank 0 connects."""
    found: list[WeightGroup] = []

    def join() -> None:
        found.append(
            WeightGroup.join(
                master_address=group.address, master_port=group.port, rank=1, world_size=2,
                group_name=group.group_name, timeout_s=HANG_LIMIT_S, **settings,
            )
        )  # fmt: skip

    thread = threading.Thread(target=join)
    thread.start()
    group.connect()
    thread.join()
    with found[0] as peer:
        yield peer


def create(**settings: Any) -> WeightGroup:
    return WeightGroup.create(**{"world_size": 2, "group_name": "w", "timeout_s": HANG_LIMIT_S, **settings})


def test_store_listens_on_its_host_and_port_range_only() -> None:
    ports = free_ports(OTHER_LOOPBACK, 2)
    with create(host=OTHER_LOOPBACK, ports=ports) as first:
        assert first.port == ports[0] and listening_addresses(first.port) == [OTHER_LOOPBACK]
        assert accepts(OTHER_LOOPBACK, first.port) and not accepts("127.0.0.1", first.port)
        with create(host=OTHER_LOOPBACK, ports=ports) as second:
            assert second.port == ports[1], "the next port of the range"
            message = f"every port of weights.port_range={ports[0]}-{ports[1]} is taken on {OTHER_LOOPBACK}"
            with pytest.raises(WeightSyncError, match=message):
                create(host=OTHER_LOOPBACK, ports=ports)
    with create(host=OTHER_LOOPBACK, ports=ports) as again:
        assert again.port == ports[0], "a port is free again when its group is closed"


def test_a_host_of_another_machine_is_a_mistake_of_the_user() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0.*set weights\.host"):
        create(host="192.0.2.1")


def test_group_needs_no_store_once_all_have_joined() -> None:
    with create(secret=SECRET) as group, joined(group, secret=SECRET) as peer:
        assert accepts(group.address, group.port)
        group.close_store()
        assert not accepts(group.address, group.port)
        payload, received = torch.arange(1 << 12).to(torch.uint8), torch.zeros(1 << 12, dtype=torch.uint8)
        receiving = threading.Thread(target=peer.broadcast, args=(received,))
        receiving.start()
        group.broadcast(payload)
        receiving.join()
        assert torch.equal(received, payload)


def of_rank_0(real: bytes) -> bytes:
    return real


def with_another_port(real: bytes) -> bytes:
    return real[:-33] + bytes([real[-33] ^ 1]) + real[-32:]


@pytest.mark.parametrize(
    "forge",
    [lambda _: b"", lambda _: b"\0", lambda _: bytes(7 << 20), of_rank_0, with_another_port],
    ids=["empty", "short", "large", "of_rank_0", "altered"],
)
def test_forged_address_fails_the_rendezvous_only(forge: Callable[[bytes], bytes]) -> None:
    """Without authentication the first one is a segmentation fault in gloo, the third a MemoryError."""
    with create(secret=SECRET) as group:
        intruder = intruder_of(group)
        failures: list[BaseException] = []

        def connect() -> None:
            try:
                group.connect()
            except WeightSyncError as error:
                failures.append(error)

        connecting = threading.Thread(target=connect)
        connecting.start()
        while not (keys := intruder.list_keys()):
            pass
        assert len(keys) == 1 and keys[0].endswith("/0")
        intruder.set(keys[0][:-1] + "1", forge(intruder.get(keys[0])))
        connecting.join()
        assert len(failures) == 1 and "not in the weight group changed its rendezvous" in str(failures[0])


def test_a_rank_with_another_secret_does_not_join() -> None:
    with create(secret=SECRET) as group:

        def join() -> None:
            with pytest.raises(WeightSyncError):
                WeightGroup.join(
                    master_address=group.address, master_port=group.port, rank=1, world_size=2,
                    group_name="w", timeout_s=HANG_LIMIT_S, secret=secrets.token_hex(32),
                )  # fmt: skip

        joining = threading.Thread(target=join)
        joining.start()
        with pytest.raises(WeightSyncError, match="changed its rendezvous"):
            group.connect()
        joining.join()
