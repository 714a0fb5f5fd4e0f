"""A real Prometheus scrapes a keyed job; every rule and panel can be evaluated; an alert fires and clears."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.test_stops import SETTINGS, process_of
from tests.cluster.prometheus import Prometheus, running_prometheus
from tests.support.launching import areal_like, finish, launcher, wait_for_steps

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed"),
]
EVENTS = {
    "ALERTS": "no alert fires in a healthy job",
    "areal_trainer_eval": "the job has no evaluations",
    "areal_trainer_reward_part": "the task's rewards have no parts",
    "areal_trainer_label_reward": "its prompts have no labels",
    "areal_trainer_sample_metric": "its samples have no metrics",
    "areal_trainer_gpu_memory": "its trainer has no GPU",
}
"""What may be empty, by a part of the expression, and why."""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Prometheus]:
    assert areal_like("keys", "init", "keys", cwd=tmp_path).returncode == 0
    with running_prometheus(tmp_path) as made:
        yield made


def panel_expressions(directory: Path) -> dict[str, list[str]]:
    """Dashboard and panel -> its expressions, for the run x."""

    def panels(part: Any) -> Iterator[Any]:
        for panel in part.get("panels", []):
            yield panel
            yield from panels(panel)

    found: dict[str, list[str]] = {}
    for file in sorted(directory.glob("*.json")):
        for panel in panels(json.loads(file.read_text())):
            expressions = [target["expr"] for target in panel.get("targets") or []]
            for variable, value in (("$__rate_interval", "10s"), ("$run", "x"), ("$name", ".*")):
                expressions = [expression.replace(variable, value) for expression in expressions]
            if expressions:
                found[f"{file.stem}: {panel['title']}"] = expressions
    return found


def test_prometheus_scrapes_a_job_and_alerts(lab: Prometheus, tmp_path: Path) -> None:
    root = tmp_path / "runs" / "x"
    settings = (
        "security.keys=keys",
        f"metrics.sd_path={lab.directory}/targets",
        "rollout.generate_timeout_s=300",
    )
    with launcher(*SETTINGS, *settings, cwd=tmp_path) as process:
        wait_for_steps(3, root, process=process)
        lab.wait('up{run="x"} == 1', is_empty=False, seconds=30)
        time.sleep(20)  # rates over ten seconds
        roles = sorted(result["metric"]["role"] for result in lab.query('up{run="x"} == 1'))
        assert roles == ["buffer", "engine", "engine", "rollout", "rollout", "trainer"]
        assert lab.query("up == 0") == []

        empty = []
        for panel, expressions in panel_expressions(lab.directory.parent / "grafana" / "dashboards").items():
            for expression in expressions:
                if not lab.query(expression) and not any(event in expression for event in EVENTS):
                    empty.append(f"{panel}: {expression}")
        assert not empty, "\n".join(empty)
        groups = lab.get("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert len(rules) > 20 and [rule for rule in rules if rule["health"] != "ok"] == []

        engine = process_of(root, "engine")
        firing = 'ALERTS{alertname="ArealWaits", alertstate="firing", on="engine"}'
        os.kill(engine, signal.SIGSTOP)
        try:
            lab.wait(firing, is_empty=False, seconds=40)
        finally:
            os.kill(engine, signal.SIGCONT)
        lab.wait(firing, is_empty=True, seconds=40)
        process.terminate()
        assert finish(process, root)[0] == 0
    assert not list((lab.directory / "targets").iterdir())
