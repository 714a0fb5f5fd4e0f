"""A week in minutes: a real job with small limits, each role replaced now and then, and a resume in between.

What a run of days writes and holds must not grow without a reason. The limits that a week reaches (logs,
copies, checkpoints, segments, evaluations) are so small here that they are reached many times.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from areal_like.paths import RunPaths
from launch.audit.run import audit_run
from launch.run_directory.rundir import checkpoints
from tests.support.launching import finish, launcher, num_steps_done, processes_of, wait_for_steps, wait_until

HALF_S = float(os.environ.get("AREAL_LIKE_SOAK_HALF_S", "330"))
"""Length of the run before and after the resume."""
_LOOK_S = 2.0
_WARM_S = 45.0
"""Age at which a process has made everything that it makes once."""
_WINDOW_S = 30.0
_MAX_GROWTH_MB = 24.0
"""Of resident memory between the window after the warm-up and the last window of a process' life."""
_MAX_NEW_FILES = 8
"""Of open files, in the same way."""
_LOG_MB, _LOG_BACKUPS = 0.02, 2
_KEEP, _SEGMENT_BYTES = 2, 1 << 18
SETTINGS = (
    "name=x",
    "model.warm_start_steps=0",
    "task._target_=tests.support.rollout_tasks.Checksum",
    "sampling.group_size=4",
    "trainer.groups_per_step=4",
    "trainer.num_steps=1000000",
    "trainer.checkpoint_interval=20",
    f"trainer.keep_checkpoints={_KEEP}",
    "trainer.keep_rolled_back=1",
    "trainer.lr_schedule=constant",
    "eval.num_prompts=8",
    "eval.interval=25",
    "eval.keep=2",
    "rollout.num_servers=2",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "buffer.lease_timeout_s=5",
    f"buffer.segment_bytes={_SEGMENT_BYTES}",
    "daemon.log_level=DEBUG",
    f"daemon.log_max_mb={_LOG_MB}",
    f"daemon.log_backups={_LOG_BACKUPS}",
    "max_staleness=2",
)
ROLES = {
    "rollout-1": "--name rollout-1",
    "trainer": "-m trainer --config",
    "engine": "-m rollout_server.engine",
    "buffer": "-m buffer",
}


@dataclass
class Life:
    """What was seen of one process."""

    command: str
    seen_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    num_files: list[int] = field(default_factory=list)

    def growth(self, values: list[float] | list[int]) -> float | None:
        """The last window's median less the first one's; None for a life that was too short."""
        first = [v for s, v in zip(self.seen_s, values, strict=True) if 0 <= s - self._warm_s < _WINDOW_S]
        last = [v for s, v in zip(self.seen_s, values, strict=True) if self.seen_s[-1] - s < _WINDOW_S]
        if self.seen_s[-1] - self._warm_s < 2 * _WINDOW_S:
            return None
        return statistics.median(last) - statistics.median(first)

    @property
    def _warm_s(self) -> float:
        return self.seen_s[0] + _WARM_S


class Watcher:
    """Looks at every process of the run, and at its directory."""

    def __init__(self, root: Path, ledger: Path) -> None:
        self.lives: dict[int, Life] = {}
        self.most: dict[str, int] = defaultdict(int)
        """The largest number of files of each kind that was seen."""
        self._root, self._ledger = root, ledger

    def look(self, extra: dict[int, str]) -> None:
        """Takes one look. `extra`: processes beside those that the launcher has started."""
        now_s = time.monotonic()
        for pid, command in (processes_of(self._root) | extra).items():
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            except OSError:  # it has just ended
                continue
            life = self.lives.setdefault(pid, Life(command))
            life.seen_s.append(now_s)
            life.rss_mb.append(pages * 4096 / 1e6)
            life.num_files.append(num_files)
        for kind, files in self._files():
            self.most[kind] = max(self.most[kind], len(files))

    def _files(self) -> Iterator[tuple[str, list[Path]]]:
        yield "checkpoints", list((self._root / "checkpoints").glob("step_[0-9]*[0-9]"))
        yield "rolled back", list((self._root / "checkpoints").glob("*.rolled_back"))
        yield "segments", list((self._ledger / "segments").glob("*.seg"))
        yield "endpoints", list((self._root / "endpoints").iterdir())
        for path in (self._root / "logs").iterdir():
            yield (
                f"copies of {path.name.rstrip('.0123456789')}",
                [copy for copy in path.parent.glob(f"{path.name}.*") if copy.suffix[1:].isdecimal()],
            )


