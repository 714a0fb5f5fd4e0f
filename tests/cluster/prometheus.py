"""A real Prometheus for tests, with the files of `areal-like deploy-files`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.launching import areal_like
from tests.support.ports import free_port

_LAB = Path(__file__).with_name("prometheus_lab.sh")


class Prometheus:
    """A Prometheus that scrapes and evaluates every second. `directory`: of its configuration."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._environment = os.environ | {"PROM_PORT": str(free_port())}
        config = directory / "prometheus.yml"
        text = config.read_text()
        for interval in ("scrape_interval", "evaluation_interval", "refresh_interval"):
            text = re.sub(rf"{interval}: \w+", f"{interval}: 1s", text)
        config.write_text(text)
        rules = directory / "rules.yml"
        rules.write_text(re.sub(r"for: \w+", "for: 2s", rules.read_text()).replace("> 30", "> 6"))
        self.url = self._run("start")

    def _run(self, verb: str) -> str:
        done = subprocess.run(
            ["bash", str(_LAB), verb, str(self.directory)],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.strip()

    def close(self) -> None:
        self._run("stop")

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[Any]:
        return list(self.get("query", query=expression)["result"])

    def wait(self, expression: str, *, is_empty: bool, seconds: float) -> None:
        """Polls until the expression has no result, or one."""
        end_s = time.monotonic() + seconds
        while bool(self.query(expression)) is is_empty:
            assert time.monotonic() < end_s, f"{expression} is {'not empty' if is_empty else 'empty'}"
            time.sleep(0.5)


@contextlib.contextmanager
def running_prometheus(directory: Path) -> Iterator[Prometheus]:
    """Prometheus in `directory`/deploy/prometheus, with the monitor's token of `directory`/keys."""
    done = areal_like("deploy-files", "deploy", "--force", cwd=directory)
    assert done.returncode == 0, done.stderr
    shutil.copy(directory / "keys" / "monitor.token", directory / "deploy" / "prometheus")
    made = Prometheus(directory / "deploy" / "prometheus")
    try:
        yield made
    finally:
        made.close()
