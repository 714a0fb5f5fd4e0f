"""The state machine of a local job with simulated time: observations in, actions out."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest

from areal_like.config import Config, from_mapping
from launch.local_job.actions import (
    Action,
    Exit,
    HandOver,
    Kill,
    KillEverything,
    Notice,
    Start,
    Terminate,
    Tried,
    describe_exit,
)
from launch.local_job.lifecycle import JobLifecycle, Phase
from launch.local_job.specs import DRAINED, JobSpecs
from launch.observation.observer import DaemonView, Observation
from launch.observation.progress import Progress
from launch.view.plain import phase_line


def lifecycle(**settings: object) -> JobLifecycle:
    config: Config = from_mapping({"rollout": {"num_servers": 2, "start_timeout_s": 10.0}} | settings)
    specs = JobSpecs(config, config_path=Path("config.yaml"))
    return JobLifecycle(config, specs=specs, last_words=lambda name: [f"{name} hangs"], now_s=0.0)


def seen(
    *ready: str, step: int = -1, at_unix_s: float = 0.0, joined: bool = False, pid: int = 1
) -> Observation:
    """An observation: these daemons are ready, `step` is finished, and a server has `joined` or not.

    `pid`: of each daemon.
    """
    endpoint = {"stream": "tcp://127.0.0.1:7001", "http": "127.0.0.1:8001", "pid": pid}
    peers = [{"name": "joined", "role": "rollout"}] if joined else []
    daemons = {
        name: DaemonView(
            name=name,
            endpoint=endpoint | {"role": name.partition("-")[0]},
            status={"not_ready": "", "peers": peers, "why": {}},
            seen_s=1.0,
        )
        for name in ready
    }
    rows = ({"step": step, "time_unix_s": at_unix_s},) if step >= 0 else ()
    return Observation(daemons=daemons, progress=Progress(recent=rows))


ALL = ("buffer", "rollout-0", "rollout-1", "trainer-0")


def tick(job: JobLifecycle, now_s: float, observation: Observation) -> list[Action]:
    return job.tick(observation, now_s=now_s, now_unix_s=now_s)


def started(actions: list[Action]) -> list[str]:
    return [action.spec.name for action in actions if isinstance(action, Start)]


def notices(actions: list[Action]) -> str:
    return "\n".join(action.text for action in actions if isinstance(action, Notice))


def running_job(**settings: object) -> JobLifecycle:
    """A job in which everything is ready, at time 2."""
    job = lifecycle(**settings)
    assert started(job.start()) == ["buffer", "prepare_model"]
    assert tick(job, 0.5, seen("buffer")) == [], "the model is not prepared yet"
    assert job.exited(Exit(name="prepare_model", code=0), now_s=1.0) == []
    assert started(tick(job, 1.0, seen("buffer"))) == ["rollout-0", "rollout-1", "trainer"]
    assert tick(job, 1.5, seen("buffer", "rollout-0")) == [] and job.phase is Phase.STARTING
    assert tick(job, 2.0, seen(*ALL)) == []
    assert job.phase is Phase.RUNNING
    return job


def test_daemons_start_while_the_buffer_reads_its_ledger() -> None:
    job = lifecycle()
    assert started(job.start(has_model=True)) == ["buffer"], "a resumed run has its model"
    assert started(tick(job, 0.1, seen())) == ["rollout-0", "rollout-1", "trainer"]
    assert job.waiting_for(seen("rollout-0", "rollout-1")) == "buffer (starting), trainer-0 (starting)"
    assert tick(job, 1.0, seen("rollout-0", "rollout-1", "trainer-0")) == []
    assert job.phase is Phase.STARTING
    tick(job, 2.0, seen(*ALL))
    assert job.phase is Phase.RUNNING
    assert job.replace("buffer", now_s=3.0)[-1].spec.command[-1] == "buffer.ports=[7001]"  # type: ignore[union-attr]


def test_a_buffer_that_does_not_start_ends_the_run() -> None:
    job = lifecycle()
    job.start(has_model=True)
    for now_s in (0.1, 59.9):
        tick(job, now_s, with_status(seen("rollout-0"), "rollout-0", stats={"progress": now_s}))
    tick(job, 300.1, seen("rollout-0"))
    assert job.outcome.failure == ["buffer was not ready after 300 s: starting", "  buffer hangs"]
    job = lifecycle()
    job.start(has_model=True)
    tick(job, 0.1, seen())
    job.exited(Exit(name="buffer", code=1), now_s=1.0)
    assert job.phase is Phase.CLOSING and job.outcome.exit_code == 1


def test_a_run_closes_trainer_first_and_buffer_last() -> None:
    job = running_job()
    assert job.exited(Exit(name="trainer", code=0), now_s=9.0) == [
        Terminate("rollout-0"),
        Terminate("rollout-1"),
    ]
    assert job.phase is Phase.CLOSING
    assert job.waiting_for(seen()) == "waiting for rollout-0, rollout-1"
    for name in ("rollout-0", "rollout-1"):
        assert tick(job, 9.1, seen()) == []
        assert job.exited(Exit(name=name, code=0), now_s=9.1) == []
    assert tick(job, 9.2, seen()) == [Terminate("buffer")]
    assert not job.is_over
    job.exited(Exit(name="buffer", code=-signal.SIGTERM), now_s=9.3)
    assert job.is_over and (job.outcome.exit_code, job.outcome.failure) == (0, [])
    assert job.outcome.is_finished


def test_daemons_that_hear_of_the_end_close_a_finished_run() -> None:
    job = running_job()
    for name in ("rollout-0", "rollout-1"):
        assert notices(job.exited(Exit(name=name, code=0), now_s=9.0)) == f"{name} has left the finished run"
    assert job.exited(Exit(name="buffer", code=0), now_s=9.1) == [], "the trainer ends by itself"
    assert job.waiting_for(seen()) == "waiting for trainer"
    job.exited(Exit(name="trainer", code=0), now_s=9.2)
    assert job.is_over and job.outcome.is_finished and job.outcome.exit_code == 0


def test_a_run_is_finished_if_its_buffer_says_so() -> None:
    job = running_job(daemon={"drain_timeout_s": 100.0})
    for name in ("rollout-0", "rollout-1"):
        job.exited(Exit(name=name, code=0), now_s=9.0)
    assert tick(job, 9.1, seen(*ALL)) == [] and job.phase is Phase.CLOSING
    assert tick(job, 18.9, seen(*ALL)) == []
    assert tick(job, 19.2, seen(*ALL)) == [Terminate("trainer")], "it has had time to end by itself"
    job.exited(Exit(name="trainer", code=-signal.SIGTERM), now_s=19.3)
    job.exited(Exit(name="buffer", code=0), now_s=19.4)
    assert job.is_over and job.outcome.is_finished and job.outcome.exit_code == 0


def test_a_server_that_calls_exit_does_not_finish_the_run() -> None:
    job = running_job()
    job.exited(Exit(name="rollout-0", code=0), now_s=3.0)
    assert tick(job, 3.1, seen(*ALL)) == [] and job.phase is Phase.RUNNING
    job.exited(Exit(name="rollout-1", code=0), now_s=4.0)
    tick(job, 4.1, seen(*ALL))
    for name in ("trainer", "buffer"):
        job.exited(Exit(name=name, code=DRAINED), now_s=15.0)
    assert job.is_over and not job.outcome.is_finished


@pytest.mark.parametrize("name", ["trainer", "buffer"])
def test_a_daemon_stopped_by_a_user_drains_the_run(name: str) -> None:
    job = running_job()
    actions = job.exited(Exit(name=name, code=DRAINED), now_s=3.0)
    assert notices(actions) == f"a user stopped the {name}: closing the run"
    for other in {"trainer", "rollout-0", "rollout-1", "buffer"} - {name}:
        job.exited(Exit(name=other, code=DRAINED), now_s=4.0)
    assert job.is_over and not job.outcome.is_finished and job.outcome.exit_code == 0


def test_each_stage_is_killed_in_time_for_the_next() -> None:
    job = running_job(daemon={"drain_timeout_s": 100.0})
    actions = job.stop_requested(1, now_s=10.0)
    assert actions[1:] == [Terminate("trainer")] and "writes a checkpoint" in notices(actions)
    assert tick(job, 84.0, seen()) == []
    actions = tick(job, 86.0, seen())
    assert actions[0] == Kill("trainer") and actions[2:] == [Terminate("rollout-0"), Terminate("rollout-1")]
    assert notices(actions) == "trainer did not end in time: killed"
    actions = tick(job, 101.0, seen())
    assert [a for a in actions if not isinstance(a, Notice)] == [
        Kill("rollout-0"),
        Kill("rollout-1"),
        Terminate("buffer"),
    ]
    assert tick(job, 109.9, seen()) == []
    assert Kill("buffer") in tick(job, 110.1, seen())
    assert job.is_over and job.outcome.exit_code == 1


FULL = {
    "on": "buffer",
    "name": "buffer",
    "what": "it cannot write its ledger: disk full: 3 MiB are free",
    "remedy": "make room",
}


def with_status(observation: Observation, name: str, **status: object) -> Observation:
    """The observation with these fields of a daemon's /status."""
    view = observation.daemons[name]
    observation.daemons[name] = dataclasses.replace(view, status=(view.status or {}) | status)
    return observation


