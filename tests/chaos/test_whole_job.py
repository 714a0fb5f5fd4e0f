"""A real job whose buffer, trainer, servers and engines are killed at random, about every 15 seconds."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.support.launching import finish, launcher, num_steps_done, processes_of, wait_for_steps

MEAN_PAUSE_S = 15.0
_CALM_S = 60.0
"""No daemon is killed three times within this time: the launcher would stop restarting it and end the job."""
SETTINGS = (
    "name=x",
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.Checksum",
    "sampling.group_size=4",
    "trainer.groups_per_step=8",
    "trainer.num_steps=1000000",
    "trainer.checkpoint_interval=10",
    "trainer.lr_schedule=constant",
    "eval.num_prompts=0",
    "rollout.num_servers=2",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "weights.push_deadline_s=10",
    "buffer.lease_timeout_s=5",
    "max_staleness=2",
)


class Killer:
    """Kills processes at random and records the times."""

    def __init__(self, root: Path, victims: dict[str, str], *, seed: int) -> None:
        """`victims`: name -> a part of the command line."""
        self._root, self._victims = root, victims
        self.rng = random.Random(seed)
        self.kills: dict[str, list[float]] = defaultdict(list)

    def strike(self) -> None:
        """Sends SIGKILL to one of the processes that may be killed now."""
        now_s = time.monotonic()
        living = processes_of(self._root)
        names = [
            name
            for name in self._victims
            if sum(now_s - killed_s < _CALM_S for killed_s in self.kills[name]) < 2
        ]
        self.rng.shuffle(names)
        for name in names:
            pids = [pid for pid, command in living.items() if self._victims[name] in command]
            if pids:
                os.kill(min(pids), signal.SIGKILL)
                self.kills[name].append(now_s)
                return


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("num_shards", "duration_s"), [(1, 1800.0), (2, 600.0)])
def test_a_job_with_random_kills_loses_nothing(tmp_path: Path, num_shards: int, duration_s: float) -> None:
    root = tmp_path / "runs" / "x"
    victims = {
        "trainer": "-m trainer --config",
        "server 0": "-m rollout_server --config",
        "server 1": "--name rollout-1",
        "engine": "-m rollout_server.engine",
    } | {
        f"buffer {index}": f"--name {name}"
        for index, name in enumerate(["buffer"] if num_shards == 1 else ["buffer-0", "buffer-1"])
    }
    killer = Killer(root, victims, seed=num_shards)
    with launcher(*SETTINGS, f"buffer.num_shards={num_shards}", cwd=tmp_path) as process:
        wait_for_steps(5, root, process=process)
        end_s = time.monotonic() + duration_s
        while (pause_s := killer.rng.expovariate(1 / MEAN_PAUSE_S)) < end_s - time.monotonic():
            time.sleep(pause_s)
            assert process.poll() is None, process.communicate()
            killer.strike()
        # The process that was killed last is started again, and the job continues.
        wait_for_steps(num_steps_done(root) + 5, root, process=process)
        process.terminate()
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert len(killer.kills) == len(victims), dict(killer.kills)
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    states = dict(audit.tickets)
    assert states.pop("issued") == sum(states.values())
    assert states.get("dropped", 0) == sum(audit.drops.values())
    print(f"{sum(map(len, killer.kills.values()))} kills in {duration_s:.0f} s", *audit.lines(), sep="\n")
