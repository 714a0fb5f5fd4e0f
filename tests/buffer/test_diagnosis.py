"""Who waits on whom: the cause is named, and nobody who only waits for it."""

import re
from dataclasses import replace
from typing import Any

import pytest

from areal_like.runtime.metrics import Metrics
from buffer.diagnosis.bottleneck import PoolTotals, Utilisation, advice
from buffer.diagnosis.facts import JobFacts, LeaseFacts, On, PeerFacts, ServerFacts, WaitLimits
from buffer.diagnosis.rules import causes_of, effects_of, late_servers
from buffer.diagnosis.speeds import Speeds
from buffer.diagnosis.watchdog import Wakefulness, Watchdog
from buffer.storage.base import Blocked
from trainer.weights.publisher import OWN_FAILURE

LIMITS = WaitLimits(stall_s=5.0, work_s=10.0)


def server(name: str = "rollout-0", **fields: Any) -> ServerFacts:
    return ServerFacts(name=name, **({"silent_s": 0.2, "state": "serving"} | fields))


def rank(number: int = 0, **fields: Any) -> PeerFacts:
    return PeerFacts(name=f"trainer-{number}", **({"silent_s": 0.2, "state": "training"} | fields))


WAITING = rank(waits={"buffer: group 3 of step 11": 25.0})
JOB = JobFacts(
    servers=(server(), server("rollout-1")),
    ranks=(WAITING,),
    world_size=1,
    open_step=11,
    num_recorded=13,
    num_groups=16,
    trainer_step=11,
    oldest_leases=(LeaseFacts(ticket_id=812, server="rollout-0", age_s=41.0),),
)
SILENT = {"silent_s": 20.0}
FROZEN = {"waits": {"engine: a token": 28.0}}


def named(facts: JobFacts, **slow: str) -> list[tuple[str, On]]:
    causes = causes_of(facts, slow=slow, late=late_servers(facts), limits=LIMITS)
    return [(cause.name, cause.on) for cause in causes]


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"servers": (server(), server("rollout-1", **SILENT))}, ("rollout-1", On.SERVER)),
        ({"ranks": (rank(**SILENT),)}, ("trainer-0", On.TRAINER)),
        ({"ranks": (WAITING, rank(1, **SILENT)), "world_size": 2}, ("trainer-1", On.TRAINER)),
        ({"servers": (server(), server("rollout-1", **FROZEN))}, ("rollout-1's engine", On.ENGINE)),
        ({"servers": (server(waits={"engine: paused": 9.0}),)}, ("rollout-0's engine", On.ENGINE)),
        ({"servers": (server(waits={"engine: a response": 6.0}),)}, ("rollout-0's engine", On.ENGINE)),
        (
            {"servers": (server(waits={"engine: ready": 40.0}, state="starting"),)},
            ("rollout-0's engine", On.ENGINE),
        ),
        ({"store_trouble": "disk full: 0 MiB are free", "store_trouble_s": 3.0}, ("buffer", On.BUFFER)),
        ({"loop_late_s": 2.0}, ("buffer", On.BUFFER)),
        ({"servers": (server(stats={"loop_late_s": 0.8}), server("rollout-1"))}, ("rollout-0", On.SERVER)),
        ({"servers": (), "lost_servers": {"rollout-0": 12.0}}, ("rollout-0", On.SERVER)),
        ({"servers": ()}, ("rollout servers", On.SERVER)),
        ({"paused_s": 30.0}, ("an operator", On.OPERATOR)),
        ({"ranks": (), "closed_s": 60.0}, ("trainer", On.TRAINER)),
        ({"servers": (server(held_back="quarantined (ten failures)"),)}, ("rollout-0", On.SERVER)),
        ({"servers": (server(waits={"rewards: 12 completions": 30.0}),)}, ("rollout-0's rewards", On.REWARD)),
        (
            {"servers": (server(waits={"teachers: 9 samples at distill.teachers.math": 30.0}),)},
            ("rollout-0's teachers", On.TEACHER),
        ),
        (
            {"servers": (server(waits={"environments: 3 calls": 30.0}),)},
            ("rollout-0's environments", On.ENVIRONMENT),
        ),
        (
            {"servers": (server(waits={"sessions: 64 wait for an agent (POST /sessions)": 30.0}),)},
            ("rollout-0's agents", On.AGENT),
        ),
        (
            {
                "ranks": (rank(waits={"the evaluation": 30.0}),),
                "servers": (server(waits={"sessions: 64 wait for an agent (POST /sessions)": 30.0}),),
            },
            ("rollout-0's agents", On.AGENT),
        ),
        (
            {"ranks": (rank(waits={"weights: rollout-1 to activate version 49": 26.0}),)},
            ("rollout-1", On.WEIGHTS),
        ),
        ({"ranks": (rank(waits={OWN_FAILURE: 26.0}),)}, ("trainer-0", On.TRAINER)),
        ({"ranks": (rank(waits={"the last weights to be active": 26.0}),)}, ("trainer-0", On.TRAINER)),
    ],
)
def test_one_cause_is_named(changes: dict[str, Any], culprit: tuple[str, On]) -> None:
    assert named(replace(JOB, **changes)) == [culprit]