def test_a_killed_process_is_named_with_its_wait() -> None:
    for waiting, reason in (
        (
            with_status(seen(*ALL), "buffer", why={"causes": [FULL]}),
            "the job waits on buffer: it cannot write",
        ),
        (
            with_status(seen(*ALL), "trainer-0", waiting_on={"CommitStep": 21.4}),
            "it waits for CommitStep, 21 s",
        ),
    ):
        job = running_job(daemon={"drain_timeout_s": 100.0})
        job.stop_requested(1, now_s=10.0)
        assert notices(tick(job, 86.0, waiting)).startswith(f"trainer did not end in time: killed; {reason}")


def test_a_start_that_waits_for_the_disk_says_so() -> None:
    job = lifecycle()
    job.start()
    job.exited(Exit(name="prepare_model", code=0), now_s=1.0)
    tick(job, 1.0, seen("buffer"))
    full = with_status(seen("buffer"), "buffer", why={"causes": [FULL]})
    assert "disk full: 3 MiB" in phase_line(full, phase=job.phase, detail=job.waiting_for(full))
    for now_s in (2.0, 42.1):
        tick(job, now_s, full)
    assert "disk full: 3 MiB" in job.outcome.failure[-1]


def not_ready(observation: Observation, reason: str) -> Observation:
    """The observation with a buffer that is not ready for this reason."""
    return with_status(observation, "buffer", not_ready=reason)


