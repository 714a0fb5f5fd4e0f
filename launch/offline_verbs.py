"""The verbs that train on rows of a file, without rollout servers and a buffer.

`launch/commands/offline.py` runs them. Their trainers are kinds of `trainer.offline`.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_like.paths import RunPaths
from launch.run_files import read_object


@dataclass(frozen=True, kw_only=True)
class OfflineVerb:
    """One of them."""

    verb: str
    """Its name on the command line, in rows.json of its runs, and behind the names of the runs."""
    section: str
    """Its section of the configuration."""
    module: str
    """The trainer, for `python -m`."""
    measures: tuple[tuple[str, str, str], ...]
    """(name of a metric of held-out rows, label, format), in the order of the summary."""
    use: str
    """What its model is for; the settings that name the model follow."""
    title: str = ""
    """What a report calls its runs; empty: by the verb."""
    prepares: tuple[str, ...] = ()
    """Further arguments of `trainer.prepare_model`."""


_LOSS = ("loss", "loss", "{:.4f}")
SFT = OfflineVerb(
    verb="sft",
    section="sft",
    module="trainer.sft",
    measures=(_LOSS,),
    use="train it with rewards: areal-like run, with",
    title="Supervised run",
)
REWARD_MODEL = OfflineVerb(
    verb="reward-model",
    section="reward_model",
    module="trainer.reward_model",
    measures=(
        _LOSS,
        ("accuracy", "accuracy", "{:.1%}"),
        ("margin", "margin", "{:.3f}"),
        ("ece", "calibration error", "{:.3f}"),
    ),
    use="a directory for AutoModelForSequenceClassification; areal-like reward-model trains it further, with",
    prepares=("--reward-model",),
)
PREFERENCES = OfflineVerb(
    verb="preferences",
    section="preferences",
    module="trainer.preferences",
    measures=(
        _LOSS,
        ("accuracy", "accuracy of the rewards", "{:.1%}"),
        ("margin", "margin of the rewards", "{:.3f}"),
    ),
    use="train it with rewards, or evaluate it: areal-like run or eval, with",
)
OFFLINE_VERBS = {each.verb: each for each in (SFT, REWARD_MODEL, PREFERENCES)}


def offline_verb(paths: RunPaths) -> OfflineVerb | None:
    """The verb that made a run; None for a run with rewards, or one that has no rows yet."""
    if not paths.rows.exists():
        return None
    return OFFLINE_VERBS.get(str(read_object(paths.rows).get("command")), SFT)
