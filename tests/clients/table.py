"""The table of docs/reference/clients.md: its rows are what the tests of this directory measure."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from tests.support.launching import ROOT

PAGE = ROOT / "docs" / "reference" / "clients.md"
_HEAD = "| client | mode | version | turns | segments | what to know |"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a run of one client in one mode has recorded."""

    client: str
    mode: str
    version: str
    turns: int
    segments: int
    note: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.client, self.mode

    @property
    def measured(self) -> tuple[int, int, str]:
        """All but the version, which a later release of a client may change."""
        return self.turns, self.segments, self.note

    @property
    def line(self) -> str:
        return "| " + " | ".join(str(getattr(self, field.name)) for field in fields(self)) + " |"


def rows_of(page: Path = PAGE) -> dict[tuple[str, str], Row]:
    """The rows of the page by client and mode."""
    found = {}
    for line in _parts(page)[1]:
        client, mode, version, turns, segments, note = (cell.strip() for cell in line.split("|")[1:-1])
        row = Row(
            client=client, mode=mode, version=version, turns=int(turns), segments=int(segments), note=note
        )
        assert row.key not in found, f"{page.name} has two rows {row.key}"
        found[row.key] = row
    return found


def write(row: Row, page: Path = PAGE) -> None:
    """Puts a row into the page: in place of the one with its key, or behind the others of its client."""
    rows = rows_of(page) | {row.key: row}
    order = list(dict.fromkeys(one.client for one in rows.values()))
    lines = [one.line for one in sorted(rows.values(), key=lambda one: order.index(one.client))]
    before, _, after = _parts(page)
    page.write_text("\n".join([*before, *lines, *after]) + "\n")


def _parts(page: Path) -> tuple[list[str], list[str], list[str]]:
    """The lines of the page before, in and after the table's rows."""
    lines = page.read_text().splitlines()
    begin = end = lines.index(_HEAD) + 2
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return lines[:begin], lines[begin:end], lines[end:]
