"""Eight peers that send as fast as they can, as one process: well-formed and malformed, registered and not.

`python -m tests.chaos.flooder ADDRESS NUM_FRAMES --config FILE` prints `{kind: frames sent}` at its end. The
registered ones are rollout servers without credit, so that they take no leases from the job.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import msgpack
import zmq

from areal_like.config import Config
from areal_like.runtime.command_line import load_config
from areal_like.runtime.process import die_with_parent
from areal_like.wire.codec import WIRE_VERSION, decode, encode
from areal_like.wire.messages.consumer import Fetch, StartTraining
from areal_like.wire.messages.hello import Welcome
from areal_like.wire.messages.producer import (
    ReturnLeases,
    SampleDone,
    Samples,
    ServerHeartbeat,
    ServerState,
)
from areal_like.wire.records import Record
from tests.chaos.producer import hello, synthetic
from tests.support.waiting import HANG_LIMIT_S

Frames = list[bytes]
_RECONNECT_EVERY = 200
"""Frames after which the peer of kind `leaving` closes its connection without having read anything."""


def heartbeat(num_leases: int) -> ServerHeartbeat:
    """A heartbeat that asks for nothing."""
    return ServerHeartbeat(
        state=ServerState.SERVING,
        free_samples=0,
        holding_samples=0,
        weights_version=0,
        leases=list(range(num_leases)),
    )


def unknown_samples() -> Samples:
    """Samples of tickets that no ledger has."""
    records = [Record.of(1 << 40, i, synthetic(1, i, num_tokens=32, version=0)) for i in range(8)]
    return Samples(samples=[SampleDone(lease_id=1, record=record) for record in records])


def kinds(config: Config) -> dict[str, Iterator[Frames]]:
    """Kind of peer -> what it sends, in turn and for ever. Kinds that begin with `server` register first."""
    rng = random.Random(0)
    garbage = [[rng.randbytes(rng.randrange(1, 200)) for _ in range(rng.randrange(1, 4))] for _ in range(100)]
    sample = encode(unknown_samples())
    costly = msgpack.packb([WIRE_VERSION, "ServerHeartbeat", 1])[:-1] + b"\x01\xdd\x00\x00\xf0\x00"
    return {
        "garbage": cycle(garbage),
        "large": cycle([[bytes(1 << 19)], [b"\xff" * 100, bytes(1 << 19)]]),
        "unregistered": cycle(
            [encode(Fetch(step=0, position=0), rid=1), encode(StartTraining(step=0), rid=2), sample]
        ),
        "leaving": cycle([encode(replace(hello(config, "stranger"), job="other"), rid=1)]),
        "other version": cycle([[encode(heartbeat(1))[0].replace(b"\x94\x04", b"\x94\x03")]]),
        "server": cycle(
            [encode(heartbeat(3)), sample, encode(ReturnLeases(leases=[1, 2, 3], reason="none"))]
        ),
        "server, long headers": cycle([encode(heartbeat(28_000))]),
        "server, malformed": cycle([[sample[0], sample[1][:-8]], [costly + b"\x90" * 60_000], *garbage]),
    }


class _Peer:
    """One connection."""

    def __init__(self, address: str, kind: str, frames: Iterator[Frames], config: Config) -> None:
        self.kind, self.num_sent = kind, 0
        self._address, self._frames = address, frames
        self._socket = self._connect()
        if kind.startswith("server"):
            self._socket.send_multipart(
                encode(hello(config, kind.replace(", ", "-").replace(" ", "-")), rid=1)
            )
            assert self._socket.poll(HANG_LIMIT_S * 1000), "the buffer does not answer"
            assert isinstance(decode(self._socket.recv_multipart())[0], Welcome)

    def send(self) -> bool:
        """Sends one message. False if the connection takes none now."""
        try:
            self._socket.send_multipart(next(self._frames), flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        self.num_sent += 1
        if self.kind == "leaving" and self.num_sent % _RECONNECT_EVERY == 0:
            self._socket.close()
            self._socket = self._connect()
        return True

    def close(self) -> None:
        self._socket.close()

    def _connect(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 100)
        socket.set(zmq.RCVHWM, 100)  # of the replies, which are never read
        socket.connect(self._address)
        return socket


def main() -> None:
    """Sends until all peers together have sent NUM_FRAMES."""
    address, num_frames, *settings = sys.argv[1:]
    config = load_config(settings)
    peers = [_Peer(address, kind, frames, config) for kind, frames in kinds(config).items()]
    print("registered", flush=True)
    while sum(peer.num_sent for peer in peers) < int(num_frames):
        num_taken = sum(peer.send() for peer in peers for _ in range(20))
        if not num_taken:
            time.sleep(0.001)
    print(json.dumps({peer.kind: peer.num_sent for peer in peers}), flush=True)
    for peer in peers:
        peer.close()


if __name__ == "__main__":
    die_with_parent()
    main()
