"""Schemas of MCP servers: which are accepted, and what the check of arguments costs."""

from __future__ import annotations

from typing import Any

import pytest

from areal_like.errors import ToolError, ToolServerError
from rollout_server.tools.mcp.schemas import accepted, depth_of

DRAFT_7 = "http://json-schema.org/draft-07/schema#"
SLOW = "a" * 60 + "!"
"""A text that (a+)+$ takes longer than the age of the universe to refuse."""


def check(schema: dict[str, Any], arguments: Any) -> str:
    """What the policy reads about the arguments; empty if they are passed on."""
    try:
        accepted(schema, max_bytes=16384, max_depth=16).check(arguments)
    except ToolError as error:
        return str(error)
    return ""


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def doubling(times: int) -> dict[str, Any]:
    """A schema of which each part refers twice to the next."""
    parts: dict[str, Any] = {f"p{n}": {"allOf": [{"$ref": f"#/$defs/p{n + 1}"}] * 2} for n in range(times)}
    return {**of(a={"$ref": "#/$defs/p0"}), "$defs": {**parts, f"p{times}": {"type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "arguments", "problem"),
    [
        (of(a={"type": "integer"}), {"a": 1}, ""),
        (of(a={"type": "integer"}), {"a": "x"}, "$.a: 'x' is not of type 'integer'"),
        ({**of(), "required": ["a"]}, {}, "'a' is a required property"),
        ({**of(), "additionalProperties": False}, {"b": 1}, "'b' was unexpected"),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", **of(a={"const": 1})},
            {"a": 2},
            "1 was expected",
        ),
        (
            of(a={"$ref": "#/$defs/b"}) | {"$defs": {"b": {"type": "string"}}},
            {"a": 1},
            "is not of type 'string'",
        ),
        (of(a={"$ref": "#/nowhere"}), {"a": 1}, "the tool's schema cannot be used"),
        ({"type": "object", "$ref": "#"}, {}, "the tool's schema cannot be used"),
        (doubling(3), {"a": "x"}, ""),
        (doubling(40), {"a": "x"}, "take too much work"),
        (of(a={"type": "string", "pattern": "(a+)+$"}), {"a": SLOW}, ""),
        # A draft named in a part would choose a check without these bounds.
        (
            of(a={"$schema": "https://json-schema.org/draft/2020-12/schema", "pattern": "(a+)+$"}),
            {"a": SLOW},
            "",
        ),
        (
            {"type": "object", "patternProperties": {"(a+)+$": {}}, "additionalProperties": False},
            {"a" * 60 + "!": 1},
            "",
        ),
        (of(a={"uniqueItems": True}), {"a": [1, {}, "x"] * 5000}, ""),
        (of(a={"items": {"enum": list(range(2000))}}), {"a": [1] * 1000}, "take too much work"),
    ],
)
def test_the_check_of_arguments(schema: dict[str, Any], arguments: Any, problem: str) -> None:
    said = check(schema, arguments)
    assert problem in said and bool(problem) == bool(said)


def test_deep_arguments() -> None:
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    assert depth_of(deep) == 40 and depth_of({"a": [1], "b": 2}) == 2 and depth_of("x") == 0
    assert check(of(), {"a": deep}) == "the arguments are nested more than 32 deep"


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ([], "no JSON object"),
        ({"type": "array"}, 'no "type": "object"'),
        ({"type": "objekt"}, "no JSON schema"),
        ({"type": "object", "properties": 3}, "no JSON schema: $.properties"),
        ({"type": "object", "$schema": ["x"]}, "no JSON schema"),
        (of(a={"$ref": "http://127.0.0.1:9/x"}), "references may only point into the schema"),
        (of(a={"$dynamicRef": "other#x"}), "references may only point into the schema"),
        (of(a={"default": float("nan")}), "is not JSON"),
    ],
)
def test_refused_schemas(schema: Any, problem: str) -> None:
    with pytest.raises(ToolServerError) as refused:
        accepted(schema, max_bytes=16384, max_depth=16)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("draft", "keyword", "is_allowed"),
    [
        ("http://json-schema.org/draft-03/schema#", "enum", True),
        ("http://json-schema.org/draft-04/schema#", "enum", True),
        (DRAFT_7, "type", False),
        ("https://json-schema.org/draft/2019-09/schema", "type", False),
        ("https://json-schema.org/draft/2020-12/schema", "type", False),
    ],
)
def test_long_lists_of_objects_in_a_schema_take_linear_time(
    draft: str, keyword: str, is_allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """jsonschema compares each two objects of a list whose values are to differ."""
    monkeypatch.setattr("jsonschema._keywords.uniq", None)  # not called at all
    schema = {"$schema": draft, **of(a={keyword: [{"a": number} for number in range(1000)]})}
    if is_allowed:
        accepted(schema, max_bytes=1 << 20, max_depth=16)
        schema = {"$schema": draft, **of(a={keyword: [{"b": 1}, {"b": 1}]})}
    with pytest.raises(ToolServerError, match=rf"is no JSON schema: \$\.properties\.a\.{keyword}: "):
        accepted(schema, max_bytes=1 << 20, max_depth=16)
