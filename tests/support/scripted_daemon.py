"""Stand-ins for the daemons, for tests of what the launcher does when daemons misbehave on purpose.

Real processes with the real runtime (signals, endpoint files, HTTP plane) and no model: what they do is named by `SCRIPT`, a JSON
object from daemon name to behaviour. The launcher finds them because `python -m` looks into the working directory first.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from areal_like.errors import ConfigError, DeadlineError
from areal_like.paths import RunPaths, write_json
from areal_like.runtime.command_line import role_arguments
from areal_like.runtime.daemon import Runtime, run_daemon

PACKAGES = {
    "buffer/__main__.py": "from tests.support.scripted_daemon import main; main('buffer', 'buffer')",
    "rollout_server/__main__.py": "from tests.support.scripted_daemon import main; main('rollout', 'rollout-0')",
    "trainer/__main__.py": "from tests.support.scripted_daemon import main; main('trainer', 'trainer-0')",
    "trainer/prepare_model.py": "from tests.support.scripted_daemon import prepare; prepare()",
}


def write_packages(folder: Path) -> None:
    """Makes `folder` a working directory in which `python -m buffer` and the others are these stand-ins."""
    for name, text in PACKAGES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
        (path.parent / "__init__.py").touch()


def behaviour(name: str) -> str:
    """What the test asked of this daemon; empty: behave."""
    return str(json.loads(os.environ.get("SCRIPT", "{}")).get(name, ""))


def prepare() -> None:
    """The model is there at once, or cannot be made."""
    if behaviour("prepare_model") == "user error":
        sys.stderr.write("error: model.path=/nowhere: no config.json there\n")
        sys.exit(2)


def main(role: str, default_name: str) -> None:
    """One daemon."""
    config, name = role_arguments(sys.argv[1:], default_name=default_name)
    script = behaviour(name)
    if script == "crash" or (
        script == "crash once" and not _seen_before(RunPaths.of(config).root / f"{name}.crashed")
    ):
        sys.stderr.write(f"{name}: the dog ate my weights\n")
        sys.exit(3)

    async def body(runtime: Runtime) -> None:
        if script == "user error":
            raise ConfigError("cannot bind 127.0.0.1:1 (in use): set buffer.port to a free port")
        if script == "never ready":
            runtime.unready("waiting for Godot")
            await runtime.stopping.wait()
            return
        if script == "deaf":
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            # A process in a session of its own, as torchrun's ranks are.
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        if role == "buffer":
            runtime.advertise(stream="tcp://127.0.0.1:12345")
            runtime.status = lambda: {
                "tickets": {"queued": 1, "trained": 7},
                "drops": {"stale": 2},
                "tokens_generated": 99,
            }
        num_lives = _num_lives(runtime.paths.root / f"{name}.lives") if script == "loses its device" else 0
        if num_lives == 2:
            raise ConfigError("rollout.engine_device=cuda:1: there is no such device")
        runtime.ready()
        if num_lives == 1:
            await asyncio.sleep(2)
            os._exit(3)
        if role == "trainer":
            await train(
                runtime, fail_at=5 if script == "fail" else None, drain_s=2 if script == "drain slowly" else 0
            )
        else:
            await runtime.stopping.wait()

    sys.exit(run_daemon(config, role=role, name=name, main=body))


def _seen_before(path: Path) -> bool:
    known = path.exists()
    path.touch()
    return known


def _num_lives(path: Path) -> int:
    with path.open("a+") as file:
        return file.write("life\n") and file.tell() // len("life\n")


async def train(runtime: Runtime, *, fail_at: int | None, drain_s: float) -> None:
    """Writes what a trainer writes, twenty steps a second."""
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
    (runtime.paths.checkpoints / f"step_{num_done:06d}").mkdir(parents=True)
    write_json(
        runtime.paths.summary,
        {"steps": num_done, "wall_seconds": time.monotonic() - started_s, "tickets": {"trained": num_done}},
    )
