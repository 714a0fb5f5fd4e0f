"""Measures the throughput of trajectories from producers through a buffer to a trainer, for several systems.

Everything runs on one machine: 1,024-token trajectories (13.3 kB of arrays), 8 producers in two processes
with a window of 32 each, one consumer, at most 8,192 trajectories between them (`stream_peers/load.py`). The
score is the smaller of the trajectories acknowledged and consumed per second.

    row             acknowledged means                    implementation
    ours            power_loss | process_crash | none     python -m buffer, with all ledger calls of a run
    redis           appendfsync always | no               Redis Streams (7.0, Debian), pipelined XADD
    ray queue       in the memory of an actor             ray.util.queue, one at a time | a window at a time
    transfer queue  in the memory of two actors           TransferQueue's client, a window at a time
    bare zmq        forwarded                             the same sockets and messages alone: the upper bound

Flushes of the disk under --scratch during the measurement are counted (/sys/dev/block/*/stat), so that group
commits can be compared. `half load` paces the producers at half of the measured rate and reports the latency
of acknowledgements. `cost` is the CPU time of inserting and reading one sample in ledgers of different sizes.
`server_cpu_us`, `producer_cpu_us` and `consumer_cpu_us` are the CPU time per trajectory in each process. The
other systems need their packages; without --peers only ours and bare zmq are run.

`wire` measures ours (process_crash) with records of 8 and 256 kB by the number of ZeroMQ threads
(`daemon.io_threads`) of every process, each without keys and right after it with keys: `mb_per_s` is the data
rate through the buffer in each direction, `of_without_keys` the ratio of the two rates.

    pip install --target DIR hiredis ray TransferQueue tensordict
    python -m benchmarks.stream [--seconds 8] [--peers DIR] [--scratch DIR] [--only ours,redis]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from areal_like.security.administration import init_keys
from areal_like.security.keys import KeyRole
from areal_like.wire.records import BYTES_PER_TOKEN
from benchmarks.report import ROOT, table, write
from benchmarks.stream_peers import bare_zmq, ledger_cost, ours
from benchmarks.stream_peers.load import NUM_PROCESSES, WARM_UP_S, Plan, Served, cpu_s

RAY_MODES = {
    "queue": "ray queue, one at a time",
    "queue_batch": "ray queue, a window at a time",
    "transfer_queue": "transfer queue",
}
NUM_TICKETS = (1_000, 10_000, 100_000, 1_000_000)
"""Sizes of the ledger at which `cost` is measured."""
WIRE_TOKENS = {"8 kB": 1_000, "256 kB": 32_000}
"""Size of a record -> number of tokens, 8 bytes each."""
WIRE_BACKLOG = {"8 kB": 8192, "256 kB": 1024}
"""Size of a record -> trajectories between producers and consumer: at most 256 MB in the buffer's cache."""
IO_THREADS = (1, 2, 4)


def measure(
    module: str, served: Served, plan: Plan, *, seconds: float, environment: dict[str, str]
) -> dict[str, Any]:
    """Runs producers and consumer as processes; returns rates, latencies and CPU time per trajectory."""
    plans = [dataclasses.replace(plan, role="producers", index=index) for index in range(NUM_PROCESSES)]
    plans.append(dataclasses.replace(plan, role="consumer"))
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen([sys.executable, "-m", module, each.dumps()], cwd=ROOT, env=environment, **pipes)
        for each in plans
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n", module
        begin_s = time.monotonic() + WARM_UP_S
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{begin_s} {begin_s + seconds}\n")
            worker.stdin.flush()
        time.sleep(max(0.0, begin_s - time.monotonic()))
        *producers, consumer = (worker.pid for worker in workers)
        before_s = [served.cpu_s, cpu_s(*producers), cpu_s(consumer)]
        time.sleep(seconds)
        after_s = [served.cpu_s, cpu_s(*producers), cpu_s(consumer)]
        found = summary(
            [json.loads(worker.communicate(timeout=60)[0]) for worker in workers], seconds=seconds
        )
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    used_us = [
        1e6 * (after - before) / max(1, found["per_s"] * seconds)
        for before, after in zip(before_s, after_s, strict=True)
    ]
    return found | dict(
        zip(
            ("server_cpu_us", "producer_cpu_us", "consumer_cpu_us"),
            [round(used, 1) for used in used_us],
            strict=True,
        )
    )


