"""Curricula: choices, coverage of an epoch, and the same choices in a resumed and an uninterrupted run."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import BufferConfig, from_mapping
from areal_like.data.permutation import permuted
from areal_like.errors import ConfigError, RefusedError
from areal_like.runtime.metrics import Metrics
from areal_like.wire.codec import decode, encode
from areal_like.wire.messages.consumer import StreamState
from buffer.ledger.recovery import recover
from buffer.prompts.curriculum import Curriculum, state_from_scalars
from buffer.prompts.order import PromptOrder
from buffer.service.peers import ConnectedPeers
from buffer.service.prometheus import BufferSeries
from buffer.settings import LedgerSettings
from buffer.storage.durable import DurableStore
from tests.support.ledger_simulation import (
    add_server,
    deliver,
    done,
    empty_ledger,
    ledger_settings,
    new_ledger,
)
from tests.support.store_load import raising, store_settings

GROUP_SIZE = 8
SOLVE_RATES = [0.0, 0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0, 1.0, 1.0]
"""Prompt i has entry i mod 12. Most groups have no spread, as in a run that has learned the easy prompts."""


def curriculum(kind: str = "goldilocks", **changes: Any) -> Curriculum:
    """A curriculum with the defaults and these changes."""
    of_curriculum = {f"curriculum_{name}": value for name, value in changes.items()}
    return Curriculum(BufferConfig(curriculum=kind, **of_curriculum))  # type: ignore[arg-type]


def observed(core: Curriculum, solve_rates: Sequence[float], *, num_groups: int = 20) -> Curriculum:
    """Observes groups of ten samples in which prompt i solves its share of `solve_rates`."""
    for index, rate in list(enumerate(solve_rates)) * num_groups:
        core.observe(index, [1.0] * round(10 * rate) + [0.0] * round(10 * (1 - rate)))
    return core


def share_with_spread(order: PromptOrder, *, num_groups: int) -> float:
    """Share of groups with spread, with `SOLVE_RATES` and outcomes that arrive four groups late."""
    rng, pending, num_with_spread = random.Random(1), [], 0
    for _ in range(num_groups):
        index = order.next().index
        rewards = [float(rng.random() < SOLVE_RATES[index % len(SOLVE_RATES)]) for _ in range(GROUP_SIZE)]
        num_with_spread += len(set(rewards)) > 1
        pending.append((index, rewards))
        if order.curriculum is not None and len(pending) > 4:
            order.curriculum.observe(*pending.pop(0))
    return num_with_spread / num_groups


def test_each_kind_chooses_the_candidate_nearest_its_target() -> None:
    rates = [0.0, 0.2, 0.4, 0.8, 1.0]
    core = observed(curriculum(), rates)
    assert core.choose([0, 1, 2, 3, 4], uniform=0.99) == 2
    assert core.choose([4, 3, 0], uniform=0.99) == 3
    assert observed(curriculum("paced", target=0.8), rates).choose([0, 1, 2, 3, 4], uniform=0.99) == 3
    assert observed(curriculum("paced", target=0.2), rates).choose([0, 1, 2, 3, 4], uniform=0.99) == 1
    assert observed(curriculum("paced", target=0.8), rates).choose([0, 1, 2, 3, 4], uniform=0.05) == 0, (
        "explores"
    )


@pytest.mark.parametrize("kind", ["goldilocks", "paced"])
def test_a_curriculum_raises_the_share_of_groups_with_spread(kind: str) -> None:
    num_prompts, num_groups = 480, 1500
    plain = share_with_spread(PromptOrder(seed=3, num_prompts=num_prompts), num_groups=num_groups)
    chosen = share_with_spread(
        PromptOrder(seed=3, num_prompts=num_prompts, curriculum=curriculum(kind)), num_groups=num_groups
    )
    assert 0.3 < plain < 0.42, "expected from SOLVE_RATES: 0.36"
    assert chosen > plain + 0.2


def test_an_epoch_issues_one_prompt_of_each_pool() -> None:
    num_prompts, pool = 48, 4
    core = observed(curriculum(pool=pool), [SOLVE_RATES[i % 12] for i in range(num_prompts)])
    order = PromptOrder(seed=5, num_prompts=num_prompts, curriculum=core)
    for epoch in range(2):
        drawn = [permuted(i, size=num_prompts, seed=5, epoch=epoch) for i in range(num_prompts)]
        assert sorted(drawn) == list(range(num_prompts))
        issued = [order.next().index for _ in range(num_prompts // pool)]
        for pool_index, index in enumerate(issued):
            candidates = drawn[pool_index * pool : (pool_index + 1) * pool]
            best = max(candidates, key=lambda i: -abs(core.solve_rate(i) - 0.5))
            assert index in (candidates[0], best)
    assert order.cursor == 2 * num_prompts
    assert core.num_explored < 10


def test_exploration_issues_prompts_with_the_lowest_score() -> None:
    num_prompts, exploration = 40, 0.2
    core = observed(curriculum(exploration=exploration, half_life=10**9), [0.0] + [0.5] * (num_prompts - 1))
    order = PromptOrder(seed=0, num_prompts=num_prompts, curriculum=core)
    num_epochs = 2000
    issued = Counter(order.next().index for _ in range(num_epochs * num_prompts // 4))
    assert issued[0] == pytest.approx(num_epochs * exploration / 4, rel=0.3), (
        "once in pool / exploration epochs"
    )


def test_a_pool_is_limited_to_the_data_set() -> None:
    order = PromptOrder(seed=0, num_prompts=3, curriculum=curriculum(pool=8))
    assert {order.next().index for _ in range(20)} <= {0, 1, 2}
    assert order.cursor == 60


def test_unseen_prompts_are_average_and_old_outcomes_decay() -> None:
    core = observed(curriculum(half_life=50), [0.0, 0.0, 1.0], num_groups=30)
    assert core.mean_solve_rate == pytest.approx(1 / 3, abs=0.05)
    assert core.solve_rate(99) == core.mean_solve_rate
    before = core.solve_rate(0)
    for _ in range(500):
        core.observe(2, [1.0] * 10)
    assert before < 0.02 and core.solve_rate(0) > 0.3, "its outcomes are ten half-lives old"


def test_memory_evicts_the_prompt_observed_longest_ago() -> None:
    core = curriculum(memory=3)
    for index in (1, 2, 3, 1, 4):
        core.observe(index, [0.0] * 8)
    assert core.status()["prompts_remembered"] == 3
    assert core.solve_rate(2) == core.mean_solve_rate and core.solve_rate(1) < core.mean_solve_rate
    assert len(core.state()) == len(core.scalars()) == 4 + 4 * 3


def test_scalars_of_all_outcomes_restore_the_state() -> None:
    core, scalars, rng = curriculum(memory=10), {}, random.Random(0)
    for _ in range(200):
        scalars |= core.observe(rng.randrange(25), [float(rng.random() < 0.5) for _ in range(3)])
    again = curriculum(memory=10)
    again.restore(state_from_scalars(scalars))
    assert again.state() == core.state()
    smaller = curriculum(memory=4)
    smaller.restore(state_from_scalars(scalars))
    assert smaller.state() == core.state()[:4] + core.state()[-16:], "the prompts observed last"


def test_rewards_map_to_solve_rates_by_the_configured_range() -> None:
    core = curriculum(reward_low=-1.0, reward_high=3.0)
    for _ in range(1000):
        core.observe(0, [-5.0, 1.0, 9.0, 3.0])
    assert core.mean_solve_rate == pytest.approx((0 + 0.5 + 1 + 1) / 4, abs=1e-3)


def test_choices_are_deterministic_and_survive_a_restore() -> None:
    def run(order: PromptOrder, rng: random.Random, count: int) -> list[int]:
        issued = []
        for _ in range(count):
            issued.append(order.next().index)
            assert order.curriculum is not None
            order.curriculum.observe(
                issued[-1], [float(rng.random() < SOLVE_RATES[issued[-1] % 12]) for _ in range(GROUP_SIZE)]
            )
        return issued

    rng, other = random.Random(2), random.Random(2)
    order = PromptOrder(seed=1, num_prompts=200, curriculum=curriculum(memory=40))
    twin = PromptOrder(seed=1, num_prompts=200, curriculum=curriculum(memory=40))
    assert run(order, rng, 300) == run(twin, other, 300)
    resumed = PromptOrder(seed=1, num_prompts=200, curriculum=curriculum(memory=40))
    assert resumed.curriculum is not None and twin.curriculum is not None
    resumed.curriculum.restore(twin.curriculum.state())
    resumed.restore(cursor=twin.cursor, returned=[])
    assert run(order, rng, 300) == run(resumed, other, 300)


def settings(**more: object) -> dict[str, object]:
    return {
        "curriculum": "goldilocks",
        "group_filter": "spread",
        "num_steps": 50,
        **more,
    }


def test_the_ledger_feeds_complete_groups_to_the_curriculum() -> None:
    ledger = new_ledger(**settings())
    add_server(ledger, "a", capacity=100)
    leases = ledger.dispatcher.grant(now_s=0.0)["a"]
    for lease in leases:
        for index in lease.sample_indices:
            deliver(ledger, "a", done(lease, index, [0], reward=0.0))
    core = ledger.state.prompts.curriculum
    assert core is not None and core.status()["prompts_remembered"] == len(leases), (
        "groups that the filter drops have to be observed too"
    )
    assert all(core.solve_rate(lease.prompt_index) < 0.3 for lease in leases)

    answer, _ = decode(encode(StreamState(stream=ledger.trainer.stream_state(step=-1))))
    stream = json.loads(json.dumps(answer.stream))
    resumed = empty_ledger(ledger.settings)
    resumed.state.prompts.set_num_train_prompts(1000)
    resumed.trainer.start_training(incarnation=2, step=0, stream=stream)
    assert (
        resumed.state.prompts.curriculum is not None
        and resumed.state.prompts.curriculum.state() == core.state()
    )
    add_server(resumed, "a", capacity=100)
    issued, issued_by_resumed = (
        [lease.prompt_index for lease in each.dispatcher.grant(now_s=0.0)["a"]] for each in (ledger, resumed)
    )
    assert len(issued) == 4 and issued == issued_by_resumed


def test_solve_rates_are_prometheus_series() -> None:
    ledger, metrics = new_ledger(**settings()), Metrics()
    assert ledger.state.prompts.curriculum is not None
    ledger.state.prompts.curriculum.observe(0, [0.0] * 63)
    for _ in range(200):
        ledger.state.prompts.order.next()
    peers = ConnectedPeers(job="job", dataset="")
    BufferSeries(metrics, max_staleness=1).update(
        ledger.state, peers, Counter(ledger.state.counters.summary())
    )
    for of in ("issued", "all"):
        assert metrics.registry.get_sample_value("areal_curriculum_solve_rate", {"of": of}) == pytest.approx(
            1 / 128, rel=0.2
        )


def test_a_large_bound_has_few_series() -> None:
    metrics = Metrics()
    BufferSeries(metrics, max_staleness=5_000)
    assert metrics.registry.get_sample_value("areal_samples_trained_total", {"lag": "255"}) == 0.0
    assert metrics.registry.get_sample_value("areal_samples_trained_total", {"lag": "256"}) is None


def test_a_ledger_restores_the_curriculum_of_its_data_set(tmp_path: Path) -> None:
    async def run_once(dataset: int) -> tuple[list[int], list[int]]:
        """Curriculum states at the start and the end of a process that generates a few groups."""
        store = DurableStore(tmp_path, store_settings(), on_error=raising)
        ledger = recover(
            ledger_settings(**settings()),
            store,
            now_s=0.0,
            dataset=dataset,
        )
        assert ledger.state.prompts.curriculum is not None
        before = ledger.state.prompts.curriculum.state()
        ledger.state.prompts.set_num_train_prompts(1000)
        ledger.trainer.start_training(incarnation=ledger.state.trainer_incarnation + 1, step=0, stream={})
        add_server(ledger, "a", capacity=100)
        for lease in ledger.dispatcher.grant(now_s=0.0)["a"]:
            for index in lease.sample_indices:
                deliver(ledger, "a", done(lease, index, [0], reward=0.0))
        store.close()
        return before, ledger.state.prompts.curriculum.state()

    states = [asyncio.run(run_once(dataset)) for dataset in (7, 7, 8, 8)]
    nothing = curriculum().state()
    assert [before for before, _ in states] == [nothing, states[0][1], nothing, states[2][1]]
    assert len(states[1][1]) > len(states[0][1]) > len(nothing)


@pytest.mark.parametrize(
    "state", [[1], [-1, 2, 1, 5], [-1, 0, 0, 0], [-1, 0, 1, 3, 7, -1, 2, 0], [-1, 0, 1, 3, 7, 1, 2, 9]]
)
def test_a_malformed_curriculum_state_is_refused(state: list[int]) -> None:
    ledger = empty_ledger(ledger_settings(**settings()))
    with pytest.raises(RefusedError, match="not the state of a curriculum"):
        ledger.trainer.start_training(incarnation=1, step=0, stream={"curriculum": state})


def test_curriculum_settings_are_read_and_validated() -> None:
    assert new_ledger().state.prompts.curriculum is None
    job = {"buffer": {"curriculum": "paced", "curriculum_target": 0.3, "curriculum_pool": 8}}
    chosen = empty_ledger(LedgerSettings.from_config(from_mapping(job))).state.prompts.curriculum
    assert chosen is not None and chosen.settings == curriculum("paced", target=0.3, pool=8).settings
    for wrong, message in (
        ({"curriculum": "silver"}, "none, goldilocks, paced"),
        ({"curriculum_pool": 1}, "at least 2"),
        ({"curriculum_target": 1.0}, "between 0 and 1"),
        ({"curriculum_exploration": 0.0}, "above 0"),
        ({"curriculum_reward_low": 2.0}, "must be below"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_mapping({"buffer": wrong})
