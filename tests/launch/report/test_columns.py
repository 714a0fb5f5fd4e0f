"""Columns of metrics.jsonl: steps trained again, damaged lines, counters, and the reduction to points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.formatting import duration, labels, rate, short, ticks
from launch.report.columns import MAX_COLUMNS, NUM_BUCKETS, Columns, filled_back, read_columns, reduced


def columns_of(path: Path, *lines: str) -> Columns:
    path.write_text("\n".join(lines) + "\n")
    return read_columns(path)


def test_steps_that_were_trained_again_count_once(tmp_path: Path) -> None:
    rows = [(0, 1.0), (1, 2.0), (2, 3.0), (1, 20.0), (2, 30.0)]
    found = columns_of(
        tmp_path / "m", *(json.dumps({"step": step, "loss": loss, "time_unix_s": 5}) for step, loss in rows)
    )
    assert found.steps.tolist() == [0, 1, 2]
    assert found.get("loss").tolist() == [1.0, 20.0, 30.0]
    assert not found.is_incomplete


def test_a_torn_line_ends_the_rows(tmp_path: Path) -> None:
    found = columns_of(tmp_path / "m", '{"step": 0, "loss": 1}', '{"step": 1, "lo')
    assert found.steps.tolist() == [0] and found.is_incomplete
    assert read_columns(tmp_path / "none").steps.tolist() == []


@pytest.mark.parametrize(
    "line",
    [
        "[1]",
        '{"step": true}',
        '{"step": -1}',
        '{"step": 1e400}',
        '{"step": 99999999999999999999}',
        '{"loss": 1}',
        "[" * 100_000,
    ],
)
def test_rows_of_another_form_are_left_out(tmp_path: Path, line: str) -> None:
    assert columns_of(tmp_path / "m", '{"step": 0, "loss": 1}', line).steps.tolist() == [0]


def test_values_that_are_no_numbers_are_unknown(tmp_path: Path) -> None:
    odd = '{"step": 0, "a": "x", "b": null, "c": true, "d": 1e39, "e": [1], "f": Infinity, "g": NaN, "h": 2}'
    found = columns_of(tmp_path / "m", odd)
    assert {name for name in found.values if found.has(name)} == {"h"}


def test_the_number_of_columns_is_bounded(tmp_path: Path) -> None:
    row = json.dumps({"step": 0} | {f"c{index}": 1 for index in range(3 * MAX_COLUMNS)})
    assert len(columns_of(tmp_path / "m", row, row.replace(": 0", ": 1", 1)).values) == MAX_COLUMNS


def test_a_counter_may_begin_again(tmp_path: Path) -> None:
    values = [None, 10, None, 40, 5, 6]
    found = columns_of(
        tmp_path / "m",
        *(json.dumps({"step": at, "n": value, "time_unix_s": 2 * at}) for at, value in enumerate(values)),
    )
    assert found.increase("n")[[3, 4, 5]].tolist() == [30, 5, 1]
    assert np.isnan(found.increase("n")[[0, 1, 2]]).all()
    assert found.seconds_between("n")[[3, 4, 5]].tolist() == [4, 2, 2]


def test_a_rate_holds_since_the_row_before() -> None:
    nan = float("nan")
    found = filled_back(np.array([nan, nan, 4, nan, 6, nan], np.float32))
    assert found[:5].tolist() == [4, 4, 4, 6, 6] and np.isnan(found[5])
    assert np.isnan(filled_back(np.array([nan, nan], np.float32))).all()


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=400),
    st.integers(1, 50),
)
def test_a_reduced_line_loses_no_extreme(values: list[float | None], num_buckets: int) -> None:
    steps = np.arange(0, 3 * len(values), 3)
    column = np.array([np.nan if value is None else value for value in values], np.float32)
    line = reduced(steps, column, num_buckets=num_buckets)
    assert len(line.x) <= num_buckets or len(values) <= num_buckets
    known = column[np.isfinite(column)]
    low, high = np.array(line.low), np.array(line.high)
    if len(known):
        assert np.nanmin(low) == known.min() and np.nanmax(high) == known.max()
        middle = np.array(line.mean)
        at = np.isfinite(middle)
        slack = 1e-6 * np.abs(middle[at])
        assert (low[at] - slack <= middle[at]).all() and (middle[at] <= high[at] + slack).all()
    else:
        assert not np.isfinite(low).any()
    assert line.x == sorted(line.x)


def test_a_long_run_has_few_points() -> None:
    values = np.zeros(100_000, np.float32)
    values[54_321] = 7
    line = reduced(np.arange(100_000), values)
    assert len(line.x) == NUM_BUCKETS and line.is_reduced
    assert max(line.high) == 7 and max(line.mean) < 0.1


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12), st.integers(2, 8))
def test_ticks_are_round_and_few(low: float, width: float, count: int) -> None:
    high = low + width
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        return
    found = ticks(low, high, count=count)
    assert len(found) <= 2 * count + 2
    margin = 1e-6 * (high - low)
    assert all(low - margin <= value <= high + margin for value in found)
    assert len(labels(found)) == len(found)


def test_rates_that_are_almost_zero() -> None:
    shown = [rate(value) for value in (8.61e-06, 0.0049, 0.005, 0, 12.3456, None)]
    assert shown == ["<0.01", "<0.01", "0.005", "0", "12.35", "-"]


def test_numbers_are_short() -> None:
    shown = [short(value) for value in (0, 1, -3, 0.123456, 12.3456, 4810, 1.234e6, 2e-5, None, float("nan"))]
    assert shown == ["0", "1", "-3", "0.1235", "12.35", "4,810", "1.234M", "2.00e-05", "-", "-"]
    assert [duration(s) for s in (0.25, 200, 7500, 273_600)] == [
        "0.25 s",
        "3 min 20 s",
        "2 h 5 min",
        "3 d 4 h",
    ]
    assert labels([0, 0.05, 0.1]) == ["0", "0.05", "0.10"]
    assert labels([0, 5000, 10000]) == ["0", "5k", "10k"]
