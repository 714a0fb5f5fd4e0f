"""Curricula: what is chosen, what an epoch becomes, and that a resumed run chooses what an uninterrupted one would have."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from buffer.prompts.curriculum import Curriculum, CurriculumKind, CurriculumSettings, state_from_scalars

from areal_like.config import from_mapping
from areal_like.errors import ConfigError, RefusedError
from areal_like.runtime.metrics import Metrics
from areal_like.wire.codec import decode, encode
from areal_like.wire.messages.consumer import StreamState
from buffer.ledger.recovery import recover
from buffer.prompts.order import PromptOrder, permuted
from buffer.service.peers import ConnectedPeers
from buffer.service.prometheus import BufferSeries
from buffer.settings import LedgerSettings
from buffer.storage.durable import DurableStore
from tests.support.ledger_plant import add_server, deliver, done, empty_ledger, ledger_settings, new_ledger
from tests.support.store_load import raising, store_settings

GROUP_SIZE = 8
SOLVE_RATES = [0.0, 0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0, 1.0, 1.0]
"""Of prompt i: entry i mod 12. Most prompts teach next to nothing, as in a run that has learned the easy ones."""


def curriculum_settings(kind: str = "goldilocks", **changes: Any) -> CurriculumSettings:
    """The configuration's defaults with these changes."""
    settings = LedgerSettings.from_config(from_mapping({"buffer": {"curriculum": kind}})).curriculum
    assert settings is not None
    return dataclasses.replace(settings, **changes)


def curriculum(kind: str = "goldilocks", **settings: object) -> Curriculum:
    return Curriculum(curriculum_settings(kind, **settings))


def told(core: Curriculum, solve_rates: Sequence[float], *, num_groups: int = 20) -> Curriculum:
    """Prompt i has solved this share of its samples, in each of so many groups of ten."""
    for index, rate in list(enumerate(solve_rates)) * num_groups:
        core.observe(index, [1.0] * round(10 * rate) + [0.0] * round(10 * (1 - rate)))
    return core


def share_with_spread(order: PromptOrder, *, num_groups: int) -> float:
    """Issues groups in a plant where answers are right with `SOLVE_RATES`; outcomes come back four groups late."""
    rng, late, spread = random.Random(1), [], 0
    for _ in range(num_groups):
        index = order.next().index
        rewards = [float(rng.random() < SOLVE_RATES[index % len(SOLVE_RATES)]) for _ in range(GROUP_SIZE)]
        spread += len(set(rewards)) > 1
        late.append((index, rewards))
        if order.curriculum is not None and len(late) > 4:
            order.curriculum.observe(*late.pop(0))
    return spread / num_groups


def test_each_kind_takes_the_candidate_nearest_to_what_it_wants() -> None:
    rates = [0.0, 0.2, 0.4, 0.8, 1.0]
    core = told(curriculum(), rates)
    assert core.choose([0, 1, 2, 3, 4], uniform=0.99) == 2
    assert core.choose([4, 3, 0], uniform=0.99) == 3
    assert told(curriculum("paced", target=0.8), rates).choose([0, 1, 2, 3, 4], uniform=0.99) == 3
    assert told(curriculum("paced", target=0.2), rates).choose([0, 1, 2, 3, 4], uniform=0.99) == 1
    assert told(curriculum("paced", target=0.8), rates).choose([0, 1, 2, 3, 4], uniform=0.05) == 0, "explores"


@pytest.mark.parametrize("kind", list(CurriculumKind))
def test_more_groups_have_spread_than_without_a_curriculum(kind: CurriculumKind) -> None:
    num_prompts, num_groups = 480, 1500
    plain = share_with_spread(PromptOrder(seed=3, num_prompts=num_prompts), num_groups=num_groups)
    chosen = share_with_spread(
        PromptOrder(seed=3, num_prompts=num_prompts, curriculum=curriculum(kind)), num_groups=num_groups
    )
    assert 0.3 < plain < 0.42, "what the plant's solve rates give: 0.36"
    assert chosen > plain + 0.2


