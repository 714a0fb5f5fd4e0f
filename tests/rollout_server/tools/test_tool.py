"""Tools of Python functions: their schemas, the checks of arguments, and what the policy reads."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any, Literal

import pytest

from areal_like.errors import ConfigError, ToolError
from rollout_server.tools import Tool


def echo(text: str) -> str:
    """Returns its argument."""
    return text


def weather(
    city: str, *, days: int = 1, unit: Literal["C", "F"] = "C", near: list[str] | None = None, **_: Any
) -> str:
    """Unused."""
    return city


def forecast(
    city: str,
    days: int = 1,
    unit: Literal["C", "F"] = "C",
    at: float | None = None,
    tags: list[str] = (),  # type: ignore[assignment]
    weights: dict[str, float] = {},  # noqa: B006
    exact: bool = False,
) -> str:
    """The weather of the next days.

    In all cities.

    Args:
        city: Name of the city,
            in English.
        days (int): How many days.

    Returns:
        A text.
    """
    return f"{city} {days} {unit} {at} {tags} {weights} {exact}"


def call(function: Callable[..., Any], arguments: Any = "", **settings: Any) -> tuple[str, bool]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    answer = asyncio.run(Tool.of(function, **settings).call(text))
    return answer.text, answer.is_error


def test_schema_of_a_function() -> None:
    assert Tool.of(forecast).schema == {
        "type": "function",
        "function": {
            "name": "forecast",
            "description": "The weather of the next days. In all cities.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city, in English."},
                    "days": {"type": "integer", "description": "How many days.", "default": 1},
                    "unit": {"enum": ["C", "F"], "default": "C"},
                    "at": {"anyOf": [{"type": "number"}, {"type": "null"}], "default": None},
                    "tags": {"type": "array", "items": {"type": "string"}, "default": ()},
                    "weights": {
                        "type": "object",
                        "additionalProperties": {"type": "number"},
                        "default": {},
                    },
                    "exact": {"type": "boolean", "default": False},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }


def test_a_call() -> None:
    text, is_error = call(
        forecast, {"city": "Ulm", "days": 3.0, "at": 2, "tags": ["a"], "weights": {"b": 1}, "exact": True}
    )
    assert (text, is_error) == ("Ulm 3 C 2.0 ['a'] {'b': 1.0} True", False)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("{city: Ulm}", "Error: the arguments are not a JSON object (Expecting property name"),
        ('{"city": "Ulm"', "Error: the arguments are not a JSON object"),
        ("[1]", "Error: the arguments are not a JSON object but list: [1]"),
        ("[" * 100_000, "Error: the arguments are not a JSON object"),
        ("9" * 5000, "Error: the arguments are not a JSON object"),
        ('{"city": "Ulm", "at": NaN}', "Error: the arguments are not a JSON object (NaN is not JSON)"),
        ("", "Error: missing argument city"),
        ({"city": "Ulm", "town": 1}, "Error: unknown argument town: it takes city, days, unit, at,"),
        ({"city": 5}, "Error: argument city: want a string, got 5"),
        ({"city": "Ulm", "days": True}, "Error: argument days: want an integer, got True"),
        ({"city": "Ulm", "days": 1.5}, "Error: argument days: want an integer, got 1.5"),
        ({"city": "Ulm", "unit": "K"}, "Error: argument unit: want one of 'C', 'F', got 'K'"),
        ({"city": "Ulm", "at": "x"}, "Error: argument at: want a number, got 'x'; or argument at: want null"),
        ({"city": "Ulm", "at": 10**400}, "Error: argument at: want a number below 1e308"),
        ({"city": "Ulm", "tags": ["a", 2]}, "Error: argument tags[1]: want a string, got 2"),
        ({"city": "Ulm", "tags": "a"}, "Error: argument tags: want an array, got 'a'"),
        ({"city": "Ulm", "weights": {"a": "b"}}, "Error: argument weights.a: want a number, got 'b'"),
        ({"city": "Ulm", "exact": 1}, "Error: argument exact: want true or false, got 1"),
        ({"city": ["x" * 1000]}, "Error: argument city: want a string, got ['xxx"),
    ],
)
def test_wrong_arguments_are_answers(arguments: Any, problem: str) -> None:
    text, is_error = call(forecast, arguments)
    assert is_error and text.startswith(problem) and len(text) < 600, text


def no_hint(x) -> str:  # type: ignore[no-untyped-def]
    """Has a parameter without a hint."""
    return ""


def odd_hint(x: set[int]) -> str:
    """Has a parameter of a type that JSON does not have."""
    return ""


def odd_key(x: dict[int, str]) -> str:
    """Has keys that JSON does not have."""
    return ""


def unknown_hint(x: Missing) -> str:  # type: ignore[name-defined]  # noqa: F821
    """Has a hint that is not defined."""
    return ""


def no_docstring(x: int) -> None:
    pass


def wrong_docstring(x: int) -> None:
    """Describes another parameter.

    Args:
        y: A number.
    """


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (weather, "tool weather: parameter .*: use parameters that can be given by name"),
        (no_hint, "tool no_hint: parameter x needs a type hint"),
        (odd_hint, r"tool odd_hint: parameter x: set\[int\] is not supported: use str, int"),
        (odd_key, r"tool odd_key: parameter x: dict\[int, str\]: the keys of a JSON object are str"),
        (unknown_hint, "tool unknown_hint: its signature cannot be read: name 'Missing' is not defined"),
        (no_docstring, "tool no_docstring: write a docstring"),
        (wrong_docstring, "tool wrong_docstring: its docstring describes y, which it does not have"),
        (lambda: 1, "may have only letters"),
    ],
)
def test_functions_without_a_schema_are_refused(function: Callable[..., Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Tool.of(function)
    with pytest.raises(ConfigError, match="must be above 0"):
        Tool.of(forecast, timeout_s=0)


def test_what_a_function_returns() -> None:
    def give(what: int) -> Any:
        """Returns one of several things."""
        return ["text", "", None, {"a": [1, "é"]}, {2}, "x" * 100][what]

    outputs = [call(give, {"what": what}, max_chars=20)[0] for what in range(6)]
    assert outputs[:5] == ["text", "(no output)", "(no output)", '{"a": [1, "é"]}', '"{2}"']
    assert outputs[5] == "x" * 20 + "\n[cut: 20 of 100 characters]"


def test_text_that_cannot_be_encoded_is_replaced() -> None:
    assert call(echo, r'{"text": "a\ud800b"}') == ("a?b", False)
    text, is_error = call(echo, r'{"text\ud800": "a"}')
    assert is_error and text.isascii()


def test_what_a_function_raises() -> None:
    def fail(how: int) -> str:
        """Raises one of several exceptions."""
        raise [
            ValueError("no " * 1000),
            ToolError("say please"),
            TimeoutError("the disk"),
            SystemExit(3),
            StopIteration(),
        ][how]

    outputs = [call(fail, {"how": how}) for how in range(5)]
    assert all(is_error for _, is_error in outputs)
    texts = [text for text, _ in outputs]
    assert texts[0].startswith("Error: ValueError: no no") and len(texts[0]) < 520
    assert texts[1:] == [
        "Error: say please",
        "Error: TimeoutError: the disk",
        "Error: RuntimeError: SystemExit: 3",
        "Error: RuntimeError: StopIteration: ",
    ]


def test_time_limit_of_functions_and_coroutines() -> None:
    release = threading.Event()

    def block() -> str:
        """Blocks."""
        release.wait(60)
        return "late"

    async def sleep() -> str:
        """Sleeps."""
        await asyncio.sleep(60)
        return "late"

    async def both() -> list[str]:
        answers = [await Tool.of(tool, timeout_s=0.1).call("{}") for tool in (block, sleep)]
        release.set()  # the abandoned thread answers while the loop still runs
        await asyncio.sleep(0.05)
        return [answer.text for answer in answers]

    assert asyncio.run(both()) == ["Error: no result within 0.1 s"] * 2
