"""The upper bound of `benchmarks/stream.py`: the same messages through a process that only forwards them.

The sockets have the options of our channel's sockets. Producers send records of samples that were packed
beforehand; each message has as many records as fit into the window. The forwarder acknowledges each message,
and sends a group of eight for each request of the consumer. Nothing is packed, checked or unpacked during the
measurement, and there is no ledger and no disk. The ratio of the buffer's rate to this rate shows the cost of
that work.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator

import zmq

from benchmarks.report import ROOT
from benchmarks.stream_peers.load import Pacer, Plan, Served, Tally, packed, trajectories

GROUP_SIZE = 8
REQUESTS_AHEAD = 64


@contextlib.contextmanager
def server() -> Iterator[Served]:
    """Runs the forwarder as a process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.stream_peers.bare_zmq", "forward"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield Served(address=process.stdout.readline().strip(), pid=process.pid)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _forward() -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    print(f"tcp://127.0.0.1:{port}", flush=True)
    num_bytes = len(packed(trajectories(Plan(role="", address="").num_tokens, count=1)[0], 0))
    waiting: deque[bytes] = deque()
    wanted: deque[bytes] = deque()
    while True:
        peer, joined = socket.recv_multipart()
        # An empty message is the consumer's request for a group.
        if not joined:
            wanted.append(peer)
        else:
            records = [joined[start : start + num_bytes] for start in range(0, len(joined), num_bytes)]
            socket.send_multipart([peer, b"%d %d" % (len(records), len(waiting))])
            waiting.extend(records)
        while wanted and len(waiting) >= GROUP_SIZE:
            socket.send_multipart(
                [wanted.popleft(), b"".join([waiting.popleft() for _ in range(GROUP_SIZE)])]
            )


def _produce(plan: Plan, tally: Tally) -> None:
    pacer = Pacer(plan.rate_per_s)
    samples = [packed(trajectory, number) for number, trajectory in enumerate(trajectories(plan.num_tokens))]
    poller = zmq.Poller()
    sent_s: dict[zmq.Socket[bytes], deque[float]] = {}
    for _ in plan.names:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.set(zmq.LINGER, 0)
        socket.connect(plan.address)
        poller.register(socket, zmq.POLLIN)
        sent_s[socket] = deque()
    number = backlog = 0
    while not tally.is_over:
        for socket, sent in sent_s.items():
            finished = []
            while len(sent) < plan.window and backlog + len(sent) < plan.backlog and pacer.may_send():
                sent.append(time.monotonic())
                finished.append(samples[number % len(samples)])
                number += 1
                pacer.sent()
            if finished:
                socket.send(b"".join(finished))
        for socket, _ in poller.poll(1):
            with contextlib.suppress(zmq.Again):
                while True:
                    num_taken, backlog = map(int, socket.recv(zmq.NOBLOCK).split())
                    for _ in range(num_taken):
                        tally.acked(sent_s[socket].popleft())
        # With nothing unacknowledged, no acknowledgement would report a smaller backlog.
        if not any(sent_s.values()):
            backlog = 0


def _consume(plan: Plan, tally: Tally) -> None:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.connect(plan.address)
    for _ in range(REQUESTS_AHEAD):
        socket.send(b"")
    while not tally.is_over:
        if socket.poll(100):
            socket.recv()
            tally.consumed(GROUP_SIZE)
            socket.send(b"")


def main() -> None:
    """One process of the load, or the forwarder."""
    if sys.argv[1] == "forward":
        _forward()
    plan = Plan.from_argv()
    tally = Tally(plan=plan)
    (_consume if plan.role == "consumer" else _produce)(plan, tally)
    print(tally.dumps())


if __name__ == "__main__":
    main()
