"""`max_staleness: auto` on simulated policies, and in the ledger.

The bound settles, keeps the target and the cap, and recovers; no samples are dropped as stale.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from areal_like.errors import ConfigError, RefusedError
from areal_like.runtime.command_line import load_config
from buffer.settings import LedgerSettings
from buffer.tickets import Drop
from tests.support.ledger_simulation import (
    SimulatedJob,
    SimulatedServer,
    add_server,
    beat,
    deliver,
    done,
    new_ledger,
)
from tests.support.quick import only_in_chaos
from trainer.adaptive_staleness import WINDOW_STEPS, StalenessController

TARGET = 0.7


@dataclass
class Policy:
    """A simulated policy with ESS ratio exp(-drift * lag^2) and noise.

    The lag moves towards the bound by one per step, up to `reachable_lag`, the limit of generation's speed.
    """

    drift: Callable[[int], float]
    noise: float = 0.0
    reachable_lag: int = 10**6
    seed: int = 0
    bounds: list[int] = field(default_factory=list)
    ess: list[float] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)

    def run(self, controller: StalenessController, num_steps: int) -> None:
        """Trains `num_steps` steps under the controller."""
        rng, lag = random.Random(self.seed), 0
        for step in range(num_steps):
            wanted = min(controller.bound, self.reachable_lag)
            lag += (wanted > lag) - (wanted < lag)
            self.ess.append(
                min(1.0, max(0.0, math.exp(-self.drift(step) * lag**2) + rng.gauss(0, self.noise)))
            )
            self.lags.append(lag)
            self.bounds.append(controller.observe(ess_ratio=self.ess[-1], lag_max=lag))


def largest_within(drift: float) -> int:
    """The largest lag whose ESS is at the target or above."""
    return math.floor(math.sqrt(-math.log(TARGET) / drift))


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("drift", [0.5, 0.08, 0.02, 0.009, 0.004])
def test_the_bound_settles_at_the_largest_that_meets_the_target(drift: float, noise: float) -> None:
    policy = Policy(drift=lambda step: drift, noise=noise)
    policy.run(StalenessController(cap=8, target=TARGET), 3000)
    best = min(8, largest_within(drift))
    tail = policy.bounds[1500:]
    settled = max(set(tail), key=tail.count)
    assert best - 2 <= settled <= best
    if not noise:
        assert settled >= best - 1
        assert tail.count(settled) > 0.9 * len(tail), "the bound oscillates"
    changes = [a != b for a, b in itertools.pairwise(policy.bounds)]
    assert sum(changes[1500:]) <= sum(changes[:1500]) + 2, "the bound must change less often with time"
    assert sum(tail_ess := policy.ess[1500:]) / len(tail_ess) > TARGET


def test_the_bound_reaches_the_cap_but_never_exceeds_it() -> None:
    policy = Policy(drift=lambda step: 0.0)
    policy.run(StalenessController(cap=5, target=TARGET), 200)
    assert policy.bounds[0] == 0 and max(policy.bounds) == 5 == policy.bounds[-1]
    assert all(b - a in (0, 1) for a, b in itertools.pairwise(policy.bounds)), (
        "the bound must rise by one at a time"
    )
    capped = Policy(drift=lambda step: 0.0)
    capped.run(StalenessController(cap=0, target=TARGET), 100)
    assert set(capped.bounds) == {0}


def test_the_bound_falls_fast_with_the_ess_and_recovers() -> None:
    """A policy that learns fast between steps 300 and 600, and slowly otherwise."""
    policy = Policy(drift=lambda step: 0.3 if 300 <= step < 600 else 0.005)
    policy.run(StalenessController(cap=8, target=TARGET), 1500)
    assert policy.bounds[299] == 8
    assert min(policy.bounds[300:360]) <= 1, "8 -> 4 -> 2 -> 1 within 60 steps"
    assert max(policy.bounds[400:600]) <= 2
    assert policy.bounds[-1] >= 7


def test_data_from_before_a_change_are_ignored() -> None:
    """Samples in flight when the bound falls are still stale; they must not count against the new bound."""
    controller = StalenessController(cap=8, target=TARGET)
    controller.restore({**controller.dump(), "bound": 8})
    for _ in range(WINDOW_STEPS):
        assert controller.bound == 8
        controller.observe(ess_ratio=0.1, lag_max=8)
    assert controller.bound == 4
    for _ in range(9):
        controller.observe(ess_ratio=0.1, lag_max=8)
    for _ in range(WINDOW_STEPS):
        controller.observe(ess_ratio=0.75, lag_max=4)
    assert controller.bound == 4


def test_a_bound_that_no_lag_reaches_is_not_raised() -> None:
    policy = Policy(drift=lambda step: 0.0, reachable_lag=2)
    policy.run(StalenessController(cap=8, target=TARGET), 400)
    assert policy.bounds[-1] == 3, "the bound ends one above the lag that generation reaches"


def test_low_on_policy_ess_keeps_bound_zero_and_nan_lowers_it() -> None:
    controller = StalenessController(cap=8, target=TARGET)
    assert {controller.observe(ess_ratio=0.2, lag_max=0) for _ in range(100)} == {0}
    raised = StalenessController(cap=8, target=TARGET)
    raised.restore({**raised.dump(), "bound": 2})
    assert [raised.observe(ess_ratio=math.nan, lag_max=2) for _ in range(WINDOW_STEPS)][-1] == 1


def test_a_restored_controller_decides_the_same() -> None:
    policy = Policy(drift=lambda step: 0.02, noise=0.2)
    policy.run(StalenessController(cap=6, target=TARGET), 400)
    controller, bounds = StalenessController(cap=6, target=TARGET), []
    for step, (ess, lag) in enumerate(zip(policy.ess, policy.lags, strict=True)):
        if step % 7 == 0:
            resumed = StalenessController(cap=6, target=TARGET)
            resumed.restore(json.loads(json.dumps(controller.dump())))
            controller = resumed
        bounds.append(controller.observe(ess_ratio=ess, lag_max=lag))
    assert bounds == policy.bounds and len(set(bounds)) > 3
    smaller = StalenessController(cap=1, target=TARGET)
    smaller.restore({**controller.dump(), "bound": 6})
    assert smaller.bound == 1


# --- in the ledger ---


def test_a_lower_bound_stops_admission_and_drops_nothing() -> None:
    ledger = new_ledger(max_staleness=4, adaptive=True, groups_per_step=1, group_size=1, num_steps=20)
    add_server(ledger, "a", capacity=100)
    first = ledger.dispatcher.grant(now_s=0.0)["a"]
    assert len(first) == 1, "the bound begins at 0: one step's tickets"
    ledger.trainer.set_max_staleness(incarnation=1, max_staleness=4)
    more = ledger.dispatcher.grant(now_s=0.0)["a"]
    assert len(more) == 4, "five groups for steps 0 to 4"
    ledger.trainer.set_max_staleness(incarnation=1, max_staleness=0)
    for lease in first + more:
        deliver(ledger, "a", done(lease, 0, [0]))
    for step in range(5):
        assert ledger.dispatcher.grant(now_s=0.0) == {}, "the admitted tickets fill the next steps"
        group = ledger.trainer.fetch(step=step, position=0)
        assert group is not None and step - group.version_steps[0] == step, (
            "a ticket keeps the bound that it was issued with"
        )
        ledger.trainer.complete_step(incarnation=1, step=step)
        version = ledger.trainer.alloc_version(incarnation=1, step=step + 1)
        beat(ledger, "a", capacity=100, version=version)
    assert ledger.state.drops[Drop.STALE] == 0
    assert len(ledger.dispatcher.grant(now_s=0.0)["a"]) == 1, (
        "at bound 0 one step's tickets are granted again"
    )


def test_a_bound_outside_the_cap_or_a_fixed_one_is_refused() -> None:
    ledger = new_ledger(max_staleness=4, adaptive=True)
    for bound in (-1, 5):
        with pytest.raises(RefusedError, match=r"0\.\.4"):
            ledger.trainer.set_max_staleness(incarnation=1, max_staleness=bound)
    with pytest.raises(RefusedError, match="fixed at 4"):
        new_ledger(max_staleness=4).trainer.set_max_staleness(incarnation=1, max_staleness=2)


class AdaptiveJob(SimulatedJob):
    """The ESS falls with the lag of the trained groups, and the controller sets the ledger's bound."""

    controller: StalenessController
    drift: float
    bounds: list[int]

    def _end_step(self, step: int) -> None:
        groups = [
            self.ledger.trainer.fetch(step=step, position=position)
            for position in range(self.ledger.settings.groups_per_step)
        ]
        lags = [step - version_step for group in groups if group for version_step in group.version_steps]
        ess = math.exp(-self.drift * sum(lag**2 for lag in lags) / len(lags))
        bound = self.controller.observe(ess_ratio=ess, lag_max=max(lags))
        self.ledger.trainer.set_max_staleness(incarnation=1, max_staleness=bound)
        self.bounds.append(bound)
        super()._end_step(step)


