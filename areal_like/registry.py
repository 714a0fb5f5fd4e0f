"""Builds an object (an objective, a mask, a task) from an open section of the configuration.

A section has `name` or `_target_`, and settings. A registered class is a frozen keyword-only dataclass: its
fields are its settings; an unknown setting, or a value outside the choices of a `Literal` field, raises a
ConfigError that names it. A `_target_` is the dotted path of any class and needs no registration. A class may
also be registered by such a path; it is then imported only when it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from areal_like.config.common import as_float, check_choice, fits, members_of
from areal_like.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name, for one section of the configuration."""

    def __init__(self, section: str, base: type[T], *, elsewhere: Mapping[str, str] | None = None) -> None:
        """`elsewhere`: name -> dotted path, for classes that are registered without being imported."""
        self._section = section
        self._base = base
        self._elsewhere = dict(elsewhere or {})
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that registers the class under `name`."""

        def add(cls: type[T]) -> type[T]:
            assert name not in self._classes, f"{self._section} {name} is registered twice"
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        return sorted([*self._classes, *self._elsewhere])

    def build(self, settings: Mapping[str, Any], *, job: Mapping[str, Any] | None = None) -> T:
        """The object that a section describes.

        `job`: values from the rest of the job (`max_tokens`). They fill settings of the same name that the
        section leaves out. Raises ConfigError for an unknown name or setting, listing the known ones.
        """
        values = dict(settings)
        name, target = values.pop("name", None), values.pop("_target_", None)
        if (name is None) == (target is None):
            raise ConfigError(f"{self._section}: give either `name` or `_target_`")
        cls = self._named(str(name)) if target is None else self._import(str(target))
        # A field cannot have the name of a method (`reward` of a task).
        fields: Mapping[str, str] = getattr(cls, "fields_of_settings", {})
        values = {fields.get(key, key): value for key, value in values.items()}
        known = inspect.signature(cls).parameters
        values = {name: value for name, value in (job or {}).items() if name in known} | values
        values = self._checked(cls, values)
        try:
            return cls(**values)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:  # a user's class may raise either
            raise ConfigError(f"{self._section} {name or target}: {error}") from error

    def build_list(self, settings: Any, *, job: Mapping[str, Any] | None = None) -> tuple[T, ...]:
        """The objects that a list of sections describes; empty for None. Raises ConfigError."""
        if settings is None:
            return ()
        well_formed = isinstance(settings, Sequence) and all(
            isinstance(one, Mapping) and ("name" in one) != ("_target_" in one) for one in settings
        )
        if not well_formed:
            names = ", ".join(self.names())
            raise ConfigError(
                f"{self._section}: want a list of mappings, each with `name` ({names}) or `_target_`, "
                f"got {settings!r}"
            )
        return tuple(self._build_one(one, job) for one in settings)

    def _build_one(self, settings: Mapping[str, Any], job: Mapping[str, Any] | None) -> T:
        """An object of a list; an error names it, because several may have the same setting."""
        try:
            return self.build(settings, job=job)
        except ConfigError as error:
            name = settings.get("name", settings.get("_target_"))
            raise ConfigError(str(error) if str(name) in str(error) else f"{name}: {error}") from error

    def _named(self, name: str) -> type[T]:
        if name in self._elsewhere:
            return self._import(self._elsewhere[name])
        if name not in self._classes:
            raise ConfigError(
                f"{self._section}.name={name}: choose one of {', '.join(self.names())}; "
                f"for your own class write {self._section}._target_=my_module.MyClass"
            )
        return self._classes[name]

    def _import(self, target: str) -> type[T]:
        key = f"{self._section}._target_={target}"
        cls = named_object(target, key=key)
        if not (inspect.isclass(cls) and issubclass(cls, self._base)):
            raise ConfigError(f"{key}: not a subclass of {self._base.__module__}.{self._base.__name__}")
        return cls

    def _checked(self, cls: type[T], values: dict[str, Any]) -> dict[str, Any]:
        parameters = inspect.signature(cls).parameters.values()
        known = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        for key, value in values.items():
            path = f"{self._section}.{key}"
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = (
                    f"did you mean {near[0]}?" if near else f"its settings are {', '.join(known) or 'none'}"
                )
                raise ConfigError(f"unknown key `{path}` of {cls.__name__}: {hint}")
            values[key] = _coerced(hints.get(key), value, path=path)
        missing = [name for name, p in known.items() if p.default is p.empty and name not in values]
        if missing:
            raise ConfigError(f"{self._section}: {cls.__name__} needs {', '.join(missing)}")
        return values


def named_object(path: str, *, key: str, form: str = "module.Class") -> Any:
    """Returns the object at a dotted path. Raises ConfigError that begins with `key`. `form`: how to write
    such a path."""
    module_name, _, attribute = path.rpartition(".")
    if not module_name or not all(path.split(".")):
        raise ConfigError(f"{key}: write {form}")
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"{key}: {error}; it must be importable from the directory the job starts in"
        ) from error
    if found is None:
        raise ConfigError(f"{key}: module {module_name} has no {attribute}")
    return found


def _coerced(hint: Any, value: Any, *, path: str) -> Any:
    if hint is float:
        return as_float(value, key=path)
    if hint in (int, bool, str) and type(value) is not hint:
        raise ConfigError(f"{path}: want {hint.__name__}, got {value!r}")
    value = _as_member(members_of(hint), value)
    check_choice(hint, value, key=path)
    return value


def _as_member(members: tuple[Any, ...], value: Any) -> Any:
    """`value` as a float if the union has a float and no other member that fits; else unchanged."""
    if any(fits(member, value) for member in members if member is not float):
        return value
    if float in members:
        with contextlib.suppress(ConfigError):
            return as_float(value, key="")
    return value
