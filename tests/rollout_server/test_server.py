"""A whole rollout server: real process, engine, reward workers and pushes; the test acts as the buffer."""

import asyncio
import itertools
import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from areal_like.config import WeightsConfig
from areal_like.failures import FailureKind
from areal_like.trajectory import FinishReason, Trajectory
from areal_like.weights.adapters import AdapterHeader
from areal_like.wire.messages.consumer import ServerEntry
from areal_like.wire.messages.hello import Goodbye, Hello, JobFailed, Refused
from areal_like.wire.messages.producer import (
    AbortLeases,
    Purpose,
    ReturnLeases,
    SampleDone,
    SampleFailed,
    ServerState,
)
from rollout_server.tasks.sort import SortTask
from tests.support.adapters import make_adapter
from tests.support.quick import only_in_chaos
from tests.support.rollout_harness import (
    PlayedBuffer,
    ServerProcess,
    job,
    serving,
    wait_until,
)
from tests.support.snapshots import Held
from tests.support.waiting import HANG_LIMIT_S, descendants, is_alive
from trainer.models.tiny import build_tiny_model, character_tokenizer
from trainer.weights.broadcaster import Broadcaster, PushOutcome

CAPACITY = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_tiny_model(path, seed=0, warm_start_steps=20, swap_prob=0.5)
    return path


@pytest.fixture(scope="module")
def shared(
    model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[PlayedBuffer, ServerProcess]]:
    """One server, shared by all tests that do not change its state."""
    with PlayedBuffer() as buffer:
        config = job(
            tmp_path_factory.mktemp("run"), port=buffer.port, model_dir=model, sampling={"max_new_tokens": 40}
        )
        with serving(config) as server:
            server.wait_serving(buffer)
            yield buffer, server


@pytest.fixture
def buffer(shared: tuple[PlayedBuffer, ServerProcess]) -> Iterator[PlayedBuffer]:
    buffer, server = shared
    yield buffer
    buffer.acknowledging = True
    assert server.process.poll() is None
    buffer.expect_beat(
        lambda beat: beat.state is ServerState.SERVING and not beat.leases and beat.free_samples == CAPACITY
    )


def push(
    buffer: PlayedBuffer,
    tensors: dict[str, torch.Tensor],
    *,
    version: int,
    adapter: AdapterHeader | None = None,
    **settings: Any,
) -> PushOutcome:
    """Pushes with the code of trainer rank 0, in a new weight group each time."""

    async def body() -> PushOutcome:
        hello = buffer.hellos[-1]
        entry = ServerEntry(
            name=hello.name,
            incarnation=hello.incarnation,
            weights_address=hello.weights_address,
            device=hello.device,
            state="serving",
            weights_version=0,
        )
        config = WeightsConfig(bucket_bytes=1 << 16, push_deadline_s=60, **settings)
        broadcaster = Broadcaster(config, device="cpu")
        try:
            return await broadcaster.push(
                Held(tensors, bucket_bytes=1 << 16, adapter=adapter),
                version=version,
                step=version,
                servers=[entry],
            )
        finally:
            await broadcaster.close()

    return asyncio.run(body())


def perturbed(model: Path, seed: int) -> dict[str, torch.Tensor]:
    policy = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (parameter + 0.03 * torch.randn(parameter.shape, generator=generator)).detach()
        for name, parameter in policy.named_parameters()
    }


@torch.no_grad()
def logprobs_under(
    model: Path, tensors: dict[str, torch.Tensor] | None, trajectory: Trajectory
) -> np.ndarray:
    """[T] log-prob of every token given its prefix; 0 for the first."""
    policy = AutoModelForCausalLM.from_pretrained(model)
    policy.load_state_dict(tensors or {}, strict=False)
    tokens_T = torch.from_numpy(trajectory.tokens.astype(np.int64))
    logits_TV = policy(tokens_T[None]).logits[0].float()
    scores_T = torch.log_softmax(logits_TV[:-1], dim=-1).gather(1, tokens_T[1:, None])[:, 0]
    return np.concatenate([[0.0], scores_T.numpy()])


def test_hello_describes_server_and_task(buffer: PlayedBuffer) -> None:
    hello = buffer.hellos[0]
    assert hello.name == "rollout-0" and hello.weights_address.startswith("tcp://127.0.0.1:")
    assert (
        hello.model and hello.tokenizer and hello.dataset and hello.num_train_prompts == SortTask().num_train
    )
    assert hello.eval_sets == {"eval": SortTask().num_eval}