def test_a_start_goes_on_while_a_buffer_waits_for_space() -> None:
    job = lifecycle()
    job.start(has_model=True)
    tick(job, 1.0, seen("buffer", "rollout-0", "trainer-0"))
    full = not_ready(seen("buffer", "rollout-0", "trainer-0"), "disk full: 3 MiB are free")
    tick(job, 2.0, full)
    assert job.waiting_for(full) == "rollout-1 (starting)", "the buffer has been ready"
    tick(job, 3.0, not_ready(seen(*ALL), "disk full: 3 MiB are free"))
    assert job.phase is Phase.RUNNING


def test_all_shards_must_be_ready_at_the_same_time() -> None:
    job = lifecycle(buffer={"num_shards": 2})
    job.start(has_model=True)
    others = ("rollout-0", "rollout-1", "trainer-0")
    tick(job, 1.0, seen("buffer-0", *others))
    tick(job, 2.0, with_status(seen("buffer-0", "buffer-1", *others), "buffer-0", not_ready="disk full"))
    no_address = seen("buffer-0", "buffer-1", *others)
    del no_address.daemons["buffer-1"].endpoint["stream"]
    tick(job, 3.0, no_address)
    assert job.phase is Phase.STARTING
    tick(job, 300.1, seen("buffer-0", *others))
    assert job.outcome.failure == ["buffer-1 was not ready after 300 s: starting", "  buffer-1 hangs"]


def test_a_buffer_that_dies_during_preparation_is_restarted() -> None:
    job = lifecycle()
    job.start()
    tick(job, 1.0, seen("buffer"))
    assert "starting it again in 0.5 s" in notices(job.exited(Exit(name="buffer", code=3), now_s=2.0))
    (start,) = tick(job, 2.6, seen())
    assert isinstance(start, Start) and start.spec.command[-1] == "buffer.ports=[7001]"
    assert job.phase is Phase.PREPARING


def test_the_wait_for_a_buffer_counts_from_its_start() -> None:
    job = lifecycle()
    job.start()
    tick(job, 1.0, seen())
    job.exited(Exit(name="prepare_model", code=0), now_s=55.0)
    tick(job, 55.0, seen())
    tick(job, 300.1, seen())
    assert job.outcome.failure[0] == "buffer was not ready after 300 s: starting"


