"""The buffer as a real process, fake producers beside it, and a trainer that the test controls."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from areal_like.config import Config, from_mapping
from areal_like.errors import RefusedError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import save_config
from areal_like.security.tokens import operator_token
from areal_like.wire.channel import Link
from areal_like.wire.fingerprint import dataset_fingerprint, model_fingerprint, tokenizer_fingerprint
from areal_like.wire.messages.consumer import CompleteStep, Directory, Fetch, Group, StartTraining
from areal_like.wire.messages.hello import AreYouAlive, Hello, HelloRequired, JobFailed, Role, StillAlive
from areal_like.wire.messages.producer import Lease, SampleAck, SampleAcks, ServerHeartbeat
from buffer.tables.server_health import MAX_LIES
from tests.support import warm_start
from tests.support.ledger_simulation import heartbeat
from tests.support.waiting import HANG_LIMIT_S

ROOT = Path(__file__).resolve().parents[2]
_WATCHDOG = re.compile("WARNING the job (no longer )?waits on ")


def job(directory: Path, **overrides: Any) -> Config:
    """A small job; `overrides` are whole sections or top-level fields."""
    mapping: dict[str, Any] = {
        "name": "job",
        "runs_dir": str(directory / "runs"),
        "max_staleness": 1,
        "sampling": {"group_size": 2},
        "trainer": {"num_steps": 6, "groups_per_step": 4},
        # Peers that a test plays send few heartbeats.
        "buffer": {"lease_timeout_s": 120.0},
        "daemon": {"heartbeat_s": 0.1},
    }
    return from_mapping(mapping | overrides)


class BufferProcess:
    """A process of `python -m buffer`."""

    def __init__(
        self,
        config: Config,
        *settings: str,
        name: str = "buffer",
        wait: bool = True,
        settings_file: Path | None = None,
        is_forked: bool = True,
    ) -> None:
        """`settings_file`: where its configuration is written, instead of into the run's directory.

        `is_forked`: see warm_start.py. A fork shares memory, so tests of its size start it as a user does.
        """
        self.config = config
        self._name = name
        self.paths = RunPaths.of(config)
        settings_file = settings_file or self.paths.config
        save_config(config, settings_file)
        # A killed buffer leaves its endpoint behind.
        (self.paths.endpoints / f"{name}.json").unlink(missing_ok=True)
        start = warm_start.Popen if is_forked else subprocess.Popen
        self.process = start(
            [sys.executable, "-m", "buffer", "--config", str(settings_file), "--name", name, *settings],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.producers: list[subprocess.Popen[bytes]] = []
        if wait:
            self._wait_ready()

    def _wait_ready(self) -> None:
        file = self.paths.endpoints / f"{self._name}.json"
        while not (file.exists() and "stream" in (endpoint := json.loads(file.read_text()))):
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.02)
        self.address, self.http = endpoint["stream"], endpoint["http"]

    @property
    def peers_config(self) -> Config:
        """The configuration of its peers, with its port."""
        port = int(self.address.rpartition(":")[2])
        return dataclasses.replace(self.config, buffer=dataclasses.replace(self.config.buffer, port=port))

    def produce(self, name: str, *, capacity: int = 8, sample_s: float = 0.01) -> subprocess.Popen[bytes]:
        """Starts a fake producer."""
        process = warm_start.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.fake_producer",
                self.address,
                name,
                str(capacity),
                str(sample_s),
                dataset_fingerprint(self.config),
            ],
            cwd=ROOT,
        )
        self.producers.append(process)
        return process

    def get(self, path: str) -> str:
        """The body of an HTTP GET."""
        keys = self.config.security.keys
        headers = {"Authorization": f"Bearer {operator_token(keys)}"} if keys else {}
        request = urllib.request.Request(f"http://{self.http}{path}", headers=headers)
        with urllib.request.urlopen(request) as response:
            return str(response.read().decode())

    def status(self) -> dict[str, Any]:
        """The body of /status."""
        return dict(json.loads(self.get("/status")))

    def wait_status(self, accept: Any, *, timeout_s: float = HANG_LIMIT_S) -> dict[str, Any]:
        """Polls /status until `accept` returns true for it."""
        deadline_s = time.monotonic() + timeout_s
        while not accept(status := self.status()):
            assert time.monotonic() < deadline_s, status
            time.sleep(0.05)
        return status

    def wait_series(self, line: str) -> None:
        """Waits until /metrics, which follows the ledger a heartbeat later, has this line."""
        deadline_s = time.monotonic() + HANG_LIMIT_S
        while line not in (metrics := self.get("/metrics")).splitlines():
            assert time.monotonic() < deadline_s, metrics
            time.sleep(0.05)

    def rss_bytes(self) -> int:
        """Resident memory of the process, in bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def terminate(self) -> tuple[int, str]:
        """(exit code, stderr) after SIGTERM, as `ended`."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """(exit code, stderr) of a process that ends by itself, without what its watchdog says: on a slow
        machine the peers of a test are silent for long."""
        _, stderr = self.process.communicate()
        lines = [line for line in stderr.splitlines(keepends=True) if not _WATCHDOG.search(line)]
        return self.process.returncode, "".join(lines)

    def close(self) -> None:
        """Kills the processes that still run."""
        for process in (*self.producers, self.process):
            if process.poll() is None:
                process.kill()
            process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def running_buffer(directory: Path, *, is_forked: bool = True, **overrides: Any) -> Iterator[BufferProcess]:
    """A ready buffer; it and its producers are killed at the end."""
    buffer = BufferProcess(job(directory, **overrides), is_forked=is_forked)
    try:
        yield buffer
    finally:
        buffer.close()


class FakeTrainer:
    """Rank 0 of a trainer, controlled by the test, over a real connection."""

    def __init__(self, config: Config, link: Link) -> None:
        self.config = config
        self.link = link

    async def call(self, message: Any, *, timeout_s: float = HANG_LIMIT_S) -> Any:
        return await self.link.call(message, timeout_s=timeout_s)

    async def groups(self, step: int, *, timeout_s: float = HANG_LIMIT_S) -> list[Group]:
        """All groups of a step, fetched at the same time."""
        fetches = [
            self.call(Fetch(step=step, position=position), timeout_s=timeout_s)
            for position in range(self.config.trainer.groups_per_step)
        ]
        return list(await asyncio.gather(*fetches))

    async def train(self, step: int, *, timeout_s: float = HANG_LIMIT_S) -> list[Group]:
        """Fetches a step and completes it."""
        groups = await self.groups(step, timeout_s=timeout_s)
        await self.call(CompleteStep(step=step))
        return groups


def trainer_hello(config: Config, **changes: Any) -> Hello:
    """The Hello of rank 0; of the job's model if there is one."""
    path = config.model.path
    has_model = Path(path).is_dir()
    fields: dict[str, Any] = {
        "role": Role.TRAINER,
        "name": "trainer-0",
        "process": secrets.token_hex(16),
        "job": config.name,
        "model": model_fingerprint(path) if has_model else "m",
        "tokenizer": tokenizer_fingerprint(path) if has_model else "t",
        "dataset": dataset_fingerprint(config),
        "http_address": "",
    }
    return Hello(**(fields | changes))


