"""Converts a parameter's type hint to a JSON schema, and to a check of arguments.

Supported: str, int, float, bool, Literal, list, dict with text keys, None in a union, unions of these, and
Any. Each is a small class with both, so that the schema shown to the policy and the check of its arguments
cannot differ. Values are not converted, except for a whole number written as `3.0`, or given for a float.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from areal_like.errors import ConfigError, ToolError

_MAX_SHOWN_CHARS = 80
"""Maximum length at which a wrong value is quoted."""


class Kind(Protocol):
    """The set of values that a parameter accepts."""

    @property
    def schema(self) -> dict[str, Any]:
        """Returns the JSON schema."""

    def check(self, value: Any, name: str) -> Any:
        """Returns the value as passed to the function. Raises ToolError that says what is wrong with
        `name`."""


def kind_of(hint: Any) -> Kind:
    """Returns the kind for a type hint. Raises ConfigError if it is not supported."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and hint in _SCALARS:
        return _SCALARS[hint]
    if hint is Any:
        return _Anything()
    if origin is Literal:
        return _Choice(arguments)
    if hint is list or origin in (list, Sequence):
        return _List(kind_of(arguments[0]) if arguments else _Anything())
    if hint is dict or origin in (dict, Mapping):
        if arguments and arguments[0] is not str:
            raise ConfigError(f"{_written(hint)}: the keys of a JSON object are str")
        return _Object(kind_of(arguments[1]) if arguments else _Anything())
    if origin in (typing.Union, types.UnionType):
        return _Union(tuple(kind_of(member) for member in arguments))
    raise ConfigError(
        f"{_written(hint)} is not supported: use str, int, float, bool, Literal, list[...], dict[str, ...] "
        "or a union of these"
    )


@dataclass(frozen=True)
class _Scalar:
    python: type
    json: str
    words: str

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": self.json}

    def check(self, value: Any, name: str) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if self.python is float and is_number:
            try:
                return float(value)
            except OverflowError:
                raise _mismatch(name, "a number below 1e308", value) from None
        if self.python is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if type(value) is not self.python:
            raise _mismatch(name, self.words, value)
        return value


_SCALARS: dict[Any, Kind] = {
    str: _Scalar(str, "string", "a string"),
    int: _Scalar(int, "integer", "an integer"),
    float: _Scalar(float, "number", "a number"),
    bool: _Scalar(bool, "boolean", "true or false"),
    type(None): _Scalar(type(None), "null", "null"),
}


@dataclass(frozen=True)
class _Anything:
    @property
    def schema(self) -> dict[str, Any]:
        return {}

    def check(self, value: Any, name: str) -> Any:
        return value


@dataclass(frozen=True)
class _Choice:
    choices: tuple[Any, ...]

    @property
    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.choices)}

    def check(self, value: Any, name: str) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in self.choices):
            raise _mismatch(name, f"one of {', '.join(map(repr, self.choices))}", value)
        return value


@dataclass(frozen=True)
class _List:
    item: Kind

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.item.schema}

    def check(self, value: Any, name: str) -> Any:
        if not isinstance(value, list):
            raise _mismatch(name, "an array", value)
        return [self.item.check(item, f"{name}[{place}]") for place, item in enumerate(value)]


@dataclass(frozen=True)
class _Object:
    item: Kind

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.item.schema}

    def check(self, value: Any, name: str) -> Any:
        if not isinstance(value, dict):
            raise _mismatch(name, "an object", value)
        return {key: self.item.check(item, f"{name}.{key:.40}") for key, item in value.items()}


@dataclass(frozen=True)
class _Union:
    members: tuple[Kind, ...]

    @property
    def schema(self) -> dict[str, Any]:
        return {"anyOf": [member.schema for member in self.members]}

    def check(self, value: Any, name: str) -> Any:
        problems = []
        for member in self.members:
            try:
                return member.check(value, name)
            except ToolError as problem:
                problems.append(str(problem))
        raise ToolError("; or ".join(problems))


def _mismatch(name: str, wanted: str, value: Any) -> ToolError:
    text = repr(value)
    shown = text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
    return ToolError(f"argument {name}: want {wanted}, got {shown}")


def _written(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
