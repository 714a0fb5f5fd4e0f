"""What the runners of suites share: they claim sessions of a running job and make one rollout in each.

A session's index is a row of the suite's tasks; the last `--eval-rows` rows are the eval split. A rollout
that fails ends only its own session.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_like.client.areal_like_client import (
    ClaimedSession,
    ClientError,
    JobOverError,
    RefusedError,
    SessionOverError,
    claim,
)
from areal_like.errors import UserError

_LOG = logging.getLogger("areal_like.agents.runner")
_WAIT_S = 5.0
"""Longest wait of one claim, which also bounds how long a stop takes."""
_UNREACHABLE_S = 2.0
_TRIES = 30


@dataclass(frozen=True)
class Rows:
    """The tasks of a suite by split and index."""

    tasks: Sequence[Any]
    num_eval: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.num_eval < len(self.tasks):
            raise UserError(
                f"--eval-rows={self.num_eval}: there are {len(self.tasks)} rows; "
                "leave at least one of them for training"
            )

    def task(self, split: str, index: int) -> Any:
        """The task of one row. Raises UserError if there is none: other sessions would fail too."""
        num_train = len(self.tasks) - self.num_eval
        rows = self.tasks[num_train:] if split == "eval" else self.tasks[:num_train]
        if not 0 <= index < len(rows):
            setting = "task.num_eval" if split == "eval" else "task.num_train"
            raise UserError(
                f"the job asks for row {index} of the split {split}, which has {len(rows)} rows: start the "
                f"job with {setting}={len(rows)}" + (", or give --eval-rows" if split == "eval" else "")
            )
        return rows[index]


@dataclass(kw_only=True)
class SessionRunner(ABC):
    """Claims sessions and reports what comes of them. A subclass makes the rollouts."""

    url: str
    token: str = field(repr=False)
    ca_file: str
    rows: Rows
    concurrency: int
    """Rollouts at a time."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    num_done: int = 0
    num_failed: int = 0
    failure: UserError | None = None
    """Why every further rollout would fail."""

    @abstractmethod
    async def run(self) -> None:
        """Runs until `stopping` is set; rollouts in progress are played to the end. Raises UserError."""

    async def claim(self) -> ClaimedSession | None:
        """The next session; None when stopping."""
        failures = 0
        while not self.stopping.is_set():
            try:
                session = await asyncio.to_thread(
                    claim, self.url, token=self.token, wait_s=_WAIT_S, ca_file=self.ca_file
                )
            except RefusedError as error:
                self.fail(UserError(str(error)))
            except JobOverError:
                self.stopping.set()
            except OSError as error:
                failures += 1
                if failures == _TRIES:
                    self.fail(UserError(f"{self.url}: no response after {_TRIES} tries ({error})"))
                elif failures == 1:
                    _LOG.warning("%s: %s; trying again", self.url, error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.stopping.wait(), _UNREACHABLE_S)
            else:
                failures = 0
                if session is not None:
                    return session
        return None

    def fail(self, error: UserError) -> None:
        self.failure = self.failure or error
        self.stopping.set()

    async def report(self, session: ClaimedSession, rollout: Awaitable[float]) -> None:
        """Waits for a rollout, posts its reward, and ends the session."""
        problem = ""
        try:
            reward = await rollout
            await asyncio.to_thread(session.reward, reward)
        except (UserError, RefusedError) as error:
            self.fail(UserError(str(error)))
            problem = str(error)
        except SessionOverError as error:
            problem = str(error)
        except Exception as error:  # a rollout fails alone
            problem = f"{type(error).__name__}: {error}"
        try:
            await asyncio.to_thread(session.end)
        except ClientError as error:
            problem = problem or str(error)
        self.num_done += not problem
        self.num_failed += bool(problem)
        if problem:
            _LOG.warning("session %s: %s", session.id, problem[:500])

    def task_of(self, session: ClaimedSession) -> Any:
        """Returns the task of a session's row. Raises UserError."""
        return self.rows.task(str(session.example["split"]), int(session.example["index"]))


async def run_until_stopped(runner: SessionRunner, *, name: str) -> int:
    """Runs until SIGINT or SIGTERM; prints what was done. Returns the exit code."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(stop, runner.stopping.set)
    num_eval = runner.rows.num_eval
    sys.stdout.write(
        f"{name}: {len(runner.rows.tasks) - num_eval} rows to train on, {num_eval} to evaluate; "
        f"claiming sessions at {runner.url}\n"
    )
    sys.stdout.flush()
    try:
        await runner.run()
    finally:
        sys.stdout.write(f"{runner.num_done} rollouts, {runner.num_failed} failed\n")
    return 0


def add_session_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that say which sessions to claim."""
    parser.add_argument("--url", required=True, help="base URL of a rollout server's sessions")
    parser.add_argument("--concurrency", type=positive, default=16, metavar="N", help="rollouts at a time")
    parser.add_argument("--rows", type=positive, default=0, metavar="N", help="the first N rows only")
    parser.add_argument("--eval-rows", type=int, default=0, metavar="N", help="the last N rows: split eval")
    parser.add_argument("--token-file", default="", help="token of role agent, if the job has keys")
    parser.add_argument("--ca-file", default="", help="PEM file of the certificate's authority")


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


json_object.__name__ = "JSON object"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "number above 0"