def test_a_trainer_that_a_blocked_buffer_ends_names_it() -> None:
    job = lifecycle()
    job.start(has_model=True)
    tick(job, 1.0, not_ready(seen("buffer"), "locked: another program holds the ledger"))
    job.exited(Exit(name="trainer", code=1, last_words=("no reply to Hello",)), now_s=58.0)
    assert job.outcome.failure == [
        "trainer failed (exit code 1); its last lines:",
        "  no reply to Hello",
        "buffer was not ready: locked: another program holds the ledger",
    ]


def test_a_buffer_that_has_not_answered_yet_is_not_a_cause() -> None:
    starting = DaemonView(name="buffer", endpoint={"role": "buffer"}, status=None, seen_s=0.0)
    assert Observation(daemons={"buffer": starting}).cause == ""


def test_a_second_stop_signal_kills_everything() -> None:
    job = running_job()
    job.stop_requested(1, now_s=3.0)
    assert KillEverything() in job.stop_requested(2, now_s=4.5)
    assert job.is_over and job.outcome.exit_code == 1
    assert job.stop_requested(2, now_s=4.6) == [], "there is nothing left to kill"


def test_a_dead_server_is_started_again_after_a_delay() -> None:
    job = running_job()
    actions = job.exited(Exit(name="rollout-1", code=3), now_s=5.0)
    assert notices(actions) == "rollout-1 ended (exit code 3): starting it again in 0.5 s"
    assert tick(job, 5.4, seen(*ALL)) == []
    assert started(tick(job, 5.6, seen(*ALL))) == ["rollout-1"]


def test_the_run_ends_when_no_server_is_restarted_any_more() -> None:
    job = running_job()
    job.exited(Exit(name="rollout-1", code=DRAINED), now_s=2.5)
    now_s = 3.0
    for _ in range(4):
        job.exited(Exit(name="rollout-0", code=3, last_words=("no device",)), now_s=now_s)
        now_s += 10.0
        actions = tick(job, now_s, seen("buffer", "trainer-0"))
    assert Terminate("trainer") in actions and job.phase is Phase.CLOSING
    assert job.outcome.exit_code == 1
    assert "no rollout server is left" in job.outcome.failure[0] and "no device" in job.outcome.failure[1]


def test_a_joined_server_keeps_the_run_alive_until_it_leaves() -> None:
    job = running_job(buffer={"lease_timeout_s": 5.0})
    for name in ("rollout-0", "rollout-1"):
        assert (
            notices(job.exited(Exit(name=name, code=DRAINED), now_s=3.0)) == f"{name} was stopped by a user"
        )
    assert tick(job, 4.0, seen("buffer", "trainer-0", joined=True)) == []
    assert tick(job, 8.9, seen("buffer", "trainer-0")) == [], "the joined server may register again"
    assert tick(job, 9.1, seen("buffer", "trainer-0")) == [Terminate("trainer")]
    assert job.outcome.exit_code == 0


def test_wrong_settings_end_the_run_unless_they_have_worked() -> None:
    mistake = Exit(name="rollout-1", code=2, complaint="no such device")
    job = running_job()
    assert notices(job.exited(mistake, now_s=3.0)).startswith("rollout-1 ended (exit code 2): starting it")
    job = lifecycle()
    job.start()
    job.exited(Exit(name="prepare_model", code=0), now_s=1.0)
    tick(job, 1.0, seen("buffer"))
    job.exited(mistake, now_s=2.0)
    assert (job.outcome.exit_code, job.outcome.failure) == (2, ["no such device"])


def test_a_trainer_that_fails_before_step_0_is_not_restarted() -> None:
    job = running_job()
    job.exited(Exit(name="trainer", code=1), now_s=3.0)
    assert job.phase is Phase.CLOSING and job.outcome.exit_code == 1
    job = running_job()
    killed_rank = Exit(name="trainer", code=128 + signal.SIGKILL)
    assert "starting it again" in notices(job.exited(killed_rank, now_s=3.0))


