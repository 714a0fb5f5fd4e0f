"""`areal-like drop RUN TICKET ...`: permanently removes harmful tickets from the steps that contain them.

A running buffer gets a control request. `python -m buffer --drop` opens the ledger of a stopped buffer, and
refuses if another process has it open. In both cases either all of the tickets are dropped or none. With
several shards, each gets the whole list and drops its own tickets.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from areal_like.runtime.daemon import read_endpoint
from areal_like.shards import Shard, all_shards
from launch.commands.parser import add_run
from launch.local_job.child import python_path
from launch.observation.http_json import operator_of, post_json
from launch.run_directory.rundir import find_run

_TIMEOUT_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN and the tickets' numbers."""
    add_run(parser)
    parser.add_argument("tickets", metavar="TICKET", nargs="+", type=_ticket_id, help="its number")


def _ticket_id(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a ticket number")
    return int(text)


def main(args: argparse.Namespace) -> int:
    """Drops the tickets and prints the result."""
    sys.stdout.write(drop_tickets(find_run(args.run), args.tickets) + "\n")
    return 0


def drop_tickets(root: Path, ticket_ids: Sequence[int]) -> str:
    """Drops the tickets; returns a message for the user. Raises ConfigError with the reason of a refusal."""
    paths = RunPaths(root)
    shards = all_shards(load_config(["--config", str(paths.config)]).buffer.num_shards)
    tickets = ", ".join(map(str, ticket_ids))
    are_running = [_drop(paths, shard, ticket_ids) for shard in shards]
    if any(are_running):
        dropped = f"the running buffer has dropped tickets {tickets}"
        return f"{dropped}; the trainer restarts from its newest checkpoint"
    dropped = f"dropped tickets {tickets} from the ledger of a job that is not running"
    return f"{dropped}; continue the job with resume=latest"


def _drop(paths: RunPaths, shard: Shard, ticket_ids: Sequence[int]) -> bool:
    """Drops the tickets of one shard; returns True when its buffer is running."""
    endpoint = read_endpoint(paths.endpoints / f"{shard.name}.json")
    if endpoint is not None and _request(paths, str(endpoint["http"]), ticket_ids):
        return True
    root = paths.root.resolve()
    # The stored configuration has an old place if the run's directory was moved.
    where = (f"runs_dir={root.parent}", f"name={root.name}")
    ids = ",".join(map(str, ticket_ids))
    command = [sys.executable, "-m", "buffer", "--name", shard.name, "--drop", ids]
    done = subprocess.run(
        [*command, "--config", str(paths.config), *where],
        env=os.environ | {"PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ConfigError(
            done.stderr.strip().removeprefix("buffer: ")
            or f"the ledger could not be opened (exit code {done.returncode})"
        )
    return False


def _request(paths: RunPaths, address: str, ticket_ids: Sequence[int]) -> bool:
    """Sends the request to a running buffer; returns False if no process listens at the address.

    A killed buffer leaves its endpoint file behind.
    """
    try:
        body = {"tickets": list(ticket_ids)}
        post_json(address, "/control/drop", body, operator=operator_of(paths.root), timeout_s=_TIMEOUT_S)
    except ConnectionRefusedError:
        return False
    except OSError as error:
        raise ConfigError(
            f"drop: the buffer at {address} does not answer ({error}): is its disk full? See its /status"
        ) from None
    return True
