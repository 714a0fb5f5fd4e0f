"""The newest checkpoint that an engine may start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from areal_like.paths import find_checkpoints
from areal_like.weights.snapshots_on_disk import STATE_FILE, VERSION_KEY, DiskSnapshot, newest_snapshot


def checkpoint(folder: Path, step: int, extra: dict[str, int]) -> Path:
    path = folder / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / STATE_FILE).write_text(json.dumps({"extra": extra}))
    return path


def test_the_latest_step_is_found(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, {VERSION_KEY: 7})
    newest = checkpoint(tmp_path, 10, {VERSION_KEY: 31})
    (tmp_path / ".step_000012.partial").mkdir()
    assert newest_snapshot(tmp_path) == DiskSnapshot(path=newest, version=31)


def test_a_checkpoint_without_version_is_not_used(tmp_path: Path) -> None:
    checkpoint(tmp_path, 2, {VERSION_KEY: 7})
    checkpoint(tmp_path, 10, {})
    assert newest_snapshot(tmp_path) is None


def test_checkpoints_out_of_sight_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert newest_snapshot(tmp_path / "nowhere") is None
    assert find_checkpoints(tmp_path / "nowhere") == {}
    checkpoint(tmp_path, 2, {VERSION_KEY: 7})

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    # By a patch and not by chmod: root may read everything.
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert find_checkpoints(tmp_path) == {}
    assert newest_snapshot(tmp_path) is None
