"""Routes in an engine's responses: both engines' forms, requests to SGLang, and what fails a sample."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from areal_like.config import from_mapping
from areal_like.errors import ConfigError, EngineError, RoutesError
from areal_like.failures import FailureKind
from areal_like.wire.messages.producer import SampleDone, SampleFailed
from areal_like.wire.routes import Routes, RoutesShape
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.leases.held_leases import SampleResult
from rollout_server.policy.engines.process import check_routes_fit
from rollout_server.policy.engines.sglang.process import check_server_info, launch_options, routes_reader
from rollout_server.policy.generation import Generation, Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.policy.routes import RoutesReader
from rollout_server.policy.sglang_client import SglangClient
from tests.rollout_server.test_episodes import CountingEngine
from tests.rollout_server.test_lease_runner import GROUP, Slow, serving
from tests.support import moved_clock
from tests.support.played_sglang import PlayedSglang
from tests.support.waiting import HANG_LIMIT_S

QWEN3_30B = {
    "num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip
"""Of the config.json of Qwen3-30B-A3B."""
READER = RoutesReader(shape=RoutesShape(2, 2, 8), layers=(1, 2), num_reported=3)
"""Of a model of three layers, the first of which has no experts."""


def test_bytes_a_token_of_a_large_model() -> None:
    reader = RoutesReader.of_model(QWEN3_30B)
    assert reader.shape == RoutesShape(48, 8, 128) and reader.layers == tuple(range(48))
    assert reader.shape.bytes_per_token == 384
    routes = Routes(np.zeros((1000, 48, 8), np.uint8), 128)
    assert len(routes.to_bytes()) == 384 * 1000 + 32 == reader.shape.block_bytes(1000)


@pytest.mark.parametrize(
    ("facts", "layers"),
    [
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"mlp_only_layers": [0, 2]}, (1, 3)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 1}, (1, 2, 3)),
        ({"mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}, (2, 3)),
        ({"moe_layer_freq": [0, 1, 1, 1]}, (1, 2, 3)),
        ({"num_experts": None, "num_local_experts": 8}, (0, 1, 2, 3)),
        ({"num_experts": None, "n_routed_experts": 8}, (0, 1, 2, 3)),
    ],
)
def test_layers_with_experts_are_found(facts: dict[str, Any], layers: tuple[int, ...]) -> None:
    model = {"num_hidden_layers": 4, "num_experts": 8, "num_experts_per_tok": 2}
    assert RoutesReader.of_model(model | facts).layers == layers


@pytest.mark.parametrize(
    "facts", [{}, {"num_hidden_layers": 4}, QWEN3_30B | {"num_experts": 0}, QWEN3_30B | {"num_experts": "x"}]
)
def test_a_model_without_experts_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="needs a mixture of experts"):
        RoutesReader.of_model(facts)


def in_text(experts: np.ndarray, dtype: str = "<i4") -> str:
    return base64.b64encode(experts.astype(dtype).tobytes()).decode()


def test_layers_without_experts_are_left_out() -> None:
    experts = np.arange(4 * 3 * 2).reshape(4, 3, 2) % 8
    experts[:, 0] = 99  # SGLang has memory for it, in which anything may be
    routes = READER.read(in_text(experts), num_tokens=4)
    assert np.array_equal(routes.experts_TLK, experts[:, 1:]) and routes.num_experts == 8


RIGHT = np.tile(np.array([3, 5]), (4, 3, 1))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "--enable-return-routed-experts"),
        (in_text(RIGHT[:3]), "for each of 4 tokens"),
        (in_text(np.tile(RIGHT, (2, 1, 1))), "for each of 4 tokens"),
        (in_text(RIGHT[:, :2]), "for each of 4 tokens"),
        (in_text(RIGHT, "<i8"), "for each of 4 tokens"),
        (in_text(RIGHT)[:-3], "unusable"),
        ("no base64!", "unusable"),
        (in_text(RIGHT + 5), "there are 8"),
        (in_text(RIGHT - 4), "there are 8"),
        (in_text(np.zeros_like(RIGHT)), "the same expert twice"),
        (RIGHT.tolist(), "unusable"),
        (7, "unusable"),
        (b"", "for each of 4 tokens"),
        (RIGHT.astype("<u2").tobytes(), "for each of 4 tokens"),
    ],
)
def test_wrong_routes_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(RoutesError, match=message):
        READER.read(raw, num_tokens=4)
    assert READER.read(in_text(RIGHT), num_tokens=4).num_tokens == 4


@pytest.mark.parametrize("raw", [[2, 2], [2, 2, 0], "x", 7, [2, 2, 1 << 20], [2, 2, math.inf]])
def test_a_wrong_shape_is_an_engines_error(raw: Any) -> None:
    with pytest.raises(RoutesError, match="routes_shape"):
        RoutesReader.of_embedded(raw)
    assert RoutesReader.of_embedded(None) is None


def played(body: Callable[[PlayedSglang, SglangClient], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with (
            PlayedSglang(**options).running() as sglang,
            SglangClient(sglang.url, vocab_size=100, routes=READER) as client,
            asyncio.timeout(HANG_LIMIT_S),
        ):
            await body(sglang, client)

    asyncio.run(main())


async def complete(sglang: PlayedSglang, *requests: asyncio.Task[Generation]) -> None:
    """Ends the requests once all have arrived."""
    while len(sglang.requests) < len(requests):
        await asyncio.sleep(0.001)
    for request in sglang.requests:
        request.end.set_result("length")


def generating(client: SglangClient, prompt: Sequence[int], **options: Any) -> asyncio.Task[Generation]:
    sampling = Sampling(max_new_tokens=3, **options)
    return asyncio.create_task(client.generate(prompt, sampling=sampling))


def test_sglang_returns_the_routes_that_were_requested() -> None:
    async def body(sglang: PlayedSglang, client: SglangClient) -> None:
        wanted = generating(client, [1, 2, 3, 4], returns_routes=True)
        other = generating(client, [5, 6])
        await complete(sglang, wanted, other)
        routes = (await wanted).routes
        assert routes is not None and sglang.num_routed == 1
        assert routes.experts_TLK[:, 0].tolist() == [[t, t + 1] for t in range(6)]
        assert np.array_equal(routes.experts_TLK[:, 0], routes.experts_TLK[:, 1])
        assert (await other).routes is None
        alone = generating(client, [5, 6])
        await complete(sglang, alone)
        assert (await alone).routes is None and sglang.num_routed == 1, "not requested"

    played(body, routes_shape=(3, 2, 8))


@pytest.mark.parametrize("forged", ["", in_text(RIGHT), "no base64!"])
def test_wrong_routes_fail_their_request_alone(forged: str) -> None:
    async def body(sglang: PlayedSglang, client: SglangClient) -> None:
        sglang.forged_routes = forged
        routed = generating(client, [1, 2, 3, 4], returns_routes=True)
        plain = generating(client, [5, 6])
        await complete(sglang, routed, plain)
        with pytest.raises(RoutesError, match="routed_experts"):
            await routed
        assert (await plain).output_ids.tolist() == [7, 8, 9]

    played(body, routes_shape=(3, 2, 8) if forged else None)


def test_an_aborted_part_is_joined_with_the_next() -> None:
    """Of each token the routes of its first pass: the second part computes the first one's tokens again."""

    async def body(sglang: PlayedSglang, client: SglangClient) -> None:
        policy = PolicyClient(
            client,
            sampling=Sampling(max_new_tokens=6, returns_routes=True),
            rid="1.0",
            gate=GenerationGate(),
        )
        sampling = asyncio.create_task(policy.sample(np.array([1, 2], np.int32)))
        for kind, forged in (("abort", 1), ("length", 4)):
            while not sglang.requests:
                await asyncio.sleep(0.001)
            (request,) = sglang.requests
            num_tokens = 2 + 3 - 1 if kind == "abort" else 2 + 6 - 1
            sglang.forged_routes = in_text(np.tile([forged, forged + 1], (num_tokens, 3, 1)))
            request.end.set_result(kind)
            while request in sglang.requests:
                await asyncio.sleep(0.001)
        generation = await sampling
        assert len(generation.output_ids) == 6 and generation.routes is not None
        assert generation.routes.experts_TLK[:, 0, 0].tolist() == [1] * 4 + [4] * 3

    played(body, routes_shape=(3, 2, 8))


