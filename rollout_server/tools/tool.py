"""A tool: a Python function that the policy may call.

    def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
        \"\"\"The weather of today.

        Args:
            city: Name of the city, in English.
        \"\"\"

Its schema (OpenAI's function format) is generated from its name, signature, type hints and docstring, whose
`Args:` section describes the parameters. A function whose schema cannot be generated is refused when the job
starts. Mistakes of the policy are reported to the policy: `call` does not raise. A function that blocks runs
in a thread of its own; after its time limit it cannot be stopped, only abandoned.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import re
import textwrap
import threading
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from areal_like.errors import ConfigError, EpisodeError, ToolError
from rollout_server.tools.kinds import Kind, kind_of

TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_MAX_ERROR_CHARS = 500
_MAX_ARGUMENTS_CHARS = 1 << 20
_REQUIRED: Any = inspect.Parameter.empty


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a tool."""

    name: str
    kind: Kind
    default: Any = _REQUIRED
    description: str = ""

    @property
    def is_required(self) -> bool:
        return self.default is _REQUIRED

    @property
    def schema(self) -> dict[str, Any]:
        """Returns the JSON schema, with the default if it is a JSON value."""
        schema = dict(self.kind.schema)
        if self.description:
            schema["description"] = self.description
        if not self.is_required and _is_json(self.default):
            schema["default"] = self.default
        return schema


@dataclass(frozen=True, kw_only=True)
class ToolOutput:
    """The text that the policy reads after a call."""

    text: str
    is_error: bool = False


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function with its schema and limits. `Tool.of` makes one from the function alone."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    function: Callable[..., Any] = field(repr=False)
    timeout_s: float = 10.0
    """Time limit of one call, in seconds."""
    max_chars: int = 8192
    """Maximum length of the output, which is cut with a note."""
    check: Callable[[], None] = field(default=lambda: None, repr=False)
    """Raises ConfigError if the tool does not work on this machine. Called once when a server starts."""

    @classmethod
    def of(cls, function: Callable[..., Any], *, name: str = "", **settings: Any) -> Tool:
        """Makes a tool of a function, coroutine function or bound method. `settings`: `timeout_s`,
        `max_chars`.

        Raises ConfigError if the schema cannot be generated.
        """
        name = name or getattr(function, "__name__", "")
        if not TOOL_NAME.fullmatch(name):
            raise ConfigError(
                f"tool {function!r}: its name may have only letters, digits, _ and -: use Tool.of(name=)"
            )
        try:
            description, about = _described(function)
            parameters = tuple(_parameters(function, about))
        except ConfigError as error:
            raise ConfigError(f"tool {name}: {error}") from None
        return cls(
            name=name, description=description, parameters=parameters, function=function
        ).with_settings(**settings)

    def with_settings(self, **settings: Any) -> Tool:
        """Returns the same tool with other limits. Raises ConfigError for a limit that is not above 0."""
        tool = replace(self, **settings)
        if tool.timeout_s <= 0 or tool.max_chars <= 0:
            raise ConfigError(f"tool {self.name}: timeout_s and max_chars must be above 0")
        return tool

    @property
    def schema(self) -> dict[str, Any]:
        """Returns the schema in OpenAI's function format."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": self._schema_of_parameters,
            },
        }

    @property
    def _schema_of_parameters(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {parameter.name: parameter.schema for parameter in self.parameters},
            "required": [parameter.name for parameter in self.parameters if parameter.is_required],
            "additionalProperties": False,
        }

    def bind(self, arguments: str) -> dict[str, Any]:
        """Checks and returns the arguments of a call. Raises ToolError that says what is wrong."""
        values = json_object(arguments)
        known = {parameter.name: parameter for parameter in self.parameters}
        if unknown := [name for name in values if name not in known]:
            takes = f"it takes {', '.join(known)}" if known else "it takes no arguments"
            raise ToolError(f"unknown argument {', '.join(unknown):.80}: {takes}")
        missing = [name for name, one in known.items() if one.is_required and name not in values]
        if missing:
            raise ToolError(f"missing argument {', '.join(missing)}")
        return {name: known[name].kind.check(value, name) for name, value in values.items()}

    async def call(self, arguments: str, *, timeout_s: float | None = None) -> ToolOutput:
        """Runs the function; errors become the output, except an EpisodeError, which fails the sample.

        `timeout_s`: a limit below the tool's own, in seconds.
        """
        limit_s = self.timeout_s if timeout_s is None else min(self.timeout_s, timeout_s)
        try:
            values = self.bind(arguments)
            async with asyncio.timeout(limit_s) as limit:
                value = await self._run(values)
            return ToolOutput(text=_valid(self._cut(_text(value))))
        except ToolError as error:
            problem = str(error)
        except EpisodeError:
            raise
        # A tool may raise anything. Its own TimeoutError is not that of the time limit.
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            if isinstance(error, TimeoutError) and limit.expired():
                problem = f"no result within {limit_s:.3g} s"
        return ToolOutput(text=_valid(f"Error: {problem:.{_MAX_ERROR_CHARS}}"), is_error=True)

    async def _run(self, values: Mapping[str, Any]) -> Any:
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**values)
        value = await _in_thread(self.function, values)
        return await value if inspect.isawaitable(value) else value

    def _cut(self, text: str) -> str:
        if len(text) <= self.max_chars:
            return text
        return f"{text[: self.max_chars]}\n[cut: {self.max_chars} of {len(text)} characters]"


@dataclass(frozen=True, kw_only=True)
class ServerTool(Tool):
    """A tool of a server, with the server's schema."""

    parameters: tuple[Parameter, ...] = ()
    input_schema: Mapping[str, Any]
    max_argument_chars: int = 1 << 16
    check_arguments: Callable[[Mapping[str, Any]], None] = field(default=lambda _: None, repr=False)
    """Raises ToolError for arguments that do not match the schema; the server may check them, too."""

    @property
    def _schema_of_parameters(self) -> dict[str, Any]:
        return dict(self.input_schema)

    def bind(self, arguments: str) -> dict[str, Any]:
        values = json_object(arguments, max_chars=self.max_argument_chars)
        self.check_arguments(values)
        return values


