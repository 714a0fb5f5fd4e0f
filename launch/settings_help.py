"""The settings, read from the dataclasses of areal_like/config.py: one place says what a key means, help and README repeat it.

Python keeps no docstrings of fields, so they are read from the source with `ast`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from dataclasses import dataclass

from areal_like import config as config_module
from areal_like.config import Config
from areal_like.runtime.command_line import GROUPS, OPEN_SECTIONS, presets

COMMON = (
    "name",
    "resume",
    "seed",
    "max_staleness",
    "model.path",
    "model.dtype",
    "sampling.group_size",
    "sampling.max_new_tokens",
    "sampling.temperature",
    "rollout.num_servers",
    "rollout.engine",
    "rollout.engine_device",
    "rollout.max_running",
    "weights.update_mode",
    "trainer.num_steps",
    "trainer.groups_per_step",
    "trainer.lr",
    "trainer.world_size",
    "trainer.device",
    "trainer.checkpoint_interval",
    "eval.num_prompts",
    "eval.interval",
)
"""Keys that `run --help` shows; `run --help-all` shows all."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One setting."""

    path: str
    """Dotted, as on the command line."""
    default: str
    text: str
    """Its docstring on one line."""


def all_keys() -> list[Key]:
    """Every key that has a fixed type, in the order of config.py. The open sections (task, objective, advantage) appear as one each."""
    return _keys_of(Config, prefix="")


def choices() -> dict[str, list[str]]:
    """Section -> names that `section=name` accepts."""
    return {section: presets(section) for section in GROUPS}


def _keys_of(cls: type, *, prefix: str) -> list[Key]:
    texts = _field_docstrings(cls)
    keys = []
    for spec in dataclasses.fields(cls):
        value = spec.default_factory() if callable(spec.default_factory) else spec.default
        if dataclasses.is_dataclass(value):
            keys += _keys_of(type(value), prefix=f"{prefix}{spec.name}.")
        else:
            default = (
                value["name"] if isinstance(value, dict) and spec.name in OPEN_SECTIONS else _written(value)
            )
            keys.append(Key(path=f"{prefix}{spec.name}", default=default, text=texts.get(spec.name, "")))
    return keys


def _written(value: object) -> str:
    """A value as one would type it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{item}' for key, item in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _field_docstrings(cls: type) -> dict[str, str]:
    tree = next(
        node
        for node in ast.parse(inspect.getsource(config_module)).body
        if isinstance(node, ast.ClassDef) and node.name == cls.__name__
    )
    texts = {}
    for node, following in zip(tree.body, tree.body[1:], strict=False):
        is_text = (
            isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        )
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
            texts[node.target.id] = " ".join(ast.literal_eval(following.value).split())  # type: ignore[attr-defined]
    return texts
