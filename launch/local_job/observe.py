"""What the launcher knows about a running job: each daemon's /status, and the trainer's metrics.jsonl.

A thread polls with short timeouts, so neither a stuck daemon nor a slow disk ever holds up the launcher, which only reads the newest
`Observation`. Everything is read leniently: a daemon of another version, or a missing key, leaves a gap in the view and nothing else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.shards import add_up
from launch.local_job.progress import Progress, StepTally

REQUEST_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class DaemonView:
    """One daemon as it was seen last."""

    name: str
    endpoint: dict[str, Any]
    """Content of its endpoint file: role, pid, http, ..."""
    status: dict[str, Any] | None
    """Answer of /status; None when it did not answer."""
    seen_s: float
    """Monotonic time of the last answer; 0: never."""

    @property
    def role(self) -> str:
        """`buffer` | `rollout` | `trainer`."""
        return str(self.endpoint.get("role", "?"))

    @property
    def not_ready(self) -> str:
        """Why it is not ready; empty when it is."""
        return "no answer" if self.status is None else str(self.status.get("not_ready", ""))


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One look at the whole job."""

    daemons: dict[str, DaemonView] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    """What metrics.jsonl says."""

    @property
    def steps(self) -> tuple[dict[str, Any], ...]:
        """The newest rows, ascending by step."""
        return self.progress.recent

    @property
    def tokens_per_s_generated(self) -> float | None:
        """Over all rollout servers; None when none of them tells."""
        rates = [
            find_number(view.status or {}, "tokens_per_s")
            for view in self.daemons.values()
            if view.role == "rollout"
        ]
        known = [rate for rate in rates if rate is not None]
        return sum(known) if known else None

    @property
    def buffer(self) -> dict[str, Any]:
        """The buffer's /status, or nothing; of several that of the first, with the tickets of all."""
        statuses = [view.status for view in self.daemons.values() if view.role == "buffer" and view.status]
        if len(statuses) < 2:
            return statuses[0] if statuses else {}
        return statuses[0] | {
            name: add_up(find_table(status, name) for status in statuses) for name in ("tickets", "drops")
        }


class MetricsTail:
    """Reads what was appended to metrics.jsonl since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inode = 0
        self._tally = StepTally()

    def read(self) -> Progress:
        """Of all rows so far, in the order of the file, which is that of the steps."""
        try:
            with self._path.open("rb") as file:
                if (
                    inode := os.fstat(file.fileno()).st_ino
                ) != self._inode:  # a resumed trainer writes the file anew
                    self._inode, self._offset, self._tally = inode, 0, StepTally()
                file.seek(self._offset)
                for line in file:  # and not at once: that of a resumed run may be large
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    self._add(line)
        except FileNotFoundError:
            return Progress()
        return self._tally.progress

    def _add(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            int(row["step"])
            self._tally.add(row)


class Observer:
    """Polls in a thread of its own between `start` and `close`."""

    def __init__(self, paths: RunPaths, *, interval_s: float = 1.0) -> None:
        self._paths = paths
        self._interval_s = interval_s
        self._tail = MetricsTail(paths.metrics)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self.newest = Observation()
        """Replaced, never changed: safe to read from any thread."""
        self.interval_s = 0.2
        """Pause between two looks; short until the job is ready."""

    def start(self) -> None:
        """Begins to poll."""
        self._thread.start()

    def close(self) -> None:
        """Stops polling."""
        self._stopped.set()
        self._thread.join(timeout=2 * REQUEST_TIMEOUT_S)

    def settle(self) -> None:
        """The job is ready: look less often."""
        self.interval_s = self._interval_s

    def _run(self) -> None:
        while not self._stopped.wait(self.interval_s):
            daemons = look_at_daemons(self._paths.endpoints, before=self.newest.daemons)
            self.newest = Observation(daemons=daemons, progress=self._tail.read())


def look_at_daemons(folder: Path, *, before: dict[str, DaemonView] | None = None) -> dict[str, DaemonView]:
    """Asks every daemon that has an endpoint file in `folder`, by name; `before` remembers when each was seen last."""
    daemons = {}
    for path in sorted(folder.glob("*.json")):
        try:
            endpoint = dict(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue  # it has just left
        status = fetch_json(str(endpoint.get("http", "")), "/status")
        known = (before or {}).get(path.stem)
        seen_s = time.monotonic() if status is not None else known.seen_s if known else 0.0
        daemons[path.stem] = DaemonView(name=path.stem, endpoint=endpoint, status=status, seen_s=seen_s)
    return daemons


def fetch_json(address: str, path: str) -> dict[str, Any] | None:
    """GET http://address/path as a JSON object; None when there is no such answer within REQUEST_TIMEOUT_S."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return None
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = json.loads(connection.getresponse().read())
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return answer if isinstance(answer, dict) else None


def post_json(address: str, path: str, body: dict[str, Any], *, timeout_s: float = 5.0) -> dict[str, Any]:
    """POST http://address/path: a control verb. Raises OSError when nobody answers there, ConfigError with the reason of a refusal."""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=timeout_s)
    try:
        connection.request("POST", path, body=json.dumps(body))
        answer = connection.getresponse()
        said = dict(json.loads(answer.read()))
    finally:
        connection.close()
    if answer.status != 200:
        raise ConfigError(str(said.get("error", said)))
    return said


def find_number(status: dict[str, Any], key: str) -> float | None:
    """A number by its name, at the top of a status or one level down."""
    for place in (status, *(value for value in status.values() if isinstance(value, dict))):
        value = place.get(key)
        if isinstance(value, (int, float)):
            return float(value)
    return None


def find_table(status: dict[str, Any], key: str) -> dict[str, Any]:
    """A table by its name, at the top of a status or one level down; empty when it is not there."""
    for place in (status, *(value for value in status.values() if isinstance(value, dict))):
        value = place.get(key)
        if isinstance(value, dict):
            return value
    return {}
