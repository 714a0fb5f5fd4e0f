"""The result of comparing two runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = (
    "settings",
    "initial weights",
    "damaged records",
    "groups",
    "prompts",
    "tokens",
    "shape of samples",
    "versions",
    "behavior log-probs",
    "rewards",
    "parameters before the step",
    "policy's log-probs",
    "advantages",
    "weights of the loss",
    "loss",
    "gradient norm",
    "other metrics",
    "parameters",
    "moments",
)
"""The kinds that are compared, in causal order: in a step, each is computed from those before it."""
_OF_STEP = ("loss", "gradient norm", "other metrics")
"""Numbers of a whole step, which its row has in full."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two runs in one step."""

    kind: str
    """One of KINDS."""
    text: str
    """What differs and where, with the values of both runs, in the order of the runs."""
    run: Any = None
    """The value in the first run, if it is one number or word."""
    other: Any = None


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """The first step that differs, trained again from the records of both runs, each at one rank."""

    step: int
    differences: list[Difference]
    """In causal order."""
    equal: list[str]
    """The kinds that do not differ."""
    rows: list[str]
    """For each run, whether the loss and gradient norm in its row match its records."""

    def lines(self) -> Iterator[str]:
        """The result as text for a user."""
        yield f"step {self.step} of both, trained again from their records:"
        yield from (f"  {one.kind}: {one.text}" for one in self.differences)
        if self.equal:
            yield f"  equal: {', '.join(self.equal)}"
        yield from (f"  {text}" for text in self.rows)


@dataclass(kw_only=True)
class Comparison:
    """The result of a comparison: what is equal in two runs, and the first step at which they differ."""

    run: str
    other: str
    first_step: int
    last_step: int
    """Last of the steps that both have."""
    tolerance: float
    """Largest relative difference that counts as equal; 0: to the last bit."""
    rounding: list[str] = field(default_factory=list)
    """Settings that differ and change results only by rounding."""
    step: int | None = None
    """The first step at which the runs differ; None: none."""
    differences: list[Difference] = field(default_factory=list)
    """The differences in that step, in causal order."""
    compared: Counter[str] = field(default_factory=Counter)
    """Kind -> how many steps it was compared in."""
    compared_means: Counter[str] = field(default_factory=Counter)
    """The same, of numbers of a whole step: the rows of metrics.jsonl."""
    replayed: Replayed | None = None
    not_recorded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """True if no difference was found."""
        return not self.differences

    def add(self, step: int, found: list[Difference]) -> None:
        """Records the differences of a step, which ends the comparison."""
        self.step = step
        self.differences = sorted([*self.differences, *found], key=lambda one: KINDS.index(one.kind))

    def dumps(self) -> str:
        """The result as JSON."""
        differences = [asdict(one) for one in self.differences]
        replayed = None if self.replayed is None else asdict(self.replayed)
        found = {"equal": self.is_equal, "differences": differences, "replayed": replayed}
        return json.dumps(vars(self) | found, indent=2)

    def lines(self) -> Iterator[str]:
        """The result as text for a user; of two values separated by a slash, the first is `run`'s."""
        yield f"{self.run} / {self.other}: steps {self.first_step} to {self.last_step}"
        yield f"compared {self._precision()}"
        differing = {one.kind for one in self.differences}
        if "parameters" in differing:  # then the moments of that step are not compared
            differing.add("moments")
        others = [kind for kind in KINDS if kind not in differing]
        whole = self.compared + Counter({kind: self.compared_means[kind] for kind in _OF_STEP})
        equal = [kind for kind in others if whole[kind]]
        means = [kind for kind in others if self.compared_means[kind] and not whole[kind]]
        if self.is_equal:
            yield "no difference"
        else:
            yield f"first difference: step {self.step}, {self.differences[0].kind}"
        yield from (f"  {one.kind}: {one.text}" for one in self.differences)
        for kinds, of in ((equal, ""), (means, "means over each step of ")):
            if kinds:
                yield f"equal: {of}{', '.join(kinds)}"
        if self.replayed is not None:
            yield from self.replayed.lines()
        yield from (f"not recorded: {text}" for text in self.not_recorded)
        yield from (f"note: {text}" for text in self.notes)

    def _precision(self) -> str:
        because = f", because of {', '.join(self.rounding)}" if self.rounding else ""
        if self.tolerance:
            return f"to a relative difference of {self.tolerance:g}{because}"
        return f"to the last bit (rounding differs{because})" if because else "to the last bit"
