"""Settings of episodes with an environment, of sessions, and of the sandbox for programs of the policy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from areal_like.config.common import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    require,
)

_SANDBOX = re.compile(r"bwrap|rlimits|(docker|podman):\S+|e2b(:\S+)?")
MAX_TURNS = 1024
"""Maximum number of turns, and of segments, in one record."""


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig(Section, key="episode"):
    """Budget of one episode, for tasks with an environment, and limits of the environment's process.

    An episode that exceeds its budget becomes a truncated sample; its finish reason names the limit.
    `sampling.max_new_tokens` limits each turn, and `rollout.sample_timeout_s` the time.
    """

    max_turns: Annotated[int, Bounds(1, MAX_TURNS)] = 16
    """Maximum number of turns of the policy."""
    max_tokens: NonNegativeInt = 0
    """Maximum number of tokens over all segments: prompt, turns, and the environment's messages between them.
    0: the longest sequence that the engine holds (`rollout.max_context`)."""
    step_timeout_s: PositiveFloat = 30.0
    """Time limit of one call of the environment (reset or step), in seconds. After it its process is killed,
    and the sample counts as failed (`buffer.on_failure`)."""
    memory_mb: Annotated[int, Bounds(64)] = 2048
    """Address space that one environment's process may use in addition to that of its task's imports, in
    MiB."""


MAX_ROUTERS = 16
"""Maximum number of routers of one job."""


@dataclass(frozen=True, kw_only=True)
class SessionsConfig(Section, key="sessions"):
    """Sessions, for tasks with `agent()` and for external agents (`task.external=true`).

    `episode.max_turns`, `episode.max_tokens` and `rollout.sample_timeout_s` limit each session. A session
    waits for an external agent without a time limit, and so does the job.
    """

    host: str = "127.0.0.1"
    """Address that a rollout server binds for external agents. The server's own `agent()` processes use
    loopback."""
    port: Annotated[int, Bounds(0, 65535)] = 0
    """Port for external agents; rollout server I (the number at the end of its name) binds `port` + I. 0: a
    free port, which `areal-like status` shows."""
    advertise_host: str = ""
    """Host name or address in the base URL given to external agents; empty: the one to which they sent their
    request."""
    idle_timeout_s: PositiveFloat = 120.0
    """Longest time that a session may be without a request, in seconds: before the first request, between two
    requests, and after the last one. For the task's own `agent()` it begins when that has a process. A
    heartbeat counts as a request; a refused request to the model does not. Then the session's sample counts
    as failed (`buffer.on_failure.environment`). The sample of an external agent is first given to other
    agents, up to `buffer.max_sample_retries` times."""
    heartbeat_limit_s: NonNegativeFloat = 3600.0
    """Longest time for which heartbeats keep a session alive without a completion of the model, in
    seconds."""
    journal_bytes: NonNegativeInt = 32 << 20
    """Largest journal of one session of an external agent, in bytes: what the buffer keeps so that another
    server can continue the session. A session that needs more does not survive its server. 0: none does."""
    num_routers: Annotated[int, Bounds(0, MAX_ROUTERS)] = 0
    """Routers that `areal-like run` and `submit` start: each is one address for external agents, in front of
    all rollout servers."""
    router_host: str = "127.0.0.1"
    """Address that a router binds for external agents."""
    router_port: Annotated[int, Bounds(0, 65535)] = 0
    """Port of a router; router I (the number at the end of its name) binds `router_port` + I. 0: a free port,
    which `areal-like status` shows."""
    router_advertise_host: str = ""
    """Host name or address in the base URL that a router gives to external agents; empty: the one to which
    they sent their request."""

    def check(self) -> None:
        require(bool(self.host), "sessions.host is empty: give an address to bind, e.g. 127.0.0.1")
        require(
            bool(self.router_host), "sessions.router_host is empty: give an address to bind, e.g. 127.0.0.1"
        )


@dataclass(frozen=True, kw_only=True)
class RewardsConfig(Section, key="rewards"):
    """Programs that tools and rewards run for the policy."""

    sandbox: str = "bwrap"
    """`bwrap` (bubblewrap): no network, no files but the program's own, own process space. `rlimits`: only
    limits of time, memory and processes; the program can read what the server can read. `docker:IMAGE` or
    `podman:IMAGE`: containers of that image. `e2b` or `e2b:TEMPLATE`: remote sandboxes of E2B."""

    def check(self) -> None:
        require(
            _SANDBOX.fullmatch(self.sandbox) is not None,
            f"rewards.sandbox={self.sandbox}: choose one of bwrap, rlimits, docker:IMAGE, podman:IMAGE, e2b, "
            "e2b:TEMPLATE",
        )
