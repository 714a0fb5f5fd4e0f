"""The directory of a reward model: what it must contain, and its identity. Does not import torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.errors import ConfigError, first_line
from areal_like.paths import ADAPTER_CONFIG

_CONFIG = "config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""Files that determine the tokens of a text."""
_CLASSIFIER = "ForSequenceClassification"
_IDENTITY_CHARS = 16
_MAX_JSON_BYTES = 64 << 20


@dataclass(frozen=True)
class ModelDirectory:
    """A directory that has been checked."""

    path: Path
    weights: tuple[Path, ...]
    """Its safetensors files."""

    @property
    def identity(self) -> str:
        """16 hex digits of a hash over weights, config.json and tokenizer; reads all of these files."""
        names = [_CONFIG, *(file.name for file in self.weights), *_TOKENIZER_FILES]
        digest = hashlib.sha256()
        for name in sorted(names):
            if (file := self.path / name).is_file():
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
                digest.update(f"{name} {content}\n".encode())
        return digest.hexdigest()[:_IDENTITY_CHARS]


def checked_directory(path: str) -> ModelDirectory:
    """Returns the directory of a reward model.

    Raises ConfigError unless it has a sequence classifier with one label, its weights as safetensors, and a
    tokenizer.
    """
    folder, what = Path(path).expanduser(), f"scorer.path={path}"
    if not (folder / _CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise ConfigError(
                f"{what} is an adapter: merge it with its base: areal-like merge {path} --into DIRECTORY"
            )
        raise ConfigError(f"{what}: no {_CONFIG} there; name the directory of a reward model")
    _check_config(_json(folder / _CONFIG, what=what), what=what)
    weights = _weight_files(folder, what=what)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ConfigError(
            f"{what} has no tokenizer: save the tokenizer of the reward model there (tokenizer.json, "
            "tokenizer_config.json)"
        )
    return ModelDirectory(path=folder.resolve(), weights=tuple(weights))


def _check_config(config: Any, *, what: str) -> None:
    if not isinstance(config, dict):
        raise ConfigError(f"{what}: its {_CONFIG} is not a JSON object")
    named = config.get("architectures")
    architectures = [str(one) for one in named] if isinstance(named, Sequence) else []
    if architectures and not any(one.endswith(_CLASSIFIER) for one in architectures):
        raise ConfigError(
            f"{what} is a {', '.join(architectures)[:80]}: a reward model is a sequence classifier "
            f"(...{_CLASSIFIER}) with one label"
        )
    labels = config.get("id2label")
    num_labels = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)
    if num_labels != 1:
        raise ConfigError(
            f"{what} has {num_labels} labels: a reward model has one, whose logit is the score (num_labels=1)"
        )


def _weight_files(folder: Path, *, what: str) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        found = f" (only {pickled[0]}, which is a pickle)" if pickled else ""
        raise ConfigError(
            f"{what} has no {_WEIGHTS}{found}: save the model with save_pretrained, which writes safetensors"
        )
    index = _json(folder / _INDEX, what=what)
    named = index.get("weight_map") if isinstance(index, dict) else None
    names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
    if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
        raise ConfigError(f"{what}: its {_INDEX} does not name safetensors files of the same directory")
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ConfigError(f"{what}: {absent[0]}, which its {_INDEX} names, is missing")
    return [folder / name for name in names]


def _json(file: Path, *, what: str) -> Any:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has more than {_MAX_JSON_BYTES} bytes")
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what}: {file.name} cannot be read ({first_line(error)})") from None