@pytest.mark.parametrize(("drift", "expected"), [(0.09, {1, 2}), *only_in_chaos((0.0, {4}), (1.0, {0}))])
def test_the_whole_stream_under_a_moving_bound(drift: float, expected: set[int]) -> None:
    ledger = new_ledger(max_staleness=4, adaptive=True, groups_per_step=8, group_size=4, num_steps=200)
    servers = [
        SimulatedServer(name="fast", tokens_per_s=100, max_running=24, capacity=32),
        SimulatedServer(name="slow", tokens_per_s=50, max_running=12, capacity=16),
    ]
    job = AdaptiveJob(ledger=ledger, servers=servers, step_s=6.0, fail_probability=0.02)
    job.controller, job.drift, job.bounds = StalenessController(cap=4, target=TARGET), drift, []
    job.run()
    assert max(ledger.state.counters.lag_histogram) <= 4
    assert ledger.state.drops[Drop.STALE] == 0, "a moving bound must not make samples stale"
    assert max(set(job.bounds[100:]), key=job.bounds[100:].count) in expected
    assert ledger.state.store.num_bytes == 0


# --- settings ---


def test_auto_uses_the_cap_as_the_ledgers_bound() -> None:
    config = load_config(["max_staleness=auto", "max_staleness_cap=3", "ess_target=0.5"])
    assert config.staleness_cap == 3
    settings = LedgerSettings.from_config(config)
    assert (settings.staleness_cap, settings.adaptive) == (3, True)
    fixed = LedgerSettings.from_config(load_config(["max_staleness=2"]))
    assert (fixed.staleness_cap, fixed.adaptive) == (2, False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_staleness=soon", "max_staleness=soon: use a whole number or auto"),
        ("max_staleness=1.5", "max_staleness=1.5"),
        ("max_staleness=true", "max_staleness=True"),
        ("ess_target=1", "ess_target=1"),
        ("max_staleness_cap=-1", "max_staleness_cap"),
    ],
)
def test_error_messages_for_invalid_settings(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([setting])
