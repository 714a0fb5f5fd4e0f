"""The JSON schema of a server's tool: what of it is accepted, and the check of a call's arguments against it.

A server's schema is untrusted. Its size and depth are bounded, and references may only point into the schema
itself, so nothing is fetched. Arguments are checked by jsonschema with a bound on the work, because a small
schema can ask for exponential work (references that double). Some keywords are shown to the policy, and the
server has to check them: `pattern` and `patternProperties` (a regular expression can take exponential time),
`uniqueItems` (quadratic time), and `unevaluatedProperties` and `unevaluatedItems` (which follow all others).
Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import jsonschema
import jsonschema_specifications
import referencing
from jsonschema.validators import extend, validator_for
from referencing.jsonschema import specification_with

from areal_like.errors import ToolError, ToolServerError

MAX_ARGUMENT_DEPTH = 32
_MAX_WORK = 100_000
"""Keywords that one check may evaluate, each counted with the length of its value and of what it checks."""
_WORK_OF_REFERENCE = 50
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
_UNCHECKED = ("pattern", "patternProperties", "uniqueItems", "unevaluatedProperties", "unevaluatedItems")
_MAX_SHOWN_CHARS = 200


class ArgumentCheck:
    """Checks the arguments of one tool's calls."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        """Raises ToolServerError if this is no JSON schema of an object."""
        named = schema.get("$schema")
        draft = validator_for(
            {"$schema": named} if isinstance(named, str) else {}, jsonschema.Draft202012Validator
        )
        # jsonschema's own check of a schema compares each two objects of a list that wants different values.
        checker = extend(draft, {"uniqueItems": _unique_items})(
            _plain(draft.META_SCHEMA),
            format_checker=jsonschema.FormatChecker(formats=()),
            registry=_metaschemas(),
        )
        try:
            wrong = next(checker.iter_errors(schema), None)
        except RecursionError:
            raise ToolServerError("is nested too deep") from None
        if wrong is not None:
            raise ToolServerError(f"is no JSON schema: {_shown(wrong)}")
        if schema.get("type") != "object":
            raise ToolServerError('has no "type": "object"')
        self._work_left = 0
        counted = {name: self._counted(name, check) for name, check in draft.VALIDATORS.items()}
        # A validator follows `$schema` in subschemas to a class without the bounds of this one.
        self._validator = extend(draft, counted)(_without_drafts(schema), registry=referencing.Registry())

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raises ToolError, for the policy, if the arguments do not match the schema."""
        if depth_of(arguments) > MAX_ARGUMENT_DEPTH:
            raise ToolError(f"the arguments are nested more than {MAX_ARGUMENT_DEPTH} deep")
        self._work_left = _MAX_WORK
        try:
            error = next(self._validator.iter_errors(arguments), None)
        except _TooMuchWorkError:
            raise ToolError("the arguments take too much work to check against the tool's schema") from None
        # RecursionError: a schema that refers to itself. Others: references to nothing, numbers too large.
        except (RecursionError, referencing.exceptions.Unresolvable, ArithmeticError, ValueError) as problem:
            name = type(problem).__name__
            raise ToolError(f"the tool's schema cannot be used to check the arguments ({name})") from None
        if error is not None:
            raise ToolError(f"the arguments do not match the tool's schema: {_shown(error)}")

    def _counted(self, name: str, check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
            work = _WORK_OF_REFERENCE if name in _REFERENCES else 1
            self._work_left -= work + _length(value) + _length(instance)
            if self._work_left < 0:
                raise _TooMuchWorkError
            if name in _UNCHECKED or (name == "additionalProperties" and "patternProperties" in schema):
                return
            yield from check(validator, value, instance, schema) or ()

        return counted


@lru_cache(maxsize=1)
def _metaschemas() -> referencing.Registry[Any]:
    """The schemas of schemas without `$schema`, with which a validator takes jsonschema's own class."""
    known = ((uri, resource.contents) for uri, resource in jsonschema_specifications.REGISTRY.items())
    resources = (
        (uri, specification_with(meta["$schema"]).create_resource(_plain(meta))) for uri, meta in known
    )
    # Crawled, because anchors are found in the registry, where those of jsonschema's own would stay.
    return referencing.Registry().with_resources(resources).crawl()


def _plain(metaschema: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metaschema.items() if name != "$schema"}


def _unique_items(_: Any, is_wanted: Any, instance: Any, __: Any) -> Iterator[jsonschema.ValidationError]:
    """`uniqueItems` in linear time, except that 1 and 1.0 differ."""
    values = instance if is_wanted and isinstance(instance, list) else []
    if len({json.dumps(one, sort_keys=True) for one in values}) < len(values):
        yield jsonschema.ValidationError("a list has the same value twice")


class _TooMuchWorkError(Exception):
    """A check has used its work."""


def accepted(schema: Any, *, max_bytes: int, max_depth: int) -> ArgumentCheck:
    """Returns the check for a server's schema. Raises ToolServerError, which says what is wrong with it."""
    if not isinstance(schema, dict):
        raise ToolServerError("is no JSON object")
    if depth_of(schema) > max_depth:
        raise ToolServerError(f"is nested more than max_schema_depth={max_depth} deep")
    try:
        text = json.dumps(schema, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError):
        raise ToolServerError("is not JSON") from None
    if len(text) > max_bytes:
        raise ToolServerError(f"has {len(text)} bytes: more than max_schema_bytes={max_bytes}")
    return _check_of(text)


@lru_cache(maxsize=256)
def _check_of(text: str) -> ArgumentCheck:
    """The same schemas come in each episode, and checking one takes milliseconds."""
    schema = json.loads(text)
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise ToolServerError(f"refers to {reference!r:.80}: references may only point into the schema")
    return ArgumentCheck(schema)


def depth_of(value: Any) -> int:
    """Returns how deep objects and arrays are nested: 0 for a number or a text."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [one for part in level for one in (part.values() if isinstance(part, dict) else part)]
    return depth


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name in _REFERENCES:
            if isinstance(value.get(name), str):
                yield value[name]
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _references(part)


def _without_drafts(value: Any) -> Any:
    """Returns the schema without texts under `$schema`."""
    if isinstance(value, list):
        return [_without_drafts(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_drafts(part)
        for name, part in value.items()
        if not (name == "$schema" and isinstance(part, str))
    }


def _length(value: Any) -> int:
    return len(value) if isinstance(value, dict | list) else 0


def _shown(error: Any) -> str:
    path = "" if error.json_path == "$" else f"{error.json_path}: "
    return f"{path}{error.message}"[:_MAX_SHOWN_CHARS]
