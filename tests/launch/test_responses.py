"""Responses of daemons over HTTP: escape sequences become text, and no wrong type ends the launcher."""

from __future__ import annotations

import json
import logging
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from areal_like.config import Config
from areal_like.paths import write_json
from areal_like.runtime.logs import PlainFormatter
from launch.commands.watch import change_lines, diagnosis_text, held_lines
from launch.observation.job_report import job_report
from launch.observation.observer import DaemonView, Observation, diagnosis, look_at_daemons
from launch.observation.responses import checked_status, parsed_object
from launch.view.picture import picture
from launch.view.plain import PlainView
from launch.view.speed import Eta
from launch.view.status import bound_line, daemon_table, rates_line, server_table, steps_line, tickets_line

ESCAPES = "\x1b]0;OWNED\x07\x1b[2J\x9b2J\u202e"
STATUS = {
    "name": "buffer", "role": "buffer", "state": ESCAPES, "not_ready": ESCAPES, "step": 3,
    "waiting_on": {f"engine: {ESCAPES}": 500.0},
    "tickets": {ESCAPES: 3, "issued": 5}, "drops": {ESCAPES: 2}, "cordoned": [ESCAPES], "paused": True,
    "rates": {"window_s": 60.0, "samples_per_s": 1.0, "steps_per_min": None},
    "changes": [{"step": 1, "key": ESCAPES, "value": ESCAPES, "origin": "operator"}],
    "bound": ESCAPES, "parts": {"waiting": 2, ESCAPES: 3},
    "closed_because": ESCAPES, "newest_version": 2, "committed_steps": 1, "failed_because": "",
    "why": {
        "causes": [
            {"on": "x", "name": f"a{ESCAPES}", "seconds": 5.0, "what": f"x{ESCAPES}\ny", "remedy": ESCAPES}
        ],
        "effects": [ESCAPES],
    },
    "peers": [{"name": "rollout-0", "role": "rollout", "waits": {ESCAPES: 1.0}, "stats": {}, "leases": 2}],
}  # fmt: skip


def shown(name: str, answer: dict[str, Any]) -> str:
    """Everything that `status`, `why`, `top` and the launcher print of a daemon's answer."""
    role = "buffer" if name == "buffer" else "rollout"
    endpoint = {"role": role, "http": "127.0.0.1:1"}
    view = DaemonView(name=name, endpoint=endpoint, status=checked_status(answer), seen_s=1.0)
    seen = Observation(daemons={name: view})
    report = job_report(Config(), seen.daemons)
    out = StringIO()
    console = Console(file=out, width=200, force_terminal=False)
    plain = PlainView(Config(), console, interval_s=0.0)
    plain.update(seen, phase="training", detail=view.not_ready)
    plain.notice(f"{name} failed:\n  {answer.get('state')}")
    parts = (
        daemon_table([view], width=200),
        tickets_line(seen),
        rates_line(report),
        steps_line(report),
        bound_line(report),
        server_table(report) or "",
        picture(seen, config=Config(), eta=Eta(num_steps=3), phase="x", detail=view.not_ready, width=200),
    )
    for part in parts:
        console.print(part)
    found = diagnosis(seen.daemons.values())
    lines = [diagnosis_text(found), *held_lines(seen.buffer), *change_lines(seen.buffer), json.dumps(report)]
    assert seen.signs_of_progress
    return out.getvalue() + "\n".join(lines)


@pytest.mark.parametrize("name", ["buffer", "rollout-0"])
def test_escape_sequences_are_shown_as_text(name: str) -> None:
    text = shown(name, STATUS)
    assert not set("\x1b\x07\x9b\u202e") & set(text)
    assert "OWNED" in text and "\\x1b" in text


def test_a_cause_has_one_line() -> None:
    why = checked_status(STATUS)["why"]
    assert "\n" not in why["causes"][0]["what"]


def test_samples_of_closed_groups_are_added_up_over_shards() -> None:
    parts: list[dict[str, Any]] = [{"waiting": 2, "late_running": 5}, {"waiting": 1, "late_running": 0}]
    answers = [{"bound": "close after 2 steps", "parts": each} for each in parts]
    daemons = {
        f"buffer-{index}": DaemonView(
            name=f"buffer-{index}", endpoint={"role": "buffer"}, status=answer, seen_s=1.0
        )
        for index, answer in enumerate(answers)
    }
    line = bound_line(job_report(Config(), daemons)).plain
    assert line == "bound close after 2 steps  parts that wait 3  late samples 5"


WRONG = (None, [], {}, "x", 1, [1], [None], {"a": "b"}, {"a": None}, {"a": [1]}, [{}], {"causes": [{}]})
KEYS = (*STATUS, "tokens_per_s", "progress", "queue", "weights_version")


@pytest.mark.parametrize("value", WRONG, ids=str)
def test_no_response_ends_what_shows_it(value: Any) -> None:
    shown("buffer", dict.fromkeys(KEYS, value))
    shown("rollout-0", {"nested": dict.fromkeys(KEYS, value)})
    why = dict.fromkeys(("causes", "effects", "bottleneck"), value)
    peer = dict.fromkeys(KEYS, value) | {"name": "rollout-0", "stats": value, "waits": value}
    shown("buffer", STATUS | {"why": why, "peers": [peer]})


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999", "1" * 400])
def test_numbers_are_finite(number: str) -> None:
    with pytest.raises(ValueError):
        parsed_object(b'{"a": %s}' % number.encode())


def test_a_server_cannot_pass_for_a_buffer(tmp_path: Path) -> None:
    for name in ("buffer", "trainer-0", "rollout-9", "a\x1b[2J"):
        write_json(tmp_path / f"{name}.json", {"role": "buffer", "http": "", "sessions": ESCAPES})
    found = look_at_daemons(tmp_path)
    assert set(found) == {"buffer", "trainer-0"}
    assert "\x1b" not in found["buffer"].endpoint["sessions"]


@pytest.mark.parametrize(
    "content",
    [
        '{"http": "127.0.0.1:\u00b2"}',
        '{"http": "127.0.0.1:99999"}',
        '{"http": "127.0.0.1:' + "9" * 5000 + '"}',
        '{"http": "a\\nb:80"}',
        '{"http": 5}',
        '{"a": ' + "[" * 450 + "1" + "]" * 450 + "}",
        "[" * 100_000,
        "[1]",
        "",
    ],
    ids=range(9),
)
def test_no_endpoint_file_ends_what_reads_it(content: str, tmp_path: Path) -> None:
    (tmp_path / "rollout-9.json").write_text(content)
    found = look_at_daemons(tmp_path)
    assert [view.status for view in found.values()] in ([], [None])


def test_log_lines_on_a_terminal_are_harmless() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 1, "refused: %s", (ESCAPES,), None)
    assert not set(ESCAPES) & set(PlainFormatter("buffer").format(record)) - set("]0;OWNED[2J")
