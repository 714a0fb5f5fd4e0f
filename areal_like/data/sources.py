"""Resolves settings such as `task.train`: files on this machine, or a data set of the Hugging Face hub.

    train.jsonl | "data/*.parquet" | [a.jsonl, b.jsonl] | hf:owner/name[:config[:split]]
    {hf: owner/name, config: main, split: train, revision: 1a2b3c}

Left out: directories (name the files in it, or a pattern), because one that also contains a README or a
second split would be read without a warning.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.errors import ConfigError

JSON_LINES = (".jsonl", ".json", ".ndjson")
PARQUET = (".parquet",)
_HUB = "hf:"
_HUB_KEYS = ("hf", "config", "split", "revision")
_PATTERN = frozenset("*?[")


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A split of a data set of the hub, for `datasets.load_dataset`."""

    name: str
    """`owner/name`."""
    config: str = ""
    """Name of the configuration (subset); empty: the default one."""
    split: str
    revision: str = ""
    """Branch, tag or commit; empty: the newest."""

    @property
    def label(self) -> str:
        """Its name in messages."""
        return _HUB + ":".join([self.name, *([self.config] if self.config else []), self.split])


def sources_of(source: Any, *, split: str, key: str) -> list[Path | HubSource]:
    """The files and hub data sets that `source` names, in order; patterns are expanded and sorted.

    `split`: the split of a hub data set that names none. `key`: the setting, for errors. Raises ConfigError.
    """
    if isinstance(source, str) and source:
        if source.startswith(_HUB):
            return [_hub(source, split=split, key=key)]
        return [*_files(source, key=key)]
    if isinstance(source, Mapping):
        return [_hub_mapping(source, split=split, key=key)]
    if isinstance(source, Sequence) and not isinstance(source, str | bytes) and source:
        return [one for item in source for one in sources_of(item, split=split, key=key)]
    raise ConfigError(
        f"{key}={source!r}: name a file (.jsonl, .parquet), a pattern, a list of these, or hf:owner/name"
    )


def _files(pattern: str, *, key: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():
        found = [path]
    elif _PATTERN & set(pattern):
        names = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207, it may be absolute
        found = [Path(name) for name in names if Path(name).is_file()]
        if not found:
            raise ConfigError(f"{key}={pattern}: no file matches (relative to {Path.cwd()})")
    elif path.is_dir():
        raise ConfigError(f"{key}={pattern} is a directory: name its files, e.g. {path}/*.jsonl")
    else:
        raise ConfigError(f"{key}={pattern}: there is no such file (relative to {Path.cwd()})")
    for file in found:
        if file.suffix.lower() not in JSON_LINES + PARQUET:
            raise ConfigError(
                f"{key}: {file} is neither JSON lines ({', '.join(JSON_LINES)}) nor parquet (.parquet)"
            )
    return [file.absolute() for file in found]


def _hub(text: str, *, split: str, key: str) -> HubSource:
    name, *rest = text.removeprefix(_HUB).split(":", 2)
    config, own_split = [*rest, "", ""][:2]
    if not name:
        raise ConfigError(f"{key}={text}: write hf:owner/name, hf:owner/name:config or hf:owner/name::split")
    return HubSource(name=name, config=config, split=own_split or split)


def _hub_mapping(source: Mapping[Any, Any], *, split: str, key: str) -> HubSource:
    values = {str(name): "" if value is None else value for name, value in source.items()}
    unknown = [name for name in values if name not in _HUB_KEYS]
    if unknown or not values.get("hf") or not all(isinstance(value, str) for value in values.values()):
        raise ConfigError(f"{key}: want a mapping of texts with hf (owner/name) and {_HUB_KEYS[1:]}")
    return HubSource(
        name=values["hf"].removeprefix(_HUB),
        config=values.get("config", ""),
        split=values.get("split") or split,
        revision=values.get("revision", ""),
    )