def test_a_trainer_that_gets_further_is_always_started_again() -> None:
    job = running_job()
    now_s = 3.0
    for step in range(10):
        tick(job, now_s, seen(*ALL, step=step, at_unix_s=now_s))
        job.exited(Exit(name="trainer", code=1), now_s=now_s + 1)
        now_s += 60.0
        (start,) = tick(job, now_s, seen(*ALL, step=step, at_unix_s=now_s - 60))
        assert isinstance(start, Start) and start.from_newest_checkpoint
    for _ in range(4):
        job.exited(Exit(name="trainer", code=1, last_words=("nan",)), now_s=now_s + 1)
        now_s += 60.0
        tick(job, now_s, seen(*ALL, step=9, at_unix_s=now_s - 600))
    assert job.phase is Phase.CLOSING and "trainer died 4 times in a row" in job.outcome.failure[0]


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
def test_a_clock_that_is_set_does_not_end_a_run(ahead_s: float) -> None:
    """The rows of finished steps carry the trainer's clock, which may not be the launcher's any more."""
    job = running_job()
    now_s = 3.0
    for step in range(10):
        tick(job, now_s, seen(*ALL, step=step, at_unix_s=now_s - ahead_s))
        job.exited(Exit(name="trainer", code=1), now_s=now_s + 1)
        now_s += 60.0
        tick(job, now_s, seen(*ALL, step=step, at_unix_s=now_s - 60 - ahead_s))
    assert job.phase is Phase.RUNNING


@pytest.mark.parametrize("durability", ["process_crash", "none"])
def test_a_buffer_with_a_durable_ledger_restarts_at_its_port(durability: str) -> None:
    job = running_job(buffer={"durability": durability})
    actions = job.exited(Exit(name="buffer", code=-signal.SIGKILL), now_s=3.0)
    if durability == "none":
        assert job.outcome.failure[0].startswith("buffer failed (killed by SIGKILL)")
        assert actions == [Terminate("trainer")]
        return
    (start,) = tick(job, 4.0, seen(*ALL))
    assert isinstance(start, Start) and start.spec.command[-1] == "buffer.ports=[7001]"


def test_a_draining_trainer_gets_its_buffer_back() -> None:
    job = running_job()
    job.stop_requested(1, now_s=3.0)
    actions = job.exited(Exit(name="buffer", code=-signal.SIGKILL), now_s=3.5)
    assert "starting it again" in notices(actions)
    assert started(tick(job, 4.1, seen(*ALL))) == ["buffer"]


def test_a_replaced_trainer_starts_with_its_new_settings() -> None:
    job = running_job()
    actions = job.replace_trainer(["trainer.lr=1e-4"], seen=seen(*ALL))
    assert actions[1:] == [HandOver("127.0.0.1:8001")]
    (start,) = job.exited(Exit(name="trainer", code=DRAINED), now_s=4.0)
    assert isinstance(start, Start) and start.from_newest_checkpoint
    assert start.spec.command[-1] == "trainer.lr=1e-4" and job.phase is Phase.RUNNING
    assert Terminate("rollout-0") in job.exited(Exit(name="trainer", code=0), now_s=5.0), "it is done"


def on_trial(settings: list[str]) -> JobLifecycle:
    """A job whose trainer has just been replaced by one with these settings."""
    job = running_job()
    job.replace_trainer(settings, seen=seen(*ALL))
    assert tick(job, 3.0, seen(*ALL)) == [], "the trainer of before is ready, and finishes its step"
    (start,) = job.exited(Exit(name="trainer", code=DRAINED), now_s=4.0)
    assert isinstance(start, Start) and start.spec.command[-len(settings) :] == tuple(settings)
    assert tick(job, 4.1, seen(*ALL)) == [], "this was seen before the new one began"
    return job


def test_settings_of_a_replaced_trainer_count_when_it_is_ready() -> None:
    job = on_trial(["trainer.lr=1e-4"])
    assert tick(job, 4.2, seen("buffer", "rollout-0")) == []
    notice, tried = tick(job, 5.0, seen(*ALL, pid=2))
    assert notice == Notice("the trainer is ready with trainer.lr=1e-4")
    assert tried == Tried(settings=("trainer.lr=1e-4",))
    job.exited(Exit(name="trainer", code=-signal.SIGKILL), now_s=6.0)
    (start,) = tick(job, 7.0, seen(*ALL, pid=2))
    assert isinstance(start, Start) and start.spec.command[-1] == "trainer.lr=1e-4", "for good"
    job = on_trial(["trainer.lr=1e-4"])
    tried, *_ = job.exited(Exit(name="trainer", code=0), now_s=5.0)
    assert tried == Tried(settings=("trainer.lr=1e-4",)) and job.phase is Phase.CLOSING


