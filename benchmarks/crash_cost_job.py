"""A small job whose processes are killed, and what each kill has cost it (benchmarks/crash_cost.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT
from launch.trace.reading import Span, read_processes

GROUPS, GROUP_SIZE = 8, 4
SETTINGS = (
    "name=x",
    "model.warm_start_steps=0",
    "eval.num_prompts=0",
    f"sampling.group_size={GROUP_SIZE}",
    "sampling.max_new_tokens=48",
    f"trainer.groups_per_step={GROUPS}",
    "trainer.num_steps=1000000",
    "trainer.lr_schedule=constant",
    "trainer.checkpoint_interval=10",
    "rollout.num_servers=2",
    "rollout.max_running=16",
    "rollout.queue_samples=0",
    "max_staleness=4",
    "daemon.heartbeat_s=0.2",
)
_LIMIT_S = 120.0
_POLL_S = 0.05


@dataclass(kw_only=True)
class Kill:
    """One kill, and what was found before and after it."""

    role: str
    at_s: float
    """Unix seconds."""
    step: int
    """Steps that the trainer had completed."""
    before: dict[str, int]
    """Counters before it (`_counters`)."""
    lost_s: float
    """Seconds of samples in progress that ended with a process."""
    lost_samples: int
    """Finished samples that ended with a process, or with the buffer's memory."""
    trained_again: int = 0
    repair_s: float = 0.0
    after: dict[str, int] | None = None


def cost(kill: Kill, *, cancelled_s: float, sample_s: float) -> dict[str, Any]:
    """The numbers of a kill. `cancelled_s`: seconds of samples that other servers gave up after it;
    `sample_s`: mean seconds of a sample."""
    assert kill.after is not None
    refused = sum(
        max(0, kill.after[key] - kill.before[key]) for key in ("samples_refused", "samples_dropped")
    )
    again = kill.trained_again + GROUP_SIZE * max(
        0, kill.after["tickets_rolled_back"] - kill.before["tickets_rolled_back"]
    )
    lost_samples = kill.lost_samples + refused
    return {
        "step": kill.step,
        "lost_trajectory_s": round(kill.lost_s + cancelled_s + lost_samples * sample_s, 3),
        "lost_finished_samples": lost_samples,
        "trained_again": again,
        "repair_s": round(kill.repair_s, 2),
        "mean_sample_s": round(sample_s, 3),
    }


