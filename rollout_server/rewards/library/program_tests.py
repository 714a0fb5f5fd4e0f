"""The tests of a program, in the formats used by data sets. Pure.

    {"inputs": ["1 2\\n"], "outputs": ["3\\n"]}             stdin and stdout (APPS, TACO, verl's code data)
    {"inputs": [[1, 2]], "outputs": [3], "fn_name": "f"}  arguments and return value of a function
    [{"input": "1 2", "output": "3"}, ...]                stdin and stdout (CodeContests, LiveCodeBench)
    ["assert f(1) == 2", ...]                             statements that must not raise (MBPP)
    "def check(candidate): ..."                           one test of statements (HumanEval)

Each may also be given as JSON text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ProgramTests:
    """At least one test, all of one kind."""

    function: str = ""
    """The function to call; empty: the whole program is run."""
    inputs: tuple[Any, ...] = ()
    """stdin of each run, or the list of arguments of each call."""
    outputs: tuple[Any, ...] = ()
    """Expected stdout of each run, or the expected value of each call."""
    statements: tuple[str, ...] = ()
    """Python statements, executed one after the other after the program."""

    @property
    def num(self) -> int:
        """Number of tests."""
        return len(self.inputs) or len(self.statements)

    def first(self, most: int) -> ProgramTests:
        """Returns the first `most` tests."""
        return ProgramTests(
            function=self.function,
            inputs=self.inputs[:most],
            outputs=self.outputs[:most],
            statements=self.statements[:most],
        )


def tests_of(value: Any, *, entry_point: str = "") -> ProgramTests:
    """Parses the tests of a row. `entry_point`: HumanEval's name of the function. Raises ValueError."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
        if isinstance(value, str):
            value = [value]
    if isinstance(value, Mapping):
        tests = _of_lists(value)
    elif isinstance(value, Sequence) and value and all(isinstance(one, str) for one in value):
        tests = ProgramTests(statements=tuple(_statements(one, entry_point) for one in value))
    elif isinstance(value, Sequence) and all(isinstance(one, Mapping) for one in value):
        tests = _of_pairs(value)
    else:
        raise ValueError(f"got {type(value).__name__}")
    if not tests.num:
        raise ValueError("there is no test")
    return tests


def _of_lists(value: Mapping[str, Any]) -> ProgramTests:
    inputs, outputs = value.get("inputs"), value.get("outputs")
    function = value.get("fn_name") or ""
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or not isinstance(function, str):
        raise ValueError("`inputs` and `outputs` must be lists, and `fn_name` a name")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    if function:
        arguments = tuple(_arguments(one) for one in inputs)
        return ProgramTests(function=function, inputs=arguments, outputs=tuple(map(_value, outputs)))
    return ProgramTests(inputs=tuple(map(_text, inputs)), outputs=tuple(map(_text, outputs)))


def _of_pairs(value: Sequence[Mapping[str, Any]]) -> ProgramTests:
    if any("input" not in one or "output" not in one for one in value):
        raise ValueError("each test needs `input` and `output`")
    return _of_lists({"inputs": [one["input"] for one in value], "outputs": [one["output"] for one in value]})


def _statements(text: str, entry_point: str) -> str:
    is_check = "def check(" in text and entry_point.isidentifier()
    return f"{text}\ncheck({entry_point})\n" if is_check else text


def _text(value: Any) -> str:
    """Joins lists of lines, which APPS sometimes has."""
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _arguments(value: Any) -> list[Any]:
    """Parses arguments; LiveCodeBench has one JSON value per line."""
    if isinstance(value, str):
        return [json.loads(line) for line in value.splitlines() if line.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _value(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def is_same_output(said: str, expected: str, *, tolerance: float) -> bool:
    """Compares a program's output with the expected one, word by word.

    Numbers may differ by `tolerance`, absolutely or relatively.
    """
    words, wanted = said.split(), expected.split()
    return len(words) == len(wanted) and all(
        word == want or (tolerance > 0 and _is_close(word, want, tolerance))
        for word, want in zip(words, wanted, strict=True)
    )


def _is_close(word: str, want: str, tolerance: float) -> bool:
    try:
        difference, size = abs(float(word) - float(want)), abs(float(want))
    except ValueError:
        return False
    # Beyond the range of floats every difference from infinity would be close.
    return math.isfinite(size) and difference <= tolerance * max(1.0, size)


def is_same_value(returned: Any, expected: Any, *, tolerance: float) -> bool:
    """Compares a return value, after JSON, with the expected one, which APPS sometimes wraps in a list."""
    if returned == expected or (isinstance(expected, list) and expected == [returned]):
        return True
    numbers = all(isinstance(one, (int, float)) for one in (returned, expected))
    return numbers and tolerance > 0 and _is_close(str(returned), str(expected), tolerance)
