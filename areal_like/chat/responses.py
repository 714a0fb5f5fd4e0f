"""OpenAI's Responses API: checks bodies, writes responses and the events of streams. Pure.

    body -> parse_responses -> ResponsesRequest: messages in the chat format, some of them references
    ChatReply -> response_body: one object, or the events of a stream
    messages -> input_items -> item_page: a page of the list of the items before a reply

A reply of the model is several items here: its reasoning, its text, and each of its tool calls. Adjacent
items of the assistant in a request are therefore one message again, so that a client that sends them back
continues its conversation. Ids of items contain the id of their response: a client may send an
`item_reference` instead of the item.

Source: the types of the `openai` package (openai/types/responses), and OpenAI's API reference, "Responses".
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_like.chat.openai import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ChatRules,
    RefusedFields,
    RequestOptions,
    parse_model,
    refuse_fields,
)
from areal_like.chat.reply import ChatReply
from areal_like.http.bodies import ParamError, flag, integer, one_of
from areal_like.http.streams import encode_event

MAX_METADATA = 16
_PAGE = 20
_LARGEST_PAGE = 100
_REFUSED: RefusedFields = {
    "background": ((False,), "the response is sent when the turn is complete"),
    "conversation": ((), "send the whole input, or previous_response_id"),
    "prompt": ((), "the server has no templates of prompts; send input"),
}
_IGNORED = (
    "temperature", "top_p", "top_logprobs", "reasoning", "text", "truncation", "parallel_tool_calls",
    "max_tool_calls", "include", "context_management", "moderation",
)  # fmt: skip
_LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text")
_UNUSABLE = "its items and parts must be texts, function calls and their outputs"


@dataclass(frozen=True, kw_only=True)
class ItemReference:
    """Stands for the whole reply that an item belongs to."""

    response_id: str
    """Without its prefix."""
    where: str
    """Its place in the body, for errors."""


@dataclass(frozen=True, kw_only=True)
class ResponsesRequest:
    """A checked body of /v1/responses."""

    options: RequestOptions
    instructions: str
    """The system message, which is not part of the stored conversation; empty: none."""
    messages: list[dict[str, Any] | ItemReference]
    """Those of `input`, in the chat format."""
    previous_response_id: str
    """Empty: `messages` are the whole conversation."""
    tools: list[dict[str, Any]]
    """In the chat format."""
    logprobs: bool
    is_stored: bool
    """True if later requests may refer to the response."""
    echo: dict[str, Any] = field(repr=False)
    """Fields that the response repeats."""


def bare_id(id: str) -> str:
    """Returns the id of a response or of one of its items without prefix and number."""
    return id.split("_")[1] if "_" in id else ""


def parse_responses(body: Mapping[str, Any], rules: ChatRules) -> ResponsesRequest:
    """Checks a body. Raises UserError for the first error."""
    refuse_fields(body, _REFUSED, server=rules.server)
    previous = body.get("previous_response_id")
    if previous is not None and not isinstance(previous, str):
        raise ParamError("previous_response_id must be a text", param="previous_response_id")
    instructions = body.get("instructions")
    if instructions is not None and not isinstance(instructions, str):
        raise ParamError("instructions must be a text", param="instructions")
    if body.get("input") is None and not (previous or instructions):
        raise ParamError("input must be a text or a list of items", param="input")
    is_stored = body.get("store") is None or flag(body, "store")
    limit = integer(body, "max_output_tokens", None, low=1, high=1 << 30)
    include = body.get("include") or []
    if not isinstance(include, list):
        raise ParamError("include must be a list", param="include")
    return ResponsesRequest(
        options=RequestOptions(
            model=parse_model(body, rules),
            stop=(),
            max_new_tokens=limit,
            stream=flag(body, "stream"),
            include_usage=True,
            return_token_ids=False,
            ignored=tuple(name for name in _IGNORED if _is_ignored(name, body.get(name))),
        ),
        instructions=instructions or "",
        messages=_messages(body.get("input")),
        previous_response_id=previous or "",
        tools=_tools(body),
        logprobs=_LOGPROBS in include,
        is_stored=is_stored,
        echo={
            "instructions": instructions,
            "max_output_tokens": limit,
            "metadata": _metadata(body.get("metadata")),
            "previous_response_id": previous,
            "store": is_stored,
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
        },
    )


def _is_ignored(name: str, value: Any) -> bool:
    if name == "include" and isinstance(value, list):
        value = [one for one in value if one != _LOGPROBS]
    if name == "text" and isinstance(value, dict) and value.get("format") == {"type": "text"}:
        value = {key: one for key, one in value.items() if key != "format"}
    return value not in (None, [], {}, "disabled")


def _metadata(raw: Any) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, dict) or len(raw) > MAX_METADATA:
        raise ParamError(f"metadata must be an object of at most {MAX_METADATA} texts", param="metadata")
    return raw


def _messages(raw: Any) -> list[dict[str, Any] | ItemReference]:
    if raw is None:
        return []
    if isinstance(raw, str):
        return [{"role": "user", "content": raw}]
    if not isinstance(raw, list) or len(raw) > MAX_MESSAGES:
        raise ParamError(f"input must be a text, or a list of at most {MAX_MESSAGES} items", param="input")
    found = _Messages()
    for place, item in enumerate(raw):
        found.add(item, f"input[{place}]")
    return found.closed()


class _Messages:
    """Collects items; adjacent ones of one reply become one message."""

    def __init__(self) -> None:
        self._found: list[dict[str, Any] | ItemReference] = []
        self._reply: dict[str, Any] | None = None
        """The reply that the next item may belong to; its content is None until its text is known."""
        self._referred: set[str] = set()
        """Ids of the replies that stand in the input by reference, each once as a whole."""

    def closed(self) -> list[dict[str, Any] | ItemReference]:
        """Returns the messages."""
        self._close()
        return self._found

    def add(self, item: Any, where: str) -> None:
        """Adds an item. Raises ParamError."""
        if not isinstance(item, dict):
            raise ParamError(f"{where} must be an object", param=where)
        kind = item.get("type") or ("message" if "role" in item else None)
        match kind:
            case "message":
                self._add_message(item, where)
            case "reasoning":
                self._close()
                text = _text(item.get("content") or [], f"{where}.content")
                self._reply = {"role": "assistant", "content": None} | (
                    {"reasoning_content": text} if text else {}
                )
            case "function_call":
                self._add_call(item, where)
            case "function_call_output":
                self._close()
                output = _text(item.get("output"), f"{where}.output")
                call_id = _name(item, "call_id", where)
                self._found.append({"role": "tool", "tool_call_id": call_id, "content": output})
            case "item_reference":
                reference = ItemReference(response_id=bare_id(_name(item, "id", where)), where=where)
                if reference.response_id in self._referred:
                    return  # another item of the same reply
                self._referred.add(reference.response_id)
                self._close()
                self._found.append(reference)
            case _:
                raise ParamError(
                    f"{where} has the type {kind!r:.60}, which is not supported: {_UNUSABLE}",
                    param=f"{where}.type",
                )

    def _add_message(self, item: dict[str, Any], where: str) -> None:
        role = _name(item, "role", where)
        text = _text(item.get("content"), f"{where}.content")
        if role != "assistant":
            self._close()
            self._found.append({"role": "system" if role == "developer" else role, "content": text})
            return
        if self._reply is None or self._reply["content"] is not None or "tool_calls" in self._reply:
            self._close()
            self._reply = {"role": "assistant"}
        self._reply["content"] = text

    def _add_call(self, item: dict[str, Any], where: str) -> None:
        arguments = item.get("arguments")
        if not isinstance(arguments, str):
            raise ParamError(f"{where}.arguments must be a text", param=f"{where}.arguments")
        function = {"name": _name(item, "name", where), "arguments": arguments}
        call = {"id": _name(item, "call_id", where), "type": "function", "function": function}
        if self._reply is None:
            self._reply = {"role": "assistant", "content": None}
        self._reply.setdefault("tool_calls", []).append(call)

    def _close(self) -> None:
        reply, self._reply = self._reply, None
        # Reasoning whose text the client does not have (a summary, encrypted text) is no message.
        if reply is not None and (reply["content"] is not None or len(reply) > 2):
            self._found.append({**reply, "content": reply["content"] or ""})


def _name(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value:
        raise ParamError(f"{where}.{name} must be a text that is not empty", param=f"{where}.{name}")
    return value


def _text(raw: Any, where: str) -> str:
    """The text of a content: a string, or a list of parts that are texts."""
    if isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        raise ParamError(f"{where} must be a text, or a list of parts that are texts", param=where)
    texts = []
    for place, part in enumerate(raw):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in (*_TEXT_PARTS, "refusal") or not isinstance(text, str):
            raise ParamError(
                f"{where}[{place}] must be a part of type input_text or output_text; images, sounds and "
                "files are not supported",
                param=where,
            )
        texts.append(text)
    return "".join(texts)


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    raw = body.get("tools") or []
    if not isinstance(raw, list) or len(raw) > MAX_TOOLS:
        raise ParamError(f"tools must be a list of at most {MAX_TOOLS} tools", param="tools")
    tools = []
    for place, tool in enumerate(raw):
        where = f"tools[{place}]"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise ParamError(
                f"{where} must be a function ({{'type': 'function', 'name': ...}}): there are no tools "
                "of a provider",
                param=where,
            )
        function: dict[str, Any] = {"name": _name(tool, "name", where)}
        function |= {key: tool[key] for key in ("description", "parameters") if tool.get(key) is not None}
        tools.append({"type": "function", "function": function})
    return [] if body.get("tool_choice") == "none" else tools


# Responses


def response_body(reply: ChatReply, request: ResponsesRequest, *, id: str, created_s: int) -> bytes:
    """One object, or all events of a stream. `id`: the response's id, without its prefix."""
    output = _output(reply, id=id)
    response = _response(
        request, id=id, created_s=created_s, status="incomplete" if reply.is_cut else "completed"
    )
    response["output"] = output
    response["usage"] = _usage(reply)
    if reply.is_cut:
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    else:
        response["completed_at"] = created_s
    if not request.options.stream:
        return json.dumps(response, separators=(",", ":")).encode()
    events = _Events(request, id=id, created_s=created_s)
    for index, item in enumerate(output):
        events.add_item(item, index)
    events.add(f"response.{response['status']}", response=response)
    return events.content


