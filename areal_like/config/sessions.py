"""Settings of sessions: samples made by programs that speak OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.config.common import Section, require

_LARGEST_PORT = 65535


@dataclass(frozen=True, kw_only=True)
class SessionsConfig(Section, key="sessions"):
    """Sessions, for tasks with `agent()` and for agents from outside (`task.external=true`).

    `episode.max_turns`, `episode.max_tokens` and `rollout.sample_timeout_s` limit each session.
    """

    host: str = "127.0.0.1"
    """Address that a rollout server binds for agents from outside. The server's own `agent()` processes use
    loopback."""
    port: int = 0
    """Port for agents from outside; rollout server I (the number at the end of its name) binds `port` + I.
    0: a free one, which `areal-like status` shows."""
    advertise_host: str = ""
    """Name or address in the base URL that agents from outside are given; empty: the one that their request
    was sent to."""
    idle_timeout_s: float = 120.0
    """Longest time of a session without a request to the model, in seconds: between two of them, before the
    first and after the last. After it the session's sample counts as failed (`buffer.on_failure.environment`;
    one of an agent from outside is sampled again)."""

    def check(self) -> None:
        require(bool(self.host), "sessions.host is empty: give an address to bind, e.g. 127.0.0.1")
        require(
            0 <= self.port <= _LARGEST_PORT, f"sessions.port={self.port}: use 0 (a free port) or 1..65535"
        )
        require(self.idle_timeout_s > 0, "sessions.idle_timeout_s must be above 0")
