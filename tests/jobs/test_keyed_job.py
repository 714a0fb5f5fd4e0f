"""A whole job with keys: shards, a server that joins with a key of its own, renewed and revoked keys."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from areal_like.errors import DeadlineError
from areal_like.security.administration import add_key, revoke_key
from areal_like.security.keys import KeyRole
from areal_like.wire.messages.weights import AskAlive
from launch.cli import main as areal_like
from tests.support import warm_start
from tests.support.keys import keyed_link, keyring, keys_of_machine, new_keys
from tests.support.launching import ROOT, TEST_LIMIT_S, finish, launcher, num_steps_done, wait_until
from tests.support.waiting import HANG_LIMIT_S

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]


async def answers(address: str, path: Path | None, role: KeyRole, *, timeout_s: float = 1) -> bool:
    """True if a weight socket answers to this key."""
    keys = keyring(path, role) if path else None
    link = keyed_link(address, keys, role=KeyRole.ROLLOUT)
    try:
        await link.call(AskAlive(), timeout_s=timeout_s)
    except DeadlineError:
        return False
    finally:
        link.close()
    return True


def log_of(run: Path, daemon: str) -> str:
    return (run / "logs" / f"{daemon}.log").read_text()


@pytest.mark.long
def test_a_keyed_job_with_renewed_and_revoked_keys(tmp_path: Path, cache: dict[str, str]) -> None:
    """Long, because a server joins, changes its key and is shut out of a job that goes on."""
    keys = new_keys(tmp_path / "keys")
    add_key(keys, "gpu-7", KeyRole.ROLLOUT)
    # The joining machine has only what it needs.
    machine = keys_of_machine(keys, tmp_path / "machine", "gpu-7")
    run = tmp_path / "runs" / "x"
    settings = (
        "name=x",
        "task._target_=tests.support.rollout_tasks.SlowChecksum",
        f"security.keys={keys}",
        "buffer.num_shards=2",
        "model.warm_start_steps=0",
        "sampling.max_new_tokens=8",
        "sampling.group_size=4",
        "trainer.groups_per_step=4",
        "trainer.num_steps=100000",
        "trainer.checkpoint_interval=100000",
        "trainer.checkpoint_minutes=0.03",
        "eval.num_prompts=4",
        "weights.push_deadline_s=15",
    )
    with launcher(*settings, cwd=tmp_path, environment=cache) as process:

        def wait(condition: object, what: str) -> None:
            assert callable(condition)
            wait_until(condition, what=what, run_root=run, process=process)

        def steps(count: int) -> None:
            goal = num_steps_done(run) + count
            wait(lambda: num_steps_done(run) >= goal, f"step {goal}")

        wait(lambda: num_steps_done(run) > 2, "steps")
        joined = warm_start.Popen(
            [
                *(sys.executable, "-m", "launch", "rollout", "x", "--join", "--name", "joined"),
                *(f"security.keys={machine}", "security.identity=gpu-7"),
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | cache,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait(lambda: "'joined'" in log_of(run, "trainer-0"), "a push to the server that joined")
            # Strangers at the weight socket of a server: no key, an unknown key, a key of another role.
            weights = str(json.loads((run / "endpoints" / "rollout-0.json").read_text())["weights"])
            assert asyncio.run(answers(weights, keys, KeyRole.TRAINER, timeout_s=HANG_LIMIT_S))
            assert not asyncio.run(answers(weights, None, KeyRole.TRAINER))
            assert not asyncio.run(answers(weights, keys, KeyRole.ROLLOUT))
            steps(2)

            assert areal_like(["keys", "rotate", str(keys), "--grace", "600"]) == 0
            (machine / "public.json").write_bytes((keys / "public.json").read_bytes())
            (machine / "gpu-7.secret").write_bytes((keys / "gpu-7.secret").read_bytes())
            for daemon in ("buffer-0", "buffer-1", "trainer-0", "rollout-0", "joined"):
                log = functools.partial(log_of, run, daemon)
                wait(lambda log=log: "using the new key" in log(), f"the new key of {daemon}")
            steps(5)
            wait(lambda: list(run.glob("checkpoints/step_*")), "a checkpoint by the clock")
            revoke_key(keys, "gpu-7")
            wait_until(lambda: joined.poll() is not None, what="the end of the revoked server")
            assert joined.returncode == 1
            assert joined.stderr is not None and "this key was revoked" in joined.stderr.read()
            steps(5)
            process.terminate()
            code, _, _ = finish(process, run)
        finally:
            joined.kill()
            joined.wait()
            assert joined.stderr is not None
            joined.stderr.close()
    assert code == 0
    audit = warm_start.run(
        [sys.executable, "-m", "launch", "audit", "x"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert audit.returncode == 0, audit.stdout
    secrets = [json.loads(file.read_text())["secret"] for file in keys.glob("*.secret")]
    for file in (run / "config.yaml", *run.glob("endpoints/*"), *run.glob("logs/*")):
        text = file.read_text()
        assert not any(secret in text for secret in secrets), file