@pytest.mark.parametrize("code", [2, 1, -signal.SIGKILL])
def test_a_trainer_that_is_not_ready_gets_its_old_settings(code: int) -> None:
    job = on_trial(["trainer.device=cuda", "trainer.lr=1e-4"])
    ended = Exit(name="trainer", code=code, complaint="no GPU")
    notice, tried, start = job.exited(ended, now_s=5.0)
    assert "starting it again with the previous settings" in notices([notice])
    assert tried == Tried(settings=("trainer.device=cuda", "trainer.lr=1e-4"), refusal=ended)
    assert isinstance(start, Start) and start.from_newest_checkpoint
    assert not any(word.startswith(("trainer.device=", "trainer.lr=")) for word in start.spec.command)
    assert job.phase is Phase.RUNNING and job.outcome.exit_code == 0
    assert tick(job, 6.0, seen(*ALL, pid=3)) == []
    assert "starting it again in" in notices(
        job.exited(Exit(name="trainer", code=-signal.SIGKILL), now_s=7.0)
    )


def test_refused_settings_end_no_run_after_another_order() -> None:
    job = on_trial(["trainer.device=cuda"])
    job.replace_trainer(["trainer.lr=1e-4"], seen=seen("buffer", "rollout-0"))
    ended = Exit(name="trainer", code=2, complaint="no GPU")
    _, tried, start = job.exited(ended, now_s=5.0)
    assert tried == Tried(settings=("trainer.device=cuda", "trainer.lr=1e-4"), refusal=ended)
    assert isinstance(start, Start) and not any(word.startswith("trainer.") for word in start.spec.command)
    assert job.phase is Phase.RUNNING and job.outcome.exit_code == 0


def test_a_server_is_replaced_when_it_has_drained() -> None:
    job = running_job()
    assert job.replace("rollout-1", now_s=3.0)[1:] == [Terminate("rollout-1")]
    assert notices(job.exited(Exit(name="rollout-1", code=DRAINED), now_s=4.0)).endswith("starting it again")
    assert started(tick(job, 4.1, seen(*ALL))) == ["rollout-1"]
    actions = job.exited(Exit(name="rollout-1", code=DRAINED), now_s=5.0)
    assert notices(actions) == "rollout-1 was stopped by a user", "asked once, it is replaced once"
    assert tick(job, 6.0, seen(*ALL)) == []


def test_a_server_that_dies_instead_counts_as_dead() -> None:
    job = running_job()
    job.replace("rollout-1", now_s=3.0)
    assert "starting it again in 0.5 s" in notices(job.exited(Exit(name="rollout-1", code=1), now_s=4.0))
    assert started(tick(job, 5.0, seen(*ALL))) == ["rollout-1"]
    assert "stopped by a user" in notices(job.exited(Exit(name="rollout-1", code=DRAINED), now_s=6.0))


def test_a_buffer_is_replaced_at_its_port() -> None:
    job = running_job()
    notice, kill, start = job.replace("buffer", now_s=3.0)
    assert isinstance(notice, Notice) and kill == Kill("buffer") and isinstance(start, Start)
    assert start.spec.command[-1] == "buffer.ports=[7001]" and job.phase is Phase.RUNNING
    for name in ("rollout-7", "prepare_model"):
        assert "this launcher does not run it" in notices(job.replace(name, now_s=3.0))


def test_a_buffer_without_a_ledger_is_not_replaced() -> None:
    job = running_job(buffer={"durability": "none"})
    assert "this launcher does not run it" in notices(job.replace("buffer", now_s=3.0))


def test_a_run_goes_back_to_its_step_before_anything_else() -> None:
    job = lifecycle(resume="step:20")
    job.start()
    job.exited(Exit(name="prepare_model", code=0), now_s=1.0)
    tick(job, 1.0, seen("buffer"))
    job.exited(Exit(name="trainer", code=-signal.SIGKILL), now_s=2.0)
    (start,) = tick(job, 3.0, seen("buffer"))
    assert isinstance(start, Start) and not start.from_newest_checkpoint, "newer checkpoints may be there"
    tick(job, 4.0, seen(*ALL))
    job.exited(Exit(name="trainer", code=-signal.SIGKILL), now_s=5.0)
    (start,) = tick(job, 7.0, seen(*ALL))
    assert isinstance(start, Start) and start.from_newest_checkpoint