def failed_events(
    request: ResponsesRequest, *, id: str, created_s: int, status: int, message: str, code: str = ""
) -> bytes:
    """The events of a stream whose request has failed. `status`: the HTTP status of the error."""
    events = _Events(request, id=id, created_s=created_s)
    response = _response(request, id=id, created_s=created_s, status="failed")
    # OpenAI has few codes here; clients recognize that of a full context by its name.
    response["error"] = {
        "code": code or ("server_error" if status >= 500 else "invalid_prompt"),
        "message": message,
    }
    events.add("response.failed", response=response)
    return events.content


def _response(request: ResponsesRequest, *, id: str, created_s: int, status: str) -> dict[str, Any]:
    return {
        "id": f"resp_{id}",
        "object": "response",
        "created_at": created_s,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": request.options.model,
        "output": [],
        "parallel_tool_calls": True,
        "reasoning": {"effort": None, "summary": None},
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "top_p": None,
        "truncation": "disabled",
        "usage": None,
        **request.echo,
    }


def _output(reply: ChatReply, *, id: str) -> list[dict[str, Any]]:
    """The items of a reply. There is at least one, so that a reply without text is a message."""
    items: list[dict[str, Any]] = []
    if reply.reasoning:
        content = [{"type": "reasoning_text", "text": reply.reasoning}]
        items.append({"id": f"rs_{id}", "type": "reasoning", "summary": [], "content": content})
    if reply.text or not reply.tool_calls:
        part: dict[str, Any] = {"type": "output_text", "text": reply.text, "annotations": []}
        part["logprobs"] = [{**one, "bytes": one["bytes"] or []} for one in reply.logprobs]
        items.append({"id": f"msg_{id}", "type": "message", "role": "assistant", "content": [part]})
    for number, call in enumerate(reply.tool_calls):
        items.append(
            {
                "id": f"fc_{id}_{number}",
                "type": "function_call",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments"],
            }
        )
    for item in items:
        item["status"] = "completed"
    if reply.is_cut:
        items[-1]["status"] = "incomplete"
    return items


