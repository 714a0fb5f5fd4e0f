"""A score server as a process: its address, its pages, its signals, and settings that end it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from areal_like.paths import RunPaths, read_endpoint
from rollout_server.scoring.directory import checked_directory
from tests.support import warm_start
from tests.support.launching import wait_until
from tests.support.reward_models import write_reward_model


def start(root: Path, *settings: str) -> warm_start.Popen:
    words = [sys.executable, "-m", "rollout_server.scoring", "name=x", f"runs_dir={root}", *settings]
    return warm_start.Popen(words, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def get(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=60) as response:
        text = response.read().decode()
    return json.loads(text) if text.startswith("{") else text


def test_a_daemon_like_the_others(tmp_path: Path) -> None:
    model = write_reward_model(tmp_path / "rm")
    paths = RunPaths(tmp_path / "x")
    file = paths.endpoints / "scorer-0.json"
    with start(tmp_path, f"scorer.path={model}") as process:
        wait_until(lambda: "scores" in (read_endpoint(file) or {}), what="its address", process=process)
        endpoint = read_endpoint(file)
        assert endpoint is not None and endpoint["role"] == "scorer"
        assert endpoint["model"] == checked_directory(model).identity
        assert get(f"{endpoint['scores']}/health") == "ok"
        scored = get(f"{endpoint['scores']}/score", {"prompt": "1+1=", "completion": "2"})
        assert scored["model"] == endpoint["model"]
        status = get(f"http://{endpoint['http']}/status")
        assert (status["role"], status["name"], status["not_ready"]) == ("scorer", "scorer-0", "")
        page = get(f"http://{endpoint['http']}/metrics")
        assert "areal_scorer_scores_total 1.0" in page and f'model="{endpoint["model"]}"' in page
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0, process.communicate()
    assert not file.exists() and (paths.logs / "scorer-0.log").exists()


def test_a_wrong_model_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with start(tmp_path, "scorer.path=nowhere") as process:
        assert process.wait() == 2
        _, err = process.communicate()
    assert err.startswith("scorer-0: scorer.path=nowhere: no config.json there") and err.count("\n") == 1
