"""Pushes from several trainer ranks at once to a real engine, with real processes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from areal_like.config import from_mapping
from areal_like.errors import ConfigError, WeightSyncError
from areal_like.hosts import LOOPBACK
from areal_like.weights.buckets import Bucket, flatten
from areal_like.weights.integrity import BucketSums, sha256
from areal_like.wire.messages.weights import SenderAddress
from areal_like.wire.sockets import bound_socket
from rollout_server.policy.client import EmbeddedClient, EngineClient
from rollout_server.policy.generation import Generation
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.checks import check_form_group
from rollout_server.weights.shadow import ShadowWeightUpdate
from rollout_server.weights.strategy import WeightPush
from tests.rollout_server.test_weight_socket import FORM
from tests.support.adapter_pushes import serving
from tests.support.engine_harness import (
    Engine,
    load_model,
    reference_logprobs,
    running_engine,
    sample,
    save_model,
)
from tests.support.trainer_helpers import run_ranks
from tests.support.waiting import HANG_LIMIT_S
from trainer.weights.broadcaster import interleaved
from trainer.weights.bucket_sender import BucketSender
from trainer.weights.senders import SenderService
from trainer.weights.shares import sender_ranks, share_of_sender

PROMPT = [5, 17, 3]
WORLD_SIZE = 3
TOLERANCE = 1e-4
MOST_CHECKED = 5
"""Generations of each version whose log-probs are recomputed."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path = save_model(tmp_path_factory.mktemp("senders") / "model", "llama")
    with running_engine(path) as running:
        yield running


async def push_from_ranks(check: str, engine: Engine, tmp_path: Path) -> tuple[list[Generation], list[int]]:
    """Runs the ranks of `sender_ranks.py`, which push to a server with this engine.

    Returns what the engine has sampled meanwhile and afterwards, and the versions that it activated.
    """

    def fail(reason: str) -> None:
        raise AssertionError(reason)

    async def generate(client: EngineClient) -> None:
        while True:
            generations.append(await sample(client, PROMPT, 12))

    generations: list[Generation] = []
    strategy = ShadowWeightUpdate(gate=GenerationGate(), on_untrusted=fail)
    async with (
        asyncio.timeout(HANG_LIMIT_S),
        engine.client() as client,
        serving(client, strategy, base="") as server,
    ):
        generating = asyncio.create_task(generate(client))
        address = server.entry.weights_address
        words = (check, str(tmp_path), str(engine.path), address)
        module = "tests.support.sender_ranks"
        await asyncio.to_thread(run_ranks, *words, world_size=WORLD_SIZE, module=module)
        generating.cancel()
        generations.append(await sample(client, PROMPT, 12))
        return generations, server.versions


def check_log_probs(engine: Engine, generations: list[Generation], folder: Path, *, first: int) -> None:
    """Compares log-probs with those under the weights that the ranks have written for each token's version.

    `first`: tokens of earlier versions come from weights of another test.
    """
    for version in {
        version for each in generations for version in each.versions.tolist() if version >= first
    }:
        model = load_model(engine.path)
        model.load_state_dict(load_file(folder / f"{version}.safetensors"), strict=False)
        of_version = [each for each in generations if version in each.versions]
        for each in of_version[:MOST_CHECKED]:
            expected = reference_logprobs(model, PROMPT, each.output_ids.tolist())
            assert abs(expected - each.logprobs)[each.versions == version].max() < TOLERANCE, version


@pytest.mark.long
def test_every_number_of_senders_pushes_the_same_weights(engine: Engine, tmp_path: Path) -> None:
    """Both ways to gather, one, two and three senders, with digests, while the engine generates; all bytes,
    and what differs."""
    generations, versions = asyncio.run(push_from_ranks("pushes", engine, tmp_path))
    assert versions == list(range(1, 19))
    assert set(generations[-1].versions.tolist()) == {18}
    check_log_probs(engine, generations, tmp_path, first=1)


