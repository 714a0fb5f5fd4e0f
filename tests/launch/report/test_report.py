"""`areal-like report`: every kind of run, two runs, hostile names, damaged files, size, and what is found."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from areal_like.paths import RunPaths
from areal_like.security.redaction import HIDDEN
from buffer.storage import sql
from launch.cli import main
from launch.report.figures import figures
from launch.report.findings import findings
from launch.report.ledger import LedgerFacts
from launch.report.page import page as page_of
from launch.report.run import read_run
from launch.run_directory.rundir import lock
from launch.samples.transcripts import Part, Transcript
from tests.support.launching import ROOT
from tests.support.report_runs import START_S, log_entry, row, write_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'\x1b[2J\u202e"


class Page(html.parser.HTMLParser):
    """Which elements a page has, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def report(root: Path, *arguments: str) -> str:
    out = root / "page.html"
    assert main(["report", str(root), "--out", str(out), *arguments]) == 0
    return out.read_text()


def evaluation(step: int, avg: float, name: str = "eval") -> dict[str, Any]:
    return {"step": step, "set": name, "avg": avg, "ci_low": avg - 0.1, "ci_high": avg + 0.1}


def rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [row(step, **columns) for step in range(count)]


def test_a_finished_run_has_its_charts_and_figures(tmp_path: Path) -> None:
    root = write_run(
        tmp_path / "one",
        rows(60),
        summary={"finished": True, "generation_idle_fraction": 0.25},
        evaluations=[evaluation(0, 0.2), evaluation(50, 0.8), evaluation(50, 0.5, name="aime")],
    )
    page = Page(report(root))
    for text in ("finished", "Reward", "held out: eval", "Held-out reward: aime", "Lag", "bound", "Idle"):
        assert text in page.text
    assert "[0.7, 0.9] at step 50, from 0.2" in page.text
    assert "trainer.lr" in page.text and "seed" not in page.text
    assert (root / "page.html").stat().st_mode & 0o777 == 0o600


def test_a_page_needs_nothing_else_and_runs_only_its_script(tmp_path: Path) -> None:
    text = report(write_run(tmp_path / "one", rows(30)))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy[1]
    names = {name for name, _ in Page(text).attributes}
    assert not names & {"src", "style", "onload", "onclick", "action"}
    assert not re.search(r'(?:href|url)\s*[=(]\s*"?(?!#)', text.replace('href="#', ""))


def test_what_a_run_has_named_is_escaped(tmp_path: Path) -> None:
    root = write_run(
        tmp_path / "one",
        rows(30, reward_parts={HOSTILE: 1.0}, finish_reasons={HOSTILE: 0.5}),
        evaluations=[evaluation(0, 0.2, name=HOSTILE), evaluation(1, 0.2, name=HOSTILE + "2")],
        logs={"trainer-0": [log_entry(HOSTILE), log_entry(HOSTILE, level=HOSTILE)]},
        summary={
            "finished": HOSTILE,
            "drops": {HOSTILE: 3},
            "selection": {"failures": {HOSTILE: {HOSTILE: 2}}},
        },
    )
    config = {"name": HOSTILE, "task": {"name": HOSTILE, HOSTILE: HOSTILE}, "model": HOSTILE}
    (root / "config.yaml").write_text(json.dumps(config))
    text = report(root)
    page = Page(text)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert "\x1b" not in text and "\u202e" not in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert json.loads(data)["charts"]


def test_what_the_policy_has_written_is_escaped(tmp_path: Path) -> None:
    sample = Transcript(
        **{"ticket": 1, "sample": 0, "prompt_index": 2, "eval_set": "", "step": 3, "state": "trained"},
        **{"reason": "", "is_greedy": False, "reward": 0.5, "num_sampled": 1, "oldest_version": 1},
        **{"newest_version": 1, "failure": HOSTILE, "lag": 1, "label": HOSTILE},
        reward_parts={HOSTILE: 1.0},
        segments=((Part(is_sampled=True, text=HOSTILE, num_tokens=1),),),
    )
    run = read_run(write_run(tmp_path / "one", rows(3)))
    samples: list[Transcript] | str
    for samples in ([sample], HOSTILE):
        text = page_of([run], samples=samples, now_s=START_S, version="1")
        found = Page(text)
        assert found.tags.count("script") == 2 and "img" not in found.tags and "alert(1)" in found.text
        assert "\x1b" not in text and "\u202e" not in text