def test_status_readiness_and_metrics_pages(shared: tuple[PlayedBuffer, ServerProcess]) -> None:
    _, server = shared
    address = json.loads((server.paths.endpoints / "rollout-0.json").read_text())["http"]

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://{address}{path}") as response:
            return str(response.read().decode())

    wait_until(lambda: json.loads(get("/status"))["not_ready"] == "")
    assert get("/readyz") == "ok"
    status = json.loads(get("/status"))
    assert status["state"] == "serving" and status["engine_pid"] in descendants(server.process.pid)
    metrics = get("/metrics")
    for line in (
        'areal_rollout_samples_failed_total{kind="reward"} 0.0',
        "areal_engine_starts 1.0",
        "areal_weight_pushes_total",
    ):
        assert line in metrics
    assert "areal_engine_steps_total" in get("/metrics/engine")
    with pytest.raises(HTTPError, match="401"):
        urllib.request.urlopen(f"{status['engine_url']}/server_info")
    command = Path(f"/proc/{status['engine_pid']}/cmdline").read_bytes()
    assert b"--options\0/dev/fd/" in command and status["engine_url"].startswith("http://127.0.0.1:")


def test_engine_that_cannot_start_is_reported_with_its_log(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    with PlayedBuffer() as buffer, serving(job(tmp_path, port=buffer.port, model_dir=broken)) as server:
        code, _, errors = server.wait()
        assert code == 1 and "engine" in errors and "Traceback (most" not in errors.splitlines()[0]
        assert "rollout-0-engine.log" in errors


def test_leases_become_samples_with_reward_and_logprobs(buffer: PlayedBuffer, model: Path) -> None:
    version = buffer.expect_beat(lambda _: True).weights_version
    assert version == 0
    buffer.grant(buffer.lease(1, samples=8, prompt=7), buffer.lease(2, samples=[1, 3], prompt=8))
    answers = buffer.expect(SampleDone, count=10)
    assert {(a.lease_id, a.ticket_id, a.sample_index) for a in answers} == {(1, 101, i) for i in range(8)} | {
        (2, 102, 1),
        (2, 102, 3),
    }
    tokenizer, task = character_tokenizer(), SortTask(seed=0)
    for answer in answers:
        trajectory = answer.record.trajectory()
        example = task.example("train", 7 if answer.lease_id == 1 else 8)
        prompt = tokenizer(example.prompt)["input_ids"]
        sampled = trajectory.loss_mask == 1
        assert trajectory.tokens[~sampled].tolist() == prompt
        assert (trajectory.tokens[-1] == tokenizer.eos_token_id) == (
            trajectory.finish_reason is FinishReason.STOP
        )
        assert trajectory.reward == task.reward(
            example, tokenizer.decode(trajectory.tokens[sampled], skip_special_tokens=True)
        )
        assert set(trajectory.versions[sampled]) == {0}
        expected = logprobs_under(model, None, trajectory)
        np.testing.assert_allclose(trajectory.logprobs[sampled], expected[sampled], atol=1e-4)
    assert len({tuple(a.record.trajectory().tokens) for a in answers if a.lease_id == 1}) > 1


def test_evaluation_is_greedy(buffer: PlayedBuffer) -> None:
    for lease_id in (3, 4):
        buffer.grant(buffer.lease(lease_id, samples=2, prompt=5, purpose=Purpose.EVAL))
    answers = buffer.expect(SampleDone, count=4)
    assert len({tuple(a.record.trajectory().tokens) for a in answers}) == 1
    prompt = character_tokenizer()(SortTask(seed=0).example("eval", 5).prompt)["input_ids"]
    assert answers[0].record.trajectory().tokens[: len(prompt)].tolist() == prompt


def test_unacknowledged_samples_are_sent_again_on_reconnect(buffer: PlayedBuffer) -> None:
    buffer.acknowledging = False
    buffer.grant(buffer.lease(5, samples=2))
    first = buffer.expect(SampleDone, count=2)
    beat = buffer.expect_beat(lambda beat: beat.holding_samples == 0 and beat.leases == [5])
    assert beat.free_samples == CAPACITY
    buffer.restart()
    buffer.expect(Hello)
    again = buffer.expect(SampleDone, count=2)
    assert {a.sample_index for a in again} == {0, 1}
    for answer in first:
        same = next(a for a in again if a.sample_index == answer.sample_index)
        assert same.record.trajectory().tokens.tolist() == answer.record.trajectory().tokens.tolist()
        buffer.acknowledge(answer)


def test_aborted_leases_are_stopped_without_results(buffer: PlayedBuffer) -> None:
    buffer.acknowledging = False
    buffer.grant(*(buffer.lease(10 + i, samples=8, prompt=i) for i in range(3)))
    buffer.send(AbortLeases(leases=[10, 11, 12, 99], reason="test"))
    buffer.expect_beat(lambda beat: not beat.leases and beat.free_samples == CAPACITY)
    while not buffer.received.empty():
        buffer.received.get_nowait()
    time.sleep(0.5)
    assert not [m for m in list(buffer.received.queue) if isinstance(m, SampleDone)]


def test_bad_frames_on_the_control_socket_are_counted(buffer: PlayedBuffer) -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 500)
        socket.connect(buffer.hellos[-1].weights_address)
        for frames in ([b"garbage"], [b""], [b"\x94\x01", b"x" * 100, b"y"]):
            socket.send_multipart(frames)
        buffer.expect_beat(lambda beat: beat.stats.get("bad_frames", 0) >= 3)


