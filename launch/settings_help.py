"""Lists all settings with their defaults, choices and texts, from the dataclasses of areal_like/config/.

`areal-like run --help` and the settings reference of the docs are generated from this list, so that both
agree with the dataclasses.
"""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from dataclasses import dataclass
from typing import Any

from areal_like.config import Config
from areal_like.config.common import choices_of, field_texts, members_of
from areal_like.runtime.command_line import GROUPS, OPEN_SECTIONS, SCALE, presets

COMMON = (
    "name",
    "resume",
    "seed",
    "max_staleness",
    "buffer.overdue",
    "model.path",
    "model.dtype",
    "sampling.group_size",
    "sampling.max_new_tokens",
    "sampling.temperature",
    "rollout.num_servers",
    "rollout.engine",
    "rollout.engine_device",
    "rollout.gpus_per_engine",
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
"""Settings that `run --help` shows; `run --help-all` shows all."""
_NAME_COLUMNS = 38


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as help and the docs describe it."""

    key: str
    """Dotted, as on the command line: `buffer.durability`."""
    section: str
    """The part of the key before the last dot; empty at the root."""
    type: str
    """The field's annotation with its choices spelled out: `int`, `tuple[int, ...]`, `wait|drop`,
    `int|auto`."""
    default: str
    """The default as it is typed on the command line."""
    choices: tuple[str, ...]
    """The allowed words (for `max_staleness`, in addition to a number); empty for a field without choices."""
    text: str
    """The field's docstring on one line."""


def all_keys() -> list[Setting]:
    """Every setting in the order of the dataclasses.

    An open section (task, objective, advantage) is one entry.
    """
    return _settings_of(Config, section="")


def choices() -> dict[str, list[str]]:
    """Section -> names of its presets, which `section=name` accepts."""
    return {section: presets(section) for section in (*GROUPS, SCALE)}


def help_text(*, width: int, everything: bool) -> str:
    """The settings in the help of `areal-like run`: presets and settings in lines of `width` columns.

    It has only the settings in COMMON unless `everything`.
    """
    lines = ["presets:"]
    for preset, names in choices().items():
        first, *others = textwrap.wrap(" | ".join(names), width=width - 4 - len(preset))
        lines += [f"  {preset}={first}", *(" " * (3 + len(preset)) + line for line in others)]
    lines.append("  task._target_=my_module.MyTask: a class of your own (objective and advantage alike)")
    section = None
    for setting in all_keys():
        if not everything and setting.key not in COMMON:
            continue
        if setting.section != section:
            section = setting.section
            lines.append("")
        name = f"  {setting.key}={setting.default}".ljust(_NAME_COLUMNS - 1)
        allowed = f" [{setting.type}]" if setting.choices else ""
        lines += textwrap.wrap(
            f"{name} {setting.text}{allowed}",
            width=width,
            subsequent_indent=" " * _NAME_COLUMNS,
            break_on_hyphens=False,
        )
    own = (
        "Settings of a task, objective or advantage are the fields of its class: "
        "objective.cap=8 (docs/reference/objectives.md)."
    )
    lines += ["", own if everything else "run --help-all shows every key."]
    return "\n".join(lines) + "\n"


def _settings_of(cls: type, *, section: str) -> list[Setting]:
    texts, hints = field_texts(cls), typing.get_type_hints(cls)
    settings = []
    for field in dataclasses.fields(cls):
        key = f"{section}.{field.name}".lstrip(".")
        default: Any = field.default_factory() if callable(field.default_factory) else field.default
        if dataclasses.is_dataclass(default):
            settings += _settings_of(type(default), section=key)
            continue
        settings.append(
            Setting(
                key=key,
                section=section,
                type=_type_text(hints[field.name]),
                default=default["name"] if key in OPEN_SECTIONS else _as_typed(default),
                choices=choices_of(hints[field.name]),
                text=texts.get(field.name, ""),
            )
        )
    return settings


def _type_text(hint: Any) -> str:
    if choices := choices_of(hint):
        others = [member.__name__ for member in members_of(hint) if isinstance(member, type)]
        return "|".join([*others, *choices])
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _as_typed(value: object) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{item}' for key, item in value.items())}}}"
    if isinstance(value, (tuple, list)):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