@pytest.mark.parametrize("check", ["death", pytest.param("death_in_delta", marks=pytest.mark.chaos)])
def test_a_sender_that_dies_in_mid_push_costs_that_push(check: str, engine: Engine, tmp_path: Path) -> None:
    """Rank 1 dies after the engine has two of its buckets: no token comes from them, and no server backs
    off."""
    generations, versions = asyncio.run(push_from_ranks(check, engine, tmp_path))
    assert versions == [1], "the second push was not activated"
    assert set(generations[-1].versions.tolist()) == {1}
    check_log_probs(engine, generations[-MOST_CHECKED:], tmp_path, first=1)
    report = json.loads((tmp_path / "report.json").read_text())
    # Rank 0 loses rank 1 twice at the same time: as a sender, and as a rank whose rows it gathers.
    reason = report["failed"]["broadcast"]
    assert "trainer rank 1, a sender" in reason or "lost while weights were gathered" in reason, reason
    assert report["activated"] == [] and report["had_base"] is (check == "death_in_delta")
    assert report["is_eligible"], "the server survived, and gets the next push at once"
    assert report["seconds"] < HANG_LIMIT_S / 4, "noticed at once, not at the time limit"


class Recording(ShadowWeightUpdate):
    """Notes what the engine receives: version -> (buckets, SHA-256 of each, computed in the engine)."""

    received: dict[int, tuple[tuple[Bucket, ...], list[str]]]

    async def push(self, client: EngineClient, push: WeightPush) -> float:
        assert isinstance(client, EmbeddedClient)
        receive, found = client.receive_weights, list[BucketSums]()

        async def noted(*args: Any, **options: Any) -> BucketSums:
            found.append(await receive(*args, **options))
            return found[-1]

        client.receive_weights = noted  # type: ignore[method-assign]
        try:
            stall_s = await super().push(client, push)
        finally:
            client.receive_weights = receive  # type: ignore[method-assign]
        self.received[push.request.version] = push.manifest.buckets, found[0].digests
        return stall_s


@pytest.mark.chaos
@pytest.mark.timeout(2 * HANG_LIMIT_S)
def test_senders_replicas_and_copies_in_every_combination(engine: Engine, tmp_path: Path) -> None:
    """Four ranks. What the engine received has the SHA-256 of the trainer's weights of that step. Chaos,
    because it is sixteen trainers."""

    def fail(reason: str) -> None:
        raise AssertionError(reason)

    async def push() -> None:
        async with engine.client() as client, serving(client, strategy, base="") as server:
            words = ("combinations", str(tmp_path), str(engine.path), server.entry.weights_address)
            module = "tests.support.sender_ranks"
            await asyncio.to_thread(run_ranks, *words, world_size=4, module=module)

    strategy = Recording(gate=GenerationGate(), on_untrusted=fail)
    strategy.received = {}
    asyncio.run(push())
    activated = {
        int(version): step for version, step in json.loads((tmp_path / "activated.json").read_text()).items()
    }
    assert strategy.received.keys() == activated.keys() and len(activated) >= 16 * 3
    for version, (buckets, digests) in strategy.received.items():
        whole = load_file(tmp_path / f"step-{activated[version]}.safetensors")
        assert {spec.name for bucket in buckets for spec in bucket.tensors} == whole.keys()
        assert digests == [sha256(flatten(bucket, whole)) for bucket in buckets], version


def test_a_sender_without_a_route_to_rank_0_says_so() -> None:
    replies: list[dict[str, Any]] = []
    channel: Any = SimpleNamespace(send=replies.append)
    taken: Any = SimpleNamespace(sender_ranks=(0, 1))
    service = SenderService(channel, taken, number=1, device=torch.device("cpu"), ports=(0,))
    service._handle({"id": 3, "do": "open", "session": 1, "toward": ["no such host", 1]})
    (reply,) = replies
    assert reply["id"] == 3 and "open failed: [Errno" in reply["error"]


