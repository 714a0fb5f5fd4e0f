"""What an objective or advantage has to see before the first gradient of a step may be computed."""

from enum import StrEnum


class Scope(StrEnum):
    """How much of a step a quantity depends on."""

    GROUP = "group"
    """One group: micro-batches are trained on while others are still being generated."""
    BATCH = "batch"
    """All groups of the step on all ranks: a pass without gradient gathers statistics first."""
