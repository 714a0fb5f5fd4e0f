"""The base class of every section of the configuration, and the checks that sections share."""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import inspect
import itertools
import math
import re
import types
import typing
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from areal_like.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Names of jobs, runs and daemons."""
NAME_RULE = "use 1 to 64 of the characters A-Z a-z 0-9 . _ -"
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}
_YAML_TYPES = (bool, int, float, str, type(None), list, dict)
"""Types of the values in a configuration."""


class Bounds(NamedTuple):
    """The range of a field's values, stated in its annotation."""

    low: float
    high: float = math.inf
    excludes_low: bool = False
    """True: the value must be greater than `low`."""
    excludes_high: bool = False
    """True, only together with `excludes_low`: the value must be less than `high`."""

    def check(self, value: Any, *, key: str) -> None:
        """Raises ConfigError unless the value is in the range; NaN is in none."""
        low, high, above, below = self
        is_high_enough = value > low or (value == low and not above)
        if is_high_enough and (value < high or (value == high and not below)):
            return
        if high == math.inf:
            raise ConfigError(f"{key} must be {'above' if above else 'at least'} {low}, not {value}")
        words = f"{low:.12g} to {high:.12g}"
        if above:
            words = f"a number {f'between {low} and' if below else f'above {low} and at most'} {high:.12g}"
        raise ConfigError(f"{key}={value}: use {words}")


PositiveInt = Annotated[int, Bounds(1)]
NonNegativeInt = Annotated[int, Bounds(0)]
PositiveFloat = Annotated[float, Bounds(0, excludes_low=True)]
NonNegativeFloat = Annotated[float, Bounds(0)]
Fraction = Annotated[float, Bounds(0, 1)]


class Section:
    """Base of the frozen dataclasses: checks bounds and the choices of `Literal` fields, then calls `check`.

        class BufferConfig(Section, key="buffer"):
            durability: Literal["power_loss", "process_crash", "none"] = "process_crash"
            max_peers: PositiveInt = 1024

    The annotation alone states choices and bounds. The checks run in the constructor, so they also apply to
    objects that the loader did not build.
    """

    key: ClassVar[str] = ""
    """Dotted path of the section in the configuration; empty for the root."""

    def __init_subclass__(cls, *, key: str | None = None) -> None:
        if key is not None:  # else that of the base class
            cls.key = key

    def __post_init__(self) -> None:
        """Raises ConfigError for a value outside the choices or bounds of its field, then calls `check`."""
        section: type = type(self)
        for name, annotation in _checked_fields(section):
            key, value = f"{self.key}.{name}".lstrip("."), getattr(self, name)
            check_choice(annotation, value, key=key)
            for bounds in getattr(annotation, "__metadata__", ()):
                bounds.check(value, key=key)
        self.check()

    def check(self) -> None:
        """Checks ranges and rules over several fields. Raises ConfigError that says what to change."""


@functools.cache
def _checked_fields(section: type) -> tuple[tuple[str, Any], ...]:
    """Names and annotations of the fields with choices or bounds.

    Another attribute of a section may be a property, or not be set yet.
    """
    hints = typing.get_type_hints(section, include_extras=True)
    return tuple(
        (name, hint) for name, hint in hints.items() if choices_of(hint) or hasattr(hint, "__metadata__")
    )


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union; only the annotation itself if it is not a union."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """The values that a `Literal` in the annotation (or in its union) allows; empty without a `Literal`."""
    literals = [member for member in members_of(annotation) if typing.get_origin(member) is Literal]
    return tuple(choice for literal in literals for choice in typing.get_args(literal))


@functools.cache
def field_texts(cls: type) -> dict[str, str]:
    """Field name -> its docstring on one line, for the fields of a dataclass and of its bases.

    Python does not keep these docstrings at run time, so they are parsed from the source.
    """
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (body,) = [
            node.body for node in ast.parse(inspect.getsource(base)).body if isinstance(node, ast.ClassDef)
        ]
        for node, following in itertools.pairwise(body):
            match node, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts


def fits(member: Any, value: Any) -> bool:
    """True if `value` is one of the choices of a `Literal`, or has the type of another member of a union.

    An int fits a float, a bool neither of them; a list fits a tuple, which YAML does not have. Only the outer
    type of a generic is compared: every list fits `list[int]`. A type that no value in a configuration has
    (`Path`) cannot be checked: every value fits it.
    """
    kind = typing.get_origin(member) or member
    if kind is Literal:
        # True == 1, but a bool is not a choice of Literal[1].
        choices = [c for c in typing.get_args(member) if isinstance(c, bool) == isinstance(value, bool)]
        return any(isinstance(value, type(choice)) and value == choice for choice in choices)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is tuple:
        return isinstance(value, (tuple, list))
    try:
        return isinstance(value, kind) or not any(issubclass(known, kind) for known in _YAML_TYPES)
    except TypeError:  # not a class that isinstance accepts, e.g. Any or a TypedDict
        return True


def check_choice(annotation: Any, value: Any, *, key: str) -> None:
    """Raises ConfigError unless `value` is one of the choices, or has another type of the annotation's union.

    Does nothing for an annotation without a `Literal`.
    """
    members = members_of(annotation)
    choices = [_as_typed(choice) for choice in choices_of(annotation)]
    if not choices or any(fits(member, value) for member in members):
        return
    others = [member for member in members if typing.get_origin(member) is not Literal]
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    names = [*(_TYPE_NAMES.get(other, str(other)) for other in others), *choices]
    listed = f"one of {', '.join(names)}" if len(names) > 2 else " or ".join(names)
    raise ConfigError(f"{key}={'' if value is None else value}: {hint}use {listed}")


def _as_typed(choice: Any) -> str:
    """A choice as it is typed on the command line."""
    if choice is None:
        return "null"
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def as_float(value: Any, *, key: str) -> float:
    """The value as a float; YAML 1.1 reads a number written as `1e-3` as text. Raises ConfigError."""
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    raise ConfigError(f"{key}: want a number, got {value!r}")


def require(ok: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def check_device(device: str, *, key: str) -> None:
    """Raises ConfigError unless `device` is `cpu`, `cuda` or `cuda:N`."""
    require(re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None, f"{key}={device}: use cpu, cuda or cuda:N")
