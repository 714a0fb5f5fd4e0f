"""docs/reference/models.md: its table is that of `model_matrix`, and what that says is what happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launching import ROOT
from tests.support.model_matrix import COLUMNS, MATRIX, YES, outcome, table, write
from trainer.planning.shapes import known_shapes

PAGE = (ROOT / "docs" / "reference" / "models.md").read_text()


def test_the_page_shows_the_matrix() -> None:
    assert table() in PAGE
    assert all(len(cells) == len(COLUMNS) for cells in MATRIX.values())
    missing = [name for name in known_shapes() if name not in ("tiny", "smollm2") and f"`{name}`" not in PAGE]
    assert not missing, "shapes that plan traces"


@pytest.mark.long
@pytest.mark.parametrize("family", MATRIX)
def test_the_matrix_is_what_happens(family: str, tmp_path: Path) -> None:
    path = write(family, tmp_path)
    for column, wanted in zip(COLUMNS, MATRIX[family], strict=True):
        found = outcome(column, path)
        assert found == YES if wanted == YES else wanted in found, (column, found)
