"""An operator's change to the ledger of a job: at its running buffer, or in the files of a stopped one.

A running buffer gets a control request, also from a machine that does not see the run's directory.
`python -m buffer OPTION` opens the ledger of a stopped buffer, and refuses if another process has it open.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.daemon import read_endpoint
from areal_like.shards import Shard, all_shards
from launch.local_job.child import python_path
from launch.observation.reach import RunningJob

_TIMEOUT_S = 30.0


def change_ledger(job: RunningJob, *, verb: str, body: dict[str, Any], option: tuple[str, str]) -> bool:
    """Changes the ledger of every shard; returns True when a buffer is running.

    `verb`, `body`: the request to a running buffer. `option`: the same for `python -m buffer`. Raises
    ConfigError with the reason of a refusal.
    """
    if job.paths is None:
        job.post_all(verb, body, timeout_s=_TIMEOUT_S)
        return True
    shards = all_shards(job.config.buffer.num_shards)
    are_running = [_change(job, job.paths, shard, verb=verb, body=body, option=option) for shard in shards]
    return any(are_running)


def _change(
    job: RunningJob,
    paths: RunPaths,
    shard: Shard,
    *,
    verb: str,
    body: dict[str, Any],
    option: tuple[str, str],
) -> bool:
    endpoint = read_endpoint(paths.endpoints / f"{shard.name}.json")
    if endpoint is not None and _request(job, str(endpoint["http"]), verb, body):
        return True
    root = paths.root.resolve()
    # The stored configuration has an old place if the run's directory was moved.
    where = (f"runs_dir={root.parent}", f"name={root.name}")
    command = [sys.executable, "-m", "buffer", "--name", shard.name, *option]
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


def _request(job: RunningJob, address: str, verb: str, body: dict[str, Any]) -> bool:
    """Sends the request to a running buffer; returns False if no process listens at the address.

    A killed buffer leaves its endpoint file behind.
    """
    try:
        job.post_to(address, verb, body, timeout_s=_TIMEOUT_S)
    except ConnectionRefusedError:
        return False
    except OSError as error:
        raise ConfigError(
            f"{verb}: the buffer at {address} does not answer ({error}): is its disk full? See its /status"
        ) from None
    return True
