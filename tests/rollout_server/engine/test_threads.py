"""The engine takes cores that are idle, and returns them."""

from areal_like.cpus import CoreTimes
from rollout_server.engine.threads import LOOK_EVERY_S, ThreadCount


class _Machine:
    """`cores` cores, shared fairly by an engine that is never idle and other threads that are not either."""

    def __init__(self, cores: int, *, least: int = 1) -> None:
        self.cores = cores
        self.threads = ThreadCount(least=least, most=cores)
        self.times = CoreTimes(at_s=0.0, own_s=0.0, spare_s=(0.0,))
        self.threads.look(self.times)

    def after(self, *, others: float, seconds: float = 1.0) -> int:
        """The number of threads after some time beside `others` threads."""
        share = min(1.0, self.cores / (self.threads.count + others))
        used = self.threads.count * share
        idle = max(0.0, self.cores - used - others * share)
        at_s, (spare_s,) = self.times.at_s + seconds, self.times.spare_s
        self.times = CoreTimes(
            at_s=at_s, own_s=self.times.own_s + used * seconds, spare_s=(spare_s + idle * seconds,)
        )
        assert self.threads.is_due(at_s)
        return self.threads.look(self.times)


def test_two_cores_follow_the_trainer() -> None:
    machine = _Machine(2)
    assert machine.after(others=1) == 1
    assert machine.after(others=0) == 1  # for how long?
    assert machine.after(others=1) == 1
    assert [machine.after(others=0) for _ in range(2)] == [1, 2]
    assert machine.after(others=0.2) == 2  # the daemons of the job need little
    assert machine.after(others=1) == 1
    assert machine.after(others=1) == 1


def test_many_cores_settle_without_more_threads_than_cores() -> None:
    machine = _Machine(8)
    assert [machine.after(others=3) for _ in range(2)] == [1, 5]
    assert [machine.after(others=3) for _ in range(3)] == [5, 5, 5]
    assert machine.after(others=4) < 5
    assert [machine.after(others=4) for _ in range(3)] == [4, 4, 4]
    assert [machine.after(others=0) for _ in range(2)] == [4, 8]


def test_an_engine_keeps_the_threads_that_it_was_given() -> None:
    machine = _Machine(4, least=2)
    assert machine.after(others=8) == 2
    fixed = ThreadCount(least=3, most=0)
    assert fixed.is_fixed and fixed.count == fixed.most == 3 and not fixed.is_due(1e9)


def test_times_are_looked_at_four_times_a_second() -> None:
    threads = ThreadCount(least=1, most=2)
    assert threads.is_due(5.0)
    assert threads.look(CoreTimes(at_s=5.0, own_s=1.0, spare_s=(9.0,))) == 1  # nothing to compare with yet
    assert not threads.is_due(5.0 + 0.9 * LOOK_EVERY_S) and threads.is_due(5.0 + LOOK_EVERY_S)
