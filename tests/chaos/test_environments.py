"""A real job with environments that misbehave, while its processes are killed and stopped in mid-episode."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from launch.audit.run import audit_run
from tests.support.chat_jobs import build_chat_model
from tests.support.launching import finish, launcher, num_steps_done, processes_of, wait_for_steps, wait_until

MISHAPS = (
    "{raise: 0.02, print: 0.02, die: 0.02, hang: 0.005, stop: 0.005, allocate: 0.01, fork: 0.01, "
    "daemon: 0.005, garble: 0.01, no_number: 0.01, nothing: 0.01, long: 0.005, wait 0.5: 0.05}"
)
SETTINGS = (
    "name=x",
    "model.renderer=tests.support.line_chat.LineChat",
    "task._target_=tests.support.environment_tasks.ChatterTask",
    "task.max_prompt_tokens=64",
    f"task.mishaps={MISHAPS}",
    "sampling.group_size=4",
    "sampling.max_new_tokens=16",
    "rollout.max_context=256",
    "rollout.num_servers=2",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "rollout.generate_timeout_s=15",
    "episode.max_turns=3",
    "episode.step_timeout_s=2",
    "episode.memory_mb=128",
    "trainer.groups_per_step=8",
    "trainer.num_steps=1000000",
    "trainer.checkpoint_interval=10",
    "trainer.lr_schedule=constant",
    "eval.num_prompts=0",
    "weights.push_deadline_s=10",
    "buffer.lease_timeout_s=5",
    "max_staleness=2",
)
ZYGOTE = "rollout_server.workers.zygote"
_CALM_S = 60.0
"""No daemon is killed three times within this time: the launcher would stop restarting it and end the job."""


def is_worker(pid: int) -> bool:
    """True for a fork of a process that starts environments."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return ZYGOTE.encode() in Path(f"/proc/{parent}/cmdline").read_bytes()


def victims_of(root: Path) -> dict[str, list[int]]:
    """Processes of the job by their role."""
    found: dict[str, list[int]] = {"server": [], "engine": [], "zygote": [], "worker": []}
    for pid, command in processes_of(root).items():
        try:
            if ZYGOTE in command:
                found["worker" if is_worker(pid) else "zygote"].append(pid)
            elif "-m rollout_server.engine" in command:
                found["engine"].append(pid)
            elif "-m rollout_server --" in command:
                found["server"].append(pid)
        except OSError:  # it has just ended
            continue
    return found


def strike(root: Path, role: str, number: int, *, rng: random.Random) -> bool:
    """Sends a signal to one process of this role; False if there is none now."""
    pids = victims_of(root)[role]
    if not pids:
        return False
    try:
        os.kill(rng.choice(pids), number)
    except ProcessLookupError:
        return False
    return True


def run_job(directory: Path, *, duration_s: float, pause_s: float, seed: int) -> None:
    root = directory / "runs" / "x"
    model = directory / "model"
    build_chat_model(model)
    rng = random.Random(seed)
    struck: dict[tuple[str, int], list[float]] = {}
    with launcher(*SETTINGS, f"model.path={model}", cwd=directory) as process:
        wait_for_steps(2, root, process=process)
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            time.sleep(rng.uniform(0.5, 1.5) * pause_s)
            assert process.poll() is None, process.communicate()
            now_s = time.monotonic()
            roles = [
                role
                for role in victims_of(root)
                if role in ("zygote", "worker")
                or sum(now_s - at_s < _CALM_S for key in struck if key[0] == role for at_s in struck[key]) < 2
            ]
            role, number = rng.choice(roles), rng.choice([signal.SIGKILL, signal.SIGSTOP])
            if strike(root, role, number, rng=rng):
                struck.setdefault((role, int(number)), []).append(now_s)
                if number is signal.SIGSTOP and role == "server":
                    time.sleep(8.0)  # its leases expire
                    for pid in victims_of(root)["server"]:
                        os.kill(pid, signal.SIGCONT)
        wait_for_steps(num_steps_done(root) + 3, root, process=process)
        process.terminate()
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    # The end of a process's children takes a moment after its own.
    wait_until(lambda: not processes_of(root), what="the end of all processes", timeout_s=20)
    assert {role for role, _ in struck} == {"server", "engine", "zygote", "worker"}, struck
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    states = dict(audit.tickets)
    assert states.pop("issued") == sum(states.values())
    assert audit.failures["environment zero"] > 0
    print({key: len(times) for key, times in struck.items()}, *audit.lines(), sep="\n")


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_environments_and_their_processes_killed_and_stopped(tmp_path: Path) -> None:
    run_job(tmp_path, duration_s=300.0, pause_s=5.0, seed=1)
