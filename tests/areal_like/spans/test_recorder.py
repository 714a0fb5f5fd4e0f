"""Spans on disk: bounds, kills, full disks, restarts, clocks, and the trace that is made of them."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.spans import recorder
from areal_like.spans.recorder import MAX_PER_S, ClockOffset, SpanRecorder
from launch.cli import main
from launch.trace.perfetto import MAX_ROWS, events, in_progress, packed
from launch.trace.reading import Span, read_processes
from tests.support.report_runs import row, write_run
from tests.support.waiting import HANG_LIMIT_S


@pytest.fixture(autouse=True)
def stopped() -> Iterator[None]:
    yield
    recorder.stop()


def span(start_s: float, seconds: float, lane: str = "samples") -> Span:
    return Span(start_s=start_s, seconds=seconds, lane=lane, name="x", arguments={})


def write_spans(directory: Path, daemon: str, *entries: Any, pid: int = 7, host: str = "a") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    head = {"daemon": daemon, "host": host, "pid": pid, "began_s": 0}
    with (directory / f"{daemon}.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in (head, *entries))


def checked(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, after a strict check of the format."""
    data = path.read_bytes()
    trace = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    assert trace["displayTimeUnit"] == "ms"
    named, ends = set(), defaultdict(float)
    for one in trace["traceEvents"]:
        assert isinstance(one["pid"], int) and isinstance(one["tid"], int) and isinstance(one["name"], str)
        match one["ph"]:
            case "M":
                assert one["name"].endswith(("_name", "_sort_index")) and len(one["args"]) == 1
                named.add((one["name"], one["pid"], one["tid"]))
            case "X":
                assert one["dur"] >= 0 and isinstance(one["ts"], int | float)
                key = (one["pid"], one["tid"])
                assert ("thread_name", *key) in named and ("process_name", one["pid"], 0) in named
                assert one["ts"] >= ends[key] - 0.2, "spans of one row overlap"
                ends[key] = one["ts"] + one["dur"]
            case "C":
                assert isinstance(one["args"]["value"], int | float)
            case other:
                raise AssertionError(f"unknown phase {other}")
    return list(trace["traceEvents"])


def test_what_was_recorded_is_read_again(tmp_path: Path) -> None:
    recorder.start(tmp_path, "trainer-0", max_bytes=1 << 20)
    start_s = time.monotonic()
    recorder.record("step", "wait", start_s=start_s, end_s=start_s + 0.5, step=3)
    recorder.count("running", 4)
    recorder.note_offset(offset_s=0.25, rtt_s=0.01)
    recorder.stop()
    (process,) = read_processes(tmp_path)
    (one,), (value,) = process.spans, process.values
    assert (one.lane, one.name, one.arguments) == ("step", "wait", {"step": 3})
    assert one.seconds == pytest.approx(0.5) and abs(one.start_s - 0.25 - time.time()) < HANG_LIMIT_S
    assert (value.name, value.value) == ("running", 4)
    assert (process.daemon, process.offset_s, process.rtt_s) == ("trainer-0", 0.25, 0.01)


def test_nothing_is_recorded_without_a_recorder(tmp_path: Path) -> None:
    recorder.start(tmp_path / "spans", "x", max_bytes=0)
    recorder.record("a", "b", start_s=0)
    recorder.count("c", 1)
    assert not list(tmp_path.iterdir())


def test_the_newest_spans_are_kept_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "MAX_PER_S", 10**9)
    kept = SpanRecorder(tmp_path, "d.1", max_bytes=20_000)
    for index in range(2000):
        kept.span("a", f"span {index}", start_s=index, end_s=index + 1)
    kept.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 21_000
    (process,) = read_processes(tmp_path)
    numbers = [int(one.name.split()[1]) for one in process.spans]
    assert numbers == list(range(numbers[0], 2000)) and len(numbers) > 100
    assert process.daemon == "d.1"


def test_too_many_spans_are_left_out_and_counted(tmp_path: Path) -> None:
    kept = SpanRecorder(tmp_path, "d", max_bytes=10 << 20)
    started_s = time.monotonic()
    for _ in range(3 * MAX_PER_S):
        kept.span("a", "b", start_s=0, end_s=1)
    is_within_a_second = time.monotonic() - started_s < 1
    kept._second_s -= 2  # a second passes
    kept.value("n", 1)
    kept.close()
    (process,) = read_processes(tmp_path)
    if is_within_a_second:
        assert len(process.spans) == MAX_PER_S
        assert process.values[0].value == 2 * MAX_PER_S


def test_a_disk_that_fails_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spans").write_text("a file")
    recorder.start(tmp_path / "spans", "d", max_bytes=1 << 20)
    recorder.record("a", "b", start_s=0)
    assert "no spans are recorded" in caplog.text
    kept = SpanRecorder(tmp_path / "full", "d", max_bytes=1 << 20)
    assert kept._file is not None
    kept._file.close()
    kept._file = Path("/dev/full").open("w")  # noqa: SIM115 (the recorder closes it)
    for _ in range(5000):
        kept.span("a", "b", start_s=0, end_s=1)
    assert kept._file is None
    kept._retry_s = 0.0  # half a minute passes, and there is space again
    kept.span("a", "later", start_s=2, end_s=3)
    kept.close()
    kept.span("a", "after the end", start_s=2, end_s=3)
    (process,) = read_processes(tmp_path / "full")
    assert [one.name for one in process.spans] == ["later"]
    assert caplog.text.count("no spans are recorded") == 2 and "recorded again" in caplog.text