def test_failed_push_leaves_the_old_weights(buffer: PlayedBuffer, model: Path) -> None:
    before = buffer.expect_beat(lambda _: True).weights_version
    tensors = perturbed(model, 1)
    incomplete = dict(list(tensors.items())[:-1])
    outcome = push(buffer, incomplete, version=1)
    assert not outcome.activated and "missing" in str(outcome.failed)
    misnamed = {
        (f"{name}.x" if name.endswith("norm.weight") else name): tensor for name, tensor in tensors.items()
    }
    assert "unknown" in str(push(buffer, misnamed, version=2).failed)
    buffer.grant(buffer.lease(20, samples=1))
    (answer,) = buffer.expect(SampleDone)
    assert answer.record.trajectory().newest_version == before
    assert buffer.expect_beat(lambda _: True).weights_version == before


@pytest.mark.parametrize(
    ("mode", "version"),
    [("recompute", 10), *only_in_chaos(("abort_resume", 11), ("drain", 12)), ("keep", 13)],
)
def test_push_while_samples_are_in_flight(buffer: PlayedBuffer, model: Path, mode: str, version: int) -> None:
    old_version = buffer.expect_beat(lambda _: True).weights_version
    old = perturbed(model, old_version) if old_version else None
    new = perturbed(model, version)
    trajectories: list[Trajectory] = []
    outcome: list[PushOutcome] = []
    pushing = threading.Thread(
        target=lambda: outcome.append(push(buffer, new, version=version, update_mode=mode))
    )
    leases = [buffer.lease(version * 10_000 + i, samples=8, prompt=i) for i in range(2000)]
    waiting = iter(leases)
    # Far more samples than the engine runs at a time, and eight new ones for every eight that are done, so
    # that sequences are running at the time of the swap.
    buffer.grant(*itertools.islice(waiting, 40))
    pushing.start()
    while pushing.is_alive():
        trajectories += [answer.record.trajectory() for answer in buffer.expect(SampleDone, count=8)]
        buffer.grant(*itertools.islice(waiting, 1))
    trajectories += [answer.record.trajectory() for answer in buffer.expect(SampleDone, count=32)]
    assert set(outcome[0].activated) == {"rollout-0"} and not outcome[0].failed
    buffer.expect_beat(lambda beat: beat.weights_version == version)
    buffer.send(AbortLeases(leases=[lease.lease_id for lease in leases], reason="test"))
    buffer.expect_beat(lambda beat: not beat.leases)
    buffer.received.queue.clear()
    buffer.grant(buffer.lease(version, samples=4))
    after = [answer.record.trajectory() for answer in buffer.expect(SampleDone, count=4)]
    assert all(t.oldest_version == version for t in after)
    mixed = [t for t in trajectories if t.oldest_version != t.newest_version]
    assert bool(mixed) == (mode != "drain")
    for trajectory in [*mixed[:3], *trajectories[:1], *trajectories[-1:], *after[:1]]:
        assert set(trajectory.versions[trajectory.loss_mask == 1]) <= {old_version, version}
        for stated, tensors in ((old_version, old), (version, new)):
            if mode == "keep" and stated == version and trajectory in mixed:
                continue  # new weights over an old KV cache: `keep` accepts these errors
            chosen = trajectory.versions == stated
            expected = logprobs_under(model, tensors, trajectory)[chosen]
            np.testing.assert_allclose(trajectory.logprobs[chosen], expected, atol=1e-4)


