"""Redis Streams under load: Debian's redis-server, append-only file, pipelined `XADD`, one consumer group.

The client is a socket with hiredis' parser. redis-py is not used, because its pipelines wait for a whole
batch, and the rate would be limited by the client and not by Redis. The entries of one step are acknowledged
and trimmed together, so that the stream stays as small as our buffer's.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hiredis  # only available in the directory given as --peers

from benchmarks.stream_peers.load import Pacer, Plan, Served, Tally, packed, trajectories, unpacked

BATCH = 512
_LOOK_EVERY = 64
"""Trajectories between two reads of the backlog."""


@contextlib.contextmanager
def server(directory: Path, *, appendfsync: str) -> Iterator[Served]:
    """Runs redis-server on a loopback port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "port": port, "bind": "127.0.0.1", "dir": directory, "save": "", "appendonly": "yes",
        "appendfsync": appendfsync, "auto-aof-rewrite-percentage": 0, "stream-node-max-entries": 100,
        "loglevel": "warning",
    }  # fmt: skip
    command = [
        "redis-server",
        *(text for key, value in settings.items() for text in (f"--{key}", str(value))),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + 10
        while True:
            try:
                with _Client(f"127.0.0.1:{port}") as client:
                    client.call("XGROUP", "CREATE", "stream", "trainer", "0", "MKSTREAM")
                break
            except ConnectionRefusedError:
                assert time.monotonic() < deadline_s, "redis-server did not start"
                time.sleep(0.05)
        yield Served(address=f"127.0.0.1:{port}", pid=process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


class _Client:
    """A minimal client: sends commands, reads replies."""

    def __init__(self, address: str) -> None:
        host, port = address.split(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = hiredis.Reader()

    def __enter__(self) -> _Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def send(self, *command: str | bytes | int) -> None:
        self.socket.sendall(hiredis.pack_command(command))

    def reply(self) -> Any:
        """Waits for the next reply and returns it."""
        while (found := self._reader.gets()) is False:
            self._reader.feed(self.socket.recv(1 << 20))
        if isinstance(found, Exception):
            raise found
        return found

    def replies(self) -> list[Any]:
        """The replies that have arrived; call it when the socket is readable."""
        self._reader.feed(self.socket.recv(1 << 20))
        found = []
        while (reply := self._reader.gets()) is not False:
            found.append(reply)
        return found

    def call(self, *command: str | bytes | int) -> Any:
        self.send(*command)
        return self.reply()


class _Producer:
    def __init__(self, plan: Plan, tally: Tally, pacer: Pacer) -> None:
        self.client = _Client(plan.address)
        self._plan, self._tally, self._pacer = plan, tally, pacer
        self._samples = trajectories(plan.num_tokens)
        self._sent_s: deque[float] = deque()
        """Send times of the commands without a reply yet, in order; 0 for a read of the backlog."""
        self._num_sent = 0
        self._backlog = 0

    def pump(self) -> None:
        """Sends as many trajectories as the window and the backlog allow."""
        while len(self._sent_s) < self._plan.window and self._pacer.may_send():
            if self._num_sent % _LOOK_EVERY == 0 or self._backlog > self._plan.backlog:
                if 0.0 in self._sent_s:
                    return
                self.client.send("XLEN", "stream")
                self._sent_s.append(0.0)
                if self._backlog > self._plan.backlog:
                    # The consumer is slower, so reading the backlog more often is unnecessary.
                    time.sleep(0.002)
                    return
            self._sent_s.append(time.monotonic())
            record = packed(self._samples[self._num_sent % len(self._samples)], self._num_sent)
            self.client.send("XADD", "stream", "*", "r", record)
            self._num_sent += 1
            self._pacer.sent()

    def take(self) -> None:
        """Counts the replies that have arrived."""
        for reply in self.client.replies():
            if isinstance(reply, Exception):
                raise reply
            if sent_s := self._sent_s.popleft():
                self._tally.acked(sent_s)
            else:
                self._backlog = reply


def _produce(plan: Plan, tally: Tally) -> None:
    pacer = Pacer(plan.rate_per_s)
    with selectors.DefaultSelector() as selector:
        producers = [_Producer(plan, tally, pacer) for _ in plan.names]
        for producer in producers:
            selector.register(producer.client.socket, selectors.EVENT_READ, producer)
        while not tally.is_over:
            for producer in producers:
                producer.pump()
            for key, _ in selector.select(timeout=0.001):
                key.data.take()


def _consume(plan: Plan, tally: Tally) -> None:
    with _Client(plan.address) as client:
        while not tally.is_over:
            answer = client.call(
                "XREADGROUP",
                "GROUP",
                "trainer",
                "trainer-0",
                "COUNT",
                BATCH,
                "BLOCK",
                100,
                "STREAMS",
                "stream",
                ">",
            )
            if not answer:
                continue
            entries = answer[0][1]
            for _, fields in entries:
                unpacked(fields[1])
            tally.consumed(len(entries))
            ids = [entry[0] for entry in entries]
            client.send("XACK", "stream", "trainer", *ids)
            client.send("XTRIM", "stream", "MINID", _after(ids[-1]))
            client.reply()
            client.reply()


def _after(entry_id: bytes) -> bytes:
    milliseconds, sequence = entry_id.split(b"-")
    return b"%s-%d" % (milliseconds, int(sequence) + 1)


def main() -> None:
    """One process of the load."""
    plan = Plan.from_argv()
    tally = Tally(plan=plan)
    (_consume if plan.role == "consumer" else _produce)(plan, tally)
    print(tally.dumps())


if __name__ == "__main__":
    main()
