"""The staleness bound of a job in words, for status, summary, report and audit."""

from __future__ import annotations

from areal_like.config import Config


def promise(config: Config, *, max_staleness: int | None = None) -> str:
    """What the settings promise about the age of what is trained on.

    `max_staleness`: the bound in force; None: that of the settings.
    """
    bound = _steps(config.staleness_cap if max_staleness is None else max_staleness)
    if config.overdue == "wait":
        return f"wait: every sample within {bound}"
    if config.overdue == "drop":
        return f"drop: every sample within {bound}, groups that are slower are dropped"
    after = f"close after {_steps(config.close_after)}"
    match config.staleness.beyond:
        case "mask":
            return f"{after}: every trained token within {bound}"
        case "cap":
            return f"{after}: no limit on the age of tokens, weights of those beyond {bound} are capped at 1"
    return (
        f"{after}: no limit on the age of tokens, those beyond {bound} are masked if their probability has "
        "changed by more than a factor of 2"
    )


def _steps(number: int) -> str:
    return f"{number} step" if number == 1 else f"{number} steps"
