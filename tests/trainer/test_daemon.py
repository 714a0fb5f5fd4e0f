"""The trainer as a process with a real buffer and no servers; its buffer client with a scripted buffer."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from areal_like.config import Config, TrainerConfig
from areal_like.errors import ArealError, ConfigError, DeadlineError
from areal_like.paths import RunPaths
from areal_like.runtime.progress import ProgressClock
from areal_like.wire.channel import Envelope, Listener
from areal_like.wire.messages.consumer import (
    CompleteStep,
    Directory,
    Fetch,
    Group,
    ServerEntry,
    TrainerHeartbeat,
)
from areal_like.wire.messages.hello import Goodbye, Hello, Ok, Welcome
from areal_like.wire.messages.producer import HeartbeatAck, ServerState
from tests.support import warm_start
from tests.support.buffer_harness import ROOT, BufferProcess, job
from tests.support.trainer_helpers import write_model
from tests.support.trainer_ranks import make_runner
from tests.support.waiting import HANG_LIMIT_S
from trainer import daemon
from trainer.buffer_client.client import TrainerBufferClient
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.process_group import device_of
from trainer.distributed.ranks import Ranks


@contextlib.contextmanager
def trainer(buffer: BufferProcess, *settings: str) -> Iterator["subprocess.Popen[str]"]:
    port = buffer.address.rpartition(":")[2]
    process = warm_start.Popen(
        [
            sys.executable,
            "-m",
            "trainer",
            "--config",
            str(buffer.paths.config),
            f"buffer.port={port}",
            *settings,
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_state(buffer: BufferProcess, state: str, *, after: str = "") -> str:
    """Waits for a trainer in this state, at another address than that of the trainer before it (`after`),
    which the buffer still lists. Returns its address."""
    while True:
        for peer in buffer.status()["peers"]:
            if (peer["name"], peer["state"]) == ("trainer-0", state) and peer["http"] != after:
                return str(peer["http"])
        time.sleep(0.1)


@pytest.mark.parametrize("summary_can_be_written", [True, False])
def test_a_drain_ends_waits_with_the_right_exit_code(tmp_path: Path, summary_can_be_written: bool) -> None:
    config = job(tmp_path, model={"path": write_model(tmp_path / "model")})
    paths = RunPaths.of(config)
    if not summary_can_be_written:
        paths.summary.mkdir(parents=True)
    paths.endpoints.mkdir(parents=True)
    (paths.endpoints / "trainer-1.json").write_text("{}")  # of an earlier run with two ranks that were killed
    (paths.checkpoints / ".step_000003.partial").mkdir(parents=True)  # of a trainer that was killed too
    buffer = BufferProcess(config)
    try:
        with trainer(buffer) as process:
            wait_for_state(buffer, "evaluating")  # there is no server, so no evaluation ends
            process.send_signal(signal.SIGTERM)
            assert process.wait() == (0 if summary_can_be_written else 1)
            assert not list(paths.endpoints.glob("trainer-0.json"))
            assert not list(paths.checkpoints.glob(".*"))
    finally:
        buffer.close()


def test_a_trainer_killed_at_its_start_has_rolled_back(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    config = job(tmp_path, model={"path": path})
    ranks = Ranks.alone()
    runner = make_runner(path, ranks, dtype=torch.float32)
    checkpoints = Checkpoints(RunPaths.of(config).checkpoints, keep=9, tokenizer_path=path)
    for step in (2, 4):
        stream = {"stream": {"cursor": 4 * step, "next_version": 1, "pending": []}}
        checkpoints.save(
            step,
            runner.policy,
            runner.optimizer,
            ranks,
            extra={"stream": stream, "shaping_duals": runner.rewards.duals},
        )
    checkpoints.wait()
    dist.destroy_process_group()
    buffer = BufferProcess(config)
    address = ""
    try:
        for resume in ("step:2", "latest"):
            with trainer(buffer, f"resume={resume}"):  # killed when the block ends
                # There is no server to push to.
                address = wait_for_state(buffer, "pushing", after=address)
                assert checkpoints.steps() == [2], "resume=latest would undo the rollback"
    finally:
        buffer.close()


def test_error_message_for_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="rank 2 of this machine needs GPU 99"):
        device_of(Config(trainer=TrainerConfig(device="cuda:97")))


class ScriptedBuffer:
    """A buffer that welcomes every peer and replies with the result of `answer`.

    It runs in a thread with its own loop.
    """

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self._answer = answer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._listener = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        self.port = self._listener.port

    def __enter__(self) -> "ScriptedBuffer":
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._listener.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> Listener:
        return Listener(host="127.0.0.1", port=0, handler=self._handle, max_message_bytes=1 << 20)

    def _handle(self, envelope: Envelope) -> None:
        match envelope.message:
            case Hello():
                answer: Any = Welcome(job="job", incarnation=1, step=0, newest_version=0)
            case Goodbye():
                answer = Ok()
            case message:
                answer = self._answer(message)
        if answer is not None:
            self._listener.send(envelope.peer, answer, rid=envelope.rid)


def test_a_request_whose_reply_was_lost_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.buffer_client.client._RESEND_AFTER_S", 1.0)
    requests: list[Any] = []

    def answer(message: Any) -> Any:
        if isinstance(message, TrainerHeartbeat):
            return None
        requests.append(message)
        return Ok() if len(requests) > 1 else None

    with ScriptedBuffer(answer) as scripted:
        config = job(
            tmp_path, model={"path": write_model(tmp_path / "model")}, buffer={"port": scripted.port}
        )
        with TrainerBufferClient(config, rank=0, world_size=1, device="cpu", process="0" * 32) as buffer:
            assert buffer.call(CompleteStep(step=3), timeout_s=HANG_LIMIT_S) == Ok()
            assert requests[:2] == [CompleteStep(step=3)] * 2

            buffer.fail(ArealError("no more weights"))
            with pytest.raises(ArealError, match="no more weights"):
                buffer.wait(buffer.submit(asyncio.sleep(1e6)), name="anything", timeout_s=20)


def test_waits_last_while_servers_make_progress(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count in the buffer's replies to heartbeats grows twenty times, and then no more.

    The client's clock moves by half a second with each reply.
    """
    num_beats = num_seen = 0
    observe = ProgressClock.observe

    def observed(progress: ProgressClock, buffer: str, count: float, *, now_s: float) -> None:
        nonlocal num_seen
        observe(progress, buffer, count, now_s=(num_seen + 1) / 2)
        num_seen += 1

    monkeypatch.setattr(ProgressClock, "observe", observed)
    monkeypatch.setattr(TrainerBufferClient, "_untroubled_time_s", lambda _: num_seen / 2)

    def answer(message: Any) -> Any:
        nonlocal num_beats
        if isinstance(message, TrainerHeartbeat):
            num_beats += 1
            return HeartbeatAck(step=0, newest_version=0, progress=float(min(20, num_beats)))
        return None  # a group that never comes

    with ScriptedBuffer(answer) as scripted:
        config = job(
            tmp_path,
            model={"path": write_model(tmp_path / "model")},
            buffer={"port": scripted.port, "lease_timeout_s": 5.0},
            daemon={"heartbeat_s": 0.05},
            trainer={"fetch_timeout_s": 1.0, "num_steps": 3, "groups_per_step": 1, "world_size": 1},
            rollout={"generate_timeout_s": 1.0, "reward_timeout_s": 0.5},
        )
        with TrainerBufferClient(config, rank=0, world_size=1, device="cpu", process="0" * 32) as buffer:
            stall = "group 0 of step 0, and no rollout server has made progress for 2 s .*fetch_timeout_s"
            with pytest.raises(DeadlineError, match=stall):
                next(buffer.groups(0))
            assert num_beats > 20
            assert "waiting for group 0 of step 0" in caplog.text, "a long wait is reported while it lasts"
            with pytest.raises(DeadlineError, match=r"the evaluation, and no .*\(eval\.timeout_s after"):
                sleep = buffer.submit(asyncio.sleep(1e6))
                buffer.wait(sleep, name="the evaluation", stall_s=0.3, setting="eval.timeout_s")


