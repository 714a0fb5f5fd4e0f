"""Settings that may change during the run, and the value that each has in each optimizer step.

    begin(step, base) -> a trainer starts: a newly configured setting applies from `step` on
    change(key, value, step) -> an operator's change applies from `step` on, the first step not begun yet
    ask(action, step) -> `evaluate` or `checkpoint`, once, after `step`

The value of a step is that of the newest row among those whose step is not later: a trainer that repeats a
step finds the same values, and a change that is made after a rollback replaces the earlier values of later
steps. Rows are only added, each at or after the step in training, so the values of completed steps stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from areal_like.errors import RefusedError
from buffer.storage.base import SettingRow, Store

LR = "trainer.lr"
EVAL_INTERVAL = "eval.interval"
MAX_STALENESS = "max_staleness"
LOG_LEVEL = "daemon.log_level"
EVALUATE, CHECKPOINT = "evaluate", "checkpoint"
ACTIONS = (EVALUATE, CHECKPOINT)
NOW = "now"
START, OPERATOR = "start", "operator"
_MAX_STEPS = 1 << 31
_MAX_CHARS = 40
"""Maximum characters of a value; longer ones are refused before they are parsed."""


def _lr(text: str) -> str:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return repr(value)


def _whole(text: str) -> str:
    value = int(text)
    if not 0 <= value < _MAX_STEPS:
        raise ValueError
    return str(value)


def _bound(text: str) -> str:
    return text if text == "auto" else _whole(text)


def _level(text: str) -> str:
    if text not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise ValueError
    return text


_SETTINGS: dict[str, tuple[Callable[[str], str], str]] = {
    LR: (_lr, "a number of at least 0"),
    EVAL_INTERVAL: (_whole, "a whole number of steps"),
    MAX_STALENESS: (_bound, "a whole number of steps"),
    LOG_LEVEL: (_level, "DEBUG, INFO, WARNING or ERROR"),
}
"""Key -> function that makes a value's text canonical, and a description of accepted values."""
CAN_CHANGE = ", ".join([*sorted(_SETTINGS), *(f"{action}={NOW}" for action in ACTIONS)])


def canonical(key: str, text: str) -> str:
    """The value as it is recorded. Raises RefusedError(key, reason)."""
    if key in ACTIONS:
        if text != NOW:
            raise RefusedError(key, f"want {key}={NOW}, got {text!r:.40}")
        return NOW
    if key not in _SETTINGS:
        raise RefusedError(
            f"{key:.40}",
            f"only these can change during the run: {CAN_CHANGE}; for other settings stop the run and "
            "resume it with them; for trainer.* `areal-like restart RUN trainer key=value`",
        )
    make, wanted = _SETTINGS[key]
    try:
        return make(text) if len(text) <= _MAX_CHARS else make("")
    except ValueError:
        raise RefusedError(key, f"want {wanted}, got {text!r:.40}") from None


class LiveSettings:
    """The rows of one ledger, all in memory: there are few, because only starts and operators add them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.rows: list[SettingRow] = []
        """Rows in the order in which they were made."""

    def restore(self, rows: Iterable[SettingRow]) -> None:
        """Takes the rows of an earlier buffer."""
        self.rows = list(rows)

    def begin(self, step: int, base: Mapping[str, str], *, unix_s: float) -> None:
        """A process starts with these configured values, at `step`.

        Only values that differ from those of the previous start apply; for the others an operator's changes
        stay.
        """
        for key, value in base.items():
            if self.configured(key) != value:
                self._add(step, key, value, origin=START, unix_s=unix_s)

    def change(self, key: str, value: str, *, step: int, unix_s: float) -> str | None:
        """Sets a canonical value for the steps from `step` on; returns the previous one (maybe equal)."""
        before, newest = self.at(key, step), self.newest(key)
        if newest is None or newest.value != value or newest.step > step:
            self._add(step, key, value, origin=OPERATOR, unix_s=unix_s)
        return before

    def ask(self, action: str, *, step: int, unix_s: float) -> None:
        """Requests an action after `step`. Idempotent."""
        if not self.is_asked(action, step):
            self._add(step, action, NOW, origin=OPERATOR, unix_s=unix_s)

    def is_asked(self, action: str, step: int) -> bool:
        """True if the action is to be done after `step`."""
        return any(row.key == action and row.step == step for row in self.rows)

    def at(self, key: str, step: int) -> str | None:
        """The value that a step has; None if it is not known."""
        return next((row.value for row in reversed(self.rows) if row.key == key and row.step <= step), None)

    def newest(self, key: str) -> SettingRow | None:
        """The last row of a key, which may apply to a future step."""
        return next((row for row in reversed(self.rows) if row.key == key), None)

    def configured(self, key: str) -> str | None:
        """The value with which the last process started; None: not known."""
        found = (row.value for row in reversed(self.rows) if row.key == key and row.origin == START)
        return next(found, None)

    @property
    def log_level(self) -> str:
        """The level that an operator has set; empty: each daemon uses its own."""
        row = self.newest(LOG_LEVEL)
        return row.value if row is not None and row.origin == OPERATOR else ""

    def _add(self, step: int, key: str, value: str, *, origin: str, unix_s: float) -> None:
        row = SettingRow(step=step, key=key, value=value, origin=origin, unix_s=unix_s)
        self.rows.append(row)
        self._store.put_row(row)