def test_lost_engine_is_replaced_and_drain_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with PlayedBuffer() as buffer:
        sampling = {"max_new_tokens": 200}
        config = job(
            tmp_path,
            port=buffer.port,
            model_dir=model,
            sampling=sampling,
            rollout={"max_running": 4, "queue_samples": 96},
            daemon={"heartbeat_s": 0.1, "drain_timeout_s": HANG_LIMIT_S},
        )
        with serving(config) as server:
            buffer.newest_version = 6
            server.wait_serving(buffer)
            # A server whose engine dies gives its leases back and waits for the newest weights.
            buffer.grant(*(buffer.lease(i, samples=8, prompt=i) for i in range(1, 11)))
            buffer.expect_beat(lambda beat: len(beat.leases) > 5)
            (engine,) = (
                pid for pid in descendants(server.process.pid) if b"rollout_server.engine" in cmdline(pid)
            )
            os.kill(engine, signal.SIGKILL)
            assert buffer.expect(ReturnLeases)[0].reason == "engine lost"
            beat = server.wait_for_beat(buffer, lambda beat: beat.state is ServerState.QUARANTINED)
            assert beat.free_samples == 0 and not beat.leases and beat.stats["engine_starts"] == 2
            assert push(buffer, perturbed(model, 6), version=6).activated
            buffer.expect_beat(
                lambda beat: (
                    beat.state is ServerState.SERVING and beat.weights_version == 6 and beat.free_samples > 0
                )
            )
            buffer.grant(buffer.lease(50, samples=1))
            assert buffer.expect(SampleDone)[0].record.trajectory().oldest_version == 6
            # SIGTERM while samples are being made.
            children = descendants(server.process.pid)
            assert len(children) >= 2
            buffer.grant(*(buffer.lease(i, samples=8, prompt=i) for i in range(101, 111)))
            buffer.expect_beat(lambda beat: len(beat.leases) > 5)
            code, seconds, errors = server.terminate()
            assert code == 0 and seconds < HANG_LIMIT_S / 4, errors
            returned = buffer.expect(ReturnLeases)[0].leases
            assert returned and set(returned) <= set(range(101, 111))
            buffer.expect(Goodbye)
            assert (
                buffer.beat is not None
                and buffer.beat.state is ServerState.DRAINING
                and not buffer.beat.leases
            )
            wait_until(lambda: not any(map(is_alive, children)))
            assert not list(server.paths.endpoints.glob("*.json"))


def test_a_run_from_an_adapter_never_samples_its_base(model: Path, tmp_path: Path) -> None:
    """The engine starts with the base alone. The first sample's log-probs are those of base and adapter."""
    adapter = make_adapter(model, seed=1)
    lora = {"rank": adapter.header.rank, "alpha": adapter.header.alpha, "path": "adapter"}
    sections = {"model": {"path": str(model), "lora": lora}, "weights": {"lora": "adapter"}}
    with PlayedBuffer() as buffer:
        config = job(tmp_path, port=buffer.port, model_dir=model, **sections)
        with serving(config) as server:
            beat = server.wait_for_beat(buffer, lambda beat: beat.state is not ServerState.STARTING)
            assert (beat.state, beat.free_samples) == (ServerState.QUARANTINED, 0)
            pushed = push(buffer, adapter.tensors, version=1, adapter=adapter.header)
            assert pushed.activated, pushed.failed
            buffer.expect_beat(lambda beat: beat.state is ServerState.SERVING and beat.weights_version == 1)
            buffer.grant(buffer.lease(1, samples=2))
            merged = dict(adapter.model.merge_and_unload().named_parameters())
            for answer in buffer.expect(SampleDone, count=2):
                trajectory = answer.record.trajectory()
                sampled = trajectory.loss_mask == 1
                assert set(trajectory.versions[sampled]) == {1}
                found, base = trajectory.logprobs[sampled], logprobs_under(model, None, trajectory)[sampled]
                expected = logprobs_under(model, merged, trajectory)[sampled]
                np.testing.assert_allclose(found, expected, atol=1e-4)
                assert np.abs(found - base).max() > 0.01


def test_a_late_joiner_starts_with_the_newest_checkpoint(model: Path, tmp_path: Path) -> None:
    tensors = perturbed(model, 7)
    for step, version in ((100, 3), (200, 7)):
        checkpoint = tmp_path / "runs" / "job" / "checkpoints" / f"step_{step:06d}"
        shutil.copytree(model, checkpoint)
        save_file(
            tensors if version == 7 else perturbed(model, 3),
            checkpoint / "model.safetensors",
            {"format": "pt"},
        )
        (checkpoint / "trainer_state.json").write_text(json.dumps({"extra": {"weights_version": version}}))
    with PlayedBuffer() as buffer:
        buffer.newest_version = 9
        with serving(job(tmp_path, port=buffer.port, model_dir=model)) as server:
            server.wait_for_beat(
                buffer, lambda beat: beat.state is ServerState.SERVING and beat.weights_version == 7
            )
            buffer.grant(buffer.lease(1, samples=1))
            trajectory = buffer.expect(SampleDone)[0].record.trajectory()
            sampled = trajectory.loss_mask == 1
            assert set(trajectory.versions[sampled]) == {7}
            np.testing.assert_allclose(
                trajectory.logprobs[sampled], logprobs_under(model, tensors, trajectory)[sampled], atol=1e-4
            )
            assert push(buffer, perturbed(model, 9), version=9).activated
            buffer.expect_beat(lambda beat: beat.weights_version == 9)