@pytest.mark.parametrize(
    ("changes", "culprits"),
    [
        ({}, ["buffer"]),
        # The first to be silent for 5 s is not the only one.
        ({"ranks": (rank(silent_s=5.1),), "servers": (server(silent_s=4.0),)}, ["buffer"]),
        ({"servers": (), "lost_servers": {"rollout-0": 14.0, "rollout-1": 14.0}}, ["buffer"]),
        ({"servers": (server(), server("rollout-1", **SILENT))}, ["rollout-1", "trainer-0"]),
        ({"servers": (server(silent_s=30.0),)}, ["rollout-0", "trainer-0"]),
        ({"servers": (), "lost_servers": {"rollout-0": 60.0}}, ["rollout-0", "trainer-0"]),
        ({"ranks": ()}, ["rollout-0", "rollout-1"]),
    ],
)
def test_all_peers_at_once_are_the_buffers_network(changes: dict[str, Any], culprits: list[str]) -> None:
    silent = (server(silent_s=19.5), server("rollout-1", **SILENT))
    facts = replace(JOB, servers=silent, ranks=(rank(**SILENT),))
    assert sorted(name for name, _ in named(replace(facts, **changes))) == culprits


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [(Blocked.FULL, "room"), (Blocked.LOCKED, "end that program"), (Blocked.HANGS, "dmesg")],
)
def test_the_remedy_is_that_of_the_stores_trouble(kind: Blocked, remedy: str) -> None:
    facts = replace(JOB, store_trouble=f"{kind}: in /runs/a/ledger", store_trouble_s=3.0)
    (cause,) = causes_of(facts, slow={}, late=(), limits=LIMITS)
    assert remedy in cause.remedy and "/runs/a/ledger" in cause.what


def test_a_healthy_job_has_no_cause() -> None:
    healthy = replace(JOB, ranks=(rank(waits={"buffer: group 3 of step 11": 0.4}),))
    assert named(healthy) == [] and named(replace(JOB, is_finished=True)) == []
    # A long wait alone is no cause: engines that make tokens are slow, or their answers are long.
    assert named(JOB) == []


def test_those_who_wait_for_a_stopped_process_are_not_named() -> None:
    """A push waits for two servers of a group, the trainer for groups, and one engine stands still."""
    pushing = {f"weights: rollout-{n} to activate version 49": 26.0 for n in (0, 1)}
    facts = replace(JOB, ranks=(replace(WAITING, waits=WAITING.waits | pushing),))
    assert named(replace(facts, servers=(server(), server("rollout-1", **FROZEN)))) == [
        ("rollout-1's engine", On.ENGINE)
    ]


def test_agents_that_fail_are_named_with_the_sessions_that_wait() -> None:
    waits = {
        "sessions: 64 wait for an agent (POST /sessions)": 30.0,
        "sessions: the last 12 sessions of 10.0.0.1 failed: no request": 2.0,
    }
    facts = replace(JOB, servers=(server(waits=waits),))
    (cause,) = causes_of(facts, slow={}, late=(), limits=LIMITS)
    assert cause.what == (
        "64 wait for an agent (POST /sessions) for 30 s; the last 12 sessions of 10.0.0.1 failed: no request"
    )


def test_a_removed_server_stays_named() -> None:
    (cause,) = causes_of(replace(JOB, lost_servers={"rollout-2": 12.0}), slow={}, late=(), limits=LIMITS)
    assert (cause.name, cause.what) == (
        "rollout-2",
        "no message; removed 12 s ago: other servers make its samples",
    )


