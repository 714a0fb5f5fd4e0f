"""`areal-like samples RUN`: shows samples of a run as text, with rewards and lags (launch/samples/).

Without options it shows the worst three and the best three of the newest completed step: what the policy
gets wrong, and what it is rewarded for. The run may still be running.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from areal_like.errors import ConfigError
from launch.commands.parser import JSON, RUN, argument, command, flag
from launch.run_directory.rundir import find_run
from launch.samples.choosing import transcripts
from launch.samples.reading import Row, Selection
from launch.samples.showing import lines_of


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _number(text: str) -> int:
    """A number that the ledger can have."""
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r:.40}")
    return int(text)


@command(
    "samples",
    "Show samples as text, with rewards, versions and lags by turn: by default the worst three and the best "
    "three of the newest completed step.",
    RUN,
    argument("--step", type=_number, metavar="K", help="of this step, not of the newest"),
    argument("--set", metavar="NAME", dest="set_name", help="of this set's evaluation"),
    argument("--ticket", type=_number, metavar="T", help="the samples of this ticket"),
    argument("--worst", type=_count, metavar="N", help="the N with the lowest rewards"),
    argument("--best", type=_count, metavar="N", help="the N with the highest rewards"),
    argument("--limit", type=_count, metavar="N", help="the first N, by position in the step"),
    flag("--full", "long texts too"),
    JSON,
    examples=[
        "samples myrun",
        "samples myrun --step 120 --worst 10 --full",
        "samples myrun --set held_out --best 5",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Prints the samples. Raises ConfigError if there are none, StoreCorruptError for a damaged record."""
    if args.ticket is not None and (args.step is not None or args.set_name is not None):
        raise ConfigError("samples: --ticket already says which samples: leave out --step and --set")
    root = find_run(args.run)
    selection = Selection(ticket=args.ticket, set_name=args.set_name, step=args.step)
    rows, samples = transcripts(root, selection, worst=args.worst, best=args.best, limit=args.limit)
    if args.json:
        print(json.dumps({"run": str(root), "samples": [one.as_json() for one in samples]}))
        return 0
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(Text(_overview(rows, num_shown=len(samples))))
    for one in samples:
        for line in lines_of(one, shows_all=args.full):
            console.print(line)
    return 0


def _overview(rows: Sequence[Row], *, num_shown: int) -> str:
    first = rows[0]
    if len({row.ticket for row in rows}) == 1:
        where = f"ticket {first.ticket}"
    elif first.eval_set:
        where = f"set {first.eval_set}, weights of step {first.step}"
    else:
        where = f"step {first.step}"
    mean = sum(row.reward for row in rows) / len(rows)
    return f"{where}: {len(rows)} samples, mean reward {mean:.4g}; {num_shown} shown\n"
