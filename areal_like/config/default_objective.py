"""`objective=auto`: the objective that a job gets by the length of its answers.

Weights that are products of the ratios pi / mu over all tokens of a sample suit short answers. Rounding in
engine and trainer alone makes them useless for long ones: with a standard deviation of .031 of a token's
log-ratio, the effective sample size of L tokens is exp(-L .031^2) of the batch, which is .88 at 128 tokens,
.61 at 512 and .37 at 1,024 (docs/reference/objectives.md, Long completions). Long answers therefore get
weights of single tokens, without the samples whose mean log-ratio has left a band.

The choice depends on settings alone, so every role makes the same one without a message. Their
selection by measurements has not ended (docs/decisions/0019-default-method.md); they set no learning rate.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

AUTO = "auto"
"""`objective.name` of the choice by length."""
MAX_SHORT_ANSWER = 512
"""Largest number of sampled tokens in a sample that counts as a short answer. Beyond, rounding alone costs
products more than a third of the batch (see above; `python -m benchmarks.long_answers` measures methods)."""
OF_SHORT_ANSWERS: dict[str, Any] = {"name": "tis"}
OF_LONG_ANSWERS: dict[str, Any] = {
    "name": "tis",
    "level": "token",
    "masks": [{"name": "band", "level": "geometric", "low": 0.5, "high": 2.0}],
}


def objective_for(longest_answer: int) -> dict[str, Any]:
    """The section `objective` for a job whose samples have at most this many sampled tokens."""
    return copy.deepcopy(OF_SHORT_ANSWERS if longest_answer <= MAX_SHORT_ANSWER else OF_LONG_ANSWERS)


def as_setting(objective: Mapping[str, Any]) -> str:
    """The section as it is typed on the command line, after `objective=`."""
    return json.dumps(objective, default=str).replace('"', "")


def why(longest_answer: int, *, limit: str) -> str:
    """The choice and its reason on one line. `limit`: the setting that limits the answers."""
    is_short = longest_answer <= MAX_SHORT_ANSWER
    kind, relation = ("short", "at most") if is_short else ("long", "more than")
    return (
        f"objective=auto is {as_setting(objective_for(longest_answer))}, the method for {kind} answers: the "
        f"longest answer has {longest_answer} tokens ({limit}), {relation} {MAX_SHORT_ANSWER}"
    )
