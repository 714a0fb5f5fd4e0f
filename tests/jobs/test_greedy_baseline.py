"""One greedy sample beside each group: requested, delivered, kept out of group filters and of training."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from areal_like.config import SamplingConfig
from areal_like.errors import ConfigError
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import GetRunCounters, Group, RequestEval, RunCounters
from areal_like.wire.messages.producer import Lease
from areal_like.wire.records import Record
from buffer.ledger.ledger import Ledger
from buffer.tickets import Drop, State, Verdict
from tests.support.buffer_harness import BufferProcess, running_buffer, training
from tests.support.launching import TEST_LIMIT_S, WAIT_LIMIT_S
from tests.support.ledger_simulation import add_server, deliver, done, new_ledger, trajectory
from tests.support.rollout_harness import ServerProcess
from tests.support.trainer_helpers import flattened, random_groups, without_measured, write_model
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.advantages.base import Advantage
from trainer.distributed.ranks import Ranks
from trainer.models.tiny import build_tiny_model


def leases_of(ledger: Ledger) -> list[Lease]:
    return ledger.dispatcher.grant(now_s=0.0).get("a", [])


def test_a_group_has_one_more_sample_which_is_greedy() -> None:
    ledger = new_ledger(group_size=2, num_greedy=1, groups_per_step=1)
    add_server(ledger, "a", capacity=3)
    (lease,) = leases_of(ledger)
    assert (lease.sample_indices, lease.greedy_indices) == ([0, 1, 2], [2])
    for index in range(3):
        assert deliver(ledger, "a", done(lease, index, [0], reward=float(index))) is Verdict.ACCEPTED
    group = ledger.trainer.fetch(step=0, position=0)
    assert group is not None
    assert [t.is_greedy for t in group.trajectories] == [False, False, True] and group.trajectories[
        2
    ].reward == 2
    ledger.trainer.complete_step(incarnation=1, step=0)
    counters = ledger.state.counters.summary()
    assert (counters["samples_accepted"], counters["samples_trained"], counters["tokens_trained"]) == (
        3,
        2,
        2,
    )


def test_only_missing_samples_are_leased_again() -> None:
    ledger = new_ledger(group_size=2, num_greedy=1)
    add_server(ledger, "a", capacity=3)
    (lease,) = leases_of(ledger)
    deliver(ledger, "a", done(lease, 2, [0]))
    ledger.dispatcher.return_leases("a", [lease.lease_id])
    (again,) = leases_of(ledger)
    assert (again.sample_indices, again.greedy_indices) == ([0, 1], [])
    ledger.dispatcher.return_leases("a", [again.lease_id])
    assert ledger.state.tickets.num_by_state()[State.QUEUED] == 1


def test_a_sample_with_the_wrong_greedy_flag_is_refused() -> None:
    ledger = new_ledger(group_size=1, num_greedy=1)
    add_server(ledger, "a", capacity=2)
    (lease,) = leases_of(ledger)
    for index, is_greedy in ((0, True), (1, False)):
        message = dataclasses.replace(
            done(lease, index, [0]),
            record=Record.of(lease.ticket_id, index, trajectory([0], is_greedy=is_greedy)),
        )
        assert deliver(ledger, "a", message) is Verdict.INVALID


@pytest.mark.parametrize(("rewards", "num_dropped"), [((1.0, 1.0, 0.0), 1), ((1.0, 0.0, 1.0), 0)])
def test_the_greedy_reward_does_not_count_as_spread(rewards: tuple[float, ...], num_dropped: int) -> None:
    ledger = new_ledger(group_size=2, num_greedy=1, group_filter="spread")
    add_server(ledger, "a", capacity=3)
    (lease,) = leases_of(ledger)
    for index, reward in enumerate(rewards):
        deliver(ledger, "a", done(lease, index, [0], reward=reward))
    assert ledger.state.drops[Drop.NO_SPREAD] == num_dropped


def test_the_greedy_sample_counts_for_version_and_lag() -> None:
    ledger = new_ledger(
        group_size=1, num_greedy=1, groups_per_step=1, group_filter="single_version", max_staleness=1
    )
    add_server(ledger, "a", capacity=4)
    first, second = leases_of(ledger)
    deliver(ledger, "a", done(first, 0, [0]))
    deliver(ledger, "a", done(first, 1, [0]))
    ledger.trainer.complete_step(incarnation=1, step=0)
    version = ledger.trainer.alloc_version(incarnation=1, step=1)
    deliver(ledger, "a", done(second, 0, [version]))
    deliver(ledger, "a", done(second, 1, [0]))
    assert ledger.state.drops[Drop.REJECTED] == 1


def test_a_baseline_needs_samples_to_compare_with() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.group_size=0: use 1"):
        SamplingConfig(group_size=0, greedy_baseline=True)


# --- the trainer ---


@dataclass(frozen=True, kw_only=True)
class AboveQuarter(Advantage):
    """R - 1/4."""

    def of_group(self, group: Sequence[Trajectory]) -> Sequence[float]:
        return [trajectory.reward - 0.25 for trajectory in group]


def test_a_step_does_not_learn_from_the_greedy_sample(tmp_path: Path) -> None:
    """The gradient is that of an advantage with the greedy reward as a constant, KL penalty included."""
    ranks, path = Ranks.alone(), write_model(tmp_path)
    kl = {"kl": {"coef": 0.05, "estimator": "k1", "place": "reward"}}
    with_greedy = [
        [*group, dataclasses.replace(group[0], is_greedy=True, reward=0.25)] for group in random_groups(4)
    ]
    remax = make_runner(path, ranks, beta1=0.0, settings=kl | {"advantage": {"name": "remax"}})
    known = make_runner(path, ranks, beta1=0.0, settings=kl, advantage=AboveQuarter())
    got, want = remax.run(with_greedy, step=0), known.run(random_groups(4), step=0)
    assert got.pop("greedy_reward") == 0.25
    got, want = (without_measured(flattened(m)) for m in (got, want))
    assert got == pytest.approx(want, rel=1e-12)
    for (name, a), (_, b) in zip(last_gradient(remax).items(), last_gradient(known).items(), strict=True):
        assert torch.equal(a, b), name
    dist.destroy_process_group()


# --- the processes ---

NUM_STEPS, GROUPS = 2, 4


@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.long
def test_real_servers_give_one_greedy_answer(tmp_path: Path) -> None:
    """Under the same weights, real processes give the same greedy answer to a prompt every time."""
    model = tmp_path / "model"
    build_tiny_model(model, seed=0, warm_start_steps=5, swap_prob=0.5)
    with ExitStack() as stack:
        settings = {
            "max_staleness": NUM_STEPS,
            "sampling": {"group_size": 3, "greedy_baseline": True, "temperature": 5.0},
            "trainer": {"num_steps": NUM_STEPS, "groups_per_step": GROUPS},
            "task": {"name": "sort", "num_train": 2},
        }
        buffer = stack.enter_context(running_buffer(tmp_path, model={"path": str(model)}, **settings))
        server = ServerProcess(buffer.peers_config)
        stack.callback(server.close)
        groups, counters = asyncio.run(_train(buffer))
    assert all([t.is_greedy for t in group.trajectories] == [False] * 3 + [True] for group in groups)
    texts: dict[int, set[tuple[int, ...]]] = {}
    sampled: dict[int, set[tuple[int, ...]]] = {}
    for group in groups:
        texts.setdefault(group.prompt_index, set()).add(tuple(group.trajectories[3].tokens.tolist()))
        sampled.setdefault(group.prompt_index, set()).update(
            tuple(t.tokens.tolist()) for t in group.trajectories[:3]
        )
    assert all(len(greedy) == 1 for greedy in texts.values()) and all(
        len(drawn) > 3 for drawn in sampled.values()
    )
    assert (
        counters.tickets["batched"] == NUM_STEPS * GROUPS
        and counters.counters["samples_trained"] == NUM_STEPS * GROUPS * 3
    )


async def _train(buffer: BufferProcess) -> tuple[list[Group], RunCounters]:
    async with training(buffer) as trainer:
        await trainer.call(
            RequestEval(eval_id=0, num_prompts=2, min_version=0), timeout_s=WAIT_LIMIT_S
        )  # the engine has started
        groups = [group for step in range(NUM_STEPS) for group in await trainer.train(step)]
        return groups, await trainer.call(GetRunCounters())
