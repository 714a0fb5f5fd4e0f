"""Whether a run's directory holds the initial model of certain settings.

`trainer.prepare_model` leaves a digest of the settings in the directory of a model that it builds. A launcher
compares it, and starts no process for a model that is there. Settings are compared and not the code that
builds the model: a run keeps its initial model when the program is upgraded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from areal_like.config import Config, to_mapping
from areal_like.paths import BUILT_MODELS, RunPaths

_DIGEST_FILE = "settings.sha256"


def note_settings(config: Config, folder: Path) -> None:
    """Records in a model's directory that it was built with these settings. Raises OSError."""
    (folder / _DIGEST_FILE).write_text(_digest(config))


def is_built(config: Config) -> bool:
    """True if the run's directory holds a model that was built with these settings."""
    if config.model.path not in BUILT_MODELS:
        return False
    try:
        return (RunPaths.of(config).built_model / _DIGEST_FILE).read_text() == _digest(config)
    except OSError:  # there is no model, or an earlier release built it
        return False


def _digest(config: Config) -> str:
    """The settings that determine the model, or with which it is refused; hashed, as `task` may have keys."""
    settings = to_mapping(config)
    for later in ("lora", "router_dtype"):  # no part of the model; and earlier releases had no such settings
        del settings["model"][later]
    wanted = {name: settings[name] for name in ("seed", "model", "task")}
    return hashlib.sha256(json.dumps(wanted, sort_keys=True, default=str).encode()).hexdigest()