def summary(tallies: list[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """Rates and latencies over all processes."""
    latencies_ms = np.concatenate([tally["latencies_ms"] for tally in tallies])
    acked, consumed = (
        sum(tally["num_acked"] for tally in tallies),
        sum(tally["num_consumed"] for tally in tallies),
    )
    return {
        "per_s": round(min(acked, consumed) / seconds),
        "acked_per_s": round(acked / seconds),
        "consumed_per_s": round(consumed / seconds),
        "ack_p50_ms": round(float(np.percentile(latencies_ms, 50)), 2) if len(latencies_ms) else None,
        "ack_p99_ms": round(float(np.percentile(latencies_ms, 99)), 2) if len(latencies_ms) else None,
    }


class Flushes:
    """Counts flushes of the block device that holds a directory, if the kernel reports them."""

    def __init__(self, directory: Path) -> None:
        device = directory.stat().st_dev
        self._file = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
        self._start = self._read()

    def _read(self) -> int | None:
        fields = self._file.read_text().split() if self._file.exists() else []
        return int(fields[15]) if len(fields) > 15 else None

    @property
    def since_start(self) -> int | None:
        """Flushes since this object was created; None if the kernel does not report them."""
        now = self._read()
        return None if now is None or self._start is None else now - self._start


class Bench:
    """Measures the rows of the table, one after the other."""

    def __init__(self, *, seconds: float, peers: str, scratch: Path) -> None:
        self._seconds, self._scratch = seconds, scratch
        self._environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": ":".join(filter(None, [str(ROOT), peers])),
        }
        if peers:
            sys.path.append(peers)
        self.rows: dict[str, dict[str, Any]] = {}
        self.wire_rows: dict[str, dict[str, Any]] = {}
        self.costs: list[dict[str, Any]] = []

    def _row(
        self, name: str, module: str, server: contextlib.AbstractContextManager[Served], *, half_load: bool
    ) -> None:
        with server as served:
            flushes = Flushes(self._scratch)
            row = measure(
                module,
                served,
                Plan(role="", address=served.address),
                seconds=self._seconds,
                environment=self._environment,
            )
            row["flushes_per_s"] = _rate(flushes.since_start, self._seconds + WARM_UP_S)
        self.rows[name] = row
        print(name, json.dumps(row), flush=True)
        if half_load:
            self._half_load(name, module, row["per_s"] / 2)

    def _half_load(self, name: str, module: str, rate_per_s: float) -> None:
        with self._server(name) as served:
            plan = Plan(role="", address=served.address, rate_per_s=rate_per_s / NUM_PROCESSES)
            found = measure(module, served, plan, seconds=self._seconds, environment=self._environment)
        row = {f"half_load_{key}": found[key] for key in ("acked_per_s", "ack_p50_ms", "ack_p99_ms")}
        self.rows[name] |= row
        print(name, json.dumps(row), flush=True)

    @contextlib.contextmanager
    def _server(self, name: str) -> Iterator[Served]:
        directory = Path(tempfile.mkdtemp(dir=self._scratch, prefix="stream-"))
        kind, _, how = name.partition(", ")
        try:
            if kind == "ours":
                with ours.server(
                    directory, durability=how, backlog=Plan(role="", address="").backlog
                ) as served:
                    yield served
            elif kind == "redis":
                from benchmarks.stream_peers import redis_streams

                with redis_streams.server(directory, appendfsync=how) as served:
                    yield served
            else:
                with bare_zmq.server() as served:
                    yield served
        finally:
            shutil.rmtree(directory)

    def ours(self) -> None:
        """Measures the buffer with each durability."""
        for durability in ("power_loss", "process_crash", "none"):
            name = f"ours, {durability}"
            self._row(
                name, "benchmarks.stream_peers.ours", self._server(name), half_load=durability != "none"
            )

    def wire(self) -> None:
        """Measures the buffer by size of the records and number of ZeroMQ threads, without keys and with."""
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix="stream-") as directory:
            keys = Path(directory) / "keys"
            init_keys(keys, [KeyRole.BUFFER, KeyRole.ROLLOUT, KeyRole.TRAINER])
            for size, num_tokens in WIRE_TOKENS.items():
                for io_threads in IO_THREADS:
                    # Side by side, so that both see the same machine.
                    for used in ("", str(keys)):
                        self._wire_row(size, num_tokens=num_tokens, io_threads=io_threads, keys=used)

    def _wire_row(self, size: str, *, num_tokens: int, io_threads: int, keys: str) -> None:
        plan = Plan(
            role="",
            address="",
            num_tokens=num_tokens,
            backlog=WIRE_BACKLOG[size],
            io_threads=io_threads,
            keys=keys,
        )
        with (
            tempfile.TemporaryDirectory(dir=self._scratch, prefix="stream-") as directory,
            ours.server(
                Path(directory),
                durability="process_crash",
                backlog=plan.backlog,
                io_threads=io_threads,
                keys=keys,
            ) as served,
        ):
            row = measure(
                "benchmarks.stream_peers.ours",
                served,
                dataclasses.replace(plan, address=served.address),
                seconds=self._seconds,
                environment=self._environment,
            )
        row["mb_per_s"] = round(row["per_s"] * num_tokens * BYTES_PER_TOKEN / 1e6, 1)
        name = f"{size}, {io_threads} threads"
        if keys:
            row["of_without_keys"] = round(row["per_s"] / max(1, self.wire_rows[name]["per_s"]), 3)
            name += ", keys"
        self.wire_rows[name] = row
        print(name, json.dumps(row), flush=True)

    def redis(self) -> None:
        """Measures Redis Streams."""
        for appendfsync in ("always", "no"):
            name = f"redis, {appendfsync}"
            self._row(
                name,
                "benchmarks.stream_peers.redis_streams",
                self._server(name),
                half_load=appendfsync == "always",
            )

    def bare_zmq(self) -> None:
        """Measures bare ZeroMQ, the upper bound."""
        self._row("bare zmq", "benchmarks.stream_peers.bare_zmq", self._server("bare zmq"), half_load=False)

    def cost(self) -> None:
        """Measures the CPU time per sample in ledgers of different sizes."""
        for num_tickets in NUM_TICKETS:
            with tempfile.TemporaryDirectory(dir=self._scratch) as directory:
                self.costs.append(asyncio.run(ledger_cost.cost(Path(directory), num_tickets=num_tickets)))
            print("cost", json.dumps(self.costs[-1]), flush=True)

    def ray(self) -> None:
        """Measures Ray's queue in two modes, and TransferQueue."""
        plan = Plan(role="", address="").dumps()
        for mode, name in RAY_MODES.items():
            command = [
                sys.executable,
                "-m",
                "benchmarks.stream_peers.ray_cluster",
                mode,
                str(self._seconds),
                plan,
            ]
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            if done.returncode:
                self.rows[name] = {"failed": done.stderr.strip().splitlines()[-1]}
            else:
                self.rows[name] = summary(json.loads(done.stdout.splitlines()[-1]), seconds=self._seconds)
            print(name, json.dumps(self.rows[name]), flush=True)


