"""Summarizes a run's results per prompt: solve rates by prompt and by label, prompts never issued.

The launcher reads the numbers from the run's ledger (launch/observation/heard_prompts.py) and sends them as
rows, because this package may not import the buffer. A sample's solve rate is its reward, mapped from
`buffer.curriculum_reward_low` .. `curriculum_reward_high` to 0 .. 1; greedy baselines do not count.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_NUM_BINS = 10
_NUM_EXAMPLES = 10


@dataclass(frozen=True, slots=True)
class HeardPrompt:
    """One prompt of the training split."""

    index: int
    num_issued: int
    """Tickets issued for the prompt; some may still be running."""
    num_samples: int
    """Samples received so far."""
    num_unsolved: int
    """Samples with a solve rate of 0."""
    num_solved: int
    """Samples with a solve rate of 1."""
    sum_solve_rate: float

    @classmethod
    def of_row(cls, row: Sequence[float]) -> HeardPrompt:
        """Builds it from the numbers of one prompt, in the order of the fields."""
        index, issued, samples, unsolved, solved, rate = row
        return cls(int(index), int(issued), int(samples), int(unsolved), int(solved), float(rate))

    @property
    def outcome(self) -> str:
        """`never`: no sample solved it; `always`: every sample did; otherwise `sometimes`."""
        if self.num_unsolved == self.num_samples:
            return "never"
        return "always" if self.num_solved == self.num_samples else "sometimes"

    @property
    def solve_rate(self) -> float:
        return self.sum_solve_rate / self.num_samples


def summary(
    prompts: Iterable[HeardPrompt],
    *,
    num_train: int,
    num_drawn: int | None,
    label_of: Callable[[int], str],
) -> dict[str, Any]:
    """Summarizes the results of a run.

    `num_train`: prompts of the training split; `num_drawn`: prompts drawn from its epochs (with a curriculum,
    more than were issued); None: there are no common epochs. `label_of` maps a prompt's index to its label;
    empty: it has none.
    """
    issued: Counter[int] = Counter()
    by_label: defaultdict[str, list[HeardPrompt]] = defaultdict(list)
    heard, num_beyond = [], 0
    for prompt in prompts:
        if prompt.index >= num_train:
            num_beyond += 1
            continue
        issued[prompt.num_issued] += 1
        if prompt.num_samples:
            heard.append(prompt)
            by_label[label_of(prompt.index)].append(prompt)
    num_issued = sum(issued.values())
    found = {
        "epochs": None if num_drawn is None else round(num_drawn / max(1, num_train), 3),
        "prompts": num_train,
        "never_issued": num_train - num_issued,
        "issued": {str(times): count for times, count in sorted(issued.items())},
        **_rates(heard),
        "histogram": _histogram(heard),
        "never_solved_examples": [
            prompt.index
            for prompt in sorted(heard, key=lambda prompt: (-prompt.num_samples, prompt.index))
            if prompt.outcome == "never"
        ][:_NUM_EXAMPLES],
    }
    if set(by_label) - {""}:
        found["by_label"] = {label: _rates(group) for label, group in sorted(by_label.items())}
    return found | ({"beyond_the_split": num_beyond} if num_beyond else {})


def _rates(prompts: Sequence[HeardPrompt]) -> dict[str, Any]:
    outcomes = Counter(prompt.outcome for prompt in prompts)
    num_samples = sum(prompt.num_samples for prompt in prompts)
    mean = sum(prompt.sum_solve_rate for prompt in prompts) / num_samples if num_samples else None
    return {
        "heard": len(prompts),
        "samples": num_samples,
        "solve_rate": None if mean is None else round(mean, 4),
        **{outcome: outcomes[outcome] for outcome in ("never", "sometimes", "always")},
    }


def _histogram(prompts: Sequence[HeardPrompt]) -> list[int]:
    """Counts prompts by solve rate: [0, 0.1), [0.1, 0.2) .. [0.9, 1]."""
    bins = Counter(min(int(prompt.solve_rate * _NUM_BINS), _NUM_BINS - 1) for prompt in prompts)
    return [bins[place] for place in range(_NUM_BINS)]
