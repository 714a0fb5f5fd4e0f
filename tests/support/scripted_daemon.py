"""Stand-ins for the daemons, for tests of the launcher with daemons that misbehave on purpose.

They are real processes with the real runtime (signals, endpoint files, HTTP plane) and without a model. The
environment variable `SCRIPT`, a JSON object from daemon name to behavior, selects how each of them
misbehaves. The launcher runs them because `python -m` searches the working directory first.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from areal_like.built_model import note_settings
from areal_like.errors import ConfigError, DeadlineError
from areal_like.paths import RunPaths, write_json
from areal_like.runtime.command_line import load_config, role_arguments
from areal_like.runtime.daemon import Runtime, run_daemon

_IMPORT = "from tests.support.scripted_daemon import"
PACKAGES = {
    "buffer/__main__.py": f"{_IMPORT} main; main('buffer', 'buffer')",
    "rollout_server/__main__.py": f"{_IMPORT} main; main('rollout', 'rollout-0')",
    "trainer/__main__.py": f"{_IMPORT} main; main('trainer', 'trainer-0')",
    "trainer/prepare_model.py": f"{_IMPORT} prepare; prepare()",
}


def write_packages(folder: Path) -> None:
    """Makes `folder` a working directory in which `python -m buffer`, `trainer` etc. run these stand-ins."""
    for name, text in PACKAGES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        (path.parent / "__init__.py").touch()


def behavior(name: str) -> str:
    """The behavior of this daemon in the test's script; empty: it works normally."""
    return str(json.loads(os.environ.get("SCRIPT", "{}")).get(name, ""))


def prepare() -> None:
    """The stand-in of `trainer.prepare_model`: its model has no weights; or a user's mistake."""
    if behavior("prepare_model") == "user error":
        sys.stderr.write("error: model.path=/nowhere: no config.json there\n")
        sys.exit(2)
    if behavior("prepare_model") == "takes long":
        time.sleep(600)
    config = load_config(sys.argv[1:])
    folder = RunPaths.of(config).built_model
    folder.mkdir(exist_ok=True)
    note_settings(config, folder)


def main(role: str, default_name: str) -> None:
    """Runs one daemon to its end."""
    config, name = role_arguments(sys.argv[1:], default_name=default_name)
    script = behavior(name)
    root = RunPaths.of(config).root
    if script == "crash" or (script == "crash once" and _count_start(root, name) == 1):
        sys.stderr.write(f"{name}: cannot load the weights\n")
        sys.exit(3)

    async def body(runtime: Runtime) -> None:
        if script == "user error":
            raise ConfigError("cannot bind 127.0.0.1:1 (in use): set buffer.port to a free port")
        if role == "trainer" and config.trainer.device != "cpu":
            raise ConfigError(f"trainer.device={config.trainer.device}: 0 GPUs are visible")
        if script == "never ready":
            runtime.unready("waiting for a peer")
            await runtime.stopping.wait()
            return
        if script == "ignore signals":
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            # A process in another session, as torchrun's ranks are.
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        start_number = _count_start(root, name) if script == "loses its device" else 0
        if start_number == 2:
            raise ConfigError("rollout.engine_device=cuda:1: there is no such device")
        if role == "buffer":
            _pose_as_buffer(runtime)
        while role == "trainer" and not (runtime.stopping.is_set() or _buffer_has_port(root)):
            await asyncio.sleep(0.05)  # as the real one, which then has no steps without a buffer
        runtime.ready()
        if start_number == 1:
            await _die_when_exists(root / f"{name}.dies")
        if role == "trainer" and not runtime.stopping.is_set():
            drain_s = 2 if script == "drain slowly" else 0
            await train(runtime, fail_at=5 if script == "fail" else None, drain_s=drain_s)
        else:
            await runtime.stopping.wait()

    sys.exit(run_daemon(config, role=role, name=name, main=body))


def _count_start(root: Path, name: str) -> int:
    """Counts a start of the daemon; returns the number of starts so far."""
    with (root / f"{name}.starts").open("a+") as file:
        file.write("start\n")
        return file.tell() // len("start\n")


def _buffer_has_port(root: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "stream" in json.loads((RunPaths(root).endpoints / "buffer.json").read_text())
    return False


def _pose_as_buffer(runtime: Runtime) -> None:
    runtime.advertise(stream="tcp://127.0.0.1:12345")
    runtime.status = lambda: {
        "tickets": {"queued": 1, "trained": 7},
        "drops": {"stale": 2},
        "tokens_generated": 99,
    }


async def _die_when_exists(path: Path) -> None:
    """Dies with exit code 3 when the test makes this file."""
    while not path.exists():
        await asyncio.sleep(0.05)
    os._exit(3)


async def train(runtime: Runtime, *, fail_at: int | None, drain_s: float) -> None:
    """Writes the files of a trainer, at twenty steps per second."""
    started_s = time.monotonic()
    num_done = 0
    with runtime.paths.metrics.open("a") as file:
        while num_done < runtime.config.trainer.num_steps and not runtime.stopping.is_set():
            row = {
                "step": num_done,
                "time_unix_s": time.time(),
                "reward_mean": num_done / 100,
                "lag_histogram": {"0": 1},
                "lag_max": 0,
                "tokens_per_s_trained": 10.0,
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            num_done += 1
            if num_done == fail_at:
                raise DeadlineError("no group for step 5 within 300 s")
            await asyncio.sleep(0.05)
    await asyncio.sleep(drain_s)
    (runtime.paths.checkpoints / f"step_{num_done:06d}").mkdir(parents=True, exist_ok=True)
    write_json(
        runtime.paths.summary,
        {"steps": num_done, "wall_seconds": time.monotonic() - started_s, "tickets": {"trained": num_done}},
    )