def _usage(reply: ChatReply) -> dict[str, Any]:
    prompt, sampled = reply.num_prompt_tokens, reply.num_sampled_tokens
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": sampled,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + sampled,
    }


@dataclass(frozen=True, kw_only=True)
class Page:
    """The part of a list that a request asks for."""

    limit: int
    """Largest number of items."""
    is_ascending: bool
    after: str
    """Id of the last item before the page; empty: from the beginning."""


def page_of(query: Mapping[str, str]) -> Page:
    """Checks the parameters of a request for a list. Raises ParamError."""
    raw = query.get("limit", str(_PAGE))
    limit: Any = int(raw) if raw.isdecimal() and len(raw) <= len(str(_LARGEST_PAGE)) else raw
    return Page(
        limit=integer({"limit": limit}, "limit", _PAGE, low=1, high=_LARGEST_PAGE),
        is_ascending=one_of(query, "order", ("desc", "asc")) == "asc",
        after=query.get("after", ""),
    )


def item_page(items: Sequence[dict[str, Any]], page: Page) -> dict[str, Any]:
    """Returns a page of items as a list of the API. `items`: all, in their order. Raises ParamError for an
    unknown `after`."""
    ordered = list(items if page.is_ascending else reversed(items))
    first = 0
    if page.after:
        places = {item["id"]: place for place, item in enumerate(ordered)}
        if page.after not in places:
            raise ParamError(f"after: {page.after!r:.100} is no item of this list", param="after")
        first = places[page.after] + 1
    data = ordered[first : first + page.limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": first + len(data) < len(ordered),
    }