def test_secrets_in_settings_are_hidden(tmp_path: Path) -> None:
    root = write_run(tmp_path / "one", rows(3))
    (root / "config.yaml").write_text("task: {reward: {api_key: sk-123}}\nname: one\n")
    text = report(root)
    assert "sk-123" not in text and HIDDEN in text


def test_two_runs_are_in_the_same_charts(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", rows(40), evaluations=[evaluation(0, 0.2)])
    two = write_run(tmp_path / "two", rows(60, reward_mean=0.1), num_steps=200)
    text = report(one, "--against", str(two))
    page = Page(text)
    assert "A: one" in page.text and "B: two" in page.text and "A - B" in page.text
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.S)
    found = json.loads(data)
    series = {one["label"]: one for one in found["charts"][0]}
    assert series["A held out: eval"]["texts"] == ["0.2 [0.1, 0.3] at 0"]
    for label, num_steps in (("A training", 40), ("B training", 60)):
        assert len(series[label]["texts"]) == len(found["steps"][series[label]["steps"]]) == num_steps
    assert "trainer.num_steps" in page.text.partition("Settings that both have")[0]


def test_a_supervised_run_has_losses_and_no_rewards(tmp_path: Path) -> None:
    losses = [{"step": step, "loss": 5 - step, "step_s": 0.1, "eval_loss": 3.0} for step in range(4)]
    root = write_run(tmp_path / "one", losses, summary={"finished": True, "eval_loss_after": 3.0})
    (root / "rows.json").write_text('{"num_steps": 4}')
    page = Page(report(root))
    assert "Supervised run" in page.text and "held out" in page.text and "of 4" in page.text
    assert "Reward" not in page.text and "generates no samples" in page.text


@pytest.mark.chaos
@pytest.mark.slow
def test_a_long_run_makes_a_small_page_quickly(tmp_path: Path) -> None:
    wide = {f"finish_reasons.{at}": 0.1 for at in range(4)} | {"grad_norm": 1.0, "memory_peak_gb": 2.0}
    root = write_run(tmp_path / "one", (row(step, **wide) for step in range(100_000)), num_steps=100_000)
    started_s = time.process_time()
    text = report(root, "--against", str(root))
    assert len(text) < 3e6
    assert time.process_time() - started_s < 30


@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl", "summary.json", "logs"])
def test_damaged_files_do_not_prevent_a_report(tmp_path: Path, kept: str) -> None:
    root = write_run(tmp_path / "one", rows(5), summary={}, logs={"buffer": [log_entry("x")]})
    (root / "ledger").mkdir()
    damaged = [root / "ledger" / "ledger.sqlite3", root / "evaluations.jsonl", root / "rows.json"]
    damaged += [path for path in root.iterdir() if path.is_file() and path.name != kept]
    if kept != "logs":
        damaged += list((root / "logs").iterdir())
    for path in damaged:
        path.write_bytes(b'\xff{"a": [')
    assert "cannot be read" in Page(report(root)).text


def test_the_reason_of_a_failure_is_named(tmp_path: Path) -> None:
    exits = {"logger": "areal_like.runtime.exit", "level": "ERROR"}
    logs = {
        "trainer-0": [log_entry("the loss is not finite", time_s=START_S + 20, **exits)],
        "rollout-0": [log_entry("the buffer is gone", time_s=START_S + 21, **exits)],
    }
    root = write_run(tmp_path / "one", rows(10), logs=logs)
    run = read_run(root)
    assert (run.status.word, run.status.detail) == ("failed", "trainer-0: the loss is not finite")
    assert "The run has failed: trainer-0: the loss is not finite." in findings(run)


def test_a_run_is_running_while_its_lock_is_held(tmp_path: Path) -> None:
    root = write_run(tmp_path / "one", rows(10), summary={"finished": False})
    assert read_run(root).status.word == "drained"
    held = lock(RunPaths(root))
    assert read_run(root).status.word == "running"
    import os

    os.close(held)
    assert read_run(root).status.word == "drained"


