"""One job of benchmarks/crash_cost.py: starts it, kills its processes, and detects when they work again."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from areal_like.paths import find_checkpoints
from areal_like.runtime.process import die_with_parent
from benchmarks.crash_books import PATIENCE, Kill
from benchmarks.crash_job import read_journal
from benchmarks.report import ROOT
from launch.local_job.child import RUN_MARKER

GROUP_SIZE, GROUPS_PER_STEP, CHECKPOINT_INTERVAL = 4, 8, 5
SETTLED_STEPS = PATIENCE + 1
"""Minimum number of new steps between two kills: everything that survives the first is trained by then."""
_LAST_STEPS = 6
"""Steps after the last kill: samples that are not trained by then never will be."""
_WAIT_S = 180.0
_PAUSE_S = 3.0
"""A kill follows up to this many seconds after the job has settled, so that it hits any phase of a step."""
_CALM_S = 31.0
"""The launcher waits longer before it restarts a daemon that has lived for less than this."""
SETTINGS = (
    "model.path=tiny",
    "model.renderer=rollout_server.rendering.tiny.TinyRenderer",
    "model.warm_start_steps=0",
    "task._target_=benchmarks.crash_job.ToolTask",
    "task.max_prompt_tokens=64",
    "advantage._target_=benchmarks.crash_job.JournaledGrpo",
    f"sampling.group_size={GROUP_SIZE}",
    "sampling.max_new_tokens=24",
    'sampling.stop=["1","2","3"]',
    "rollout.max_context=256",
    "rollout.num_servers=2",
    "rollout.max_running=16",
    "rollout.max_episodes=32",
    "rollout.queue_samples=8",
    "episode.max_turns=4",
    f"trainer.groups_per_step={GROUPS_PER_STEP}",
    f"trainer.checkpoint_interval={CHECKPOINT_INTERVAL}",
    "trainer.num_steps=1000000",
    "trainer.lr=1e-5",
    "trainer.lr_schedule=constant",
    "eval.num_prompts=0",
    f"max_staleness={PATIENCE - 1}",
    "weights.push_deadline_s=10",
    "buffer.lease_timeout_s=5",
)


class CrashJob:
    """A running job. Create it with `crash_job(...)`, which ends it."""

    def __init__(self, directory: Path, durability: str, *, seed: int) -> None:
        self._rng = random.Random(seed)
        self.root = directory / "job"
        self.journal = directory / "journal.jsonl"
        self._durability = durability
        self._out = directory / "out"
        self._command = [sys.executable, "-m", "launch", "run", "name=job", f"runs_dir={directory}"]
        self._command += [*SETTINGS, f"buffer.durability={durability}"]
        self._command += [f"task.journal={self.journal}", f"advantage.journal={self.journal}"]
        self._restarted_s: dict[str, float] = {}
        """Killed daemon of this launcher -> when it worked again."""
        self.kills: list[Kill] = []
        self.launcher = self._launch()

    def _launch(self, *more: str) -> subprocess.Popen[bytes]:
        self._restarted_s.clear()
        with self._out.open("ab") as out:
            return subprocess.Popen(
                [*self._command, *more],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signum=signal.SIGKILL),
            )

    def settle(self) -> None:
        """Waits until the job has a checkpoint, and has made steps after it or after the last kill."""
        self._wait(lambda: find_checkpoints(self.root / "checkpoints"), "the first checkpoint")
        first = max((kill.last_step for kill in self.kills), default=self.last_step)
        self._wait(lambda: self.last_step > first + SETTLED_STEPS, "steps after a recovery")

    def kill(self, role: str) -> None:
        """Kills a process of this role once the job has settled, and waits until everything works again."""
        self.settle()
        name = {"buffer": "buffer", "trainer": "trainer-0"}.get(role)
        name = name or self._rng.choice(["rollout-0", "rollout-1"])
        if role in ("buffer", "server"):
            time.sleep(max(0.0, self._restarted_s.get(name, 0.0) + _CALM_S - time.time()))
        time.sleep(self._rng.uniform(0.0, _PAUSE_S))
        daemons = {path.stem: self._pid(path.stem) for path in (self.root / "endpoints").glob("*.json")}
        makers = {line["maker"] for line in self._lines("begun")}
        offset = self.journal.stat().st_size
        living = self._processes()
        # The launcher is killed last: it restarts daemons, but not within a millisecond.
        victims = {"launcher": [self.launcher.pid], "job": [*living, self.launcher.pid]}
        at_s = time.time()
        for pid in victims.get(role, [daemons[name]]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        over_s, last_step = at_s, self.last_step
        is_new_job = role in victims or (role == "buffer" and self._durability == "none")
        if is_new_job:
            # Without its buffer the job ends by itself, and without the launcher each daemon does. A user, or
            # systemd, restarts it as soon as it has ended.
            self.launcher.wait(timeout=_WAIT_S)
            self._until(lambda: not any(map(_is_alive, living)), "end of all processes")
            over_s, last_step = time.time(), self.last_step
            self.launcher = self._launch("resume=latest")
        answered_s = 0.0
        if role == "buffer":
            self._wait(lambda: self._buffer_answers(daemons[name]), "an answer of the buffer")
            answered_s = time.time()
        resumed = None
        if is_new_job or role == "trainer":
            self._wait(lambda: self._steps_after(over_s), "the first step after the kill")
            resumed = self._steps_after(over_s)[0]
        self._wait(lambda: self.last_step > last_step, "a new step after the kill")
        if role == "server":
            self._wait(lambda: self._new_samples(makers, offset), "a sample of the new server")
            answered_s = min(self._new_samples(makers, offset))
        elif role != "buffer":
            assert resumed is not None
            answered_s = resumed[1]
        caught_up_s = next(when for step, when in self._steps_after(over_s) if step > last_step)
        self._restarted_s[name] = time.time()
        self.kills.append(
            Kill(
                role=role,
                at_s=at_s,
                over_s=over_s,
                last_step=last_step,
                resumed_step=None if resumed is None else resumed[0],
                answered_s=answered_s - at_s,
                caught_up_s=caught_up_s - at_s,
            )
        )

    def stop(self) -> tuple[float, int]:
        """Ends the job once everything that can be trained is trained; returns the time and the last step."""
        first = self.last_step
        self._wait(lambda: self.last_step > first + _LAST_STEPS, "the last steps")
        stopped_s, last_step = time.time(), self.last_step
        self.launcher.send_signal(signal.SIGTERM)
        self.launcher.wait(timeout=_WAIT_S)
        return stopped_s, last_step

    def close(self) -> None:
        """Kills processes that still run; the launcher's processes end with it."""
        if self.launcher.poll() is None:
            self.launcher.kill()
        self.launcher.wait()

    @property
    def last_step(self) -> int:
        """The newest completed step; -1 before the first."""
        rows = self._rows()
        return int(rows[-1]["step"]) if rows else -1

    def _rows(self) -> list[dict[str, Any]]:
        path = self.root / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()[-50:]]

    def _steps_after(self, at_s: float) -> list[tuple[int, float]]:
        """(step, when) of the steps completed since then."""
        return [(r["step"], r["time_unix_s"]) for r in self._rows() if r["time_unix_s"] > at_s]

    def _lines(self, event: str, *, offset: int = 0) -> list[dict[str, Any]]:
        return [line for line in read_journal(self.journal, offset=offset) if line["event"] == event]

    def _new_samples(self, makers: set[int], offset: int) -> list[float]:
        """When samples of new servers were complete."""
        begun = self._lines("begun", offset=offset)
        new = {line["attempt"] for line in begun if line["maker"] not in makers}
        return [line["at_s"] for line in self._lines("done", offset=offset) if line["attempt"] in new]

    def _buffer_answers(self, killed: int) -> bool:
        """True once a process other than the killed one responds as the buffer."""
        with contextlib.suppress(OSError, ValueError):
            endpoint = json.loads((self.root / "endpoints" / "buffer.json").read_text())
            if endpoint["pid"] != killed:
                with urllib.request.urlopen(f"http://{endpoint['http']}/status", timeout=1.0) as answer:
                    return bool(answer.status == 200)
        return False

    def _processes(self) -> list[int]:
        """All processes that the launcher and its daemons have started."""
        marker = f"{RUN_MARKER}={self.root}:".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "environ").read_bytes().split(b"\0")
                if any(word.startswith(marker) for word in words):
                    found.append(int(folder.name))
        return found

    def _pid(self, daemon: str) -> int:
        return int(json.loads((self.root / "endpoints" / f"{daemon}.json").read_text())["pid"])

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        self._until(lambda: condition() or self.launcher.poll() is not None, what)
        if self.launcher.poll() is not None:
            raise RuntimeError(f"the job ended before {what}:\n{self._out.read_text()[-2000:]}")

    def _until(self, condition: Callable[[], object], what: str) -> None:
        limit_s = time.monotonic() + _WAIT_S
        while not condition():
            if time.monotonic() > limit_s:
                raise RuntimeError(f"no {what} within {_WAIT_S:.0f} s:\n{self._out.read_text()[-2000:]}")
            time.sleep(0.02)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextlib.contextmanager
def crash_job(directory: Path, durability: str, *, seed: int) -> Iterator[CrashJob]:
    """A job in an empty directory."""
    job = CrashJob(directory, durability, seed=seed)
    try:
        yield job
    finally:
        job.close()