def test_effects_name_tickets_and_places() -> None:
    assert effects_of(JOB, limits=LIMITS) == [
        "trainer-0 waits for group 3 of step 11, 25 s",
        "step 11 lacks 3 groups of 16: ticket 812 at rollout-0 for 41 s",
    ]
    assert effects_of(replace(JOB, open_step=12, ranks=(rank(),)), limits=LIMITS) == []
    young = replace(JOB, oldest_leases=(LeaseFacts(ticket_id=812, server="rollout-0", age_s=1.0),))
    assert effects_of(replace(young, ranks=(rank(),)), limits=LIMITS) == []


def test_an_engine_at_a_tenth_of_its_speed_is_slow() -> None:
    speeds, tokens = Speeds(), 0.0
    for second in range(60):
        tokens += 100.0 if second < 40 else 10.0
        speeds.observe("rollout-0", work=tokens, busy_s=second, added_s=8 * second, now_s=second)
        assert bool(speeds.slow()) == (second >= 44), second
    assert speeds.slow()["rollout-0"].startswith("10% of its usual speed for ")
    tokens += 400.0
    speeds.observe("rollout-0", work=tokens, busy_s=64, added_s=8 * 64, now_s=64)
    assert not speeds.slow()


@pytest.mark.parametrize(("num_busy", "rate"), [(1, 20.0), (64, 150.0), (0, 0.0)])
def test_other_loads_are_not_slow(num_busy: int, rate: float) -> None:
    """Fewer sequences make fewer tokens together, more make fewer each, and none make none."""
    speeds, tokens, busy_s, added_s = Speeds(), 0.0, 0.0, 0.0
    for second in range(80):
        num_now = 8 if second < 40 else num_busy
        tokens += 100.0 if second < 40 else rate
        busy_s, added_s = busy_s + bool(num_now), added_s + num_now
        speeds.observe("rollout-0", work=tokens, busy_s=busy_s, added_s=added_s, now_s=second)
    assert not speeds.slow()


def test_a_slow_engine_is_named_until_it_is_clearly_faster() -> None:
    speeds, tokens, named = Speeds(), 0.0, []
    for second, rate in enumerate([100.0] * 40 + [20.0] * 12 + [30.0] * 12 + [50.0] * 12):
        tokens += rate
        speeds.observe("rollout-0", work=tokens, busy_s=second, added_s=second, now_s=second)
        named.append(bool(speeds.slow()))
    assert not any(named[:43]) and all(named[48:64]) and not named[-1]


def test_an_engine_that_had_little_work_is_slow() -> None:
    """It had a request for a fifth of the time; now, at a twentieth of its speed, it always has one."""
    speeds, tokens, busy_s = Speeds(), 0.0, 0.0
    for second in range(240):
        is_usual = second < 200
        tokens, busy_s = tokens + (20.0 if is_usual else 5.0), busy_s + (0.2 if is_usual else 1.0)
        speeds.observe("rollout-0", work=tokens, busy_s=busy_s, added_s=busy_s, now_s=second)
        assert not speeds.slow() or second >= 200
        if second == 210:
            assert speeds.slow()
    assert speeds.slow()["rollout-0"].startswith("5% of")


def test_an_engine_that_stood_still_is_not_slow_afterwards() -> None:
    watchdog = Watchdog(Metrics(), limits=LIMITS)
    named = set()
    for second in range(120):
        stands_still = 60 <= second < 90
        tokens = 100.0 * (second if second < 60 else max(60, second - 30))
        stats = {"tokens_generated": tokens, "at_engine_s": float(second), "requests_s": 4.0 * second}
        waits = {"engine: a token": second - 60.0} if second > 61 and stands_still else {}
        facts = replace(JOB, ranks=(rank(),), servers=(server(stats=stats, waits=waits),))
        watchdog.look(facts, load=load(float(second), wait=0.5, idle=0.5), max_staleness=4)
        named |= {cause["what"] for cause in watchdog.report()["causes"]}
    assert named and all(what.startswith("no token for") for what in named), named


def test_a_server_is_late_only_after_a_while() -> None:
    watchdog = Watchdog(Metrics(), limits=LIMITS)
    late = replace(JOB, ranks=(rank(),), servers=(server(stats={"loop_late_s": 0.8}), server("rollout-1")))
    named = []
    for second in range(30):
        watchdog.look(late, load=load(float(second), wait=0.5, idle=0.5), max_staleness=4)
        named.append([cause["name"] for cause in watchdog.report()["causes"]])
    assert named.index(["rollout-0"]) == 2 * LIMITS.stall_s
    watchdog.look(replace(JOB, ranks=(rank(),)), load=load(30.0, wait=0.5, idle=0.5), max_staleness=4)
    assert watchdog.report()["causes"] == []


