"""`areal-like deploy-files`, and the rules and dashboards among the files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.commands.deploy_files import SOURCE, deploy_files
from tests.support.launching import ROOT

RULES = SOURCE / "prometheus" / "rules.yml"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)"
)


def alerts() -> list[str]:
    """Names of the alerts."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def promtool(*words: str, cwd: Path) -> str:
    done = subprocess.run(["promtool", *words], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_all_files_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "deploy"
    assert main(["deploy-files", str(target)]) == 0
    copied = contents(target)
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "launch/deploy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    dashboards = [f"grafana/dashboards/areal-{name}.json" for name in ("run", "buffer", "rollout", "trainer")]
    if tracked.returncode == 0:  # false in a copy of the sources without their history
        files = {name.removeprefix("launch/deploy/") for name in tracked.stdout.split()}
        assert set(copied) == files | set(dashboards)
    assert {"prometheus/prometheus.yml", "prometheus/rules.yml"} <= set(copied)
    written = capsys.readouterr().out.splitlines()
    assert written == [str(target / name) for name in (*deploy_files(), *dashboards)]
    made = {name: copied.pop(name) for name in dashboards}
    assert copied == {str(name): (SOURCE / name).read_bytes() for name in deploy_files()}
    for described in yaml.safe_load((SOURCE / "grafana" / "panels.yaml").read_text()):
        drawn = json.loads(made[f"grafana/dashboards/{described['uid']}.json"])["panels"]
        titles = [title for row in described["rows"] for title in (row["title"], *_titles(row["panels"]))]
        assert [panel["title"] for panel in drawn] == titles
        assert len({panel["id"] for panel in drawn}) == len(drawn)
        assert not _overlapping(drawn)


def _titles(panels: list[dict[str, Any]]) -> list[str]:
    return [panel["title"] for panel in panels]


def _overlapping(panels: list[dict[str, Any]]) -> list[str]:
    """Titles of panels that share a cell of the grid with an earlier one, or leave it."""
    taken: set[tuple[int, int]] = set()
    found = []
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        if cells & taken or at["x"] + at["w"] > 24:
            found.append(panel["title"])
        taken |= cells
    return found


def test_files_that_are_there_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prometheus").mkdir()
    (tmp_path / "prometheus" / "rules.yml").write_text("mine")
    (tmp_path / "notes").write_text("mine")
    assert main(["deploy-files", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"areal-like: {tmp_path} is not empty: "
        "name a new directory, or give --force to write over its files\n"
    )
    assert (tmp_path / "prometheus" / "rules.yml").read_text() == "mine"
    assert main(["deploy-files", str(tmp_path), "--force"]) == 0
    assert (tmp_path / "prometheus" / "rules.yml").read_bytes() == RULES.read_bytes()
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_file_is_no_directory(
    force: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["deploy-files", str(file), *force]) == 2
    assert f"cannot write to {file}: " in capsys.readouterr().err
    assert file.read_text() == "mine"


@needs_promtool
def test_prometheus_accepts_the_configuration(tmp_path: Path) -> None:
    shutil.copytree(SOURCE / "prometheus", tmp_path / "prometheus")
    (tmp_path / "prometheus" / "monitor.token").touch()
    target = [{"targets": ["127.0.0.1:1"], "labels": {"run": "r"}}]
    (tmp_path / "prometheus" / "targets").mkdir()
    (tmp_path / "prometheus" / "targets" / "buffer.json").write_text(json.dumps(target))
    checked = promtool("check", "config", "prometheus.yml", cwd=tmp_path / "prometheus")
    assert "WARNING" not in checked and "SUCCESS" in checked


@needs_promtool
def test_alerts_fire_and_clear() -> None:
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml", cwd=SOURCE / "prometheus")


def test_each_alert_has_a_test_and_an_entry() -> None:
    tests = yaml.safe_load((SOURCE / "prometheus" / "rules_test.yml").read_text())["tests"]
    for alert in alerts():
        of_alert = [one for test in tests for one in test["alert_rule_test"] if one["alertname"] == alert]
        fired = [bool(one["exp_alerts"]) for one in of_alert]
        assert fired == [False, True, False], f"{alert}: rules_test.yml tests silence, firing, clearing"
    page = (ROOT / "docs" / "guides" / "monitoring.md").read_text()
    assert re.findall(r"^\| `(Areal\w+)`", page, re.M) == alerts()