class CrashedJob:
    """`start`, then `kill` as often as wanted, `close`, `finish`."""

    def __init__(self, directory: Path, *, durability: str) -> None:
        self._directory = directory
        self._root = directory / "x"
        self._durability = durability
        self._kills: list[Kill] = []
        self._base_step = 0
        """Step at which the ledger began."""
        self._process: subprocess.Popen[bytes] | None = None
        self._spans: list[Span] = []

    def start(self) -> None:
        """Starts the job and waits for its first checkpoint."""
        self._launch()
        self._wait(lambda: self._newest_checkpoint() > 0 and self._status()["step"] > 10, "a checkpoint")

    def kill(self, role: str, *, after_s: float) -> None:
        """Kills a role after a while and waits until the job is repaired."""
        time.sleep(after_s)
        status = self._status()
        if self._kills:
            self._kills[-1].after = self._counters(status)
        servers = {peer["name"]: peer for peer in status["peers"] if peer["role"] == "rollout"}
        ends = {"server": [min(servers)], "restart": list(servers)}.get(role, [])
        loses_buffer = role == "restart" or (self._durability == "none" and role in ("buffer", "launcher"))
        kill = Kill(
            role=role,
            at_s=time.time(),
            step=status["step"],
            before=self._counters(status),
            lost_s=sum(servers[name]["stats"]["in_progress_s"] for name in ends),
            lost_samples=sum(round(servers[name]["stats"]["unacknowledged"]) for name in ends),
        )
        self._kills.append(kill)
        started_s = time.monotonic()
        if role == "restart":
            self._kill_all()
        else:
            name = {"server": min(servers), "trainer": "trainer-0", "buffer": "buffer"}.get(role)
            pid = self._endpoint(name)["pid"] if name else self._launched().pid
            os.kill(pid, signal.SIGKILL)
            if name == "trainer-0" or (name and role == "server"):
                self._wait(lambda: self._endpoint(name).get("pid") not in (None, pid), f"a new {name}")
        if role == "launcher" or loses_buffer:
            self._wait(lambda: not self._processes(), "the end of all processes")
            self._launched().wait()
            if loses_buffer:
                self._lose_buffer(kill, status)
            self._launch("resume=latest" if loses_buffer else "resume=auto")
        if role == "server":
            self._wait(lambda: self._samples_of(min(servers), newer_than_s=kill.at_s) > 0, "a sample")
        else:
            resumed = max(kill.step, self._base_step)
            self._wait(lambda: self._status().get("step", 0) > resumed, f"step {resumed + 1}")
        kill.repair_s = time.monotonic() - started_s

    def close(self) -> None:
        """Ends the job. What is needed of it is in memory then."""
        if self._kills and (status := self._status()):
            self._kills[-1].after = self._counters(status)
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._kill_all()
        self._spans = [span for one in read_processes(self._root / "spans") for span in one.spans]

    def finish(self) -> list[dict[str, Any]]:
        """What each kill has cost, in order."""
        samples = [span for span in self._spans if span.lane == "samples"]
        finished = [span for span in samples if span.arguments.get("end") != "cancelled"]
        sample_s = statistics.fmean(span.seconds for span in finished)
        ends = [*(kill.at_s for kill in self._kills[1:]), float("inf")]
        rows = []
        for kill, end_s in zip(self._kills, ends, strict=True):
            # The end of the job cancels samples too.
            until_s = min(end_s, kill.at_s + kill.repair_s)
            cancelled_s = sum(
                span.seconds
                for span in samples
                if span.arguments.get("end") == "cancelled" and kill.at_s <= span.end_s <= until_s
            )
            rows.append(cost(kill, cancelled_s=cancelled_s, sample_s=sample_s))
        return rows

    def _lose_buffer(self, kill: Kill, status: dict[str, Any]) -> None:
        """Everything beyond the checkpoint is lost, and its steps are trained again with other samples."""
        resumed = self._newest_checkpoint()
        accepted = status["counters"]["samples_accepted"]
        kill.lost_samples += max(0, accepted - (resumed - self._base_step) * GROUPS * GROUP_SIZE)
        kill.trained_again = max(0, kill.step - resumed) * GROUPS * GROUP_SIZE
        # The new ledger counts from zero.
        kill.before = dict.fromkeys(kill.before, 0)
        self._base_step = resumed
        shutil.rmtree(self._root / "ledger", ignore_errors=True)

    def _counters(self, status: dict[str, Any]) -> dict[str, int]:
        counters = status["counters"]
        refused = ("refusals_superseded", "refusals_unknown_ticket", "refusals_unknown_version")
        return {
            "samples_refused": sum(counters[key] for key in (*refused, "refusals_abandoned")),
            "samples_dropped": counters["samples_dropped"],
            "tickets_rolled_back": self._rolled_back(),
        }

    def _rolled_back(self) -> int:
        path = self._root / "ledger" / "ledger.sqlite3"
        if not path.exists():
            return 0
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as ledger:
            return int(ledger.execute("SELECT COALESCE(SUM(num_tickets), 0) FROM rollbacks").fetchone()[0])

    def _samples_of(self, server: str, *, newer_than_s: float) -> float:
        """Samples that a server has delivered since it was started again."""
        if self._endpoint(server).get("started_unix_s", 0.0) < newer_than_s:
            return 0.0
        found = [peer for peer in self._status().get("peers", []) if peer["name"] == server]
        return float(found[0]["stats"].get("samples_done", 0.0)) if found and found[0]["stats"] else 0.0

    def _launch(self, *settings: str) -> None:
        settings = (*SETTINGS, f"buffer.durability={self._durability}", *settings)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launch", "run", f"runs_dir={self._directory}", *settings],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self._directory / "stderr").open("ab"),
            start_new_session=True,
        )

    def _launched(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    def _endpoint(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads((self._root / "endpoints" / f"{name}.json").read_text()))
        except (FileNotFoundError, ValueError):
            return {}

    def _status(self) -> dict[str, Any]:
        """The buffer's /status; {} if it does not answer."""
        try:
            url = f"http://{self._endpoint('buffer')['http']}/status"
            with urllib.request.urlopen(url, timeout=1.0) as answer:
                return dict(json.loads(answer.read()))
        except (KeyError, OSError, ValueError):
            return {}

    def _newest_checkpoint(self) -> int:
        folders = (self._root / "checkpoints").glob("step_*")
        return max((int(path.name.removeprefix("step_")) for path in folders), default=0)

    def _processes(self) -> list[int]:
        """The job's processes, the launcher too: those whose environment or command line names its run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                text = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:  # it has just ended
                continue
            if str(self._directory).encode() in text and state != "Z" and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        return found

    def _kill_all(self) -> None:
        while left := self._processes():
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(_POLL_S)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + _LIMIT_S
        while not condition():
            if time.monotonic() > end_s:
                errors = (self._directory / "stderr").read_text()
                raise TimeoutError(f"{what}: not within {_LIMIT_S:.0f} s; {self._process} {errors}")
            time.sleep(_POLL_S)
