"""`areal-like drop RUN TICKET ...`: takes tickets that do harm out of the steps they are recorded in, for good.

A running buffer is asked (its control verb); the ledger of a stopped one is opened by `python -m buffer --drop`, which refuses when
another process has it. Either way all of them are dropped or none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from areal_like.daemon import read_endpoint
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from launch.child import ROOT
from launch.observe import post_json

_TIMEOUT_S = 30.0


def drop_tickets(root: Path, ticket_ids: Sequence[int]) -> str:
    """What was done, in a sentence. Raises ConfigError with the reason when it was not."""
    paths = RunPaths(root)
    endpoint = read_endpoint(paths.endpoints / "buffer.json")
    tickets = ", ".join(map(str, ticket_ids))
    if endpoint is not None and _ask(str(endpoint["http"]), ticket_ids):
        return f"the running buffer has dropped tickets {tickets}; its trainer starts again from its checkpoint"
    here = [
        f"runs_dir={root.resolve().parent}",
        f"name={root.resolve().name}",
    ]  # it may have been moved
    command = [sys.executable, "-m", "buffer", "--drop", ",".join(map(str, ticket_ids)), "--config", str(paths.config), *here]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(done.stderr.strip().removeprefix("buffer: ") or f"the ledger could not be opened (exit code {done.returncode})")
    return f"dropped tickets {tickets} from the ledger of a job that is not running; go on with resume=latest"


def _ask(address: str, ticket_ids: Sequence[int]) -> bool:
    """False when nobody answers there: the endpoint file is of a buffer that was killed."""
    try:
        post_json(address, "/control/drop", {"tickets": list(ticket_ids)}, timeout_s=_TIMEOUT_S)
    except ConnectionRefusedError:
        return False
    return True
