"""A stored copy of the list of transformers' models, which each import of transformers would rebuild.

Importing transformers reads the source of all its 2,400 modules, twice, to list the names that each one
exports. This takes 0.36 s of CPU time in every process of a job (`imports.py` has the measurement), and
minutes on a cold network file system. Here the list is kept in the user's cache directory. It belongs to
exactly the files it was made from: the file's name is a digest of their paths, sizes and times.

transformers has no setting for this, so one of its functions is replaced as soon as its module is loaded. A
release without that function is imported as if this module did not exist.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from areal_like.paths import cache_dir, write_json

_INDEXER = "transformers.utils.import_utils"
_SCAN = "create_import_structure_from_path"

Index = dict[Any, Any]
"""The result of the scan: name of a folder -> its Index; frozenset of the packages that modules need ->
{module -> names that it exports}."""


@contextlib.contextmanager
def stored_index() -> Iterator[None]:
    """Makes an import of transformers inside the block take the list of its models from the cache, or store
    it.

    Does nothing if transformers is already imported.
    """
    if _INDEXER in sys.modules:
        yield
        return
    finder = _IndexerFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _IndexerFinder(importlib.abc.MetaPathFinder):
    """Finds the module that has the scan, and replaces the scan when the module is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _INDEXER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            scan = getattr(module, _SCAN, None)
            if scan is not None and module.__file__ is not None:
                setattr(module, _SCAN, stored_scan(scan, Path(module.__file__).parents[1] / "models"))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def stored_scan(scan: Callable[[Any], Index], models: Path) -> Callable[[Any], Index]:
    """The scan, but with the result for the folder `models` (or its `__init__.py`) from the cache.

    A cache that cannot be read, written or understood costs the time of a scan and nothing else.
    """

    @functools.cache
    def listed() -> list[Any]:
        file = cache_dir() / f"transformers-index-{_digest(models)}.json"
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            stored: list[Any] = json.loads(file.read_text(encoding="utf-8"))
            _index(stored)
            return stored
        found = _listed(scan(models))
        with contextlib.suppress(OSError):
            write_json(file, found)
        return found

    @functools.wraps(scan)
    def scan_or_stored(path: Any) -> Index:
        return _index(listed()) if Path(path) in (models, models / "__init__.py") else scan(path)

    return scan_or_stored


def _digest(folder: Path) -> str:
    """A digest of the path, size and time of each Python file below the folder; takes 10 ms."""
    state = hashlib.blake2b(digest_size=16)
    for path, size, time_ns in sorted(_files(str(folder))):
        state.update(f"{path}\0{size}\0{time_ns}\n".encode())
    return state.hexdigest()


def _files(folder: str) -> Iterator[tuple[str, int, int]]:
    """(path, size in bytes, time of the last change in ns)"""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                stat = entry.stat()
                yield entry.path, stat.st_size, stat.st_mtime_ns
            elif entry.is_dir() and entry.name != "__pycache__":
                yield from _files(entry.path)


def _listed(index: Index) -> list[Any]:
    """The index in types that JSON has."""
    return [
        [key, _listed(value)]
        if isinstance(key, str)
        else [sorted(key), {module: sorted(names) for module, names in value.items()}]
        for key, value in index.items()
    ]


def _index(listed: list[Any]) -> Index:
    """The inverse of `_listed`."""
    return {
        key if isinstance(key, str) else frozenset(key): _index(value)
        if isinstance(key, str)
        else {module: set(names) for module, names in value.items()}
        for key, value in listed
    }
