"""`areal-like logs`: merged by time, from the end of large files, and across rotations."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cli import main
from launch.logs.files import Entry, LineParser, LogFiles, complete_bytes, find_sources, since_time
from launch.logs.following import Follower
from tests.support.launching import ROOT, launcher, wait_until

START_S = 1_700_000_000.0


def line(offset_s: float, message: str, *, level: str = "INFO", **more: str) -> str:
    entry = {"time": START_S + offset_s, "level": level, "logger": "x", "message": message}
    return json.dumps(entry | more) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a run with logs of four processes."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text("{name: x}\n")
    write(tmp_path, "trainer-0.log.2", line(0, "a"))
    write(tmp_path, "trainer-0.log.1", line(10, "b"))
    write(tmp_path, "trainer-0.log", line(20, "c") + line(40, "e", level="ERROR", exception="T\nV: \x1b[2J"))
    write(tmp_path, "rollout-1.log", line(5, "aa") + line(30, "d", level="WARNING") + '{"time": 1, "lev')
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(START_S + 35))
    write(tmp_path, "rollout-1-engine.log", f"[{stamp} TP0] loading\nTraceback of it\n")
    write(tmp_path, "rollout-1.out", "12:00:00 rollout-1 WARNING d\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / "logs" / name).write_text(text)


def shown(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert main(["logs", str(run), *words]) == 0
    return [
        text.split(" ", 2)[2] for text in capsys.readouterr().out.splitlines() if not text.startswith(" ")
    ]


def test_logs_are_merged_by_time(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = shown(run, capsys)
    assert everything[:4] == [
        "trainer-0 INFO a",
        "rollout-1 INFO aa",
        "trainer-0 INFO b",
        "trainer-0 INFO c",
    ]
    assert everything[4] == "rollout-1 WARNING d" and '{"time": 1, "lev' in everything[5]
    assert everything[6].startswith("rollout-1-engine INFO [20") and everything[-1] == "trainer-0 ERROR e"
    assert everything[7] == "rollout-1-engine ERROR Traceback of it"


def test_the_clock_of_another_machine_is_corrected(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "spans").mkdir()
    estimates = '{"daemon":"rollout-1"}\n{"offset_s":-9.0,"rtt_s":0.5}\n{"offset_s":-15.0,"rtt_s":0.01}\n'
    (run / "spans" / "rollout-1.jsonl").write_text(estimates)
    (run / "spans" / "trainer-0.jsonl").write_text('{"offset_s":0.004,"rtt_s":0.01}\n')
    by_name = {(source.name, source.is_json): source.offset_s for source in find_sources(run / "logs", [])}
    assert by_name["rollout-1", True] == by_name["rollout-1-engine", False] == -15.0
    assert by_name["trainer-0", True] == 0.0, "less than the round trip"
    shown_first = shown(run, capsys, "rollout-1", "trainer")
    assert [text.rsplit(" ", 1)[1] for text in shown_first[:3]] == ["aa", "a", "b"]
    texts = "\n".join(
        shown(
            run,
            capsys,
            "rollout-1",
            "--since",
            time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(START_S + 6)),
        )
    )
    assert "WARNING d" in texts and "INFO aa" not in texts


@pytest.mark.parametrize("when", ["1e300", "NaN", "-5", "Infinity"])
def test_no_line_of_a_server_ends_the_command(
    when: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = '{"time": %s, "level": "INFO\\u001b[2J", "message": "m"}\n'
    write(run, "rollout-9.log", entry % when + entry % START_S)
    printed = shown(run, capsys, "rollout-9")
    assert len(printed) == 2 and "\x1b" not in "".join(printed)
    write(run, "rollout-9.log", f'{{"time": {when}, "level": "ERROR", "message": "m"}}\n')
    assert main(["status", str(run)]) == 1


def test_a_line_of_the_embedded_engine_has_one_header() -> None:
    parser = LineParser(LogFiles("rollout-0-engine", (), is_json=False), unix_s=0.0)
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(START_S))
    entry = parser.entry(f"{stamp},250 WARNING rollout_server.engine.loop no error\n".encode())
    assert entry == Entry(START_S + 0.25, "rollout-0-engine", "WARNING", "no error")
    assert entry.level == "WARNING" and entry.text == "no error"


def test_what_is_shown_can_be_chosen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [text[-1] for text in shown(run, capsys, "trainer")] == ["a", "b", "c", "e"]
    assert [text[-1] for text in shown(run, capsys, "trainer-0", "-n", "2")] == ["c", "e"]
    assert shown(run, capsys, "trainer", "-n", "0") == []
    assert [text[-1] for text in shown(run, capsys, "trainer", "-n", "3")] == ["b", "c", "e"]
    assert [text[-1] for text in shown(run, capsys, "trainer", "-n", "9" * 30)] == ["a", "b", "c", "e"]
    assert shown(run, capsys, "--level", "error") == [
        "rollout-1-engine ERROR Traceback of it",
        "trainer-0 ERROR e",
    ]
    assert main(["logs", str(run), "trainer", "-n", "1"]) == 0
    printed = capsys.readouterr().out
    assert "    V: \\x1b[2J" in printed and "\x1b" not in printed
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(START_S + 15))
    assert [text[-1] for text in shown(run, capsys, "trainer", "--since", since)] == ["c", "e"]


def test_mistakes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--since", "soon"], "--since soon: use 90s, 10m"),
        (["rollout-7"], "has no log of rollout-7 (logs: rollout-1, rollout-1-engine, trainer-0)"),
        (["-n", "-1"], "-n -1: use 0 or more"),
        (["--level", "loud"], "invalid choice"),
    ):
        assert main(["logs", str(run), *words]) == 2
        assert message in capsys.readouterr().err


def test_times_a_user_may_give() -> None:
    now_s = START_S
    for text, ago_s in (("90s", 90), ("10m", 600), ("1.5h", 5400), ("1d", 86400)):
        assert since_time(text, now_unix_s=now_s) == now_s - ago_s
    today = time.strftime("%Y-%m-%d", time.localtime(now_s))
    assert since_time("9:30", now_unix_s=now_s) == since_time(f"{today} 09:30", now_unix_s=now_s)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.integers(0, 300),
    st.integers(0, 70),
    st.booleans(),
)
def test_a_part_of_a_log_is_the_end_of_it(
    pauses: list[int], since_s: int, num_last: int, ends_with_newline: bool
) -> None:
    directory = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    path = directory / f"areal-logs-{time.monotonic_ns()}.log"
    times = [sum(pauses[: index + 1]) for index in range(len(pauses))]
    text = "".join(line(at_s, "x" * at_s) for at_s in times)
    path.write_text(text if ends_with_newline else text[:-1])
    try:
        source = LogFiles("x", (path,), is_json=True)
        last = list(source.entries(since_unix_s=None, num_last=num_last, ends={}))
        assert [each.unix_s - START_S for each in last] == (times[-num_last:] if num_last else [])
        later = source.entries(since_unix_s=START_S + since_s, num_last=None, ends={})
        assert [each.unix_s - START_S for each in later] == [at_s for at_s in times if at_s >= since_s]
    finally:
        path.unlink()


def test_the_end_of_a_large_log_is_found_quickly(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    block = "".join(line(0, "y" * 150) for _ in range(5000)).encode()
    num_blocks = 64  # about 70 MB
    with path.open("wb") as file:
        for number in range(num_blocks):
            file.write(block.replace(str(START_S).encode(), str(START_S + number).encode()))
    source = LogFiles("x", (path,), is_json=True)
    before_kb, started_s = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    late = source.entries(since_unix_s=START_S + num_blocks - 1, num_last=None, ends={})
    assert sum(1 for _ in late) == 5000
    assert len(list(source.entries(since_unix_s=None, num_last=7, ends={}))) == 7
    assert time.process_time() - started_s < 2.0, "the whole file was read"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 20_000


def test_a_follower_loses_nothing_when_logs_rotate(tmp_path: Path) -> None:
    path = tmp_path / "trainer-0.log"
    path.write_text(line(0, "0") + '{"time"')
    follower = Follower(lambda: find_sources(tmp_path, []), starts={path: complete_bytes(path)})
    seen: list[Entry] = follower.poll()
    path.write_text(line(0, "0"))
    for number in range(1, 40):
        with path.open("a") as file:
            file.write(line(number, str(number)))
        if number % 7 == 3:
            seen += follower.poll()
        if number % 10 == 0:  # what is in the file that is renamed is not all shown yet
            path.rename(tmp_path / f"trainer-0.log.{number}")
            path.touch()
        if number % 5 == 4:
            seen += follower.poll()
    assert [each.text for each in seen + follower.poll()] == [str(number) for number in range(1, 40)]
    path.write_text(line(99, "after a truncation"))
    assert [each.text for each in follower.poll()] == ["after a truncation"]
    (tmp_path / "rollout-2.log").write_text(line(100, "joined") + '{"time":')
    assert [each.text for each in follower.poll()] == ["joined"]
    follower.close()


def test_following_in_a_terminal(run: Path, tmp_path: Path) -> None:
    with launcher(str(run), "trainer", "-f", "-n", "1", verb="logs", cwd=tmp_path) as process:
        assert process.stdout is not None and process.stdout.readline().endswith("trainer-0 ERROR e\n")
        while "V:" not in process.stdout.readline():
            pass
        with (run / "logs" / "trainer-0.log").open("a") as file:
            file.write(line(50, "f"))
        assert process.stdout.readline().endswith("trainer-0 INFO f\n")
        process.send_signal(signal.SIGINT)
        wait_until(lambda: process.poll() is not None, what="its end")
        assert process.returncode == 0


def test_a_pager_that_is_closed_is_no_error(run: Path) -> None:
    with (run / "logs" / "trainer-0.log").open("a") as file:
        file.writelines(line(50 + number, "z" * 500) for number in range(2000))
    command = f"{sys.executable} -m launch logs {run} -n 2000 | head -n 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""
