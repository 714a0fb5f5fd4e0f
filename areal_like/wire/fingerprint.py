"""Fingerprints in `Hello`, by which the buffer refuses a peer with another model, tokenizer or dataset.

A fingerprint covers only the properties that must be equal: a model's architecture but not its weights, and a
task's settings and seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from areal_like.config import Config
from areal_like.wire.messages.hello import Role

_ARCHITECTURE_IGNORES = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "architectures",
)
_MAX_SETTING_CHARS = 48
"""Longest value of a setting in `shared_settings`: all of them together stay below `MAX_SETTINGS_CHARS`."""


def model_fingerprint(path: str) -> str:
    """Fingerprint of a model directory's config.json; of the name itself for a hub name."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return _digest(path)
    fields: dict[str, Any] = json.loads(config.read_text())
    return _digest({key: value for key, value in fields.items() if key not in _ARCHITECTURE_IGNORES})


def tokenizer_fingerprint(path: str) -> str:
    """Fingerprint of a model directory's tokenizer.json (vocabulary, rules); of the name for a hub name."""
    tokenizer = Path(path) / "tokenizer.json"
    return _digest(json.loads(tokenizer.read_text()) if tokenizer.is_file() else path)


def dataset_fingerprint(config: Config) -> str:
    """Fingerprint of the task's settings and the seed, which together determine every prompt."""
    return _digest({"task": config.task, "seed": config.seed})


def shared_settings(config: Config, role: Role) -> str:
    """The settings that a peer of this role and the buffer must share, as text `key=value ...`.

    A trainer with fewer groups per step would commit groups that it has not trained on, and one that does not
    know that groups are closed would compare parts of several groups with one another. A server that samples
    at another temperature would record log-probs of another policy, one that renders messages in another way
    would complete other prompts, and one with another policy for failed samples would send them with reward 0
    where the buffer would lease them again. Of evaluation sets and of long values, fingerprints are compared:
    a hello is small.
    """
    settings = {f"sampling.{name}": value for name, value in dataclasses.asdict(config.sampling).items()}
    for name, one in config.eval.sets.items():
        settings[f"eval.sets.{name}"] = _digest(dataclasses.asdict(one))
    if role is Role.ROLLOUT:
        policies = dataclasses.asdict(config.buffer.on_failure)
        if config.model.router_replay:
            settings["model.router_replay"] = True
        else:
            del policies["routes"]
        if config.distill.servers:
            settings["distill.teachers"] = canonical_json(config.distill.teachers)
        else:
            del policies["teacher"]
        settings |= {f"buffer.on_failure.{kind}": policy for kind, policy in policies.items()}
        settings["model.renderer"] = config.model.renderer
        settings["model.chat_template_kwargs"] = canonical_json(config.model.chat_template_kwargs)
    if role is Role.TRAINER:
        settings |= {
            "trainer.groups_per_step": config.trainer.groups_per_step,
            "trainer.num_steps": config.trainer.num_steps,
            "buffer.overdue": config.overdue,
        }
    texts = {name: str(value) for name, value in settings.items()}
    return " ".join(
        f"{name}={text if len(text) <= _MAX_SETTING_CHARS else _digest(text)}" for name, text in texts.items()
    )


def as_number(fingerprint: str) -> int:
    """63 bits of a fingerprint, for an integer column of the ledger."""
    return int(fingerprint, 16) >> 1


def canonical_json(value: Any, *, default: Callable[[Any], Any] = repr) -> str:
    """JSON with sorted keys. `default`: converts values that JSON does not have.

    YAML has keys that are not texts (`{1: a, true: b}`), which cannot be sorted together with texts.
    """
    try:
        return json.dumps(value, sort_keys=True, default=default)
    except TypeError:
        return json.dumps(_with_text_keys(value), sort_keys=True, default=default)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else f"{type(key).__name__} {key}": _with_text_keys(item)
            for key, item in value.items()
        }
    return [_with_text_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]
