"""The base class of every section of the configuration, and the checks that sections share."""

from __future__ import annotations

import difflib
import re
import types
import typing
from typing import Any, ClassVar, Literal

from areal_like.errors import ConfigError

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


class Section:
    """Base of the frozen dataclasses: checks the choices of `Literal` fields, then calls `check`.

        class BufferConfig(Section, key="buffer"):
            durability: Literal["power_loss", "process_crash", "none"] = "process_crash"

    The annotation is the only list of the choices. The checks run in the constructor, so they also apply to
    objects that the loader did not build.
    """

    key: ClassVar[str] = ""
    """Dotted path of the section in the configuration; empty for the root."""

    def __init_subclass__(cls, *, key: str = "") -> None:
        cls.key = key

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that is not among the choices of its field, then calls `check`."""
        for name, annotation in typing.get_type_hints(type(self)).items():
            check_choice(annotation, getattr(self, name), key=f"{self.key}.{name}".lstrip("."))
        self.check()

    def check(self) -> None:
        """Checks ranges and rules over several fields. Raises ConfigError with the necessary change."""


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; only the annotation itself if it is not a union."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The strings that a `Literal` in the annotation (or in its union) allows; empty without a `Literal`."""
    literals = [member for member in members_of(annotation) if typing.get_origin(member) is Literal]
    return tuple(choice for literal in literals for choice in typing.get_args(literal))


def check_choice(annotation: Any, value: Any, *, key: str) -> None:
    """Raises ConfigError unless `value` is one of the choices, or has another type of the annotation's union.

    Does nothing for an annotation without a `Literal`.
    """
    choices = choices_of(annotation)
    others = [member for member in members_of(annotation) if typing.get_origin(member) is not Literal]
    if not choices or type(value) in others or (isinstance(value, str) and value in choices):
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    names = [*(_TYPE_NAMES.get(other, str(other)) for other in others), *choices]
    listed = f"one of {', '.join(names)}" if len(names) > 2 else " or ".join(names)
    raise ConfigError(f"{key}={'' if value is None else value}: {hint}use {listed}")


def require(ok: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def check_device(device: str, *, key: str) -> None:
    """Raises ConfigError unless `device` is `cpu`, `cuda` or `cuda:N`."""
    require(re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None, f"{key}={device}: use cpu, cuda or cuda:N")