def test_daemons_that_do_not_get_ready_are_named() -> None:
    job = lifecycle()
    job.start()
    job.exited(Exit(name="prepare_model", code=0), now_s=1.0)
    tick(job, 1.0, seen("buffer"))
    for now_s in (2.0, 21.9):
        assert tick(job, now_s, seen("buffer", "rollout-0")) == []
    busy = seen("buffer", "rollout-0")  # the engine generates for the first evaluation
    status = {"not_ready": "", "stats": {"progress": 1.0}}
    busy.daemons["rollout-0"] = dataclasses.replace(busy.daemons["rollout-0"], status=status)
    for now_s in (22.0, 41.9):
        assert tick(job, now_s, busy) == [], "a start that makes progress has no limit"
    tick(job, 42.1, busy)
    assert job.outcome.exit_code == 1
    assert job.outcome.failure == [
        "rollout-1 was not ready after 41 s: starting",
        "  rollout-1 hangs",
        "trainer-0 was not ready after 41 s: starting",
        "  trainer hangs",
    ]


def evaluating(*ready: str) -> Observation:
    """An observation in which the trainer waits for its first evaluation; its other ranks wait for it."""
    return with_status(seen(*ready, "trainer-0"), "trainer-0", not_ready="starting", state="evaluating")


def test_a_start_may_wait_for_the_first_evaluation() -> None:
    job = lifecycle(trainer={"world_size": 2})
    job.start()
    job.exited(Exit(name="prepare_model", code=0), now_s=1.0)
    tick(job, 1.0, seen("buffer"))
    servers = ("buffer", "rollout-0", "rollout-1")
    for now_s in (2.0, 30.0, 10_000.0):
        assert tick(job, now_s, evaluating(*servers)) == [] and job.phase is Phase.STARTING
    for now_s in (10_001.0, 10_021.0):
        assert tick(job, now_s, evaluating("buffer", "rollout-0")) == []
    tick(job, 10_042.0, evaluating("buffer", "rollout-0"))
    assert "rollout-1 was not ready" in job.outcome.failure[0], "a server has not started meanwhile"


def test_a_trainer_that_fails_while_it_drains_fails_the_run() -> None:
    job = running_job()
    job.stop_requested(1, now_s=3.0)
    assert job.exited(Exit(name="trainer", code=1, last_words=("disk full",)), now_s=4.0) == []
    assert job.outcome.exit_code == 1 and "trainer failed while it drained" in job.outcome.failure[0]


def test_exits_of_buffers_are_handled_first_servers_last() -> None:
    names = ["rollout-0", "trainer", "buffer"]
    assert running_job().by_exit_priority(names) == ["buffer", "trainer", "rollout-0"]


def test_routers_are_started_again_and_end_last() -> None:
    job = lifecycle(sessions={"num_routers": 2}, daemon={"http_port": 9000})
    job.start()
    routers = tick(job, 0.0, seen())
    assert started(routers) == ["router-0", "router-1"]
    assert "daemon.http_port=9004" in routers[0].spec.command, "after buffer, servers and trainer"
    job.exited(Exit(name="prepare_model", code=0), now_s=1.0)
    tick(job, 1.0, seen("buffer"))
    tick(job, 1.5, seen(*ALL, "router-0"))
    assert job.waiting_for(seen(*ALL, "router-0")) == "router-1 (starting)"
    tick(job, 2.0, seen(*ALL, "router-0", "router-1"))
    assert job.phase is Phase.RUNNING
    job.exited(Exit(name="router-0", code=-signal.SIGKILL), now_s=3.0)
    assert started(tick(job, 3.6, seen(*ALL))) == ["router-0"]
    assert job.replace("router-1", now_s=3.0)[-1] == Terminate("router-1")
    ended = job.exited(Exit(name="trainer", code=0), now_s=9.0)
    assert ended == [Terminate("rollout-0"), Terminate("rollout-1")], "agents hear the end from them"
    for name in ("rollout-0", "rollout-1"):
        job.exited(Exit(name=name, code=0), now_s=9.5)
    last = tick(job, 10.0, seen())
    assert {one.name for one in last if isinstance(one, Terminate)} == {"router-0", "router-1", "buffer"}


SCORED = (*ALL, "scorer-0", "scorer-1")


