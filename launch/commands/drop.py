"""`areal-like drop RUN TICKET ...`: takes tickets that do harm out of the steps they are recorded in, for good.

A running buffer is asked (its control verb); the ledger of a stopped one is opened by `python -m buffer --drop`, which refuses when
another process has it. Either way all of them are dropped or none; of several shards, each does so with its own, and hears of the others.
"""

from __future__ import annotations

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
from launch.local_job.child import ROOT
from launch.local_job.observe import post_json

_TIMEOUT_S = 30.0


def drop_tickets(root: Path, ticket_ids: Sequence[int]) -> str:
    """What was done, in a sentence. Raises ConfigError with the reason when it was not."""
    paths = RunPaths(root)
    shards = all_shards(load_config(["--config", str(paths.config)]).buffer.num_shards)
    tickets = ", ".join(map(str, ticket_ids))
    are_running = [_drop(paths, shard, ticket_ids) for shard in shards]
    if any(are_running):
        return (
            f"the running buffer has dropped tickets {tickets}; its trainer starts again from its checkpoint"
        )
    return f"dropped tickets {tickets} from the ledger of a job that is not running; go on with resume=latest"


def _drop(paths: RunPaths, shard: Shard, ticket_ids: Sequence[int]) -> bool:
    """Returns whether the shard is running."""
    endpoint = read_endpoint(paths.endpoints / f"{shard.name}.json")
    if endpoint is not None and _ask(str(endpoint["http"]), ticket_ids):
        return True
    here = [
        f"runs_dir={paths.root.resolve().parent}",
        f"name={paths.root.resolve().name}",
    ]  # it may have been moved
    ids = ",".join(map(str, ticket_ids))
    command = [
        sys.executable,
        "-m",
        "buffer",
        "--name",
        shard.name,
        "--drop",
        ids,
        "--config",
        str(paths.config),
        *here,
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            done.stderr.strip().removeprefix("buffer: ")
            or f"the ledger could not be opened (exit code {done.returncode})"
        )
    return False


def _ask(address: str, ticket_ids: Sequence[int]) -> bool:
    """False when nobody answers there: the endpoint file is of a buffer that was killed."""
    try:
        post_json(address, "/control/drop", {"tickets": list(ticket_ids)}, timeout_s=_TIMEOUT_S)
    except ConnectionRefusedError:
        return False
    except OSError as error:
        raise ConfigError(
            f"drop: the buffer at {address} does not answer ({error}): is its disk full? See its /readyz"
        ) from None
    return True
