"""What the commands show of a run with `buffer.overdue=close`: parts are found where they are recorded."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from areal_like.config import Config, from_mapping
from areal_like.errors import RefusedError, StoreCorruptError
from areal_like.promise import promise
from areal_like.wire.messages.consumer import Group
from areal_like.wire.records import segment_path
from buffer.ledger.ledger import Ledger
from buffer.ledger.recovery import recover
from buffer.settings import LedgerSettings
from buffer.storage.durable import DurableStore
from buffer.tickets import State
from launch.observation.heard_prompts import read_heard_prompts
from launch.report.figures import figures
from launch.report.findings import findings
from launch.report.ledger import read_ledgers
from launch.report.run import read_run
from launch.report.tables import selection_tables
from launch.samples.reading import RunLedgers, Selection
from launch.view.summary import summary_table
from tests.support.closed_run import GROUPS, SIZE, make_closed_run
from tests.support.store_load import raising, store_settings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Group]]:
    return make_closed_run(tmp_path_factory.mktemp("closed"))


@pytest.fixture
def run(made: tuple[Path, list[Group]]) -> Path:
    return made[0]


@pytest.fixture
def group(made: tuple[Path, list[Group]]) -> Group:
    """A position with parts of several groups."""
    return next(group for group in made[1] if len(group.closed) > 1)


def test_the_samples_of_a_step_are_those_that_it_was_trained_on(made: tuple[Path, list[Group]]) -> None:
    run, groups = made
    for step in {group.step for group in groups}:
        served = [record for group in groups if group.step == step for record in group.records]
        rows = RunLedgers(run).find(Selection(step=step))
        assert Counter((row.ticket, row.sample, row.reward) for row in rows) == Counter(
            (record.ticket_id, record.sample_index, record.reward) for record in served
        )
        assert {row.step for row in rows} == {step} and len(rows) == GROUPS * SIZE
        assert all(RunLedgers(run).read(row).__class__.__name__ == "Record" for row in rows[:2])
    newest = RunLedgers(run).find(Selection())
    assert {row.step for row in newest} == {groups[-1].step - 1}


def test_a_closed_group_and_a_position_are_found_by_ticket(run: Path, group: Group) -> None:
    in_position = RunLedgers(run).find(Selection(ticket=group.ticket_id))
    assert {(row.ticket, row.sample) for row in in_position} == {
        (record.ticket_id, record.sample_index) for record in group.records
    }
    assert {(row.recorded_in, row.step) for row in in_position} == {(group.ticket_id, group.step)}
    of_group = RunLedgers(run).find(Selection(ticket=group.closed[0].ticket_id))
    assert {row.prompt_index for row in of_group} == {group.closed[0].prompt_index}
    assert group.ticket_id in {row.recorded_in for row in of_group}


def test_prompts_are_counted_by_their_groups(run: Path) -> None:
    heard = read_heard_prompts([run / "ledger"], reward_low=0.0, reward_high=1.0)
    with closing(sqlite3.connect(run / "ledger" / "ledger.sqlite3")) as ledger:
        (num_samples,) = ledger.execute("SELECT count(*) FROM samples").fetchone()
        (num_groups,) = ledger.execute("SELECT count(*) FROM tickets WHERE prompt_index >= 0").fetchone()
    assert [row[0] for row in heard.rows] == sorted(row[0] for row in heard.rows) and heard.rows[0][0] >= 0
    assert sum(row[1] for row in heard.rows) == num_groups
    assert sum(row[2] for row in heard.rows) == num_samples


def test_the_report_says_what_closing_did(run: Path) -> None:
    report = read_run(run)
    counters = report.ledger.counters
    named = {figure.name: figure for figure in figures(report)}
    assert named["groups closed"].value == counters["groups_closed"] > 0
    assert named["samples late"].value == counters["samples_late"] > 0
    assert named["parts given up"].value == counters["num_parts_dropped"] > 0
    masked = counters["tokens_masked"]
    share = masked / (masked + counters["tokens_trained"])
    assert named["tokens beyond the bound"].value == pytest.approx(share, abs=1e-6)
    by_length = selection_tables(report)[-1]
    assert sum(int(row[1]) for row in by_length.rows) == report.selection["offered"]["samples"]
    assert sum(int(row[2]) for row in by_length.rows) == report.selection["trained"]["samples"]
    assert sum(report.closing["tokens_masked_by_length"]) == masked
    table = summary_table({"selection": report.selection}, title="x", bound=promise(report_config(run)))
    cells = dict(zip(*(column.cells for column in table.columns), strict=True))
    assert str(cells["closed groups"]).startswith(f"{counters['groups_closed']:,.0f}: ")
    assert str(cells["staleness bound"]).startswith("close after 2 steps")


def report_config(run: Path) -> Config:
    return from_mapping({key: value for key, value in read_run(run).config.items() if key != "resume"})


def test_time_lost_by_waiting_is_a_finding(run: Path) -> None:
    report = read_run(run)
    report.ledger.counters["held_back_s"] = 30.0
    report.columns.times_s = report.columns.steps * 4.0
    found = {figure.name: figure.value for figure in figures(report)}
    assert found["time lost by waiting for whole groups"] == 0.5
    report.columns.steps = report.columns.steps.repeat(2)
    assert any("waited for the slowest samples" in text for text in findings(report))
    for directories, expected in (([run / "ledger"] * 2, "num"), ([run / "ledger"], "num")):
        assert read_ledgers(directories).counters.get("held_back_s", 0.0) == 0.0, expected


def test_a_damaged_part_can_be_dropped_with_its_position(tmp_path: Path) -> None:
    run, _ = make_closed_run(tmp_path)
    settings = LedgerSettings.from_config(report_config(run))

    async def opened(*, ignoring: Sequence[int] = ()) -> tuple[Ledger, DurableStore]:
        store = DurableStore(run / "ledger", store_settings(), on_error=raising)
        try:
            return recover(settings, store, now_s=0.0, ignoring=ignoring), store
        except StoreCorruptError:
            store.close()
            raise

    async def drop() -> None:
        ledger, store = await opened()
        position = [ticket for ticket in ledger.state.steps.tickets_from(16) if ticket.parts][-1]
        group_id, index = position.parts[0]
        location = store._locations[group_id][index]
        store.close()
        with segment_path(run / "ledger", location.segment).open("r+b") as file:
            file.seek(location.offset + location.num_bytes // 2)
            file.write(b"damage")
        with pytest.raises(StoreCorruptError, match=f"position {position.ticket_id}: drop that"):
            await opened()
        ledger, store = await opened(ignoring=[position.ticket_id])
        ledger.operator.poison([position.ticket_id])
        store.close()
        _, store = await opened()  # the damaged part is not needed any more
        store.close()

    asyncio.run(drop())


def test_dropping_a_closed_group_names_its_positions(made: tuple[Path, list[Group]], tmp_path: Path) -> None:
    run, _ = make_closed_run(tmp_path)

    async def drop() -> None:
        store = DurableStore(run / "ledger", store_settings(), on_error=raising)
        settings = LedgerSettings.from_config(report_config(run))
        ledger = recover(settings, store, now_s=0.0)
        steps = ledger.state.steps
        positions = [ticket for ticket in steps.tickets_from(0) if ticket.parts]
        position, over = next(
            (position, group)
            for position in reversed(positions)
            for ticket_id, _ in position.parts
            if (group := ledger.state.parts.groups[ticket_id]).state is State.SPLIT
        )
        live = ledger.state.tickets.live.values()
        running = next(ticket for ticket in live if ticket.state is State.CLOSED)
        with pytest.raises(RefusedError) as refused:
            ledger.operator.poison([over.ticket_id])
        assert f"{position.ticket_id} (step {position.step})" in str(refused.value)
        ledger.operator.poison([running.ticket_id])  # those of its samples that are in no position
        assert running.state.is_terminal and running.failed
        newest = positions[-1]
        assert newest.step >= steps.current
        ledger.operator.poison([newest.ticket_id])
        store.close()

    asyncio.run(drop())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_staleness": 1}, "wait: every sample within 1 step"),
        ({"max_staleness": 4, "buffer": {"overdue": "drop"}}, "drop: every sample within 4 steps, "),
        (
            {"max_staleness": 16, "buffer": {"overdue": "close"}},
            "close after 4 steps: every trained token within 16 steps",
        ),
        (
            {"max_staleness": 8, "buffer": {"overdue": "close"}, "staleness": {"beyond": "cap"}},
            "close after 4 steps: no limit on the age of tokens, weights of those beyond 8 steps are capped",
        ),
        (
            {"max_staleness": 8, "buffer": {"overdue": "close"}, "staleness": {"beyond": "ratio"}},
            "close after 4 steps: no limit on the age of tokens, those beyond 8 steps are masked if ",
        ),
    ],
    ids=json.dumps,
)
def test_the_promise_says_which_age_is_limited(settings: dict[str, object], expected: str) -> None:
    assert promise(from_mapping(settings)).startswith(expected)