def test_bad_rewards_are_reported_and_children_die_with_server(model: Path, tmp_path: Path) -> None:
    with PlayedBuffer() as buffer:
        config = job(
            tmp_path,
            port=buffer.port,
            model_dir=model,
            task={"_target_": "tests.support.rollout_tasks.FailingTask"},
            rollout={"max_running": 16, "queue_samples": 8, "reward_timeout_s": 2.0},
        )
        with serving(config) as server:
            server.wait_serving(buffer)
            buffer.grant(*(buffer.lease(1 + prompt, samples=1, prompt=prompt) for prompt in (0, 1, 2, 7)))
            answers = {a.lease_id: a for a in buffer.expect((SampleDone, SampleFailed), count=4)}
            assert answers[1].record.trajectory().reward == 0.5
            assert "cannot judge this" in answers[2].error and answers[2].kind is FailureKind.REWARD
            assert answers[2].num_tokens > 0
            zero = answers[3].record.trajectory()
            assert (answers[3].failure, zero.reward) == ("reward_timeout", 0.0) and zero.num_sampled > 0
            assert "no such example" in answers[8].error and answers[8].kind is FailureKind.ENVIRONMENT
            buffer.expect_beat(lambda beat: beat.stats["samples_failed"] == 3 and not beat.leases)
            assert buffer.beat is not None and buffer.beat.stats["samples_failed_reward_timeout"] == 1
            children = descendants(server.process.pid)
            server.process.kill()
            wait_until(lambda: not any(map(is_alive, children)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"task": {"name": "sortt"}},
            "choose one of adding, adding_agent, coding, data, external, gymnasium, mixture, ",
        ),
        ({"model": {"path": "/no/such/model"}}, "/no/such/model"),
        ({"eval": {"num_prompts": 5000}}, "task.num_eval"),
        ({"buffer": {"port": 0}}, "buffer.port"),
        # No machine has this device, with CUDA or without.
        ({"rollout": {"engine_device": "cuda:99"}}, "the engine refuses its settings"),
    ],
)
def test_bad_settings_end_with_one_message(
    model: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    config = job(tmp_path, port=1, model_dir=model, **overrides)
    with serving(config) as server:
        code, _, errors = server.wait()
        assert code == 2 and message in errors
        # The start may take long enough for this warning.
        lines = [line for line in errors.strip().splitlines() if "no welcome from the buffer" not in line]
        assert "Traceback" not in errors and len(lines) <= 2


def test_a_refusal_ends_the_server(model: Path, tmp_path: Path) -> None:
    with PlayedBuffer() as buffer, serving(job(tmp_path, port=buffer.port, model_dir=model)) as server:
        server.wait_until(lambda: bool(buffer.hellos), what="hello")
        buffer.send(Refused(field="model", reason="another model"))
        code, _, errors = server.wait()
        assert code == 1 and "another model" in errors and "Traceback" not in errors


def test_hanging_example_blocks_neither_others_nor_the_end(model: Path, tmp_path: Path) -> None:
    rollout = {"max_running": 4, "queue_samples": 0, "reward_timeout_s": 2.0}
    with PlayedBuffer() as buffer:
        config = job(
            tmp_path,
            port=buffer.port,
            model_dir=model,
            task={"_target_": "tests.support.rollout_tasks.FailingTask"},
            rollout=rollout,
        )
        with serving(config) as server:
            server.wait_serving(buffer)
            buffer.grant(buffer.lease(1, samples=1, prompt=9))
            assert "task.example() took longer" in buffer.expect(SampleFailed)[0].error
            buffer.grant(buffer.lease(2, samples=1, prompt=4))
            assert buffer.expect(SampleDone)[0].lease_id == 2, (
                "the next example must not wait for the hanging one"
            )
            buffer.send(JobFailed(reason="20 failures in a row"))
            code, _, errors = server.wait()
            assert code == 1 and "20 failures in a row" in errors and "Traceback" not in errors


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
