"""An operator's change to the ledger of a job: at its running buffer, or in the files of a stopped one.

A running buffer gets a control request. `python -m buffer OPTION` opens the ledger of a stopped buffer, and
refuses if another process has it open.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.daemon import read_endpoint
from areal_like.shards import Shard
from launch.local_job.child import python_path
from launch.observation.http_json import operator_of, post_json

_TIMEOUT_S = 30.0


def change_ledger(
    paths: RunPaths, shard: Shard, *, verb: str, body: dict[str, Any], option: tuple[str, str]
) -> bool:
    """Changes the ledger of one shard; returns True when its buffer is running.

    `verb`, `body`: the request to a running buffer. `option`: the same for `python -m buffer`. Raises
    ConfigError with the reason of a refusal.
    """
    endpoint = read_endpoint(paths.endpoints / f"{shard.name}.json")
    if endpoint is not None and _request(paths, str(endpoint["http"]), verb, body):
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


def _request(paths: RunPaths, address: str, verb: str, body: dict[str, Any]) -> bool:
    """Sends the request to a running buffer; returns False if no process listens at the address.

    A killed buffer leaves its endpoint file behind.
    """
    try:
        operator = operator_of(paths.root)
        post_json(address, f"/control/{verb}", body, operator=operator, timeout_s=_TIMEOUT_S)
    except ConnectionRefusedError:
        return False
    except OSError as error:
        raise ConfigError(
            f"{verb}: the buffer at {address} does not answer ({error}): is its disk full? See its /status"
        ) from None
    return True
