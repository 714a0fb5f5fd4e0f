"""Time in which requests were at the engine: the gate's count, without stalls and stops of the server."""

import pytest

from rollout_server.metrics import EngineTime
from rollout_server.policy.generation_gate import GenerationGate
from tests.support import moved_clock
from tests.support.moved_clock import advance


def test_the_gate_counts_time_and_requests() -> None:
    async def body() -> None:
        gate = GenerationGate()
        advance(1000)
        assert gate.seconds() == (0.0, 0.0)
        async with gate:
            async with gate:
                advance(1000)
            advance(2000)
        advance(1000)
        busy_s, request_s = gate.seconds()
        assert busy_s == pytest.approx(3000, abs=10) and request_s == pytest.approx(4000, abs=10)
        assert gate.seconds() == (busy_s, request_s)

    moved_clock.run(body())


def observe(time: EngineTime, busy_s: float, **fields: float) -> tuple[float, float]:
    base = {"passed_s": 1.0, "late_s": 0.0, "is_pushing": False, "num_pushes": 0, "stall_s": 0.0}
    time.observe(busy_s=busy_s, request_s=4 * busy_s, **(base | fields))  # type: ignore[arg-type]
    return time.busy_s, time.request_s


def test_time_of_a_stopped_server_does_not_count() -> None:
    time = EngineTime()
    assert observe(time, 1.0) == (1.0, 4.0)
    assert observe(time, 13.0, passed_s=12.0, late_s=11.0) == pytest.approx((2.0, 8.0))


def test_stalls_of_pushes_do_not_count() -> None:
    time = EngineTime()
    observe(time, 1.0)
    # How much of a push was a stall is known at its end; a beat may fall into the next push.
    assert observe(time, 2.0, is_pushing=True) == observe(time, 3.0, is_pushing=True) == (1.0, 4.0)
    assert observe(time, 4.0, is_pushing=True, num_pushes=1, stall_s=2.25) == pytest.approx((1.75, 7.0))
    # A push that stalls nothing takes no time away.
    observe(time, 5.0, is_pushing=True, num_pushes=1, stall_s=2.25)
    assert observe(time, 6.0, num_pushes=2, stall_s=2.25) == pytest.approx((3.75, 15.0))