@given(
    st.floats(-1e6, 1e6),
    st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=40),
)
def test_the_offset_is_off_by_half_a_round_trip(true_s: float, delays: list[tuple[float, float]]) -> None:
    clock, now_s = ClockOffset(), 1e7
    for there_s, back_s in delays:
        sent_s = now_s
        now_s = sent_s + there_s + back_s
        found = clock.heard(sent_s=sent_s, buffer_s=sent_s + there_s + true_s, now_s=now_s)
        assert found is not None
        offset_s, rtt_s = found
        assert abs(offset_s - true_s) <= rtt_s / 2 + 1e-6


@pytest.mark.parametrize("buffer_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_buffer_without_a_time_gives_no_offset(buffer_s: float) -> None:
    assert ClockOffset().heard(sent_s=1.0, buffer_s=buffer_s, now_s=2.0) is None


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 20)), max_size=60))
def test_spans_of_a_row_do_not_overlap(pairs: list[tuple[float, float]]) -> None:
    spans = [span(*pair) for pair in pairs]
    rows = packed(spans)
    assert sum(map(len, rows)) == len(spans)
    for found in rows:
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(found))
    counts = [count for _, count in in_progress(spans)]
    assert not counts or (min(counts) >= 0 and counts[-1] == 0)


def test_daemons_are_on_the_clock_of_the_buffer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_run(tmp_path / "one", [row(0)])
    write_spans(root / "spans", "buffer", [1000.0, 0.9, "ledger", "write", {}])
    late = [[990.2, 0.5, "step", "compute", {"step": 4}], [991.0, 0.5, "step", "update", {"step": 5}]]
    write_spans(
        root / "spans",
        "trainer-0",
        {"offset_s": 12.0, "rtt_s": 5.0},
        {"offset_s": 10.0, "rtt_s": 0.001},
        {"offset_s": 10.4, "rtt_s": 1.0},
        *late,
        host="b",
    )
    assert main(["trace", str(root)]) == 0
    assert "corrected: the clock of trainer-0 on b is off by -10.000 s" in capsys.readouterr().out
    found = {one["name"]: one for one in checked(root / "trace.json.gz") if one["ph"] == "X"}
    assert found["compute"]["ts"] - found["write"]["ts"] == pytest.approx(0.2e6)
    assert main(["trace", str(root), "--steps", "5:6", "--out", str(root / "t.json")]) == 0
    assert [one["name"] for one in checked(root / "t.json") if one["ph"] == "X"] == ["update"]
    assert main(["trace", str(root), "--last", "0.6s", "--out", str(root / "u.json")]) == 0
    assert {one["name"] for one in checked(root / "u.json") if one["ph"] == "X"} == {"write", "update"}


def test_many_samples_become_a_counter(tmp_path: Path) -> None:
    write_spans(
        tmp_path, "rollout-0", *([1000.0 + at / 100, 50.0, "samples", f"t{at}", {}] for at in range(100))
    )
    found = list(events(read_processes(tmp_path), first_s=1000, last_s=1100))
    rows = {one["tid"] for one in found if one["ph"] == "X"}
    assert len(rows) == MAX_ROWS
    counts = [one["args"]["value"] for one in found if one["name"] == "samples in progress"]
    assert max(counts) == 100 and counts[-1] == 0


def test_a_restarted_daemon_is_a_process_of_its_own(tmp_path: Path) -> None:
    for pid in (7, 8):
        write_spans(tmp_path, "rollout-0", [1000.0 + pid, 1.0, "samples", "t", {}], pid=pid)
    assert [process.pid for process in read_processes(tmp_path)] == [7, 8]


def test_damaged_lines_are_skipped(tmp_path: Path) -> None:
    odd = [
        {"x": 1},
        [1],
        [1e300, 1, "a", "b", {}],
        [1000, -1, "a", "b", {}],
        ["a"],
        {"offset_s": 1e300, "rtt_s": 1},
    ]
    write_spans(tmp_path, "d", *odd, [1000.0, 1.0, "a", "b", {}])
    with (tmp_path / "d.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n[[[[\n[1000.0, 1.")
    (process,) = read_processes(tmp_path)
    assert len(process.spans) == 1 and process.offset_s == 0


def test_mistakes_of_trace_have_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_run(tmp_path / "one", [row(0)])
    assert main(["trace", str(root)]) == 2
    write_spans(root / "spans", "trainer-0", [1000.0, 1.0, "step", "wait", {"step": 4}])
    for arguments in (
        ["--steps", "9:10"],
        ["--steps", "5"],
        ["--last", "x"],
        ["--last", "1s", "--steps", "4:5"],
    ):
        assert main(["trace", str(root), *arguments]) == 2
    assert main(["trace", str(root), "--out", str(root / "no" / "t.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 6