def test_a_trainer_in_step_with_its_heartbeats_is_not_slow() -> None:
    """Its steps of a tenth of a second fall between the heartbeats at first, and on them later."""
    watchdog = Watchdog(Metrics(), limits=LIMITS)
    for second in range(200):
        waits = {"buffer: groups": 0.5} if second < 100 else {}
        stats = {"row_step": float(second), "busy_s": 0.1 * second}
        job = replace(JOB, ranks=(rank(waits=waits, stats=stats),))
        watchdog.look(job, load=load(float(second), wait=0.9, idle=0.1), max_staleness=4)
        assert watchdog.report()["causes"] == []
    for second in range(200, 300):
        stats = {"row_step": 200.0 + 0.1 * (second - 200), "busy_s": 20.0 + 0.9 * (second - 200)}
        job = replace(JOB, ranks=(rank(stats=stats),))
        watchdog.look(job, load=load(float(second), wait=0.1, idle=0.1), max_staleness=4)
    assert [cause["name"] for cause in watchdog.report()["causes"]] == ["trainer-0"]


def test_waits_for_a_buffer_that_could_not_write_blame_nobody() -> None:
    watchdog = Watchdog(Metrics(), limits=LIMITS)
    waiting = replace(JOB, ranks=(rank(waits={"CommitStep": 31.0}),), servers=(server(),))
    blocked = replace(waiting, store_trouble="disk full: 0 MiB are free", store_trouble_s=31.0)
    named = []
    for second, facts in enumerate((blocked, waiting, waiting, *[waiting] * 5)):
        watchdog.look(facts, load=load(float(second), wait=0.5, idle=0.5), max_staleness=4)
        named.append([cause["name"] for cause in watchdog.report()["causes"]])
    assert named[:5] == [["buffer"], [], [], [], []] and named[-1] == ["trainer-0"]


def test_a_server_that_is_removed_may_only_be_stopped() -> None:
    facts = replace(JOB, servers=(), lost_servers={"rollout-0": 12.0})
    (cause,) = causes_of(facts, slow={}, late=(), limits=LIMITS)
    assert "kill -CONT" in cause.remedy and "--join" in cause.remedy


def test_a_buffer_that_was_stopped_blames_nobody() -> None:
    awake = Wakefulness(now_s=0.0)
    for tick in range(4):
        awake.tick(now_s=0.25 * tick, next_s=0.25 * (tick + 1))
    assert awake.silent_s(0.0, now_s=0.75) == 0.75
    awake.tick(now_s=31.0, next_s=31.25)
    assert awake.silent_s(0.7, now_s=31.0) == 0.0 and awake.silent_s(0.7, now_s=36.5) == 5.5


def load(at_s: float, *, wait: float, idle: float, starved: float = 0.0) -> PoolTotals:
    return PoolTotals(
        at_s=at_s,
        wait_s=wait * at_s,
        busy_s=(1 - idle) * at_s,
        idle_s=idle * at_s,
        starved_s=starved * at_s,
    )


@pytest.mark.parametrize(
    ("shares", "max_staleness", "says"),
    [
        ({"wait": 0.62, "idle": 0.02}, 4, "the engines are the limit .*up to 2.6 times"),
        ({"wait": 0.05, "idle": 0.5}, 4, "the trainer is the limit .*up to 2.0 times .* 50% of the engines"),
        ({"wait": 0.02, "idle": 0.02}, 4, "both pools are busy"),
        ({"wait": 0.5, "idle": 0.5}, 0, "take turns"),
        ({"wait": 0.5, "idle": 0.5}, 2, r"a larger max_staleness \(now 2\)"),
        ({"wait": 0.5, "idle": 0.5, "starved": 0.4}, 4, "rewards or environments are the limit"),
    ],
)
def test_the_limit_of_a_healthy_job(shares: dict[str, float], max_staleness: int, says: str) -> None:
    utilisation = Utilisation()
    utilisation.observe(load(1.0, **shares))
    assert advice(utilisation, max_staleness=max_staleness) == ""
    utilisation.observe(load(30.0, **shares))
    text = advice(utilisation, max_staleness=max_staleness)
    assert re.search(says, text), text


OVERDUE = replace(
    JOB,
    num_ready=5,
    oldest_leases=(
        LeaseFacts(ticket_id=790, server="rollout-1", age_s=60.0),
        LeaseFacts(ticket_id=812, server="rollout-0", age_s=41.0, is_due=True),
    ),
)
CLOSING = replace(JOB, overdue="close", close_after=4, group_size=8, num_parts=5)


