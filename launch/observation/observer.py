"""The state of a running job as the launcher sees it: each daemon's /status, and the trainer's metrics.jsonl.

A thread polls with short timeouts, so that neither a stuck daemon nor a slow disk blocks the launcher, which
only reads the newest `Observation`. A missing key or a daemon of another version leaves a gap in the view and
raises no error.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from areal_like.config.common import NAME
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.threads import NamedThread
from areal_like.shards import add_up
from launch.observation.http_json import (
    IS_BUFFER_OR_RANK,
    NO_OPERATOR,
    REQUEST_TIMEOUT_S,
    Operator,
    fetch_json,
)
from launch.observation.progress import MetricsTail, Progress
from launch.observation.responses import harmless_object
from launch.run_files import read_object


@dataclass(frozen=True, kw_only=True)
class DaemonView:
    """One daemon at the last poll."""

    name: str
    endpoint: dict[str, Any]
    """Content of its endpoint file: role, pid, http, ..."""
    status: dict[str, Any] | None
    """Response of /status; None when the daemon did not respond."""
    seen_s: float
    """Monotonic time of the last response; 0: never."""

    @property
    def role(self) -> str:
        """`buffer` | `rollout` | `trainer`."""
        return str(self.endpoint.get("role", "?"))

    @property
    def not_ready(self) -> str:
        """The reason why the daemon is not ready; empty when it is ready."""
        return "no response" if self.status is None else str(self.status.get("not_ready", ""))


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The whole job at the last poll."""

    daemons: dict[str, DaemonView] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    """Summary of metrics.jsonl."""

    @property
    def steps(self) -> tuple[dict[str, Any], ...]:
        """The newest rows of metrics.jsonl, ascending by step."""
        return self.progress.recent

    @property
    def last_step(self) -> int:
        """Index of the newest finished step; -1 before the first."""
        return int(self.steps[-1].get("step", -1)) if self.steps else -1

    @property
    def signs_of_progress(self) -> tuple[tuple[str, str, float | None], ...]:
        """Each daemon's state and progress counter; a change means progress."""
        return tuple(
            (name, str((view.status or {}).get("state", "")), find_number(view.status or {}, "progress"))
            for name, view in sorted(self.daemons.items())
        )

    @property
    def is_evaluating(self) -> bool:
        """True while the trainer waits for an evaluation. It limits that wait itself (`eval.timeout_s`)."""
        view = self.daemons.get("trainer-0")
        return view is not None and (view.status or {}).get("state") == "evaluating"

    def reason_unready(self, name: str) -> str:
        """Why a daemon is not ready."""
        view = self.daemons.get(name)
        return (view.not_ready if view else "") or "starting"

    @property
    def tokens_per_s_generated(self) -> float | None:
        """Sum over all rollout servers; None when no server reports a rate."""
        rates = [
            find_number(view.status or {}, "tokens_per_s")
            for view in self.daemons.values()
            if view.role == "rollout"
        ]
        known = [rate for rate in rates if rate is not None]
        return sum(known) if known else None

    @property
    def buffer(self) -> dict[str, Any]:
        """The buffer's /status, or empty. With several shards: those of all, merged."""
        statuses = [view.status for view in self.daemons.values() if view.role == "buffer" and view.status]
        return merged_status(statuses) if statuses else {}

    @property
    def why(self) -> dict[str, Any]:
        """What the job waits on, as its buffers report it, or as seen from here if one does not respond."""
        return diagnosis(self.daemons.values())

    @property
    def cause(self) -> str:
        """What the job waits on, on one line; empty if it waits on nothing, or no buffer responded yet."""
        has_begun = any(view.role == "buffer" and view.seen_s for view in self.daemons.values())
        causes = self.why["causes"] if has_begun else []
        if not causes:
            return ""
        more = f" (and {len(causes) - 1} more)" if len(causes) > 1 else ""
        return f"waits on {causes[0]['name']}: {causes[0]['what']}{more}"

    def longest_wait(self, name: str) -> str:
        """The longest wait of a daemon, or why it is not ready; empty if it reports neither."""
        view = self.daemons.get(name)
        waits = (view.status or {}).get("waiting_on") if view else None
        if not waits:
            return view.not_ready if view else ""
        wait, seconds = max(waits.items(), key=lambda each: float(each[1]))
        return f"it waits for {wait}, {seconds:.0f} s"


class Observer:
    """Polls the job in a thread between `start` and `close`."""

    def __init__(self, paths: RunPaths, *, operator: Operator = NO_OPERATOR, interval_s: float = 1.0) -> None:
        self._paths = paths
        self._operator = operator
        self._usual_interval_s = interval_s
        self._tail = MetricsTail(paths.metrics)
        self._stopped = threading.Event()
        self._thread = NamedThread(self._run, name="observer")
        self.newest = Observation()
        """Replaced by each poll and never modified, so it is safe to read from any thread."""
        self.interval_s = 0.2
        """Pause between two polls; short until the job is ready."""

    def start(self) -> None:
        """Begins to poll."""
        self._thread.start()

    def close(self) -> None:
        """Stops polling."""
        self._stopped.set()
        self._thread.join(timeout=2 * REQUEST_TIMEOUT_S)

    def slow_down(self) -> None:
        """Polls at the usual interval from now on: the job is ready. Idempotent."""
        self.interval_s = self._usual_interval_s

    def _run(self) -> None:
        while not self._stopped.wait(self.interval_s):
            daemons = look_at_daemons(
                self._paths.endpoints, before=self.newest.daemons, operator=self._operator
            )
            self.newest = Observation(daemons=daemons, progress=self._tail.read())