def test_in_an_epoch_every_prompt_is_a_candidate_once_and_one_of_each_pool_is_issued() -> None:
    num_prompts, pool = 48, 4
    core = told(curriculum(pool=pool), [SOLVE_RATES[i % 12] for i in range(num_prompts)])
    order = PromptOrder(seed=5, num_prompts=num_prompts, curriculum=core)
    for epoch in range(2):
        drawn = [permuted(i, size=num_prompts, seed=5, epoch=epoch) for i in range(num_prompts)]
        assert sorted(drawn) == list(range(num_prompts))
        issued = [order.next().index for _ in range(num_prompts // pool)]
        for place, index in enumerate(issued):
            candidates = drawn[place * pool : (place + 1) * pool]
            best = max(candidates, key=lambda i: -abs(core.solve_rate(i) - 0.5))
            assert index in (candidates[0], best)
    assert order.cursor == 2 * num_prompts
    assert core.num_explored < 10


def test_a_prompt_that_always_loses_still_comes_back() -> None:
    num_prompts, exploration = 40, 0.2
    core = told(curriculum(exploration=exploration, half_life=10**9), [0.0] + [0.5] * (num_prompts - 1))
    order = PromptOrder(seed=0, num_prompts=num_prompts, curriculum=core)
    num_epochs = 2000
    issued = Counter(order.next().index for _ in range(num_epochs * num_prompts // 4))
    assert issued[0] == pytest.approx(num_epochs * exploration / 4, rel=0.3), (
        "once in pool / exploration epochs"
    )


def test_a_pool_larger_than_the_data_set_is_the_data_set() -> None:
    order = PromptOrder(seed=0, num_prompts=3, curriculum=curriculum(pool=8))
    assert {order.next().index for _ in range(20)} <= {0, 1, 2}
    assert order.cursor == 60


def test_an_unseen_prompt_counts_as_an_average_one_and_old_news_fades() -> None:
    core = told(curriculum(half_life=50), [0.0, 0.0, 1.0], num_groups=30)
    assert core.mean_solve_rate == pytest.approx(1 / 3, abs=0.05)
    assert core.solve_rate(99) == core.mean_solve_rate
    before = core.solve_rate(0)
    for _ in range(500):
        core.observe(2, [1.0] * 10)
    assert before < 0.02 and core.solve_rate(0) > 0.3, "nothing was heard of it for ten half-lives"


def test_memory_is_bounded_and_forgets_what_was_heard_longest_ago() -> None:
    core = curriculum(memory=3)
    for index in (1, 2, 3, 1, 4):
        core.observe(index, [0.0] * 8)
    assert core.status()["prompts_remembered"] == 3
    assert core.solve_rate(2) == core.mean_solve_rate and core.solve_rate(1) < core.mean_solve_rate
    assert len(core.state()) == len(core.scalars()) == 4 + 4 * 3


def test_the_marks_of_every_outcome_add_up_to_the_state() -> None:
    core, marks, rng = curriculum(memory=10), {}, random.Random(0)
    for _ in range(200):
        marks |= core.observe(rng.randrange(25), [float(rng.random() < 0.5) for _ in range(3)])
    again = curriculum(memory=10)
    again.restore(state_from_scalars(marks))
    assert again.state() == core.state()
    smaller = curriculum(memory=4)
    smaller.restore(state_from_scalars(marks))
    assert smaller.state() == core.state()[:4] + core.state()[-16:], "those heard of last"


def test_rewards_are_mapped_to_solve_rates_by_the_range_given() -> None:
    core = curriculum(reward_low=-1.0, reward_high=3.0)
    for _ in range(1000):
        core.observe(0, [-5.0, 1.0, 9.0, 3.0])
    assert core.mean_solve_rate == pytest.approx((0 + 0.5 + 1 + 1) / 4, abs=1e-3)


def test_the_same_outcomes_give_the_same_prompts_and_a_restored_run_goes_on_with_them() -> None:
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
        "curriculum": curriculum_settings(),
        "group_filter": "spread",
        "num_steps": 50,
        **more,
    }


def test_the_ledger_hears_of_complete_groups_and_carries_it_over_a_resume() -> None:
    ledger = new_ledger(**settings())
    add_server(ledger, "a", capacity=100)
    leases = ledger.grant(now_s=0.0)["a"]
    for lease in leases:
        for index in lease.sample_indices:
            deliver(ledger, "a", done(lease, index, [0], reward=0.0))
    heard = ledger.state.prompts.curriculum
    assert heard is not None and heard.status()["prompts_remembered"] == len(leases), (
        "groups that the filter drops count too: they say most"
    )
    assert all(heard.solve_rate(lease.prompt_index) < 0.3 for lease in leases)

    answer, _ = decode(encode(StreamState(stream=ledger.stream_state(step=-1))))
    stream = json.loads(json.dumps(answer.stream))
    resumed = empty_ledger(ledger.settings)
    resumed.set_num_train_prompts(1000)
    resumed.start_training(incarnation=2, step=0, stream=stream)
    assert (
        resumed.state.prompts.curriculum is not None
        and resumed.state.prompts.curriculum.state() == heard.state()
    )
    add_server(resumed, "a", capacity=100)
    issued, issued_by_resumed = (
        [lease.prompt_index for lease in each.grant(now_s=0.0)["a"]] for each in (ledger, resumed)
    )
    assert len(issued) == 4 and issued == issued_by_resumed


def test_the_estimates_are_series() -> None:
    ledger, metrics = new_ledger(**settings()), Metrics()
    assert ledger.state.prompts.curriculum is not None
    ledger.state.prompts.curriculum.observe(0, [0.0] * 63)
    for _ in range(200):
        ledger.state.prompts.order.next()
    peers = ConnectedPeers(job="job", dataset="")
    BufferSeries(metrics, max_staleness=1).update(ledger.snapshot(), peers, Counter())
    for of in ("issued", "all"):
        assert metrics.registry.get_sample_value("areal_curriculum_solve_rate", {"of": of}) == pytest.approx(
            1 / 128, rel=0.2
        )


def test_a_ledger_on_disk_remembers_what_it_heard_unless_the_prompts_are_others(tmp_path: Path) -> None:
    async def life(dataset: int) -> tuple[list[int], list[int]]:
        """(what it knows at its start, and at its end) of one process that generates a few groups."""
        store = DurableStore(tmp_path, store_settings(), on_error=raising)
        ledger = recover(
            ledger_settings(**settings()),
            store,
            now_s=0.0,
            dataset=dataset,
        )
        assert ledger.state.prompts.curriculum is not None
        before = ledger.state.prompts.curriculum.state()
        ledger.set_num_train_prompts(1000)
        ledger.start_training(incarnation=ledger.trainer_incarnation + 1, step=0, stream={})
        add_server(ledger, "a", capacity=100)
        for lease in ledger.grant(now_s=0.0)["a"]:
            for index in lease.sample_indices:
                deliver(ledger, "a", done(lease, index, [0], reward=0.0))
        store.close()
        return before, ledger.state.prompts.curriculum.state()

    lives = [asyncio.run(life(dataset)) for dataset in (7, 7, 8, 8)]
    nothing = curriculum().state()
    assert [before for before, _ in lives] == [nothing, lives[0][1], nothing, lives[2][1]]
    assert len(lives[1][1]) > len(lives[0][1]) > len(nothing)


@pytest.mark.parametrize(
    "state", [[1], [-1, 2, 1, 5], [-1, 0, 0, 0], [-1, 0, 1, 3, 7, -1, 2, 0], [-1, 0, 1, 3, 7, 1, 2, 9]]
)
def test_a_state_that_is_none_is_refused(state: list[int]) -> None:
    ledger = empty_ledger(ledger_settings(**settings()))
    with pytest.raises(RefusedError, match="not the state of a curriculum"):
        ledger.start_training(incarnation=1, step=0, stream={"curriculum": state})


def test_settings_come_from_the_configuration_and_wrong_ones_are_refused() -> None:
    assert LedgerSettings.from_config(from_mapping({})).curriculum is None
    job = {"buffer": {"curriculum": "paced", "curriculum_target": 0.3, "curriculum_pool": 8}}
    chosen = LedgerSettings.from_config(from_mapping(job)).curriculum
    assert chosen == curriculum_settings("paced", target=0.3, pool=8)
    assert chosen is not None and chosen.kind is CurriculumKind.PACED
    for wrong, message in (
        ({"curriculum": "silver"}, "none, goldilocks, paced"),
        ({"curriculum_pool": 1}, "at least 2"),
        ({"curriculum_target": 1.0}, "between 0 and 1"),
        ({"curriculum_exploration": 0.0}, "never comes back"),
        ({"curriculum_reward_low": 2.0}, "must be below"),
    ):
        with pytest.raises(ConfigError, match=message):
            from_mapping({"buffer": wrong})