@pytest.mark.parametrize("is_registered", [True, False])
def test_a_drain_waits_while_a_server_is_left(tmp_path: Path, is_registered: bool) -> None:
    """Group 0 of the step is recorded, group 1 is never made: its server drains or leaves after 20 beats."""
    num_beats = 0

    def directory(*states: ServerState) -> Directory:
        fixed: dict[str, Any] = {"incarnation": 1, "weights_address": "", "device": "cpu"}
        servers = [
            ServerEntry(name=f"rollout-{index}", state=state.value, weights_version=0, **fixed)
            for index, state in enumerate(states)
        ]
        return Directory(servers=servers)

    def answer(message: Any) -> Any:
        nonlocal num_beats
        if isinstance(message, TrainerHeartbeat):
            num_beats += 1
            if num_beats < 20:
                return directory(ServerState.DRAINING, ServerState.QUARANTINED)
            return directory(ServerState.DRAINING) if is_registered else directory()
        if isinstance(message, Fetch) and message.position == 0:
            position = {"step": message.step, "position": 0}
            return Group(**position, ticket_id=1, prompt_index=1, records=[], version_steps=[])
        return None

    with ScriptedBuffer(answer) as scripted:
        config = job(
            tmp_path,
            model={"path": write_model(tmp_path / "model")},
            buffer={"port": scripted.port},
            daemon={"heartbeat_s": 0.05},
            trainer={"num_steps": 3, "groups_per_step": 2, "world_size": 1},
        )
        with TrainerBufferClient(config, rank=0, world_size=1, device="cpu", process="0" * 32) as buffer:
            while not buffer.directory.servers:
                time.sleep(0.01)
            buffer.stop_requested.set()
            assert [group.position for group in buffer.groups(0)] == [0]
            assert num_beats >= 20, "a server that is quarantined may still make the group"
            assert buffer.abandon_step.is_set(), "the other ranks hear of it at the next micro-batch"
            assert [group.position for group in buffer.groups(1)] == [0], "recorded groups are still served"


def test_a_failed_heartbeat_ends_every_wait(tmp_path: Path) -> None:
    with ScriptedBuffer(lambda _: None) as scripted:
        settings = {
            "model": {"path": write_model(tmp_path / "model")},
            "buffer": {"port": scripted.port},
            "daemon": {"heartbeat_s": 0.1},
        }
        config = job(tmp_path, **settings)
        with TrainerBufferClient(config, rank=0, world_size=1, device="cpu", process="0" * 32) as buffer:
            left = buffer.submit(asyncio.sleep(1e6))
            buffer.stats = {"what cannot be sent": object()}  # type: ignore[dict-item]
            with pytest.raises(ArealError, match="no more heartbeats are sent: TypeError"):
                buffer.call(CompleteStep(step=3), timeout_s=HANG_LIMIT_S)
        assert left.cancelled(), "a task that its loop leaves behind would be logged as an error of its own"


def test_an_open_rendezvous_needs_keys(tmp_path: Path) -> None:
    config = job(tmp_path, weights={"host": "192.0.2.1"})
    with pytest.raises(ConfigError, match=r"weights\.host=192\.0\.2\.1 is not a loopback address"):
        daemon.run_rank(config)