def test_sglang_is_started_with_its_option(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B))
    for on in (True, False):
        job = from_mapping({
            "model": {"path": str(tmp_path), "router_replay": on, "dtype": "bfloat16"},
            "rollout": {"engine": "sglang", "engine_device": "cuda"},
        })  # fmt: skip
        words = launch_options(job, model="m", port=1, version=0, index=0, context_length=100)
        assert ("--enable-return-routed-experts" in words) is on
        assert (routes_reader(job) is not None) is on


def test_routes_of_a_whole_sequence_must_fit_a_message() -> None:
    job, reader = from_mapping({}), RoutesReader.of_model(QWEN3_30B)
    check_routes_fit(job, None, context_tokens=1 << 30)
    check_routes_fit(job, reader, context_tokens=170_000)
    with pytest.raises(ConfigError, match=r"384 a token.*buffer\.max_message_bytes=67108864"):
        check_routes_fit(job, reader, context_tokens=180_000)


def test_routes_of_all_segments_must_fit_a_message() -> None:
    """Otherwise an agent that branches makes samples that fail, and these count against the server."""
    reader = RoutesReader.of_model(QWEN3_30B)
    check_routes_fit(from_mapping({"episode": {"max_tokens": 170_000}}), reader, context_tokens=1000)
    with pytest.raises(ConfigError, match=r"a sample of 180000 tokens .*episode\.max_tokens"):
        check_routes_fit(from_mapping({"episode": {"max_tokens": 180_000}}), reader, context_tokens=1000)


