"""Measures how the rate of a weight push grows with the number of senders, where links are the limit.

Four trainer ranks and one engine are in network namespaces. Each rank has two cables: one to the switch of
the trainer, without a limit, over which rows are gathered, and one to the switch of the engine, limited with
`tc`. So has the engine. A push is the whole of it: control messages, gathering, broadcasts, checksums on both
sides, a real engine that receives into its shadow weights and swaps them in.

`own links`: the engine's link is as wide as those of all ranks together. `engine's link`: it is as wide as
two and a half of them. `one link`: rows are gathered over the ranks' limited links too. All numbers of
senders are measured in one run, alternately; ratios are those of medians. Needs root, `ip` and `tc` (Debian's
iproute2).

    python -m benchmarks.senders [--rounds 5] [--mbit 200] [--size 100MB] [--cases "own links"]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from areal_like.config import WeightsConfig
from benchmarks.report import ROOT, table, write
from benchmarks.weight_sync import SIZES, push_once, receive, write_model
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.weights.broadcaster import Broadcaster
from trainer.weights.senders import Senders
from trainer.weights.snapshot import BackgroundGather

WORLD_SIZE = 4
BUCKET_BYTES = 2 << 20
"""Small, so that the shares of the senders have nearly the same size."""
ENGINE, RANK_0 = "10.231.8.1", "10.231.8.10"
CASES = {
    "own links": (WORLD_SIZE, "trainer"),
    "engine's link": (2.5, "trainer"),
    "one link": (WORLD_SIZE, "engine"),
}
"""Name -> width of the engine's link in links of a rank, and the cable over which rows are gathered."""


_BACKOFF_S = 6.0
"""Above the first back-off of a server."""


class Network:
    """The namespaces of the engine, the ranks and two switches."""

    def __init__(self, *, mbit: float, engine_mbit: float) -> None:
        """`mbit`: rate of a rank's link to the engine's switch; `engine_mbit`: of the engine's."""
        self._prefix = f"areal-{os.getpid()}"
        self._mbit = mbit
        self._engine_mbit = engine_mbit
        self._names: list[str] = []

    def name(self, machine: str) -> str:
        """The namespace of a machine."""
        return f"{self._prefix}-{machine}"

    def __enter__(self) -> Network:
        self._make("switch")
        for cable in ("engine", "trainer"):
            self._in("switch", "ip", "link", "add", f"bridge-{cable}", "type", "bridge")
            self._in("switch", "ip", "link", "set", f"bridge-{cable}", "up")
        self._make("engine")
        self._connect("engine", "engine", ENGINE)
        # What the engine receives leaves the switch at the port of its cable.
        self._limit("switch", "engine-engine", self._engine_mbit)
        for rank in range(WORLD_SIZE):
            machine = f"rank{rank}"
            self._make(machine)
            for number, cable in ((8, "engine"), (9, "trainer")):
                self._connect(machine, cable, f"10.231.{number}.{10 + rank}")
            self._limit(machine, "engine", self._mbit)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def _make(self, machine: str) -> None:
        _run("ip", "netns", "add", self.name(machine))
        self._names.append(self.name(machine))
        self._in(machine, "ip", "link", "set", "lo", "up")

    def _connect(self, machine: str, cable: str, address: str) -> None:
        port = f"{machine}-{cable}"
        ends = (
            "netns",
            self.name("switch"),
            "type",
            "veth",
            "peer",
            "name",
            cable,
            "netns",
            self.name(machine),
        )
        _run("ip", "link", "add", port, *ends)
        self._in("switch", "ip", "link", "set", port, "master", f"bridge-{cable}", "up")
        self._in(machine, "ip", "addr", "add", f"{address}/24", "dev", cable)
        self._in(machine, "ip", "link", "set", cable, "up")

    def _limit(self, machine: str, device: str, mbit: float) -> None:
        rate = ("rate", f"{mbit:g}mbit", "burst", "256kb", "latency", "100ms")
        self._in(machine, "tc", "qdisc", "add", "dev", device, "root", "tbf", *rate)

    def _in(self, machine: str, *command: str) -> None:
        _run("ip", "netns", "exec", self.name(machine), *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()} (this benchmark needs root, ip and tc)")