def scored_job() -> JobLifecycle:
    """A job with two score servers in which everything is ready, at time 2."""
    job = lifecycle(scorer={"path": "rm", "num_servers": 2})
    assert started(job.start()) == ["buffer", "prepare_model"]
    assert started(tick(job, 0.0, seen())) == ["scorer-0", "scorer-1"], "they load while the model is built"
    job.exited(Exit(name="prepare_model", code=0), now_s=1.0)
    assert started(tick(job, 1.0, seen("buffer"))) == ["rollout-0", "rollout-1", "trainer"]
    tick(job, 1.5, seen(*ALL, "scorer-0"))
    assert job.phase is Phase.STARTING and job.waiting_for(seen(*ALL, "scorer-0")) == "scorer-1 (starting)"
    tick(job, 2.0, seen(*SCORED))
    assert job.phase is Phase.RUNNING
    return job


def test_a_score_server_that_dies_is_started_again() -> None:
    job = scored_job()
    (notice,) = job.exited(Exit(name="scorer-1", code=-signal.SIGKILL), now_s=3.0)
    assert "scorer-1 ended (killed by SIGKILL): starting it again in 0.5 s" in notices([notice])
    assert started(tick(job, 3.1, seen(*ALL, "scorer-0"))) == []
    assert started(tick(job, 3.6, seen(*ALL, "scorer-0"))) == ["scorer-1"] and job.phase is Phase.RUNNING
    assert job.replace("scorer-0", now_s=3.0)[-1] == Terminate("scorer-0")
    job.exited(Exit(name="scorer-0", code=DRAINED), now_s=4.0)
    assert started(tick(job, 4.0, seen(*ALL))) == ["scorer-0"]


def test_a_run_without_a_score_server_ends() -> None:
    job = scored_job()
    now_s = 3.0
    for name in ("scorer-0", "scorer-1"):
        for _ in range(4):
            assert job.phase is Phase.RUNNING
            job.exited(Exit(name=name, code=1, last_words=("no memory",)), now_s=now_s)
            now_s += 10.0
            tick(job, now_s, seen(*ALL))
    assert job.phase is Phase.CLOSING and job.outcome.exit_code == 1
    assert job.outcome.failure[0].startswith("scorer-1 ended (exit code 1) and no score server is left")
    job = lifecycle(scorer={"path": "rm"})
    job.start()
    tick(job, 0.0, seen())
    job.exited(Exit(name="scorer-0", code=2, complaint="scorer: has 2 labels"), now_s=0.5)
    assert job.outcome.exit_code == 2 and job.outcome.failure == ["scorer: has 2 labels"]


def test_score_servers_end_after_the_rollout_servers() -> None:
    job = scored_job()
    ended = job.exited(Exit(name="trainer", code=0), now_s=9.0)
    assert ended == [Terminate("rollout-0"), Terminate("rollout-1")]
    for name in ("rollout-0", "rollout-1"):
        job.exited(Exit(name=name, code=0), now_s=9.5)
    last = tick(job, 10.0, seen())
    assert {one.name for one in last if isinstance(one, Terminate)} == {"scorer-0", "scorer-1", "buffer"}


def test_a_signal_without_a_name_has_its_number() -> None:
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL"
    assert describe_exit(-40) == "killed by signal 40"


def test_a_server_that_does_not_run_starts_on_request() -> None:
    job = running_job()
    job.exited(Exit(name="rollout-1", code=DRAINED), now_s=3.0)
    assert notices(job.replace("rollout-1", now_s=4.0)) == "restarting rollout-1"
    now_s = 4.0
    for _ in range(4):
        assert started(tick(job, now_s, seen(*ALL))) == ["rollout-1"]
        job.exited(Exit(name="rollout-1", code=1), now_s=now_s + 1)
        now_s += 10
    assert tick(job, now_s, seen(*ALL)) == [], "it is given up"
    assert notices(job.replace("rollout-1", now_s=now_s)) == "restarting rollout-1"
    assert started(tick(job, now_s, seen(*ALL))) == ["rollout-1"]


def test_a_dead_buffer_is_not_replaced_again() -> None:
    job = running_job()
    job.exited(Exit(name="buffer", code=-signal.SIGKILL), now_s=3.0)
    assert "is started again anyway" in notices(job.replace("buffer", now_s=3.1))
    assert started(tick(job, 5.0, seen(*ALL))) == ["buffer"]
