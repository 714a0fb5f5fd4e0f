"""A job without models: a real buffer, producers behind a faulty proxy, and the trainer's client.

Buffer and producers are processes; the test itself drives the trainer's real buffer client.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from areal_like.config import Config
from areal_like.wire.messages.consumer import (
    AllocVersion,
    CommitStep,
    CompleteStep,
    GetRunCounters,
    Group,
    RunCounters,
    StartTraining,
)
from tests.chaos.producer import is_synthetic
from tests.chaos.proxy import FaultProxy, Faults
from tests.support.buffer_harness import ROOT, BufferProcess, job
from trainer.buffer_client import client as client_module
from trainer.buffer_client.client import TrainerBufferClient

CALL_TIMEOUT_S = 600.0
RESEND_AFTER_S = 0.5
"""Instead of the trainer's 20 s, because here one in a hundred replies is lost."""


QUIET = {"heartbeat_s": 0.1, "log_level": "ERROR"}
"""Of a buffer that refuses many messages: nobody reads its stderr, so it must not write a line for each."""


def chaos_config(directory: Path, **overrides: Any) -> Config:
    """The configuration of a job whose model is two empty files, enough for a fingerprint."""
    model = directory / "model"
    model.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    base: dict[str, Any] = {
        "model": {"path": str(model)},
        "max_staleness": 2,
        "sampling": {"group_size": 4},
        "trainer": {"num_steps": 40, "groups_per_step": 8, "fetch_timeout_s": 600.0},
        "buffer": {"lease_timeout_s": 2.0},
        "daemon": {"heartbeat_s": 0.1},
    }
    return job(directory, **(base | overrides))


class ChaosJob:
    """One job. Create it with `running_job(...)`, which kills everything at the end."""

    def __init__(self, config: Config, *, faults: Faults, seed: int, stack: ExitStack) -> None:
        self._stack = stack
        self.buffer = BufferProcess(config, is_forked=False)
        stack.callback(lambda: self.buffer.close())
        self.proxy = stack.enter_context(FaultProxy(self._buffer_address, faults=faults, seed=seed))
        self.config = dataclasses.replace(
            config, buffer=dataclasses.replace(config.buffer, port=self.proxy.port)
        )
        self.producers: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(self._kill_producers)

    def _buffer_address(self) -> str:
        """Raises OSError while there is no buffer: another test may listen at the port of the last one."""
        if self.buffer.process.poll() is not None:
            raise ConnectionRefusedError("no buffer runs")
        return self.buffer.address.removeprefix("tcp://")

    def restart_buffer(self) -> None:
        """Kills the buffer with SIGKILL and starts a new process on the same run."""
        self.buffer.close()
        # The endpoint file of the killed process would be taken for the new one's.
        (self.buffer.paths.endpoints / "buffer.json").unlink(missing_ok=True)
        self.buffer = BufferProcess(self.buffer.config, is_forked=False)

    def produce(
        self, name: str, *, capacity: int = 32, sample_s: float = 0.002, num_tokens: int = 64
    ) -> subprocess.Popen[bytes]:
        """Starts a producer, or starts it again after it was killed."""
        numbers = [str(capacity), str(sample_s), str(num_tokens)]
        settings = ["--config", str(self.buffer.paths.config), f"buffer.port={self.proxy.port}"]
        self.producers[name] = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.producer", name, *numbers, *settings],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return self.producers[name]

    @contextlib.contextmanager
    def trainer(self) -> Iterator[TrainerBufferClient]:
        """The buffer client of rank 0, through the proxy."""
        before, client_module._RESEND_AFTER_S = client_module._RESEND_AFTER_S, RESEND_AFTER_S
        try:
            with TrainerBufferClient(
                self.config, rank=0, world_size=1, device="cpu", process=secrets.token_hex(16)
            ) as client:
                yield client
        finally:
            client_module._RESEND_AFTER_S = before

    def _kill_producers(self) -> None:
        for process in self.producers.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def running_job(
    directory: Path, *, faults: Faults | None = None, seed: int = 0, **overrides: Any
) -> Iterator[ChaosJob]:
    """Starts a buffer behind a proxy."""
    with ExitStack() as stack:
        yield ChaosJob(
            chaos_config(directory, **overrides), faults=faults or Faults(), seed=seed, stack=stack
        )


def train(client: TrainerBufferClient, *, first: int, last: int, commit_every: int = 5) -> list[Group]:
    """Makes the calls of rank 0 for steps `first` up to, but not including, `last`; returns the groups.

    Each step: fetch its groups in order, complete it, allocate a version; commit after every fifth.
    """
    client.call(StartTraining(step=first), timeout_s=CALL_TIMEOUT_S)
    groups = []
    for step in range(first, last):
        groups += list(client.groups(step))
        client.call(CompleteStep(step=step), timeout_s=CALL_TIMEOUT_S)
        client.call(AllocVersion(step=step + 1), timeout_s=CALL_TIMEOUT_S)
        if (step + 1) % commit_every == 0:
            client.call(CommitStep(step=step), timeout_s=CALL_TIMEOUT_S)
    return groups


def counters_of(client: TrainerBufferClient) -> RunCounters:
    """The counters of the run."""
    counters: RunCounters = client.call(GetRunCounters(), timeout_s=CALL_TIMEOUT_S)
    return counters


def check_groups(groups: list[Group], config: Config, *, first: int, last: int) -> None:
    """Checks the groups of these steps.

    Each position is filled once, in order, with a complete group of a new ticket, or with as many parts of
    closed groups, within the staleness bound. No sample is in two positions.
    """
    places = [(group.step, group.position) for group in groups]
    assert places == [
        (step, position) for step in range(first, last) for position in range(config.trainer.groups_per_step)
    ]
    assert len({group.ticket_id for group in groups}) == len(groups), "a ticket was trained twice"
    for group in groups:
        assert all(0 <= group.step - oldest <= config.staleness_cap for oldest in group.version_steps), (
            group.ticket_id
        )
        assert len(group.records) == config.sampling.group_size
        for record, trajectory in zip(group.records, group.trajectories, strict=True):
            key = record.ticket_id, record.sample_index
            assert is_synthetic(trajectory, ticket_id=key[0], sample_index=key[1]), key
    samples = [(record.ticket_id, record.sample_index) for group in groups for record in group.records]
    assert len(set(samples)) == len(samples), "a sample was trained twice"


def check_counters(counters: RunCounters) -> None:
    """Checks that tickets by state and drops by reason add up."""
    states = {state: count for state, count in counters.tickets.items() if state != "issued"}
    assert sum(states.values()) == counters.tickets["issued"], json.dumps(counters.tickets)
    assert sum(counters.drops.values()) == states["dropped"], json.dumps(counters.drops)