@contextlib.contextmanager
def inside(
    network: Network, machine: str, *arguments: str, module: str = "benchmarks.senders", **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Runs this file, or another module, on a machine; kills it at the end."""
    process = subprocess.Popen(
        [
            "ip",
            "netns",
            "exec",
            network.name(machine),
            sys.executable,
            "-m",
            module,
            *arguments,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    try:
        yield process
    finally:
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


async def first_push(push: Callable[[], Awaitable[Any]]) -> None:
    """A push that forms the group and does not count.

    It is repeated: the engine is in the group of another number of senders, or has just started on a busy
    machine, replies too late and backs off.
    """
    for _ in range(9):
        try:
            await push()
            return
        except RuntimeError as error:
            print(f"the first push failed and is repeated: {error}", file=sys.stderr)
            await asyncio.sleep(_BACKOFF_S)
    await push()


def push_from(store: str, rank: int, model: str, rounds: int, *, numbers: Sequence[int], port: int) -> None:
    """One rank: pushes from each number of senders in every round, the first time to form its group and a
    second time to measure; rank 0 prints the seconds of each."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, WORLD_SIZE),
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=900),
    )
    torch.set_num_threads(1)
    ranks = Ranks()
    policy = Policy.load(model, ranks)
    seconds: dict[int, list[float]] = {number: [] for number in numbers}
    ways = {
        number: BackgroundGather(policy, ranks, bucket_bytes=BUCKET_BYTES, dtype="float32", senders=number)
        for number in numbers
    }
    senders = {number: Senders(way, ranks, ports=range(1)) for number, way in ways.items()}
    config = WeightsConfig(host=RANK_0, push_deadline_s=300)
    with asyncio.Runner() as runner:
        broadcasters = {
            number: Broadcaster(config, device="cpu", links=each.links) for number, each in senders.items()
        }
        version = 0
        for _ in range(rounds):
            for number, way in ways.items():
                for is_timed in (False, True):
                    version += 1
                    snapshot = way.take_snapshot()
                    ranks.meet()
                    if snapshot is not None:
                        push = partial(
                            push_once, snapshot, broadcasters[number], port=port, version=version, host=ENGINE
                        )
                        started_s = time.perf_counter()
                        runner.run(push() if is_timed else first_push(push))
                        if is_timed:
                            seconds[number].append(time.perf_counter() - started_s)
                    ranks.meet()
        if rank == 0:
            for broadcaster in broadcasters.values():
                runner.run(broadcaster.close())
    for number in numbers:
        senders[number].close()
        ways[number].close()
    if rank == 0:
        num_bytes = sum(bucket.num_bytes for bucket in ways[numbers[0]].buckets)
        result = {"num_bytes": num_bytes, "num_buckets": len(ways[numbers[0]].buckets)}
        print(json.dumps(result | {"seconds": seconds}), flush=True)
    dist.destroy_process_group()


def measure(case: str, model: Path, *, mbit: float, rounds: int, numbers: Sequence[int]) -> dict[str, Any]:
    """Measures one case of CASES."""
    width, cable = CASES[case]
    store = str(model.parent / f"store-{case.replace(' ', '-')}")
    words = (store, str(model), str(rounds), json.dumps(list(numbers)))
    with (
        Network(mbit=mbit, engine_mbit=mbit * width) as network,
        inside(network, "engine", "--receiver", str(model)) as receiver,
        contextlib.ExitStack() as started,
    ):
        assert receiver.stdout is not None
        if not (port := receiver.stdout.readline().strip()):
            sys.exit("the engine did not start")
        processes = [
            started.enter_context(
                inside(network, f"rank{rank}", "--rank", str(rank), *words, port, GLOO_SOCKET_IFNAME=cable)
            )
            for rank in range(WORLD_SIZE)
        ]
        assert processes[0].stdout is not None
        if not (line := processes[0].stdout.readline()):
            sys.exit("a rank failed")
        found: dict[str, Any] = json.loads(line)
    all_seconds = {number: found["seconds"][str(number)] for number in numbers}
    medians = {number: statistics.median(times) for number, times in all_seconds.items()}
    return {
        "case": case,
        "mbit": mbit,
        "engine_mbit": mbit * width,
        "num_bytes": found["num_bytes"],
        "num_buckets": found["num_buckets"],
        "all_seconds": {n: [round(each, 4) for each in times] for n, times in all_seconds.items()},
        "seconds": {number: round(median, 4) for number, median in medians.items()},
        "share_of_link": {
            n: round(found["num_bytes"] * 8e-6 / median / min(n * mbit, width * mbit), 3)
            for n, median in medians.items()
        },
        "ratio": {number: round(medians[numbers[0]] / median, 3) for number, median in medians.items()},
    }


def main() -> None:
    """Measures, writes the result, prints the table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # the namespaces are removed
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=SIZES, default="100MB")
    parser.add_argument("--mbit", type=float, default=200.0, help="rate of a rank's link to the engine")
    parser.add_argument("--senders", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model(Path(scratch) / options.size, options.size)
        for case in options.cases:
            settings = {"mbit": options.mbit, "rounds": options.rounds, "numbers": options.senders}
            results.append(measure(case, model, **settings))
    if not options.no_write:
        command = f"python -m benchmarks.senders --rounds {options.rounds} --mbit {options.mbit:g}"
        command += f" --size {options.size}"
        write("senders", {"command": command, "world_size": WORLD_SIZE, "cases": results})
    rows = [
        (
            r["case"],
            f"{r['mbit']:g}",
            f"{r['engine_mbit']:g}",
            n,
            r["seconds"][n],
            r["ratio"][n],
            r["share_of_link"][n],
        )
        for r in results
        for n in r["seconds"]
    ]
    header = (
        "links",
        "Mbit/s a rank",
        "Mbit/s engine",
        "senders",
        "push s",
        "times one sender",
        "share of the links",
    )
    print(table(header, rows))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--receiver", model]:
            asyncio.run(receive(Path(model), in_place=False, host=ENGINE))
        case ["--rank", rank, store, model, rounds, numbers, port]:
            push_from(store, int(rank), model, int(rounds), numbers=json.loads(numbers), port=int(port))
        case _:
            main()
