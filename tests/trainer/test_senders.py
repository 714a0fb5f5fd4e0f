"""Pushes from several trainer ranks at once to a real engine, with real processes."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from areal_like.config import from_mapping
from areal_like.errors import ConfigError, WeightSyncError
from areal_like.weights.integrity import BucketSums
from areal_like.wire.messages.weights import SenderAddress
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Generation
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.checks import check_form_group
from rollout_server.weights.shadow import ShadowWeightUpdate
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
    assert report["activated"] == [] and "trainer rank 1" in report["failed"]["broadcast"]
    assert report["had_base"] is (check == "death_in_delta")
    assert report["is_eligible"], "the server survived, and gets the next push at once"
    assert report["seconds"] < HANG_LIMIT_S / 4, "noticed at once, not at the time limit"


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
    with pytest.raises(ConfigError, match=r"weights\.senders=2 is above trainer\.world_size=1"):
        from_mapping({"weights": {"senders": 2}})


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