def beat(leases: list[Lease], *, free: int) -> ServerHeartbeat:
    """The heartbeat of a server that holds these leases and nothing else."""
    holding = sum(len(lease.sample_indices) for lease in leases)
    return heartbeat(free=free, holding=holding, leases=[lease.lease_id for lease in leases])


async def until(inbox: list[Any], kind: type, *, count: int = 1) -> list[Any]:
    """Waits for this many messages of this kind in an inbox and returns them."""
    async with asyncio.timeout(HANG_LIMIT_S):
        while len(found := [message for message in inbox if isinstance(message, kind)]) < count:
            await asyncio.sleep(0.01)
    return found


async def lie_until_refused(link: Link) -> str:
    """Sends impossible totals until the buffer refuses this server for good; returns the refusal."""
    for _ in range(MAX_LIES):
        await link.call(heartbeat(tokens_generated=1e17), timeout_s=HANG_LIMIT_S)
    try:
        await link.call(heartbeat(), timeout_s=HANG_LIMIT_S)
    except RefusedError as error:
        return str(error)
    raise AssertionError("it is still served")


async def wait_for_hello_required(inbox: list[Any]) -> None:
    """Waits until the buffer has asked for a new hello. Fails if the job ends."""
    async with asyncio.timeout(HANG_LIMIT_S):
        while HelloRequired() not in inbox:
            assert not any(isinstance(message, JobFailed) for message in inbox), inbox
            await asyncio.sleep(0.01)


def one_by_one(acks: SampleAcks) -> list[SampleAck]:
    """One acknowledgement for each sample."""
    return [
        dataclasses.replace(ack, sample_indices=[index]) for ack in acks.acks for index in ack.sample_indices
    ]


@asynccontextmanager
async def connected(
    buffer: BufferProcess,
    hello: Hello | None = None,
    *,
    inbox: list[Any] | None = None,
    answers: bool = True,
) -> AsyncIterator[Link]:
    """A connection on which `hello` was sent.

    Messages that are no replies go to `inbox`, with one SampleAck per sample. `answers`: it says that it is
    alive when the buffer asks.
    """

    def take(message: Any) -> None:
        if isinstance(message, AreYouAlive) and answers:
            link.send(StillAlive())
        if inbox is not None:
            inbox.extend(one_by_one(message) if isinstance(message, SampleAcks) else [message])

    link = Link(buffer.address, handler=take)
    try:
        if hello is not None:
            await link.call(hello, timeout_s=HANG_LIMIT_S)
        yield link
    finally:
        link.close()


@asynccontextmanager
async def training(
    buffer: BufferProcess, *, directories: list[Any] | None = None
) -> AsyncIterator[FakeTrainer]:
    """A trainer that has registered and started at step 0."""
    inbox: list[Any] = []
    async with connected(buffer, trainer_hello(buffer.config), inbox=inbox) as link:
        trainer = FakeTrainer(buffer.config, link)
        await trainer.call(StartTraining(step=0))
        yield trainer
    if directories is not None:
        directories += [message for message in inbox if isinstance(message, Directory)]
