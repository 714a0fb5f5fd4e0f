"""`max_staleness: auto`: how stale data may be, chosen by what staleness does to the effective sample size.

    SETTLING (what is trained was partly admitted under the last bound) -> MEASURING (a window of steps) -> decision -> SETTLING | MEASURING

With m the mean ESS ratio over a window, T the target, and b the bound:

    m < T                                        b -> b // 2, and the old b becomes the ceiling
    m > T + (1 - T) / 4, and b was used up       b -> b + 1, but the ceiling only after `patience` such windows in a row
    else                                         b stays

Halving and adding one is TCP's law, for its reason: too stale a batch harms at once, too fresh a one only costs time. Three things keep it
from swinging as TCP does. Nothing is decided on data from before the last change, which takes b + 1 steps to be trained. Between T and
the threshold for raising nothing happens. And a bound that failed is a ceiling: trying it again takes patience that doubles with each
failure and is forgotten when it holds, so probes get rare where the plant does not change and still find out where it does. A bound that
the data do not reach (generation is the bottleneck) is not raised: nothing would be learned about the higher one.

A pure state machine: one call a step, no clock. It starts at 0, because nothing is known yet.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

WINDOW_STEPS = 8
"""Steps that are averaged for one decision: the ESS of a single batch is decided by its most unlikely sequence."""
_FIRST_PATIENCE, _MAX_PATIENCE = 2, 64
"""Windows."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """What a checkpoint keeps; everything counts from the last change of the bound."""

    bound: int = 0
    settling_steps: int = 0
    """Steps still to be ignored."""
    num_seen: int = 0
    sum_ess: float = 0.0
    max_lag: int = 0
    num_good_windows: int = 0
    ceiling: int = 0
    """The lowest bound that failed and has not held since; 0: none."""
    patience: int = _FIRST_PATIENCE


class StalenessController:
    """Feed it every trained step; see the module for the law."""

    def __init__(self, *, cap: int, target: float) -> None:
        """`cap`: largest bound in steps. `target`: ESS over batch size that is kept up, 0 to 1."""
        self._cap = cap
        self._target = target
        self._raise_above = target + (1 - target) / 4
        self._state = _State()

    @property
    def bound(self) -> int:
        """Largest lag, in steps, of what is admitted from now on."""
        return self._state.bound

    def observe(self, *, ess_ratio: float, lag_max: int) -> int:
        """A step was trained with this ESS over batch size and this largest lag; returns the bound from now on."""
        state = self._state
        if state.settling_steps:
            self._state = dataclasses.replace(state, settling_steps=state.settling_steps - 1)
            return self.bound
        state = dataclasses.replace(
            state,
            num_seen=state.num_seen + 1,
            sum_ess=state.sum_ess + (ess_ratio if math.isfinite(ess_ratio) else 0.0),
            max_lag=max(state.max_lag, lag_max),
        )
        self._state = state if state.num_seen < WINDOW_STEPS else self._decided(state)
        return self.bound

    def dump(self) -> dict[str, Any]:
        """For a checkpoint: plain numbers."""
        return dataclasses.asdict(self._state)

    def restore(self, dumped: dict[str, Any]) -> None:
        """Goes on from `dump`. The cap may be another one by now."""
        state = _State(**dumped)
        self._state = dataclasses.replace(state, bound=min(state.bound, self._cap))

    def _decided(self, state: _State) -> _State:
        mean = state.sum_ess / state.num_seen
        is_good = mean > self._raise_above and state.max_lag >= state.bound
        measured = dataclasses.replace(
            state,
            num_seen=0,
            sum_ess=0.0,
            max_lag=0,
            num_good_windows=state.num_good_windows + 1 if is_good else 0,
        )
        if mean < self._target:
            return self._lowered(measured)
        if state.bound and state.bound == state.ceiling:  # it holds now
            measured = dataclasses.replace(measured, ceiling=0, patience=_FIRST_PATIENCE)
        needed = measured.patience if state.bound + 1 == measured.ceiling else 1
        if state.bound < self._cap and measured.num_good_windows >= needed:
            return _changed(measured, state.bound + 1)
        return measured

    def _lowered(self, state: _State) -> _State:
        if (
            not state.bound
        ):  # on-policy data fall short by themselves (the engine's numerics): no bound can help
            return state
        failed_again = state.bound == state.ceiling
        patience = min(2 * state.patience, _MAX_PATIENCE) if failed_again else _FIRST_PATIENCE
        return _changed(dataclasses.replace(state, ceiling=state.bound, patience=patience), state.bound // 2)


def _changed(state: _State, bound: int) -> _State:
    # Tickets of the old bound are trained for so long, and one step is recorded ahead.
    return dataclasses.replace(
        state, bound=bound, settling_steps=max(state.bound, bound) + 1, num_good_windows=0
    )
