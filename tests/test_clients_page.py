"""docs/reference/clients.md: its table has what the tests of the clients expect of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.clients.clients import CLIENTS
from tests.clients.table import PAGE, Row, rows_of, write


def test_the_table_is_what_the_tests_expect() -> None:
    expected = {
        (client.name, client.mode): (len(client.says), client.segments, client.note) for client in CLIENTS
    }
    assert len(expected) == len(CLIENTS)
    assert {key: row.measured for key, row in rows_of().items()} == expected


def test_the_table_has_no_other_clients() -> None:
    assert set(rows_of()) <= {(client.name, client.mode) for client in CLIENTS}


def test_a_measured_row_is_written(tmp_path: Path) -> None:
    page = tmp_path / PAGE.name
    before, _, after = PAGE.read_text().partition("|---|---|---|---|---|---|\n")
    page.write_text(f"{before}|---|---|---|---|---|---|\n\n{after.rpartition('|')[2].lstrip()}")
    rows = [
        Row(client=client, mode=mode, version="1", turns=3, segments=1, note="")
        for client, mode in (("a", "x"), ("b", "x"), ("a", "y"))
    ]
    for row in rows:
        write(row, page)
    assert list(rows_of(page).values()) == [rows[0], rows[2], rows[1]], "the rows of a client stay together"
    text = page.read_text()
    write(rows[1], page)
    assert page.read_text() == text
    write(changed := replace(rows[1], segments=2), page)
    assert rows_of(page)[changed.key] == changed and len(rows_of(page)) == len(rows)