def shares(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Our rates divided by those of the other systems, where both were measured."""
    pairs = (
        ("ours, power_loss", "redis, always"),
        ("ours, process_crash", "redis, no"),
        ("ours, process_crash", "ray queue, one at a time"),
        ("ours, process_crash", "ray queue, a window at a time"),
        ("ours, process_crash", "transfer queue"),
        ("ours, power_loss", "bare zmq"),
        ("ours, process_crash", "bare zmq"),
    )
    measured = [pair for pair in pairs if all("per_s" in rows.get(name, {}) for name in pair)]
    return {
        f"{mine} / {other}": round(rows[mine]["per_s"] / rows[other]["per_s"], 2) for mine, other in measured
    }


def _rate(count: int | None, seconds: float) -> int | None:
    return None if count is None else round(count / seconds)


def main() -> None:
    """Measures, prints a table, writes benchmarks/results/stream.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument(
        "--peers", default="", help="directory with hiredis, ray, TransferQueue (pip install --target)"
    )
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure"
    )
    parser.add_argument("--only", default="bare_zmq,ours,wire,redis,ray,cost")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(seconds=arguments.seconds, peers=arguments.peers, scratch=arguments.scratch)
    for part in arguments.only.split(","):
        if part in ("bare_zmq", "ours", "wire", "cost") or arguments.peers:
            getattr(bench, part)()
    write(
        "stream",
        {
            "seconds": arguments.seconds,
            "rows": bench.rows,
            "shares": shares(bench.rows),
            "wire": bench.wire_rows,
            "costs": bench.costs,
        },
    )
    names = (
        "per_s",
        "acked_per_s",
        "consumed_per_s",
        "server_cpu_us",
        "producer_cpu_us",
        "consumer_cpu_us",
        "flushes_per_s",
        "ack_p50_ms",
        "ack_p99_ms",
        "half_load_ack_p99_ms",
    )
    print(
        table(
            ["", *names], [[name, *(row.get(key, "") for key in names)] for name, row in bench.rows.items()]
        )
    )
    if bench.wire_rows:
        wire_names = ("per_s", "mb_per_s", "server_cpu_us", "ack_p50_ms", "ack_p99_ms")
        rows = [[name, *(row[key] for key in wire_names)] for name, row in bench.wire_rows.items()]
        print(table(["record, ZeroMQ threads", *wire_names], rows))
    for pair, share in shares(bench.rows).items():
        print(f"{pair}: {share:.2f}")


if __name__ == "__main__":
    main()
