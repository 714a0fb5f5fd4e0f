"""`max_staleness: auto`: adapts the staleness bound to the effective sample size (ESS) of the batches.

The ESS is computed from the objective's own weights (`Objective.ess_level`): products over sequences, their
geometric means, or tokens. If the engine's numerics differ from the trainer's, the ESS of products falls with
the length of the completions, at any lag; the ESS of tokens hardly changes.

With m the mean ESS ratio over a window of steps, T the target, and b the bound:

    m < T                                          b -> b // 2, and the old b becomes the ceiling
    m > T + (1 - T) / 4, and some lag reached b    b -> b + 1; up to the ceiling, only after
                                                   `patience` such windows in a row
    else                                           b stays

Halving and adding one is the rule of TCP's congestion control, for the same reason: a batch that is too stale
harms training at once, a batch that is too fresh only costs time. Three rules keep the bound from oscillating
as TCP's window does:

* No decision uses samples from before the last change. Training on those takes b + 1 steps.
* Between T and the threshold for raising, the bound stays.
* A bound that failed is a ceiling. The number of good windows before it is tried again (`patience`) doubles
  with each failure and is reset when the bound holds. Attempts become rare while conditions stay the same,
  but never stop, so a change of conditions is noticed.

If no lag reaches the bound (generation is the bottleneck), the bound is not raised: the data would not show
the effect of a higher bound.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

WINDOW_STEPS = 8
"""Steps averaged for one decision: the ESS of one batch depends mostly on its most unlikely sequence."""
_FIRST_PATIENCE, _MAX_PATIENCE = 2, 64
"""First and largest value of `patience`, in windows."""


@dataclass(frozen=True, kw_only=True)
class _State:
    """The state that a checkpoint keeps. All counts start at the last change of the bound."""

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
    """Good windows in a row that are needed to raise the bound to the ceiling."""


class StalenessController:
    """A pure state machine without a clock; `observe` is called once per step. The bound starts at 0.

    SETTLING (some trained data were admitted under the last bound) -> MEASURING (a window of steps)
             -> decision -> SETTLING if the bound changed, else MEASURING
    """

    def __init__(self, *, cap: int, target: float) -> None:
        """`cap`: largest bound in steps. `target`: least ESS over batch size, 0 to 1."""
        self._cap = cap
        self._target = target
        self._raise_above = target + (1 - target) / 4
        self._state = _State()

    @property
    def bound(self) -> int:
        """Largest lag, in steps, of samples that are admitted from now on."""
        return self._state.bound

    def observe(self, *, ess_ratio: float, lag_max: int) -> int:
        """Records a trained step's ESS over batch size and largest lag; returns the bound from now on."""
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
        """The state for a checkpoint, as plain numbers."""
        return dataclasses.asdict(self._state)

    def restore(self, dumped: dict[str, Any]) -> None:
        """Restores the state from `dump`. The cap may have changed since, and lowers the bound."""
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
        if state.bound and state.bound == state.ceiling:  # the bound that failed earlier holds now
            measured = dataclasses.replace(measured, ceiling=0, patience=_FIRST_PATIENCE)
        needed = measured.patience if state.bound + 1 == measured.ceiling else 1
        if state.bound < self._cap and measured.num_good_windows >= needed:
            return _changed(measured, state.bound + 1)
        return measured

    def _lowered(self, state: _State) -> _State:
        # Bound 0 is on-policy. If even that misses the target (the engine's numerics differ), no bound helps.
        if not state.bound:
            return state
        failed_again = state.bound == state.ceiling
        patience = min(2 * state.patience, _MAX_PATIENCE) if failed_again else _FIRST_PATIENCE
        return _changed(dataclasses.replace(state, ceiling=state.bound, patience=patience), state.bound // 2)


def _changed(state: _State, bound: int) -> _State:
    # Samples admitted under the old bound are trained for that many steps, and one step is recorded ahead.
    return dataclasses.replace(
        state, bound=bound, settling_steps=max(state.bound, bound) + 1, num_good_windows=0
    )