def test_a_session_that_opens_too_late_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 no longer waits for it: nobody else would close its store."""
    replies: list[dict[str, Any]] = []
    closed: list[tuple[str, int]] = []
    close = BucketSender.forget

    def forget(end: BucketSender) -> None:
        closed.append((end.store.address, end.store.port))
        close(end)

    monkeypatch.setattr(BucketSender, "forget", forget)
    channel: Any = SimpleNamespace(send=replies.append)
    taken: Any = SimpleNamespace(sender_ranks=(0, 1))
    service = SenderService(channel, taken, number=1, device=torch.device("cpu"), ports=(0,))
    with bound_socket(LOOPBACK, 0) as of_rank_0:
        form = {"toward": of_rank_0.getsockname(), "world_size": 2, "group_name": "1", "backend": "gloo"}
        form |= {"group_timeout_s": HANG_LIMIT_S, "secret": ""}
        service._start({"do": "forget", "session": 1})
        service._handle({"id": 3, "do": "open", "session": 1, **form})
        service._handle({"id": 4, "do": "open", "session": 2, **form})
        service._start({"do": "forget", "session": 2})
    late, in_time = replies
    assert "took too long" in late["error"] and not service._ends
    assert len(closed) == 2 and closed[1][1] == in_time["port"]
    for address in closed:
        with pytest.raises(ConnectionRefusedError), socket.create_connection(address, timeout=HANG_LIMIT_S):
            pass


def test_shares_cover_all_buckets_once() -> None:
    for num_senders in range(1, 6):
        shares = [
            share_of_sender(each, num_senders=num_senders, num_buckets=7) for each in range(num_senders)
        ]
        assert sorted(index for share in shares for index in share) == list(range(7))
        sums = [
            BucketSums(checksums=list(share), digests=[f"d{index}" for index in share]) for share in shares
        ]
        assert interleaved(sums).checksums == list(range(7))
        assert interleaved(sums).digests == [f"d{index}" for index in range(7)]


def test_senders_are_at_equal_distances() -> None:
    assert sender_ranks(2, num_ranks=16, num_buckets=99) == (0, 8), "one on each of two machines"
    assert sender_ranks(3, num_ranks=4, num_buckets=99) == (0, 1, 2)
    assert sender_ranks(4, num_ranks=4, num_buckets=2) == (0, 2), "two buckets need no more senders"
    with pytest.raises(
        ConfigError, match=r"weights\.senders=3 is above the number of trainer ranks \(of a replica\), 2"
    ):
        sender_ranks(3, num_ranks=2, num_buckets=99)


@pytest.mark.parametrize(("ranks", "replicas", "num", "ok"), [(1, 1, 2, 1), (8, 2, 5, 4), (8, 8, 2, 1)])
def test_more_senders_than_ranks_are_refused(ranks: int, replicas: int, num: int, ok: int) -> None:
    trainer = {"world_size": ranks, "replicas": replicas, "groups_per_step": 8}
    from_mapping({"trainer": trainer, "weights": {"senders": ok}})
    with pytest.raises(
        ConfigError,
        match=rf"weights\.senders={num} is above the number of ranks of a replica, {ok} "
        rf"\(trainer\.world_size={ranks}, trainer\.replicas={replicas}\)",
    ):
        from_mapping({"trainer": trainer, "weights": {"senders": num}})


@pytest.mark.parametrize(
    ("senders", "problem"),
    [
        ([SenderAddress(address="127.0.0.1", port=0)], "master_port 0"),
        ([SenderAddress(address="10.0.0.1", port=9)], "on another machine"),
        ([SenderAddress(address="a b", port=9)], "want a host name or address"),
        ([SenderAddress(address="127.0.0.1", port=9)] * 256, "257 senders"),
    ],
)
def test_a_forged_sender_is_refused(senders: list[SenderAddress], problem: str) -> None:
    """The same bounds as for the first sender's store."""
    form = dataclasses.replace(FORM, more_senders=senders)
    with pytest.raises(WeightSyncError, match=problem):
        check_form_group(form, host="127.0.0.1", num_ranks=1)
