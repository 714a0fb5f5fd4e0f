"""A job across two simulated machines: network namespaces with an address and keys each, a shared disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.keys import keys_of_machine, new_keys
from tests.support.launching import ROOT, TEST_LIMIT_S, num_steps_done, wait_until

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]

TRAINER_HOST, ROLLOUT_HOST = "10.231.7.1", "10.231.7.2"
PORT = 5555


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces, connected by a virtual cable; removed afterwards."""
    near, far = (f"areal-{os.getpid()}-{end}" for end in "ab")
    cable = (f"ar{os.getpid()}a", f"ar{os.getpid()}b")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        try:
            ip("netns", "add", near)
            ip("netns", "add", far)
            ip("link", "add", cable[0], "netns", near, "type", "veth", "peer", "name", cable[1], "netns", far)
        except (FileNotFoundError, subprocess.CalledProcessError) as error:
            pytest.skip(f"may not make network namespaces: {getattr(error, 'stderr', error)}")
        for namespace, device, host in ((near, cable[0], TRAINER_HOST), (far, cable[1], ROLLOUT_HOST)):
            ip("-n", namespace, "addr", "add", f"{host}/24", "dev", device)
            ip("-n", namespace, "link", "set", device, "up")
            ip("-n", namespace, "link", "set", "lo", "up")
        yield near, far
    finally:
        for namespace in (near, far):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


@pytest.mark.chaos
def test_the_default_job_across_two_addresses(
    tmp_path: Path, machines: tuple[str, str], cache: dict[str, str]
) -> None:
    run = tmp_path / "runs" / "x"
    keys = new_keys(tmp_path / "keys")
    trainer_keys = keys_of_machine(keys, tmp_path / "trainer-keys", "buffer", "trainer")
    rollout_keys = keys_of_machine(keys, tmp_path / "rollout-keys", "rollout")
    settings = (
        "name=x",
        f"runs_dir={tmp_path}/runs",
        "model.warm_start_steps=20",
        "trainer.num_steps=8",
        "eval.num_prompts=16",
        f"security.keys={trainer_keys}",
        "buffer.host=0.0.0.0",
        f"buffer.advertise_host={TRAINER_HOST}",
        f"buffer.port={PORT}",
        f"weights.host={TRAINER_HOST}",
    )
    # The other roles get the buffer's address, and the server gets the address at which it can be reached.
    trainer_settings = (*settings, f"buffer.host={TRAINER_HOST}")
    server_settings = (
        *trainer_settings,
        f"security.keys={rollout_keys}",
        "rollout.host=0.0.0.0",
        f"rollout.advertise_host={ROLLOUT_HOST}",
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | cache
    started: list[subprocess.Popen[bytes]] = []

    def start(namespace: str, *command: str) -> subprocess.Popen[bytes]:
        inside = ["ip", "netns", "exec", namespace, sys.executable, "-m", *command]
        started.append(subprocess.Popen(inside, cwd=tmp_path, env=environment))
        return started[-1]

    near, far = machines
    try:
        preparing = start(near, "trainer.prepare_model", *settings)
        wait_until(lambda: preparing.poll() is not None, what="the model")
        assert preparing.returncode == 0
        start(near, "buffer", *settings)
        server = start(far, "rollout_server", "--name", "rollout-far", *server_settings)
        trainer = start(near, "trainer", *trainer_settings)
        wait_until(lambda: trainer.poll() is not None, what="the end of training", run_root=run)
        wait_until(lambda: server.poll() is not None, what="the end of the server", run_root=run)
        assert trainer.returncode == 0 and server.returncode == 0
    finally:
        for process in reversed(started):  # the buffer last, so that the server can send Goodbye
            process.terminate()
            process.wait()
    assert num_steps_done(run) == 8
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tickets"]["trained"] == 8 * 16 and summary["weights_version"] > 0
    log = (run / "logs" / "trainer-0.log").read_text()
    assert "['rollout-far'] over gloo" in log, "weights were pushed from one address to the other"