def advised(facts: JobFacts, *, max_staleness: int = 4, reserved: float = 0.0, **shares: float) -> str:
    utilisation = Utilisation()
    for at_s in (1.0, 30.0):
        utilisation.observe(replace(load(at_s, **shares), reserved_s=reserved * at_s))
    return advice(utilisation, max_staleness=max_staleness, facts=facts)


def test_a_wait_for_overdue_groups_is_named_with_its_remedy() -> None:
    """A single long completion keeps an engine busy, so its idle share does not show the wait."""
    text = advised(OVERDUE, wait=0.6, idle=0.0, reserved=0.5)
    assert re.search(
        r"the slowest samples are the limit .*50% of the time, .*"
        r"\(now ticket 812 at rollout-0 runs for 41 s\)\. "
        r"buffer\.overdue=close trains on complete samples .*a larger max_staleness \(now 4\)",
        text,
    ), text
    refused = replace(OVERDUE, contradicts_close="objective.name=rebel needs whole groups")
    text = advised(refused, wait=0.6, idle=0.0, reserved=0.5)
    assert "close would not wait, but objective.name=rebel needs whole groups;" in text
    # A few waits of this kind do not hide that the engines are too slow.
    assert advised(OVERDUE, wait=0.6, idle=0.0, reserved=0.2).startswith("the engines are the limit")
    assert "(now " not in advised(JOB, wait=0.6, idle=0.0, reserved=0.5).partition("larger")[0]


def test_closed_groups_are_explained() -> None:
    full = replace(CLOSING, num_ready=20, num_parts=33)
    assert "complete samples for 1.5 steps are waiting, so few new groups begin" in advised(
        full, wait=0.0, idle=0.5
    )
    assert "are waiting" not in advised(CLOSING, wait=0.0, idle=0.5)
    assert "are waiting" not in advised(replace(full, overdue="wait"), wait=0.0, idle=0.5)
    assert "a larger staleness.close_after (now 4)" in advised(CLOSING, wait=0.5, idle=0.5)


def test_effects_say_what_a_step_lacks() -> None:
    assert effects_of(OVERDUE, limits=LIMITS)[1] == (
        "step 11 lacks 3 groups of 16, whose positions are reserved (5 other groups are complete): "
        "ticket 790 at rollout-1 for 60 s, ticket 812 at rollout-0 for 41 s"
    )
    late = replace(
        CLOSING,
        oldest_leases=(
            LeaseFacts(ticket_id=790, server="rollout-1", age_s=60.0, is_late=True),
            LeaseFacts(ticket_id=812, server="rollout-0", age_s=41.0),
        ),
    )
    assert effects_of(late, limits=LIMITS)[1] == (
        "step 11 lacks 3 positions of 16, each of a group or of 8 parts (5 are complete): "
        "late samples of ticket 790 at rollout-1 for 60 s, ticket 812 at rollout-0 for 41 s"
    )
    assert "lacks 1 position of 16" in effects_of(replace(late, num_recorded=15), limits=LIMITS)[1]


def test_the_watchdog_advises_by_the_newest_facts() -> None:
    watchdog = Watchdog(Metrics(), limits=LIMITS)
    for second in range(30):
        totals = replace(load(float(second), wait=0.6, idle=0.0), reserved_s=0.6 * second)
        watchdog.look(OVERDUE, load=totals, max_staleness=4)
    assert "now ticket 812 at rollout-0" in watchdog.report()["bottleneck"]


def test_the_watchdog_reports_and_measures(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    watchdog = Watchdog(metrics, limits=LIMITS)
    frozen = replace(JOB, servers=(server(**FROZEN),))
    for at_s in (1.0, 2.0):
        watchdog.look(frozen, load=load(at_s, wait=0.5, idle=0.5), max_staleness=4)
    assert watchdog.report()["causes"][0]["what"] == "no token for 28 s"
    assert b'areal_waiting_seconds{on="engine"} 28.0' in metrics.exposition()
    watchdog.look(replace(JOB, ranks=(rank(),)), load=load(3.0, wait=0.5, idle=0.5), max_staleness=4)
    assert watchdog.report()["causes"] == []
    assert b'areal_waiting_seconds{on="engine"} 0.0' in metrics.exposition()
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2 and "rollout-0's engine: no token for 28 s" in messages[0], messages
