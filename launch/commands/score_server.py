"""`areal-like score-server DIR`: serves one reward model, for runs that name its URL (`task.reward.url`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from areal_like.config.common import NAME, NAME_RULE
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from launch.commands.foreground import become
from launch.commands.parser import SETTINGS, argument, command

_RUN = "scorer"
"""Name of the directory of its logs, if none is given."""


@command(
    "score-server",
    "Serve the scores of a reward model over HTTP (/score, and /classify as SGLang does), until Ctrl-C or "
    "SIGTERM. A run with scorer.path starts such servers itself; this is for runs that share one, and for "
    "other machines.",
    argument("model", metavar="DIR", help="Hugging Face directory of a sequence classifier with one label"),
    argument("--name", metavar="NAME", default="scorer-0", help="of the server (scorer-0)"),
    SETTINGS,
    examples=[
        "score-server models/reward scorer.port=30100",
        "score-server models/reward --name scorer-1 scorer.port=30100 scorer.device=cuda:1",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Becomes the score server. Raises ConfigError for a wrong setting."""
    if not NAME.fullmatch(args.name):
        raise ConfigError(f"--name {args.name[:80]}: {NAME_RULE}")
    path = Path(args.model).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"score-server: no directory {path}")
    settings = [f"name={_RUN}", *args.settings, f'scorer.path="{path}"']
    if any(word.startswith("scorer.path=") for word in args.settings):
        raise ConfigError("score-server: DIR is scorer.path: leave the setting out")
    config = load_config(settings)
    endpoint = RunPaths.of(config).endpoints / f"{args.name}.json"
    print(f"{args.name} serves {path}; its address is in {endpoint}; Ctrl-C ends it", flush=True)
    words = ("--name", args.name, *settings)
    become("rollout_server.scoring", *words, num_threads=config.scorer.num_threads)
