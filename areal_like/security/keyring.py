"""The keys of one daemon while it runs: its own secret, and the allow list of its peers.

    refresh() once a second, and after a failed handshake: reads public.json and the daemon's own secret again
    if they have changed, then calls the subscribers (sockets, which connect or bind again with new keys)

A new secret is used only when public.json has its public key. If a file is broken or absent, the keys that
were read last stay in use, because a copy in progress must not end a job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from areal_like.config import SecurityConfig
from areal_like.errors import ConfigError
from areal_like.security.keys import AllowedKey, KeyDirectory, KeyRole

log = logging.getLogger(__name__)

PUBLIC_LENGTH = 40
"""Characters of a public key in Z85."""


class Keyring:
    """A daemon's keys. Use it from one event loop only. `clock` returns Unix seconds."""

    def __init__(
        self, directory: KeyDirectory, *, name: str, role: KeyRole, clock: Callable[[], float] = time.time
    ) -> None:
        """Raises ConfigError if the secret is absent, has another role, or is not in public.json."""
        self.directory = directory
        self._clock = clock
        self._subscribers: list[Callable[[], None]] = []
        self._last_problem = ""
        self.identity = directory.identity(name)
        """This daemon's own key."""
        if self.identity.role is not role:
            raise ConfigError(
                f"security.identity={name} is a key of role {self.identity.role.value}, "
                f"this daemon needs one of role {role.value}: name such a key"
            )
        if self.sender(self.identity.public) is None:
            raise ConfigError(
                f"the key {name!r} in {directory.path} is not in its public.json, or has expired: "
                "copy the newest public.json and secret there"
            )

    @classmethod
    def of(cls, config: SecurityConfig, *, role: KeyRole) -> Keyring:
        """The keyring of a daemon with this role, on a job with keys. Raises ConfigError."""
        return cls(KeyDirectory(config.keys), name=config.identity or role.value, role=role)

    def sender(self, public: str) -> AllowedKey | None:
        """The entry of a public key; None if it is unknown, revoked or expired."""
        return self.directory.allowed.key(public, now_unix_s=self._clock())

    def is_named(self, name: str, role: KeyRole) -> bool:
        """True if a valid key has this name and role."""
        return any(key.name == name for key in self._valid(role))

    def candidates(self, role: KeyRole, *, name: str = "") -> list[str]:
        """Public keys that a server of this role (and this name) may have, newest first."""
        return [key.public for key in self._valid(role) if name in ("", key.name)]

    def subscribe(self, on_refresh: Callable[[], None]) -> Callable[[], None]:
        """Calls `on_refresh` after every refresh, because keys also expire; returns a function that ends the
        subscription."""
        self._subscribers.append(on_refresh)
        return lambda: self._subscribers.remove(on_refresh)

    def refresh(self) -> None:
        """Reads changed files from the disk, and calls the subscribers."""
        problem = ""
        try:
            self.directory.refresh()
            identity = self.directory.identity(self.identity.name)
            if identity != self.identity:
                if self.sender(identity.public) is None:
                    problem = (
                        f"the secret {identity.name!r} in {self.directory.path} is new, and public.json "
                        "there does not have its key yet: the old secret stays in use"
                    )
                elif identity.role is self.identity.role:
                    self.identity = identity
                    log.info("using the new key %s", identity.name)
        except ConfigError as error:
            problem = f"{error}; the keys that were read before stay in use"
        if not problem and self.sender(self.identity.public) is None:
            problem = f"the key {self.identity.name!r} of this daemon is revoked or has expired"
        if problem and problem != self._last_problem:
            log.warning("%s", problem)
        self._last_problem = problem
        for on_refresh in list(self._subscribers):
            on_refresh()

    def _valid(self, role: KeyRole) -> list[AllowedKey]:
        return self.directory.allowed.valid(role, now_unix_s=self._clock())
