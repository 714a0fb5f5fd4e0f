"""The arithmetic of benchmarks/crash_cost.py: which kill has cost which trajectory, step and sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.crash_books import Kill, attempts_of, costs
from benchmarks.crash_cost import JOB_KEY, append_rows, main, measured, read_rows
from benchmarks.crash_report import PEERS, as_table, grouped, spread

KILL = Kill(
    role="server",
    at_s=10.0,
    over_s=10.0,
    last_step=0,
    resumed_step=None,
    answered_s=2.0,
    caught_up_s=3.0,
)
TRAINER = replace(KILL, role="trainer", last_step=1, resumed_step=0)
Line = dict[str, Any]


def begun(attempt: int, at_s: float) -> Line:
    return {"event": "begun", "attempt": attempt, "maker": 7, "at_s": at_s}


def done(attempt: int, at_s: float) -> Line:
    return {"event": "done", "attempt": attempt, "at_s": at_s}


def cancelled(attempt: int, at_s: float) -> Line:
    return {"event": "cancelled", "attempt": attempt, "at_s": at_s}


def used(trainer: int, attempts: list[int], at_s: float) -> Line:
    return {"event": "used", "trainer": trainer, "attempts": attempts, "at_s": at_s}


def made(*attempts: int, at_s: float = 0.0) -> list[Line]:
    """Trajectories of two seconds."""
    return [line for number in attempts for line in (begun(number, at_s), done(number, at_s + 2))]


def cost_of(lines: list[Line], kills: list[Kill], *, last_step: int = 0) -> list[tuple[int, float, int, int]]:
    """(trajectories lost, their seconds, samples trained twice, samples undone) of each kill; a step is one
    group of two."""
    journal = sorted(lines, key=lambda line: line["at_s"])
    attempts = attempts_of(journal, kills, groups_per_step=1, last_step=last_step)
    found = costs(attempts, kills, samples_per_step=2, until_s=100.0)
    return [(c.lost_trajectories, c.lost_s, c.twice_samples, c.undone_samples) for c in found]


def test_a_server_loses_what_it_was_making() -> None:
    lines = [*made(1, 2), used(1, [1, 2], 4), begun(3, 7), begun(4, 9), cancelled(4, 10.5)]
    assert cost_of(lines, [KILL]) == [(2, 4.5, 0, 0)]


def test_a_trajectory_that_outlives_a_kill_is_not_lost() -> None:
    lines = [*made(1, 2), used(1, [1, 2], 4), *made(3, 4, at_s=9), used(1, [3, 4], 15)]
    assert cost_of(lines, [KILL], last_step=1) == [(0, 0.0, 0, 0)]


def test_samples_of_an_undone_step_are_trained_twice() -> None:
    lines = [*made(1, 2), *made(3, 4, at_s=4), used(1, [1, 2], 5), used(1, [3, 4], 8)]
    lines += [used(2, [1, 2], 12), used(2, [3, 4], 13)]
    assert cost_of(lines, [TRAINER], last_step=1) == [(0, 0.0, 4, 4)]


def test_a_group_of_an_open_step_is_not_trained_twice() -> None:
    kill = replace(TRAINER, last_step=0, resumed_step=1)
    lines = [*made(1, 2), *made(3, 4), used(1, [1, 2], 5), used(1, [3, 4], 9), used(2, [3, 4], 12)]
    assert cost_of(lines, [kill], last_step=1) == [(0, 0.0, 0, 0)]


def test_without_a_ledger_undone_samples_are_lost() -> None:
    kill = replace(TRAINER, role="job")
    lines = [*made(1, 2), *made(3, 4), *made(9, at_s=6), used(1, [1, 2], 5), used(1, [3, 4], 8)]
    lines += [*made(5, 6, 7, 8, at_s=12), used(2, [5, 6], 15), used(2, [7, 8], 16)]
    # Four that were trained and undone, and one that was in the buffer.
    assert cost_of(lines, [kill], last_step=1) == [(5, 10.0, 0, 4)]


def test_a_step_that_ends_after_the_kill_of_the_launcher_counts() -> None:
    kill = replace(KILL, role="launcher", over_s=13.0, last_step=1, resumed_step=1)
    lines = [*made(1, 2), *made(3, 4, at_s=7), used(1, [1, 2], 4), used(1, [3, 4], 12)]
    again = [*lines, used(2, [3, 4], 20)]
    assert cost_of(again, [kill], last_step=1) == [(0, 0.0, 2, 2)]
    others = [*lines, *made(5, 6, at_s=15), used(2, [5, 6], 20)]
    assert cost_of(others, [kill], last_step=1) == [(2, 4.0, 0, 2)]


def two_kills(*, num_steps: int) -> tuple[list[Line], list[Kill]]:
    """A kill of the trainer at 10 s, `num_steps` new steps, and a kill of the whole job at 30 s."""
    lines = [*made(1, 2), used(1, [1, 2], 4)]
    for step in range(1, num_steps + 1):
        lines += [*made(10 * step, 10 * step + 1), used(2, [10 * step, 10 * step + 1], 15 + step)]
    lines += [*made(98, 99, at_s=32), used(3, [98, 99], 36)]
    trainer = replace(KILL, role="trainer", resumed_step=1)
    job = replace(
        trainer, role="job", at_s=30.0, over_s=30.0, last_step=num_steps, resumed_step=num_steps + 1
    )
    return lines, [trainer, job]


@pytest.mark.parametrize("begun_s", [9.0, 11.0])
def test_a_refused_trajectory_belongs_to_the_kill_before(begun_s: float) -> None:
    lines, kills = two_kills(num_steps=3)
    lines += made(3, at_s=begun_s)
    assert cost_of(lines, kills, last_step=4) == [(1, 2.0, 0, 0), (0, 0.0, 0, 0)]


def test_a_buffered_trajectory_belongs_to_the_kill_after() -> None:
    lines, kills = two_kills(num_steps=2)
    lines += made(3, at_s=9)
    assert cost_of(lines, kills, last_step=3) == [(0, 0.0, 0, 0), (1, 2.0, 0, 0)]


def test_what_the_end_of_the_job_cancels_is_not_lost() -> None:
    lines = [*made(1, 2), used(1, [1, 2], 4), begun(3, 90), cancelled(3, 101)]
    assert cost_of(lines, [KILL]) == [(0, 0.0, 0, 0)]


def test_a_journal_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="steps 0 to 1 have only 1 groups"):
        cost_of([*made(1, 2), used(1, [1, 2], 4)], [KILL], last_step=1)
    with pytest.raises(ValueError, match="1 trainers have trained, 2 were started"):
        cost_of([*made(1, 2), used(1, [1, 2], 4)], [TRAINER])


def test_the_table_has_a_row_for_each_role() -> None:
    figures = {
        "lost_trajectories": 2,
        "lost_complete": 1,
        "twice_samples": 0,
        "undone_samples": 0,
        "caught_up_s": 2.0,
    }
    rows = [
        {"role": role, "durability": kind, "lost_s": lost_s, "answered_s": 1.5, **figures}
        for role, kind, lost_s in (("server", "process_crash", 1.0), ("server", "process_crash", 4.0))
    ]
    rows.append({**rows[0], "role": PEERS[0], "durability": PEERS[1]})
    assert [(key, len(kills)) for key, kills in grouped(rows).items()] == [
        (("server", "process_crash"), 2),
        (PEERS, 1),
    ]
    lines = as_table(rows).splitlines()
    assert "| rollout server | `process_crash` | 2 | 2.5 (1.0 to 4.0) | 2 | 1 | 0 | 0 | 1.5 | 2 |" in lines
    assert lines[-1].startswith("| all processes, as peers do it | `none` | 1 |")
    assert spread([0.0, 0.0]) == "0"


def test_a_line_that_was_cut_off_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    row = {"role": "buffer", "job": {"key": JOB_KEY}}
    append_rows(path, [row])
    with path.open("a") as file:
        file.write('{"role": "ser')
    assert read_rows(path) == [row]
    append_rows(path, [row, {"role": "buffer", "job": {"key": "another"}}])
    assert read_rows(path) == [row, row]


@pytest.mark.chaos
def test_kills_of_a_real_job_are_counted(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    rows = measured(directory, "process_crash", ["server", "trainer", "job"], seed=0)
    assert [row["role"] for row in rows] == ["server", "trainer", "job"]
    assert all(row["job"]["audit_is_clean"] and row["answered_s"] > 0 for row in rows), rows
    # The trainer's step is made again with the same samples, and so is that of the whole job.
    assert all(row["twice_samples"] == row["undone_samples"] for row in rows), rows
    assert rows[0]["undone_samples"] == 0 < rows[2]["lost_s"], rows
    results = tmp_path / "results.jsonl"
    append_rows(results, rows)
    assert main(["--report", "--results", str(results), "--figure", str(tmp_path / "figure.png")]) == 0
    assert (tmp_path / "figure.png").stat().st_size > 1000
