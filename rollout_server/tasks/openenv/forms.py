"""What an OpenEnv environment takes and says: the form of its actions, its observations as text, its tools.

A server's schemas and observations are untrusted. Pure.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from areal_like.errors import ConfigError, EpisodeError, ToolError
from rollout_server.tools.tool import TOOL_NAME

_NOT_SHOWN = ("done", "reward", "metadata")
_MCP_ACTIONS = ("call_tool", "list_tools")
_KINDS = ("string", "integer", "number")
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_MAX_TOOLS = 64
_MAX_SCHEMA_BYTES = 16384
_MAX_DESCRIPTION_CHARS = 4096
_MAX_DEPTH = 4
"""Of references and alternatives in the schema of one field of an action."""


class UnusableError(EpisodeError):
    """What a server sent cannot be used; the message says why."""


Kind = Literal["string", "integer", "number"]


@dataclass(frozen=True, kw_only=True)
class ActionForm:
    """How a reply becomes an action: one field has its text, the others are always the same."""

    field: str
    kind: Kind
    others: Mapping[str, Any]

    def action_of(self, text: str) -> dict[str, Any]:
        """Raises ToolError, for the policy, if the text is no value of the field."""
        return {**self.others, self.field: self._value_of(text)}

    def _value_of(self, text: str) -> str | int | float:
        if self.kind == "string":
            return text
        if _INTEGER.fullmatch(text):
            return int(text)
        if self.kind == "integer":
            raise ToolError("reply with one whole number, and nothing else")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ToolError("reply with one number, and nothing else")
        return value


def action_form(schema: Any, *, field: str, others: Mapping[str, Any]) -> ActionForm | None:
    """Returns the form for a server's schema of actions; None: its actions are calls of tools.

    `field`: `task.action_field`. `others`: `task.action`. Raises ConfigError if they do not fit, and
    UnusableError for something that is no schema of an object.
    """
    if not isinstance(schema, dict) or not isinstance(properties := schema.get("properties"), dict):
        raise UnusableError("its schema of actions describes no object")
    names = [name for name in properties if name != "metadata"]
    kind_of_action = properties.get("type")
    if not names or (isinstance(kind_of_action, dict) and kind_of_action.get("const") in _MCP_ACTIONS):
        if field or others:
            raise ConfigError("its actions are calls of tools: leave out task.action_field and task.action")
        return None
    listed = ", ".join(names)
    if unknown := sorted({*others, *filter(None, [field])} - set(properties)):
        raise ConfigError(f"an action has no field {', '.join(unknown)}; its fields: {listed:.300}")
    kinds = {name: _kind_of(properties[name], schema) for name in names if name not in others}
    if not field:
        texts = [name for name, kind in kinds.items() if kind == "string"]
        if len(texts) != 1 and len(kinds) != 1:
            raise ConfigError(
                f"an action has {len(texts)} fields with text: name the one for the policy's reply in "
                f"task.action_field, and the values of others in task.action. Its fields: {listed:.300}"
            )
        field = texts[0] if len(texts) == 1 else next(iter(kinds))
    kind = kinds.get(field)
    if kind is None:
        raise ConfigError(f"task.action_field: {field} is no text and no number, or is in task.action too")
    required = schema.get("required")
    missing = set(required if isinstance(required, list) else ()) - {field, *others}
    if missing:
        raise ConfigError(
            f"an action needs {', '.join(sorted(map(str, missing))):.300}, too: set task.action"
        )
    return ActionForm(field=field, kind=kind, others=dict(others))


def _kind_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Kind | None:
    """Returns what a field's values are: text before numbers. None: neither."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return None
    if schema.get("type") in _KINDS:
        kind: Kind = schema["type"]
        return kind
    parts = [part for name in ("anyOf", "allOf", "oneOf") for part in _list(schema.get(name))]
    reference = schema.get("$ref")
    definitions = root.get("$defs")
    if isinstance(reference, str) and isinstance(definitions, dict):
        parts.append(definitions.get(reference.removeprefix("#/$defs/")))
    found = {_kind_of(part, root, depth + 1) for part in parts[:16]}
    return next((kind for kind in ("string", "number", "integer") if kind in found), None)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def observation_text(observed: Mapping[str, Any], *, fields: Sequence[str], max_chars: int) -> str:
    """Returns the fields of an observation as text. `fields`: which; empty: all.

    A single field is only its value; with several each is a line with its name. Empty ones are left out.
    """
    names = list(fields) or [name for name in observed if name not in _NOT_SHOWN]
    values = {name: observed.get(name) for name in names}
    texts = {name: _text(value) for name, value in values.items() if value is not None and value != ""}
    if len(names) == 1:
        text = "".join(texts.values())
    else:
        text = "\n".join(f"{name}: {value}" for name, value in texts.items())
    if len(text) > max_chars:
        text = f"{text[:max_chars]}\n[cut: {max_chars} of {len(text)} characters]"
    # A server can write half of a surrogate pair as \ud800.
    return text.encode(errors="replace").decode() or "(no observation)"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise UnusableError("an observation is nested too deep") from None


