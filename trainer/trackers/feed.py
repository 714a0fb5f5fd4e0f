"""Passes the rows of a run to its trackers, each in its own thread, without ever blocking training.

    STARTING -> OPEN -> CLOSED
       +-> OFF (open() raised: no other method is called)

A bounded queue is between training and a tracker; when it is full, a row is dropped and counted. A row whose
log() raised is counted too; the first failure of a tracker is logged, later ones are only counted. At the end
the trackers get a limited time for the remaining rows. Their threads are daemon threads: one that hangs
delays the end of the trainer by no more than that time.
"""

from __future__ import annotations

import functools
import heapq
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

from areal_like.config import Config, to_mapping
from areal_like.paths import RunPaths
from areal_like.security.redaction import without_secrets
from areal_like.spans.recorder import unix_now
from trainer.metrics.prometheus import TRACKER_OUTCOMES
from trainer.metrics.run_files import read_rows
from trainer.trackers.base import Aliases, TrackedRow, TrackedRun, Tracker, build_trackers
from trainer.trackers.names import evaluation_numbers, step_numbers

log = logging.getLogger(__name__)

MAX_WAITING = 1000
"""Most rows that wait for one tracker."""
_POLL_S = 0.2
"""Interval at which an idle tracker looks for the end of the run."""


class Trackers:
    """All trackers of a run, possibly none, on rank 0. Any thread may call `status`."""

    def __init__(
        self, trackers: Mapping[str, tuple[Tracker, TrackedRun]], *, on_outcome: Callable[[str], None]
    ) -> None:
        """`on_outcome`: called with one of TRACKER_OUTCOMES for each row, from the trackers' threads."""
        self._feeds = [
            _Feed(name, tracker, run, on_outcome=on_outcome) for name, (tracker, run) in trackers.items()
        ]
        self._is_closed = False

    @classmethod
    def of(
        cls, config: Config, *, start_step: int, is_rewound: bool, on_outcome: Callable[[str], None]
    ) -> Trackers:
        """Opens the trackers that `config.trackers` names. `start_step`, `is_rewound`: see TrackedRun."""
        paths, opened_unix_s = RunPaths.of(config), unix_now()

        def earlier_rows(aliases: Aliases) -> Iterator[TrackedRow]:
            files = (
                map(
                    functools.partial(_tracked, aliases=aliases, is_evaluation=is_evaluation), read_rows(path)
                )
                for path, is_evaluation in ((paths.metrics, False), (paths.evaluations, True))
            )
            # The files grow at the same time: new rows come through the queue.
            for row in heapq.merge(*files, key=lambda row: row.time_unix_s):
                if row.time_unix_s < opened_unix_s and (row.is_evaluation or row.step < start_step):
                    yield row

        return cls(
            {
                name: (
                    tracker,
                    TrackedRun(
                        name=config.name,
                        root=paths.root,
                        config=without_secrets(to_mapping(config)),
                        start_step=start_step,
                        is_rewound=is_rewound,
                        earlier_rows=functools.partial(earlier_rows, tracker.aliases),
                    ),
                )
                for name, tracker in build_trackers(config.trackers).items()
            },
            on_outcome=on_outcome,
        )

    def stepped(self, row: Mapping[str, Any]) -> None:
        self._put(row, is_evaluation=False)

    def evaluated(self, row: Mapping[str, Any]) -> None:
        self._put(row, is_evaluation=True)

    def status(self) -> dict[str, Any]:
        """Tracker -> its state, its rows by outcome, and its first failure."""
        return {feed.name: feed.status() for feed in self._feeds}

    def close(
        self,
        summary: Mapping[str, Any] | None = None,
        *,
        limit_s: float,
        waits: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        """Waits until every tracker has ended, at most `limit_s`. A second call does nothing.

        `summary`: the run's summary, if there is one. `waits`: shows the wait in /status.
        """
        if self._is_closed:
            return
        self._is_closed = True
        deadline_s = time.monotonic() + limit_s
        for feed in self._feeds:
            feed.end(summary)
        for feed in self._feeds:
            with waits(f"tracker {feed.name} to end"):
                feed.thread.join(max(0.0, deadline_s - time.monotonic()))
            if feed.thread.is_alive():
                log.warning("the tracker %s did not end within %.0f s: %s", feed.name, limit_s, feed.status())
                feed.abandon()

    def _put(self, row: Mapping[str, Any], *, is_evaluation: bool) -> None:
        for feed in self._feeds:
            feed.put(_tracked(row, aliases=feed.tracker.aliases, is_evaluation=is_evaluation))


def _tracked(row: Mapping[str, Any], *, aliases: Aliases, is_evaluation: bool) -> TrackedRow:
    numbers = evaluation_numbers if is_evaluation else step_numbers
    return TrackedRow(
        step=row["step"],
        time_unix_s=row["time_unix_s"],
        is_evaluation=is_evaluation,
        numbers=numbers(row, aliases=aliases),
    )


class _Feed:
    """One tracker with its thread."""

    def __init__(
        self, name: str, tracker: Tracker, run: TrackedRun, *, on_outcome: Callable[[str], None]
    ) -> None:
        self.name = name
        self.tracker = tracker
        self._run = run
        self._on_outcome = on_outcome
        self._rows: queue.Queue[TrackedRow] = queue.Queue(MAX_WAITING)
        self._ended = threading.Event()
        self._summary: Mapping[str, Any] | None = None
        self._counts = Counter(dict.fromkeys(TRACKER_OUTCOMES, 0))
        self._state = "starting"
        self._first_failure = ""
        self.thread = threading.Thread(target=self._main, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def put(self, row: TrackedRow) -> None:
        """Queues a row; never blocks."""
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._count("left_out")
            self._failed(f"is more than {MAX_WAITING} rows behind: rows are left out")

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Announces the end: after the queued rows the tracker gets the summary, if any, and is closed."""
        self._summary = summary
        self._ended.set()

    def abandon(self) -> None:
        self._tries("abandon", self.tracker.abandon)

    def status(self) -> dict[str, Any]:
        return {
            "state": self._state,
            "waiting": self._rows.qsize(),
            **self._counts,
            "failure": self._first_failure,
        }

    def _main(self) -> None:
        is_open = self._tries("open", lambda: self.tracker.open(self._run))
        self._state = "open" if is_open else "off"
        for row in self._waiting_rows():
            if not is_open:
                self._count("left_out")
            elif self._tries("log", lambda row=row: self.tracker.log(row)):  # type: ignore[misc]
                self._count("logged")
            else:
                self._count("failed")
        if not is_open:
            return
        if self._summary is not None:
            summary = self._summary
            self._tries("summarize", lambda: self.tracker.summarize(summary))
        self._tries("close", self.tracker.close)
        self._state = "closed"

    def _waiting_rows(self) -> Iterator[TrackedRow]:
        """The rows in their order, until the end is announced and none is left."""
        while True:
            try:
                yield self._rows.get(timeout=_POLL_S)
            except queue.Empty:
                if self._ended.is_set() and self._rows.empty():
                    return

    def _tries(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # another package's or the user's code: training continues in any case
            self._failed(f"failed in {what}(): {type(error).__name__}: {error}", error)
            return False
        return True

    def _count(self, outcome: str) -> None:
        self._counts[outcome] += 1
        self._on_outcome(outcome)

    def _failed(self, text: str, error: Exception | None = None) -> None:
        if self._first_failure:
            return
        self._first_failure = text
        log.warning(
            "the tracker %s %s; training continues, metrics.jsonl has all rows, later failures are counted",
            self.name,
            text,
            exc_info=error,
        )