async def _in_thread(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Calls a function in a thread that is not waited for, by an executor or at the end of the process."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def finish(set_result: Callable[[Any], None], value: Any) -> None:
        if not done.done():  # the time limit came first
            set_result(value)

    def run() -> None:
        try:
            outcome = (done.set_result, function(**values))
        # StopIteration cannot be set on a future, and SystemExit would end only this thread.
        except BaseException as error:
            is_plain = isinstance(error, Exception) and not isinstance(error, StopIteration)
            raised = error if is_plain else RuntimeError(f"{type(error).__name__}: {error}")
            outcome = (done.set_exception, raised)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, *outcome)

    threading.Thread(target=run, name=f"tool-{function!r:.40}", daemon=True).start()
    return await done


def json_object(text: str, *, max_chars: int = _MAX_ARGUMENTS_CHARS) -> dict[str, Any]:
    """Returns the arguments of a call as written by the policy. Raises ToolError."""
    if len(text) > max_chars:
        raise ToolError(f"the arguments have {len(text)} characters; at most {max_chars} are read")
    try:
        values = json.loads(text, parse_constant=_refuse_constant) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ToolError(f"the arguments are not a JSON object ({error}): {text:.80}") from None
    if not isinstance(values, dict):
        raise ToolError(f"the arguments are not a JSON object but {type(values).__name__}: {text:.80}")
    return values


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _text(value: Any) -> str:
    """Converts a function's result to text: JSON unless it is already text."""
    if value is None or value == "":
        return "(no output)"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _valid(text: str) -> str:
    """Returns text that can be encoded: the policy can write half of a surrogate pair as \\ud800 in its
    arguments."""
    return text.encode(errors="replace").decode()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _parameters(function: Callable[..., Any], about: Mapping[str, str]) -> list[Parameter]:
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(getattr(function, "__func__", function))
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"its signature cannot be read: {error}") from None
    found = []
    for name, parameter in signature.parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"parameter {parameter}: use parameters that can be given by name")
        if name not in hints:
            raise ConfigError(f"parameter {name} needs a type hint")
        try:
            kind = kind_of(hints[name])
        except ConfigError as error:
            raise ConfigError(f"parameter {name}: {error}") from None
        found.append(
            Parameter(name=name, kind=kind, default=parameter.default, description=about.get(name, ""))
        )
    if unknown := [name for name in about if name not in signature.parameters]:
        raise ConfigError(f"its docstring describes {', '.join(unknown)}, which it does not have")
    return found


_ARGS = re.compile(r"^(?:Args|Arguments|Parameters):\s*$", re.M)
_ARG = re.compile(r"^(\w+)(?:\s*\([^)]*\))?:\s*(.*(?:\n[ \t]+\S.*)*)", re.M)
_SECTION = re.compile(r"^\w+:\s*$", re.M)


def _described(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Returns the description, and the descriptions of parameters in an `Args:` section (Google's style)."""
    text = inspect.getdoc(function) or ""
    if not text:
        raise ConfigError("write a docstring: it is what the policy reads about the tool")
    section = _ARGS.search(text)
    head = text[: section.start()] if section else text
    if (other := _SECTION.search(head)) is not None:  # Returns:, Raises:
        head = head[: other.start()]
    about = {}
    if section:
        body = text[section.end() :]
        end = _SECTION.search(body)
        body = textwrap.dedent(body[: end.start()] if end else body)
        about = {name: " ".join(words.split()) for name, words in _ARG.findall(body)}
    return " ".join(head.split()), about