@dataclass(frozen=True, kw_only=True)
class ListedTool:
    """What a server says about a tool."""

    name: str
    description: str
    input_schema: Mapping[str, Any]


def listed_tools(observed: Mapping[str, Any], *, chosen: Sequence[str]) -> list[ListedTool]:
    """Returns the tools in the response to `list_tools`. `chosen`: `task.tools`; empty: all.

    Raises ConfigError for a chosen tool that does not exist, and UnusableError.
    """
    listed = [tool for tool in _list(observed.get("tools")) if isinstance(tool, dict)]
    tools = [tool for tool in listed if not chosen or tool.get("name") in chosen]
    if missing := sorted(set(chosen) - {str(tool.get("name")) for tool in tools}):
        names = ", ".join(str(tool.get("name")) for tool in listed)
        raise ConfigError(f"task.tools: there is no tool {', '.join(missing)}; its tools: {names:.300}")
    if not tools or len(tools) > _MAX_TOOLS:
        raise UnusableError(f"it lists {len(tools)} tools: want 1 to {_MAX_TOOLS}")
    return [_listed(tool) for tool in tools]


def _listed(tool: Mapping[str, Any]) -> ListedTool:
    name, description = tool.get("name"), tool.get("description") or ""
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise UnusableError(f"the name of its tool {name!r:.100} may have only letters, digits, _ and -")
    if not isinstance(description, str) or len(description) > _MAX_DESCRIPTION_CHARS:
        raise UnusableError(
            f"the description of its tool {name} is no text of at most {_MAX_DESCRIPTION_CHARS} characters"
        )
    # Servers with some versions of MCP's SDK list tools without their schemas.
    schema = tool.get("input_schema") or {"type": "object", "properties": {}}
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise UnusableError(f'the schema of its tool {name} has no "type": "object"')
    if len(_text(schema)) > _MAX_SCHEMA_BYTES:
        raise UnusableError(f"the schema of its tool {name} has more than {_MAX_SCHEMA_BYTES} characters")
    return ListedTool(
        name=name, description=description.encode(errors="replace").decode(), input_schema=schema
    )


def result_text(observed: Mapping[str, Any], *, fields: Sequence[str], max_chars: int) -> str:
    """Returns what the policy reads after a call. Raises ToolError if the call failed.

    `fields`: of an observation that is not the usual one of a call.
    """
    if "tool_name" not in observed:
        return observation_text(observed, fields=fields, max_chars=max_chars)
    if isinstance(error := observed.get("error"), dict):
        raise ToolError(str(error.get("message", "the tool failed")))
    result = observed.get("result")
    if not isinstance(result, dict) or not isinstance(result.get("content"), list):
        return observation_text({"result": result}, fields=(), max_chars=max_chars)
    blocks = [block for block in result["content"] if isinstance(block, dict)]
    if others := sorted({str(block.get("type")) for block in blocks if block.get("type") != "text"}):
        raise ToolError(f"the result has content of type {', '.join(others):.100}; only text is supported")
    text = "\n".join(str(block.get("text", "")) for block in blocks)
    if not blocks and result.get("structured_content") is not None:
        text = _text(result["structured_content"])
    if result.get("is_error"):
        raise ToolError(text or "the tool failed")
    return observation_text({"text": text}, fields=(), max_chars=max_chars)