def live(watcher: Watcher, root: Path, pid: int, *, extra: dict[int, str], victims: list[str]) -> None:
    """Lets the job run for HALF_S, and replaces one role after the other in the first two thirds of it."""
    begin_s, num_steps = time.monotonic(), num_steps_done(root)
    pauses = [HALF_S * (index + 1) * 2 / 3 / (len(victims) + 1) for index in range(len(victims))]
    while (age_s := time.monotonic() - begin_s) < HALF_S:
        watcher.look(extra)
        if pauses and age_s > pauses[0]:
            part, _ = ROLES[victims.pop(0)], pauses.pop(0)
            pids = [pid for pid, command in processes_of(root).items() if part in command]
            os.kill(min(pids), signal.SIGKILL)
        time.sleep(_LOOK_S)
        assert Path(f"/proc/{pid}").exists(), "the launcher has ended"
    assert num_steps_done(root) > num_steps + 50
    # A copy is made within a second of a file's growth.
    for path in (root / "logs").iterdir():
        assert path.stat().st_size < 1e6 * _LOG_MB + 150_000, path


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_a_week_is_bounded(tmp_path: Path) -> None:
    root, nvme = tmp_path / "runs" / "x", tmp_path / "nvme"
    ledger = nvme / "x" / "ledger"
    settings = (*SETTINGS, f"buffer.ledger_dir={nvme}")
    watcher = Watcher(root, ledger)
    with launcher(*settings, cwd=tmp_path) as process:
        wait_for_steps(5, root, process=process)
        victims = ["rollout-1", "trainer", "buffer", "engine"]
        live(watcher, root, process.pid, extra={process.pid: "launcher"}, victims=victims)
        process.terminate()
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert (root / "ledger").resolve() == ledger
    # Back to the older checkpoint, twice: each undoes steps and sets a checkpoint aside.
    for _ in range(2):
        oldest = checkpoints(RunPaths(root))[0]
        with launcher("name=x", f"resume=step:{oldest}", cwd=tmp_path) as process:
            wait_until(
                lambda: list((root / "checkpoints").glob("*.rolled_back")), what="a rollback", run_root=root
            )
            wait_for_steps(oldest + 50, root, process=process)
            watcher.look({})
            process.terminate()
            code, out, err = finish(process, root)
        assert code == 0, out + err
    with launcher("name=x", "resume=latest", cwd=tmp_path) as process:
        wait_for_steps(num_steps_done(root) + 5, root, process=process)
        live(watcher, root, process.pid, extra={process.pid: "launcher"}, victims=["engine", "rollout-1"])
        process.terminate()
        code, out, err = finish(process, root)
    assert code == 0, out + err

    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    grown = [
        (life.command, rss, files)
        for life in watcher.lives.values()
        if (rss := life.growth(life.rss_mb)) is not None
        and (files := life.growth(life.num_files)) is not None
    ]
    for command, rss, files in grown:
        print(f"{rss:+6.1f} MB {files:+4.0f} files  {command[:120]}")
    seen = " ".join(command for command, *_ in grown)
    assert all(part in seen for part in ("launcher", *ROLES.values())), "each role lived long enough once"
    for command, rss, files in grown:
        assert rss < _MAX_GROWTH_MB and files <= _MAX_NEW_FILES, (command, rss, files)

    print(dict(watcher.most))
    # One more while a new one is complete and the oldest is being deleted.
    assert watcher.most["checkpoints"] <= _KEEP + 1 and watcher.most["rolled back"] <= _KEEP + 1
    assert len(list((root / "checkpoints").glob("*.rolled_back"))) == 1
    assert 1 <= watcher.most["segments"] <= 40 and watcher.most["endpoints"] <= 12
    copies = {kind: num for kind, num in watcher.most.items() if kind.startswith("copies of ")}
    assert max(copies.values()) == _LOG_BACKUPS, "the limit of logs was reached"
    num_tickets, num_steps = audit.tickets["issued"], num_steps_done(root)
    with closing(sqlite3.connect(ledger / "ledger.sqlite3")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    rows = (ledger / "ledger.sqlite3").stat().st_size, (root / "metrics.jsonl").stat().st_size
    print(f"{num_tickets} tickets, {num_steps} steps: ledger {rows[0]}, metrics {rows[1]} bytes")
    assert rows[0] < 500_000 + 500 * num_tickets and rows[1] < 6_000 * num_steps