def input_items(messages: Sequence[Mapping[str, Any]], *, id: str) -> list[dict[str, Any]]:
    """Returns the items of the conversation before a reply, with ids of their own. `id`: of the response,
    without its prefix."""
    items: list[dict[str, Any]] = []
    for message in messages:
        match message["role"]:
            case "assistant":
                calls = [{**call, "id": call.get("id", "")} for call in message.get("tool_calls", ())]
                reply = ChatReply(
                    text=message["content"],
                    reasoning=message.get("reasoning_content", ""),
                    tool_calls=calls,
                    num_prompt_tokens=0,
                    num_sampled_tokens=0,
                )
                items += _output(reply, id=id)
            case "tool":
                call_id = message.get("tool_call_id", "")
                output = {"type": "function_call_output", "call_id": call_id, "output": message["content"]}
                items.append({"id": "fco_", **output, "status": "completed"})
            case role:
                part = {"type": "input_text", "text": message["content"]}
                item = {"id": "msg_", "type": "message", "role": role, "content": [part]}
                items.append({**item, "status": "completed"})
    for number, item in enumerate(items):
        # Not an id of a reply: a reference to it is refused, as only whole replies can be referred to.
        item["id"] = f"{item['id'].partition('_')[0]}_in{number}of{id}"
    return items


class _Events:
    """The events of one stream, numbered; `response.created` and `response.in_progress` come first."""

    def __init__(self, request: ResponsesRequest, *, id: str, created_s: int) -> None:
        self.content = b""
        self._numbers = itertools.count()
        started = _response(request, id=id, created_s=created_s, status="in_progress")
        self.add("response.created", response=started)
        self.add("response.in_progress", response=started)

    def add(self, kind: str, **fields: Any) -> None:
        self.content += encode_event(
            {"type": kind, "sequence_number": next(self._numbers), **fields}, name=kind
        )

    def add_item(self, item: dict[str, Any], index: int) -> None:
        """Adds the events of one item of the output."""
        started = {**item, "status": "in_progress"}
        if item["type"] == "function_call":
            started["arguments"] = ""
        else:
            started["content"] = []
        self.add("response.output_item.added", output_index=index, item=started)
        place = {"item_id": item["id"], "output_index": index}
        if item["type"] == "function_call":
            arguments = item["arguments"]
            self.add("response.function_call_arguments.delta", **place, delta=arguments)
            self.add("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments)
        else:
            self._add_part(item["content"][0], place)
        self.add("response.output_item.done", output_index=index, item=item)

    def _add_part(self, part: dict[str, Any], place: dict[str, Any]) -> None:
        place = {**place, "content_index": 0}
        kind = part["type"]
        empty = {**part, "text": ""}
        if kind == "output_text":
            empty["logprobs"] = []
        logprobs = {"logprobs": part["logprobs"]} if kind == "output_text" else {}
        self.add("response.content_part.added", **place, part=empty)
        if part["text"]:
            self.add(f"response.{kind}.delta", **place, delta=part["text"], **logprobs)
        self.add(f"response.{kind}.done", **place, text=part["text"], **logprobs)
        self.add("response.content_part.done", **place, part=part)
