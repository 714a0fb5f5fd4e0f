"""`python -m trainer.planning [--gpus 4+4xH100] [--json] [--explain] [--config FILE] [key=value ...]`.

`areal-like plan` starts it, because the launcher does not import torch. Exit code 0: the job fits; 2: it does
not, or a user's mistake.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

from areal_like.errors import ConfigError, UserError
from areal_like.runtime.command_line import OneValue, Options, load_config, shows_help
from areal_like.runtime.imports import uncollected


def _options() -> Options:
    options = Options()
    options.add_argument("--gpus", action=OneValue)
    for name in ("--host-memory", "--prompt-tokens", "--response-tokens"):
        options.add_argument(name, action=OneValue)
    options.add_argument("--json", action="store_true")
    options.add_argument("--explain", action="store_true")
    return options


def _number(name: str, text: str | None, *, what: str = "mean number of tokens") -> float | None:
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"{name} {text}: give a {what} above 0")
    return number


def run(values: argparse.Namespace, settings: list[str]) -> int:
    """Plans, prints, and returns the exit code. Raises ConfigError."""
    prompt = _number("--prompt-tokens", values.prompt_tokens)
    response = _number("--response-tokens", values.response_tokens)
    host_gib = _number("--host-memory", values.host_memory, what="host's memory in GiB")
    config = load_config(settings)

    with uncollected():
        from trainer.planning.advice import changes_until_it_fits
        from trainer.planning.planner import make_plan
        from trainer.planning.report import json_of, text_of

    plan = make_plan(config, gpus=values.gpus, host_gib=host_gib, prompt=prompt, response=response)
    changes = list(changes_until_it_fits(plan))
    if values.json:
        sys.stdout.write(json.dumps(json_of(plan, changes), indent=2) + "\n")
    else:
        sys.stdout.write(text_of(plan, changes, explain=values.explain))
    sys.stdout.flush()
    if plan.fits:
        return 0
    helped = bool(changes) and changes[-1].plan.fits
    hint = "with the changes above it would" if helped else "no setting that plan knows helps"
    raise ConfigError(f"the job does not fit ({plan.memory.problems[0]}); {hint}")


def main(argv: list[str]) -> int:
    """Runs the planner; returns the exit code."""
    if shows_help(argv, __doc__):
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.basicConfig(level=logging.ERROR)
    try:
        values, settings = _options().parse_known_args(argv)
        return run(values, settings)
    except UserError as error:
        sys.stderr.write(f"areal-like: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
