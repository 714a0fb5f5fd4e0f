"""An engine that reports a pushed version but has kept its old weights is found, and is pushed to again."""

import asyncio
from typing import Any

import torch

from areal_like.config import WeightsConfig
from areal_like.errors import ArealError
from areal_like.wire.channel import tcp_address
from areal_like.wire.messages.consumer import ServerEntry, VersionGranted
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.receiver import WeightReceiver
from rollout_server.weights.shadow import ShadowWeightUpdate
from rollout_server.weights.strategy import WeightPush
from tests.support.engine_harness import Engine, Models, load_model, reference_logprobs, weights_of
from tests.support.snapshots import Held
from tests.support.waiting import HANG_LIMIT_S
from trainer.weights.broadcaster import Broadcaster
from trainer.weights.checks import CheckReport, CheckTokens
from trainer.weights.publisher import Publisher

TOKENS, FIRST = [5, 17, 33, 8, 9, 41, 3, 22], 4


class Forgetful(ShadowWeightUpdate):
    """Activates a push and then, if `forgets_next`, loads the first weights under the new version, once."""

    def __init__(self, engine: Engine, **options: Any) -> None:
        super().__init__(**options)
        self.path, self.forgets_next = engine.path, False

    async def push(self, client: EngineClient, push: WeightPush) -> float:
        stall_s = await super().push(client, push)
        if self.forgets_next:
            self.forgets_next, version = False, push.request.version
            await client.update_weights_from_disk(
                str(self.path), weight_version=version, timeout_s=HANG_LIMIT_S
            )
        return stall_s


def test_an_engine_that_keeps_old_weights_is_found(engine: Engine, models: Models) -> None:
    def reference(step: int) -> CheckTokens:
        logprobs = reference_logprobs(load_model(models[step % 2]), TOKENS[:FIRST], TOKENS[FIRST:])
        return CheckTokens(step=step, tokens=TOKENS, first=FIRST, logprobs=list(map(float, logprobs)))

    async def main() -> None:
        reports: list[CheckReport] = []
        failures: list[ArealError] = []
        strategy = Forgetful(engine, gate=GenerationGate(), on_untrusted=lambda _: None)
        async with engine.client() as client, asyncio.timeout(HANG_LIMIT_S):
            version = await client.weight_version()
            await client.fetch_info()
            receiver = WeightReceiver(
                host="127.0.0.1", max_message_bytes=1 << 20, strategy=strategy,
                on_version=lambda _: None, on_untrusted=lambda _: None,
            )  # fmt: skip
            receiver.set_engine(client, version=version)

            async def granted(_: Any, *, timeout_s: float) -> VersionGranted:
                nonlocal version
                version += 1
                return VersionGranted(version=version)

            def entry() -> ServerEntry:
                return ServerEntry(
                    name="rollout-0", incarnation=1, device="cpu", state="serving",
                    weights_address=tcp_address("127.0.0.1", receiver.port), weights_version=receiver.version,
                )  # fmt: skip

            publisher = Publisher(
                Broadcaster(WeightsConfig(), device="cpu"),
                call=granted, servers=lambda: [entry()], on_push=lambda _: None, on_failure=failures.append,
                on_check=reports.append, check_interval_s=0.0,
            )  # fmt: skip
            assert publisher.checks is not None
            for step in range(1, 6):
                strategy.forgets_next = step == 5
                publisher.offer(step, Held(weights_of(models[step % 2]), bucket_bytes=8192))
                publisher.checks.scored_by_trainer(reference(step))
                while len(reports) < step:
                    await asyncio.sleep(0.01)
            while len(reports) < 6:  # the weights of step 5 are pushed and checked once more
                await asyncio.sleep(0.01)
            assert [report.is_jump for report in reports] == [False] * 4 + [True, False]
            assert reports[4].difference > reports[4].limit > reports[5].difference
            logprobs, _ = await client.score(TOKENS, first=FIRST)
            assert torch.allclose(torch.tensor(logprobs), torch.tensor(reference(5).logprobs), atol=1e-4)
            assert not failures
            await publisher.close()
            await receiver.close()

    asyncio.run(main())
