"""The part of a step that must have arrived before the step's first gradient can be computed."""

from enum import StrEnum


class Scope(StrEnum):
    """The part of a step that an objective, advantage, mask or reward shaping depends on."""

    GROUP = "group"
    """One group: micro-batches are trained on while later groups are still being generated."""
    BATCH = "batch"
    """All groups of the step on all ranks: a pass without gradient gathers statistics first."""
