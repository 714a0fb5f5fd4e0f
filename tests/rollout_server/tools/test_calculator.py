"""The calculator: exact results, bounded work, and errors that say what is wrong."""

from __future__ import annotations

import asyncio
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_like.errors import ToolError
from rollout_server.tools import calculator
from rollout_server.tools.calculator import evaluate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("123456789 * 987654321", str(123456789 * 987654321)),
        ("2**100", str(2**100)),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3 * 3", "1"),
        ("7 / 2", "3.5"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("2 ** -2", "0.25"),
        ("sqrt(49) + sqrt(2)", repr(7 + 2**0.5)),
        ("8 ** (1 / 3)", "2"),
        ("round(2.567, 1) + abs(-3) + max(1, 2) - min(4, 5)", "3.6"),
        ("floor(2.9) * ceil(2.1) + gcd(12, 18)", "12"),
        (" (1 + 2) * 3 ", "9"),
        ("1_000 + 1e3", "2000"),
    ],
)
def test_results(expression: str, result: str) -> None:
    assert asyncio.run(calculator(expression)) == result


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("9**9**9", "the power is too large"),
        ("10**1000 * 10**1000", "more than 4096 bits"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("2 ^ 3", r"write \*\* for powers"),
        ("1,000 + 1", "without commas"),
        ("x + 1", "x is unknown; functions: abs, round"),
        ("exp(2)", "exp is unknown"),
        ("__import__('os').system('true')", "not an arithmetic expression"),
        ("(lambda: 1)()", "not an arithmetic expression"),
        ("'a' * 1000000000", "not an arithmetic expression"),
        ("[1] * 100", "not an arithmetic expression"),
        ("True + 1", "not an arithmetic expression"),
        ("1j", "not an arithmetic expression"),
        ("sqrt(-1)", "not real"),
        ("(-8) ** 0.5", "not a real number"),
        ("sqrt(1, 2)", "another number of arguments"),
        ("max()", "not an arithmetic expression|another number"),
        ("gcd(1.5, 2)", "whole numbers"),
        ("round(1, 1000)", "at most 100 digits"),
        ("2.5 ** 1e9", "too large"),
        ("2.5 ** 1000.5", "too large"),
        ("", "not an arithmetic expression"),
        ("1 +", "not an arithmetic expression"),
        ("-" * 399 + ")", "not an arithmetic expression"),
        ("1" * 401, "at most 400"),
        ("1\x00", "not an arithmetic expression"),
    ],
)
def test_errors(expression: str, problem: str) -> None:
    with pytest.raises(ToolError, match=problem):
        asyncio.run(calculator(expression))


_NUMBERS = st.integers(-99, 99).map(str) | st.decimals(-9, 9, places=2).map(str)
_EXPRESSIONS = st.recursive(
    _NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*", "/"]), inner).map(
        lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
    ),
    max_leaves=12,
)


@given(_EXPRESSIONS)
@settings(max_examples=100)
def test_agrees_with_fractions(expression: str) -> None:
    exact = re.sub(r"\d+(\.\d+)?", lambda number: f"Fraction('{number[0]}')", expression)
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ToolError, match="division by zero"):
            evaluate(expression)
        return
    assert evaluate(expression) == expected


@given(st.text(st.sampled_from("0123456789.+-*/%()e, sqrtmaxgcd"), max_size=60))
@settings(max_examples=300)
def test_any_text_is_a_number_or_an_error(expression: str) -> None:
    try:
        assert asyncio.run(calculator(expression))
    except ToolError as error:
        assert len(str(error)) < 200
