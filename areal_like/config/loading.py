"""Converts plain dicts to the configuration's dataclasses and back.

An unknown key raises an error that suggests the nearest field name. A value is converted only where YAML or a
shell cannot express the field's type: a number in quotes, `1e-4` (a string in YAML 1.1), a list for a tuple,
null for an empty string.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from areal_like.config.common import as_float, check_choice, members_of, require
from areal_like.config.job import Config
from areal_like.errors import ConfigError

T = TypeVar("T")


def from_mapping(raw: dict[str, Any]) -> Config:
    """Builds the configuration from plain dicts. Raises as `build` does."""
    return build(Config, raw)


def to_mapping(config: Config) -> dict[str, Any]:
    """The inverse of `from_mapping`: plain dicts and lists, ready for YAML or JSON."""
    plain = _lists_for_tuples(dataclasses.asdict(config))
    assert isinstance(plain, dict)
    return plain


def _lists_for_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_for_tuples(item) for key, item in value.items()}
    return [_lists_for_tuples(item) for item in value] if isinstance(value, (tuple, list)) else value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as text, for lists of settings and of their changes."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def build(cls: type[T], raw: Any, *, path: str = "") -> T:
    """Builds a dataclass from plain dicts. `path`: prefix of its keys in messages, with a dot at its end.

    Raises ConfigError for unknown keys and wrong types or values.
    """
    require(isinstance(raw, dict), f"{path.rstrip('.') or 'config'}: want a mapping, got {raw!r}")
    section: type = cls
    hints = _hints_of(section)
    values = {}
    for key, value in raw.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean `{path}{near[0]}`?" if near else f"known keys: {', '.join(hints)}"
            raise ConfigError(f"unknown key `{path}{key}`: {hint}")
        values[key] = _convert(hints[key], value, path=f"{path}{key}")
    return cls(**values)


@functools.cache
def _hints_of(cls: type) -> dict[str, Any]:
    """Field of a dataclass -> its type."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(typing.cast(Any, cls))}


def _convert(hint: Any, value: Any, *, path: str) -> Any:
    """`value` in the type of the annotation `hint`. Raises ConfigError when it does not fit."""
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, path=f"{path}.")
    origin = typing.get_origin(hint)
    if origin is dict:
        require(isinstance(value, dict), f"{path}: want a mapping, got {value!r}")
        item = typing.get_args(hint)[1]
        if dataclasses.is_dataclass(item):  # sections by name, which are part of the keys
            return {str(key): _convert(item, one, path=f"{path}.{key}") for key, one in value.items()}
        return dict(value)
    if origin is tuple:
        return _convert_tuple(hint, value, path=path)
    if origin is Literal:
        check_choice(hint, value, key=path)
        return value
    if len(members := members_of(hint)) > 1:
        return _convert_union(hint, members, value, path=path)
    return _convert_scalar(hint, value, path=path)


def _convert_tuple(hint: Any, value: Any, *, path: str) -> tuple[Any, ...]:
    args = typing.get_args(hint)
    if args[-1] is Ellipsis:
        require(isinstance(value, (list, tuple)), f"{path}: want a list such as [a, b], got {value!r}")
        args = (args[0],) * len(value)
    require(
        isinstance(value, (list, tuple)) and len(value) == len(args),
        f"{path}: want {len(args)} values, got {value!r}",
    )
    return tuple(_convert(arg, item, path=path) for arg, item in zip(args, value, strict=True))


def _convert_union(hint: Any, members: tuple[Any, ...], value: Any, *, path: str) -> Any:
    """`value` converted to the first member of the union that accepts it."""
    for member in members:
        try:
            return _convert(member, value, path=path)
        except ConfigError:
            continue
    check_choice(hint, value, key=path)
    raise ConfigError(f"{path}: want {hint}, got {value!r}")


def _convert_scalar(hint: type, value: Any, *, path: str) -> Any:
    if hint is float:
        return as_float(value, key=path)
    if hint is str and value is None:  # YAML reads `resume=` as null
        return ""
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    require(
        isinstance(value, hint) and not (hint is int and isinstance(value, bool)),
        f"{path}: want {hint.__name__}, got {value!r}",
    )
    return value
