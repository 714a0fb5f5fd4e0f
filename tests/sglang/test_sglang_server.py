"""A whole rollout server with a real SGLang: samples, pushes, the death of its engine, shutdown."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from areal_like.trajectory import Trajectory
from areal_like.wire.messages.hello import Goodbye
from areal_like.wire.messages.producer import Purpose, ReturnLeases, SampleDone, ServerState
from rollout_server.tasks.sort import SortTask
from tests.rollout_server.test_server import logprobs_under, perturbed, push
from tests.sglang.conftest import START_S
from tests.support.rollout_harness import PlayedBuffer, job, serving, wait_until
from tests.support.waiting import command_line, descendants, is_alive
from trainer.models.tiny import build_tiny_model, character_tokenizer
from trainer.weights.broadcaster import PushOutcome

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_tiny_model(path, seed=0, warm_start_steps=20, swap_prob=0.5)
    return path


def test_server_samples_takes_pushes_and_restarts_its_engine(model: Path, tmp_path: Path) -> None:
    with PlayedBuffer() as buffer:
        rollout = {"engine": "sglang", "max_running": 16, "queue_samples": 600, "start_timeout_s": START_S}
        config = job(
            tmp_path, port=buffer.port, model_dir=model, sampling={"max_new_tokens": 60}, rollout=rollout
        )
        with serving(config) as server:
            buffer.expect_beat(lambda beat: beat.state is ServerState.SERVING, timeout_s=START_S)
            _check_recorded_versions_and_logprobs(buffer, model)
            mixed = _push_while_sampling(buffer, model, version=5)
            assert mixed, "no sequence was running during the update"
            _check_bad_names_change_nothing(buffer, model, version=6)

            children = descendants(server.process.pid)
            buffer.newest_version = 6
            buffer.grant(*(buffer.lease(i, samples=8, prompt=i) for i in range(101, 131)))
            buffer.expect_beat(lambda beat: beat.stats["running"] > 0 and len(beat.leases) > 5)
            (engine,) = (pid for pid in children if "launch_with_key" in command_line(pid))
            below = descendants(engine)
            assert below, "SGLang's schedulers are separate processes"
            os.kill(engine, signal.SIGKILL)
            assert buffer.expect(ReturnLeases)[0].reason == "engine lost"
            wait_until(lambda: not any(map(is_alive, below)))
            buffer.expect_beat(
                lambda beat: beat.state is ServerState.QUARANTINED and beat.stats["engine_starts"] == 2,
                timeout_s=START_S,
            )
            assert push(buffer, perturbed(model, 7), version=7).activated
            buffer.expect_beat(lambda beat: beat.state is ServerState.SERVING and beat.weights_version == 7)

            children = descendants(server.process.pid)
            buffer.grant(*(buffer.lease(i, samples=8, prompt=i) for i in range(201, 231)))
            buffer.expect_beat(lambda beat: beat.stats["running"] > 0)
            code, seconds, errors = server.terminate()
            assert code == 0 and seconds < 20, errors
            buffer.expect(Goodbye)
            wait_until(lambda: not any(map(is_alive, children)))


def _check_recorded_versions_and_logprobs(buffer: PlayedBuffer, model: Path) -> None:
    buffer.grant(
        buffer.lease(1, samples=8, prompt=7), buffer.lease(2, samples=2, prompt=5, purpose=Purpose.EVAL)
    )
    answers = buffer.expect(SampleDone, count=10)
    tokenizer, task = character_tokenizer(), SortTask(seed=0)
    for answer in answers:
        trajectory = answer.record.trajectory()
        sampled = trajectory.loss_mask == 1
        assert set(trajectory.versions[sampled]) == {0}
        if answer.lease_id == 1:
            assert (
                trajectory.tokens[~sampled].tolist()
                == tokenizer(task.example("train", 7).prompt)["input_ids"]
            )
            np.testing.assert_allclose(
                trajectory.logprobs[sampled], logprobs_under(model, None, trajectory)[sampled], atol=1e-4
            )
    assert len({tuple(a.record.trajectory().tokens) for a in answers if a.lease_id == 1}) > 1
    assert len({tuple(a.record.trajectory().tokens) for a in answers if a.lease_id == 2}) == 1, (
        "evaluation is greedy"
    )


def _push_while_sampling(buffer: PlayedBuffer, model: Path, *, version: int) -> list[Trajectory]:
    new = perturbed(model, version)
    outcome: list[PushOutcome] = []
    buffer.grant(*(buffer.lease(10 + i, samples=8, prompt=i) for i in range(60)))
    trajectories = [answer.record.trajectory() for answer in buffer.expect(SampleDone, count=16)]
    pushing = threading.Thread(target=lambda: outcome.append(push(buffer, new, version=version)))
    pushing.start()
    trajectories += [
        answer.record.trajectory() for answer in buffer.expect(SampleDone, count=60 * 8 - 16, timeout_s=120)
    ]
    pushing.join()
    assert set(outcome[0].activated) == {"rollout-0"} and not outcome[0].failed
    mixed = [t for t in trajectories if t.oldest_version != t.newest_version]
    for trajectory in [*mixed[:4], trajectories[0], trajectories[-1]]:
        for stated, tensors in ((0, None), (version, new)):
            chosen = trajectory.versions == stated
            np.testing.assert_allclose(
                trajectory.logprobs[chosen], logprobs_under(model, tensors, trajectory)[chosen], atol=1e-4
            )
    return mixed


def _check_bad_names_change_nothing(buffer: PlayedBuffer, model: Path, *, version: int) -> None:
    before = buffer.expect_beat(lambda beat: not beat.leases).weights_version
    misnamed = {
        (f"{name}.x" if name.endswith("norm.weight") else name): tensor
        for name, tensor in perturbed(model, version).items()
    }
    assert "unknown" in str(push(buffer, misnamed, version=version).failed)
    buffer.grant(buffer.lease(90, samples=1))
    assert buffer.expect(SampleDone)[0].record.trajectory().newest_version == before