def look_at_daemons(
    folder: Path,
    *,
    before: dict[str, DaemonView] | None = None,
    operator: Operator = NO_OPERATOR,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> dict[str, DaemonView]:
    """Asks every daemon with an endpoint file in `folder` for its status; returns the views by name.

    `before`: the previous result; a daemon that does not respond now keeps the time of its last response.
    """
    daemons = {}
    for path in sorted(folder.glob("*.json")):
        if not (endpoint := harmless_object(read_object(path))):
            continue  # the daemon has just ended and removed its file
        is_server = IS_BUFFER_OR_RANK.fullmatch(path.stem) is None
        if not NAME.fullmatch(path.stem) or (is_server and endpoint.get("role") in ("buffer", "trainer")):
            continue  # not written by a daemon: a server must not pass as a buffer, whose `why` is trusted
        known = (before or {}).get(path.stem)
        daemons[path.stem] = look_at_daemon(
            path.stem, endpoint, known=known, operator=operator, timeout_s=timeout_s
        )
    return daemons


def look_at_daemon(
    name: str,
    endpoint: dict[str, Any],
    *,
    known: DaemonView | None,
    operator: Operator,
    timeout_s: float = REQUEST_TIMEOUT_S,
) -> DaemonView:
    """Asks a daemon for its status. `known`: how it was before."""
    try:
        status = fetch_json(str(endpoint.get("http", "")), "/status", operator=operator, timeout_s=timeout_s)
    except ConfigError as error:
        status = {"not_ready": str(error)}
    seen_s = time.monotonic() if status is not None else known.seen_s if known else 0.0
    return DaemonView(name=name, endpoint=endpoint, status=status, seen_s=seen_s)


_SILENCE_S = 5.0
"""A daemon that has not responded for this long after an earlier response has ended or is stopped."""


def diagnosis(daemons: Iterable[DaemonView]) -> dict[str, Any]:
    """`causes`, `effects` and `bottleneck` of a job, from the responses of its buffers.

    A buffer that does not respond is a cause itself, and tells nothing about the other daemons.
    """
    causes: list[dict[str, Any]] = []
    effects: list[str] = []
    bottleneck = ""
    for view in daemons:
        if view.role != "buffer":
            continue
        if view.status is None or "why" not in view.status:
            if (silent_s := time.monotonic() - view.seen_s if view.seen_s else math.inf) > _SILENCE_S:
                causes.append(_no_response(view.name, silent_s))
            continue
        why = view.status["why"]
        causes += [cause for cause in why.get("causes", []) if cause not in causes]
        effects += [effect for effect in why.get("effects", []) if effect not in effects]
        bottleneck = bottleneck or str(why.get("bottleneck", ""))
    return {"causes": causes, "effects": effects, "bottleneck": "" if causes else bottleneck}


def _no_response(name: str, silent_s: float) -> dict[str, Any]:
    since = f"for {silent_s:.0f} s" if silent_s < math.inf else "at all"
    return {
        "on": "buffer",
        "name": name,
        "seconds": min(silent_s, 1e9),
        "what": f"no response {since}: its process is stalled, has ended, or cannot be reached from here",
        "remedy": "look at its process and log; every role waits for it and goes on when it is back",
    }


def find_number(status: dict[str, Any], key: str) -> float | None:
    """The number under `key`, at the top level of a status or one level below; None if there is none."""
    found = (value for value in _values(status, key) if isinstance(value, int | float))
    return next((float(number) for number in found), None)


def find_table(status: dict[str, Any], key: str) -> dict[str, Any]:
    """The table under `key`, at the top level of a status or one level below; empty if there is none."""
    return next((value for value in _values(status, key) if isinstance(value, dict)), {})


def _values(status: dict[str, Any], key: str) -> Iterator[Any]:
    yield status.get(key)
    yield from (table.get(key) for table in status.values() if isinstance(table, dict))


_SUMS_OF_SHARDS = ("tickets", "drops", "parts")
_RATES_OF_A_SHARD = ("samples_per_s", "tokens_trained_per_s", "drops_per_min")
"""Numbers that each shard reports for its own samples. Every shard sees all steps, and all servers'
tokens."""


def merged_status(statuses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first shard's /status, with the tickets, drops, rates and peers of all."""
    sums = {name: add_up(find_table(dict(each), name) for each in statuses) for name in _SUMS_OF_SHARDS}
    rates: dict[str, float | None] = {}
    for status in statuses:
        for name, rate in find_table(dict(status), "rates").items():
            known = rates.get(name)
            if known is None or rate is None:
                rates[name] = known if rate is None else rate
            else:
                rates[name] = known + rate if name in _RATES_OF_A_SHARD else max(known, rate)
    return dict(statuses[0]) | sums | {"rates": rates, "peers": merged_peers(statuses)}


def merged_peers(statuses: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The peers in the /status of all shards, each once, from the shard that heard from it last."""
    found: dict[str, dict[str, Any]] = {}
    for status in statuses:
        for peer in status.get("peers") or ():
            known = found.get(peer["name"])
            if known is None or peer.get("silent_s", 0.0) < known.get("silent_s", 0.0):
                found[peer["name"]] = peer
    return list(found.values())