def test_rates_of_the_engines_come_from_counters(tmp_path: Path) -> None:
    counted = rows(40)
    for at in range(0, 40, 5):
        counters = {
            "tokens_generated": 100 * at,
            "generation_busy_s": 0.3 * at,
            "generation_idle_s": 0.1 * at,
        }
        counted[at] |= counters
    run = read_run(write_run(tmp_path / "one", counted))
    found = {one.name: one.text for one in figures(run)}
    assert (found["tokens generated a second"], found["engines idle"]) == ("100", "25 %")


def test_a_ledger_without_tables_is_empty(tmp_path: Path) -> None:
    """Its buffer died before it had made them."""
    root = write_run(tmp_path / "one", rows(4))
    (root / "ledger").mkdir()
    connection = sqlite3.connect(root / "ledger" / "ledger.sqlite3")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    assert read_run(root).ledger == LedgerFacts()
    assert "ledger.sqlite3 cannot be read: " not in report(root)


def test_a_ledger_on_an_absent_disk_is_named(tmp_path: Path) -> None:
    root = write_run(tmp_path / "one", rows(4))
    (root / "ledger").symlink_to(tmp_path / "gone")
    assert read_run(root).ledger.problem
    report(root)


def test_logs_that_were_rotated_count_from_the_oldest(tmp_path: Path) -> None:
    entry = log_entry("trainer started, pid 1", level="INFO")
    root = write_run(
        tmp_path / "one", rows(4), logs={"launcher": [entry, log_entry("closing", level="INFO")]}
    )
    old = [log_entry("closing", level="INFO"), log_entry("starting", level="INFO")]
    (root / "logs" / "launcher.log.2").write_text("".join(json.dumps(one) + "\n" for one in old))
    (root / "logs" / "launcher.log.1").write_text(json.dumps(log_entry("trainer ended: lost", level="INFO")))
    found = read_run(root).logs
    assert [event.text for event in found.events] == ["trainer ended: lost"]
    assert found.num_starts == {"trainer": 1}


def test_conspicuous_numbers_are_found(tmp_path: Path) -> None:
    odd = rows(100, wait_data_s=0.4, ess_ratio=0.1, truncated_fraction=0.5, num_groups=4)
    for at, one in enumerate(odd):
        one["entropy"] = 1.0 if at < 50 else 0.01
        one["zero_advantage_groups"] = 3
        one["reward_mean"] = 0.9 if at < 50 else 0.2
        one["time_unix_s"] += 300 if at >= 70 else 0
    odd[30]["loss"] = None
    logs = {
        "launcher": [log_entry(f"trainer started, pid {pid}", level="INFO") for pid in (10, 11)],
        "trainer-0": [log_entry(f"push of version {v} to rollout-1 failed: silent") for v in (3, 4)],
        "rollout-0": [log_entry("another reward model scores samples of this run: b, and before a")],
    }
    found = " ".join(findings(read_run(write_run(tmp_path / "one", odd, logs=logs))))
    for text in (
        "waited for data for 80 %",
        "effective sample size is 10 %",
        "entropy fell from 1 to 0.01",
        "75 % of the groups have no advantage",
        "A limit ended 50 %",
        "reward fell from 0.9 to 0.2",
        "5 min 1 s before step 70 ended",
        "not finite in 1 steps, first in step 30",
        "1 restart of processes",
        "2 failures of pushes",
        "1 change of the reward model that scores samples",
    ):
        assert text in found, text
    assert not findings(read_run(write_run(tmp_path / "two", rows(100), summary={"finished": True})))


def test_proxy_and_gold_reward_are_drawn_together(tmp_path: Path) -> None:
    gold = rows(60)
    for at, one in enumerate(gold):
        one["reward_mean"], one["reward_gold_mean"] = at / 60, 1 - at / 60
    root = write_run(tmp_path / "one", gold)
    (said,) = (text for text in findings(read_run(root)) if "gold" in text)
    assert said.startswith("The trained reward rose from 0.0417 to 0.9417, and the gold reward fell")
    assert "gold (not trained on)" in report(root)
    assert "gold (not trained on)" not in report(write_run(tmp_path / "two", rows(60)))


