"""Where score servers are: at given URLs, or those of the job, which change when a server is started again.

A rollout server tells its reward workers where to look by an environment variable, because task settings,
from which the workers are made, must be equal in all servers of a job.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from areal_like.config import Config
from areal_like.config.job import tasks_with_job_scorers
from areal_like.errors import ConfigError, RewardError
from areal_like.paths import RunPaths, read_endpoint
from areal_like.security.tls import trusting
from areal_like.security.tokens import read_secret
from rollout_server.rewards.library.service import TryAgainError

_VARIABLE = "AREAL_LIKE_SCORERS"
TOKEN_FILE = "scorer.token"
_READ_AGAIN_S = 1.0
"""Interval at which the addresses of the job's servers are read again."""
_AVOIDED_S = 5.0
"""Time for which another server is preferred to one that has failed."""


@dataclass(frozen=True, kw_only=True)
class JobScorers:
    """The score servers of a job."""

    endpoints: Path
    """Directory with the endpoint files of the job's daemons."""
    keys: str
    """Directory of the job's keys; empty: it has none."""
    certificate: str
    """File with the certificate of the job's HTTP servers; empty: no TLS."""

    @classmethod
    def in_environment(cls) -> JobScorers | None:
        """The score servers of this process's job; None if it has none."""
        text = os.environ.get(_VARIABLE, "")
        if not text:
            return None
        endpoints, keys, certificate = json.loads(text)
        return cls(endpoints=Path(endpoints), keys=keys, certificate=certificate)

    def urls(self) -> list[str]:
        """The URLs of the servers that run."""
        found = [read_endpoint(file) or {} for file in sorted(self.endpoints.glob("scorer-*.json"))]
        return [str(endpoint["scores"]) for endpoint in found if "scores" in endpoint]

    def token(self) -> str:
        """The token with which they are asked; empty without keys. Raises ConfigError."""
        if not self.keys:
            return ""
        file = Path(self.keys).expanduser() / TOKEN_FILE
        try:
            return read_secret(file)
        except FileNotFoundError:
            raise ConfigError(
                f"{file} does not exist: add the key with `areal-like keys add {self.keys} scorer --role "
                "scorer`, and copy this file to the machines of the rollout servers"
            ) from None

    def trust(self) -> ssl.SSLContext | None:
        """The certificate that is trusted. Raises ConfigError."""
        return trusting(self.certificate) if self.certificate else None


def tell_workers(config: Config) -> None:
    """Lets the reward workers that this process starts find the job's score servers."""
    if not config.scorer.path:
        os.environ.pop(_VARIABLE, None)
        return
    security = config.security
    os.environ[_VARIABLE] = json.dumps(
        [str(RunPaths.of(config).endpoints), security.keys, security.tls_certificate]
    )


async def wait_for_scorers(config: Config, *, gives_up: Callable[[], bool]) -> None:
    """Waits until a score server of the job is ready, if a reward asks one; returns early if `gives_up()`.

    It may load its model for minutes, or wait for a node, and rewards have a time limit.
    """
    job = JobScorers.in_environment()
    if job is not None and tasks_with_job_scorers(config):
        while not job.urls() and not gives_up():
            await asyncio.sleep(_READ_AGAIN_S)


class Scorers:
    """Chooses a server for each request: one that has not just failed, with the fewest open requests."""

    def __init__(self, urls: Callable[[], Sequence[str]], *, path: str, shown: str) -> None:
        """`path`: appended to each URL. `shown`: their name in errors."""
        self._urls, self._path, self._shown = urls, path, shown
        self._known: list[str] = []
        self._read_s = -math.inf
        self._open: Counter[str] = Counter()
        self._failed_s: dict[str, float] = {}
        # Workers that all began with the first server would load it alone.
        self._turn = random.randrange(1 << 16)

    @property
    def shown(self) -> str:
        return self._shown

    @contextlib.contextmanager
    def using(self) -> Iterator[str]:
        """Yields the URL of one request. Raises TryAgainError if no server runs."""
        url = self._chosen()
        self._open[url] += 1
        try:
            yield url + self._path
        except RewardError:  # the server has refused this text
            raise
        except BaseException:
            self._failed_s[url] = time.monotonic()
            self._read_s = -math.inf
            raise
        finally:
            self._open[url] -= 1

    def _chosen(self) -> str:
        now_s = time.monotonic()
        if now_s - self._read_s >= _READ_AGAIN_S:
            self._known, self._read_s = list(self._urls()), now_s
            self._failed_s = {url: at for url, at in self._failed_s.items() if url in self._known}
        if not self._known:
            self._read_s = -math.inf
            raise TryAgainError("no score server of the job is ready")
        self._turn += 1
        order = [self._known[(self._turn + at) % len(self._known)] for at in range(len(self._known))]

        def rank(url: str) -> tuple[bool, int]:
            has_failed = now_s - self._failed_s.get(url, -math.inf) < _AVOIDED_S
            return has_failed, self._open[url]

        return min(order, key=rank)
