"""Starvation: counted only while the limit on held samples keeps work from the engine, and reported once."""

from areal_like.wire.messages.producer import Lease, Purpose
from rollout_server.leases.held_leases import HeldLeases, Place
from rollout_server.starvation import Starvation


def found(at_engine: int, in_tools: int, in_rewards: int) -> dict[Place, int]:
    return {Place.ENGINE: at_engine, Place.TOOL: in_tools, Place.REWARD: in_rewards}


def test_slow_rewards_are_counted_and_reported_once() -> None:
    watch = Starvation(max_running=8, max_episodes=24, group_samples=4)
    hints = [watch.observe(found(2, 1, 20), now_s=100.0 + i) for i in range(60)]
    assert [i for i, hint in enumerate(hints) if hint] == [15] and watch.seconds_total == 59.0
    assert "2 of 8 sequences" in hints[15] and "20 samples wait for their reward" in hints[15]
    assert "rollout.reward_workers" in hints[15]


def test_slow_tools_have_another_hint() -> None:
    watch = Starvation(max_running=8, max_episodes=24, group_samples=4)
    hints = [watch.observe(found(2, 20, 1), now_s=float(i)) for i in range(20)]
    assert "rollout.max_episodes, make environments or agents faster" in "".join(hints)


def test_an_engine_with_work_or_credit_is_not_starved() -> None:
    watch = Starvation(max_running=8, max_episodes=24, group_samples=4)
    for now, places in enumerate([found(8, 0, 16), found(2, 0, 18), found(0, 0, 0), found(8, 16, 0)]):
        assert not watch.observe(places, now_s=float(now)) and not watch.is_starved
    assert watch.seconds_total == 0.0
    # What was found counts until the next look; a lone burst is no reason for a hint.
    watch.observe(found(7, 0, 17), now_s=10.0)
    assert watch.observe(found(8, 0, 16), now_s=10.5) == "" and watch.seconds_total == 0.5


def test_credit_goes_on_while_samples_are_away() -> None:
    """10 at the engine; each scored sample makes room for another one, up to 24 held."""
    held = HeldLeases(engine_samples=10, max_episodes=24)
    watch = Starvation(max_running=8, max_episodes=24, group_samples=1)
    for lease_id in range(24):
        assert held.free_samples > 0 and not watch.is_starved
        held.grant(lease_of(lease_id))
        held.moved(lease_id, 0, Place.REWARD)
        watch.observe(held.num_at, now_s=float(lease_id))
    assert held.free_samples == 0 and held.holding_samples == 24 and watch.is_starved


def lease_of(lease_id: int) -> Lease:
    return Lease(
        lease_id=lease_id,
        ticket_id=lease_id,
        prompt_index=0,
        purpose=Purpose.TRAIN,
        sample_indices=[0],
        seed=0,
    )
