"""An operator's holds: on training as a whole (a pause), or on single rollout servers (cordons).

    granted -> cordon() -> held back, until uncordon(); also for the next process of that name
    running -> pause() -> no leases of training tickets, until resume(); evaluations continue

A held-back server keeps its leases and still gets weights. Both survive a restart of the buffer.
"""

from __future__ import annotations

from collections.abc import Mapping

from buffer.storage.base import Store

_PAUSED = "paused"
_CORDON = "cordon:"


class OperatorHolds:
    """The holds of one ledger."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_paused = False
        self.cordoned: set[str] = set()
        """Names of rollout servers, registered or not."""

    def restore(self, scalars: Mapping[str, int]) -> None:
        """Takes the holds of an earlier buffer."""
        self.is_paused = bool(scalars.get(_PAUSED, 0))
        held = [key for key, value in scalars.items() if value]
        self.cordoned = {key.removeprefix(_CORDON) for key in held if key.startswith(_CORDON)}

    def set_paused(self, is_paused: bool) -> bool:
        """Returns False if nothing has changed."""
        if self.is_paused is is_paused:
            return False
        self.is_paused = is_paused
        self._store.put_scalar(_PAUSED, int(is_paused))
        return True

    def set_cordoned(self, name: str, is_cordoned: bool) -> bool:
        """Returns False if nothing has changed."""
        if (name in self.cordoned) is is_cordoned:
            return False
        (self.cordoned.add if is_cordoned else self.cordoned.discard)(name)
        self._store.put_scalar(f"{_CORDON}{name}", int(is_cordoned))
        return True
