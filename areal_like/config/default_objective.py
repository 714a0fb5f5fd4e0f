"""`objective=auto`: the objective of a job that names none.

It is GSPO with wide clips, for answers of all lengths: its weights are geometric means of the ratios pi / mu
over the tokens of a sample. Weights that are products of these ratios suit short answers only. Rounding in
engine and trainer alone makes them useless for long ones: with a standard deviation of .031 of a token's
log-ratio, the effective sample size of L tokens is exp(-L .031^2) of the batch, which is .88 at 128 tokens,
.61 at 512 and .37 at 1,024 (docs/reference/objectives.md, Long completions).

How it was selected: docs/decisions/0019-default-method.md. A run's `config.yaml` names the objective, so a
run keeps it when a later release has another default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

AUTO = "auto"
"""`objective.name` of the default."""
MAX_SHORT_ANSWER = 512
"""Largest number of sampled tokens in a sample for which products of ratios are of use.

Beyond, rounding alone costs them more than a third of the batch (see above, and `benchmarks.long_answers`).
"""


def default_objective() -> dict[str, Any]:
    """The section `objective` that `auto` stands for: the preset `configs/objective/gspo.yaml`."""
    return {"name": "gspo", "clip_low": 0.05, "clip_high": 0.05, "normalizer": "seq_mean_token_mean"}


def as_setting(objective: Mapping[str, Any]) -> str:
    """The section as it is typed on the command line, after `objective=`."""
    return json.dumps(objective, default=str).replace('"', "")


def why(longest_answer: int, *, limit: str) -> str:
    """The default and its reason on one line. `limit`: the setting that limits the answers."""
    return (
        f"objective=auto is {as_setting(default_objective())}: its weights are means over the tokens of a "
        f"sample, which suit answers of every length (here up to {longest_answer} tokens: {limit})"
    )