def test_the_ledger_says_what_became_of_groups(tmp_path: Path) -> None:
    root = write_run(tmp_path / "one", rows(10))
    (root / "ledger").mkdir()
    path = root / "ledger" / "ledger.sqlite3"
    connection = sqlite3.connect(path, isolation_level=None)
    sql.migrate(connection, path=path)
    ticket = (
        "INSERT INTO tickets (ticket_id, purpose, prompt_index, num_samples, parent, num_reissues, eval_id, "
    )
    ticket += "max_staleness, state, reason, num_greedy) VALUES (?, 'train', 0, 1, 0, 0, 0, 4, ?, ?, 0)"
    connection.executemany(ticket, [(at, "dropped", "stale") for at in range(3)] + [(9, "trained", None)])
    version = "INSERT INTO versions (version, step, parent, trainer_incarnation) VALUES (?, ?, 0, ?)"
    connection.executemany(version, [(1, 0, 1), (2, 4, 2), (3, 5, 2)])
    undone = (
        "INSERT INTO rollbacks (trainer_incarnation, from_step, to_step, num_tickets, num_tokens, unix_s) "
    )
    connection.execute(undone + "VALUES (2, 7, 4, 12, 340, ?)", [START_S + 8])
    connection.execute("INSERT INTO attempts VALUES (6, 2)")
    connection.execute("INSERT INTO statistics VALUES ('failed_timeout_retry', 5), ('offered_length_3', 8)")
    connection.close()
    run = read_run(root)
    assert run.drops == {"stale": 3}
    assert [(event.text, event.step) for event in run.events()] == [
        ("trainer process 2 began", 4),
        ("steps 4 to 6 were undone: 12 groups, 340 tokens", 4),
    ]
    page = Page(report(root))
    assert "stale" in page.text and "Failed samples" in page.text
    found = " ".join(findings(run))
    assert "75 % of the groups were dropped" in " ".join(findings(read_run(_longer(root))))
    assert "Step 6 was begun by 2 trainers" in found and "5 failed samples" in found


def test_changes_of_settings_are_marked_at_their_steps(tmp_path: Path) -> None:
    root = write_run(tmp_path / "one", rows(20))
    (root / "ledger").mkdir()
    path = root / "ledger" / "ledger.sqlite3"
    connection = sqlite3.connect(path, isolation_level=None)
    sql.migrate(connection, path=path)
    connection.executemany(
        "INSERT INTO settings VALUES (NULL, ?, ?, ?, ?, ?)",
        [
            (0, "trainer.lr", "0.001", "start", START_S),
            (7, "trainer.lr", "0.003", "operator", START_S + 6),
            (9, "evaluate", "now", "operator", START_S + 9),
            (4, "trainer.lr", "0.002", "start", START_S + 12),
            (5, "trainer.lr", "<b>", "operator", START_S + 13),
        ],
    )
    set_lr = "INSERT INTO operations VALUES (NULL, ?, 'set', 'trainer.lr', 'x')"
    connection.execute(set_lr, [START_S + 6])
    connection.close()
    events = [
        ("trainer.lr: 0.001 -> 0.003 (operator)", 7),
        ("evaluate=now (operator)", 9),
        ("trainer.lr: 0.001 -> 0.002 (start)", 4),
        ("trainer.lr: 0.002 -> <b> (operator)", 5),
    ]
    assert [(event.text, event.step) for event in read_run(root).events()] == events
    page = Page(report(root))
    for text in ("after 9", "an operator", "the trainer's start", "trainer.lr: 0.001 -> 0.003"):
        assert text in page.text, text
    assert "Changes" not in Page(report(write_run(tmp_path / "two", rows(20)))).text


def _longer(root: Path) -> Path:
    (root / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows(40)))
    return root


def test_mistakes_have_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_run(tmp_path / "one", rows(2))
    assert main(["report", str(tmp_path / "none")]) == 2
    assert main(["report", str(root), "--against", str(tmp_path / "none")]) == 2
    assert main(["report", str(root), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert main(["report", str(root), "--out", "-"]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")


def test_no_torch_is_imported(tmp_path: Path) -> None:
    root = write_run(tmp_path / "one", rows(2))
    code = (
        "import sys; from launch.cli import main; "
        f"code = main(['report', {str(root)!r}]); sys.exit(code or 9 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
