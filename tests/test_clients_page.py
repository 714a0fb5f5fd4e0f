"""docs/reference/clients.md: its table has the clients that are tested, and what the tests expect of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.clients.clients import CLIENTS, Client
from tests.clients.table import PAGE, Row, rows_of, write


@pytest.mark.parametrize("client", CLIENTS, ids=[f"{client.name}-{client.mode}" for client in CLIENTS])
def test_a_client_is_in_the_table(client: Client) -> None:
    row = rows_of()[client.name, client.mode]
    assert row.measured == (len(client.says), client.segments, client.note)


def test_the_table_has_no_other_clients() -> None:
    assert set(rows_of()) <= {(client.name, client.mode) for client in CLIENTS}


def test_a_measured_row_is_written(tmp_path: Path) -> None:
    page = Path(shutil.copy(PAGE, tmp_path))
    first, *_, last = before = list(rows_of().values())
    write(first, page)
    assert page.read_text() == PAGE.read_text()
    changed = replace(first, segments=first.segments + 1)
    write(changed, page)
    write(new := Row(client=first.client, mode="x", version="1", turns=2, segments=1), page)
    rows = rows_of(page)
    assert rows == {row.key: row for row in [*before, changed, new]}
    assert list(rows)[-1] == last.key, "the rows of a client stay together"