class RoutedEngine(CountingEngine):
    """Returns routes of `num_layers` layers where they are requested, or raises `error`."""

    def __init__(self, *, num_layers: int = 2, error: EngineError | None = None) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.error = error

    async def generate(self, input_ids: Sequence[int], *, sampling: Sampling, **options: Any) -> Generation:
        generation = await super().generate(input_ids, sampling=sampling, **options)
        if not sampling.returns_routes:
            return generation
        if self.error is not None:
            raise self.error
        num_tokens = len(input_ids) + len(generation.output_ids) - 1
        experts_TLK = np.tile(np.arange(8, dtype=np.uint8), (num_tokens, self.num_layers, 1))
        object.__setattr__(generation, "routes", Routes(experts_TLK, 8))
        return generation


def made_samples(
    engine: RoutedEngine, *, is_on: bool = True
) -> tuple[list[SampleResult], dict[FailureKind, int], tuple[int, int]]:
    """The results of one lease, the failures by kind, and (bytes, tokens) of routes."""

    async def body() -> Any:
        settings = {"model": {"router_replay": is_on}, "buffer": {"max_message_bytes": 1 << 16}}
        async with serving(Slow(), engine=engine, settings=settings) as served:
            served.grant(1)
            await served.until(lambda: len(served.results) == GROUP)
            runner = served.runner
            return served.results, runner.num_failed, (runner.num_routes_bytes, runner.num_routed_tokens)

    return moved_clock.run(body())  # type: ignore[no-any-return]


def test_samples_have_routes_and_their_bytes_are_counted() -> None:
    results, failures, (num_bytes, num_tokens) = made_samples(RoutedEngine())
    assert not failures
    for result in results:
        assert isinstance(result, SampleDone) and result.record.routes is not None
        assert result.record.routes.num_tokens == result.record.num_tokens - 1 == num_tokens / GROUP
    assert num_bytes == GROUP * (32 + 16 * num_tokens // GROUP)


def test_without_the_setting_no_routes_are_requested() -> None:
    engine = RoutedEngine(error=RoutesError("never"))
    results, failures, counts = made_samples(engine, is_on=False)
    assert not failures and counts == (0, 0)
    assert all(isinstance(result, SampleDone) and not result.record.structure.routes for result in results)
    assert not any(sampling.returns_routes for _, sampling, _ in engine.requests)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (RoutedEngine(error=RoutesError("the engine returned no routed_experts")), "no routed_experts"),
        (RoutedEngine(num_layers=2000), "buffer.max_message_bytes=65536"),
    ],
)
def test_missing_and_too_long_routes_are_counted(engine: RoutedEngine, message: str) -> None:
    results, failures, counts = made_samples(engine)
    assert failures == {FailureKind.ROUTES: GROUP} and counts == (0, 0)
    for result in results:
        assert isinstance(result, SampleFailed) and result.kind is FailureKind.ROUTES
        assert message in result.error


def test_an_engine_that_returns_no_routes_is_refused() -> None:
    info = {"enable_return_routed_experts": False}
    with pytest.raises(ConfigError, match="start it with --enable-return-routed-experts"):
        check_server_info(info, name="the engine", context_tokens=10, needs_routes=True)
    for known in ({}, {"enable_return_routed_experts": True}):
        check_server_info(known, name="the engine", context_tokens=10, needs_routes=True)
    check_server_info(info, name="the engine", context_tokens=10)
