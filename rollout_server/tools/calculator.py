"""A calculator: exact arithmetic on whole numbers, fractions and decimals.

The expression is parsed by `ast` and computed here; Python does not evaluate anything, and the only names are
the functions below. Numbers are exact fractions, so 0.1 + 0.2 is 0.3 and 1 / 3 * 3 is 1; only roots and
powers with fractional exponents are floats. The size of every intermediate number is bounded before it is
computed: `9**9**9` is refused at once.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from areal_like.errors import ToolError
from rollout_server.tools.named import NamedTool
from rollout_server.tools.tool import Tool

Number = Fraction | float

_MAX_CHARS = 400
_MAX_BITS = 4096
"""Limit of a numerator or denominator: about 1,230 digits."""


@dataclass(frozen=True, kw_only=True)
class Calculator(NamedTool):
    """`{name: calculator}`."""

    def tool(self) -> Tool:
        return Tool.of(calculator)


async def calculator(expression: str) -> str:
    """Computes an arithmetic expression exactly, for example (3 + 4) * 2**10 / 7.

    Args:
        expression: Numbers, + - * / // % **, parentheses, abs, round, min, max, floor, ceil, sqrt, gcd.
    """
    return _written(evaluate(expression))


def evaluate(expression: str) -> Number:
    """Returns the value of an expression. Raises ToolError that says what is wrong with it."""
    if len(expression) > _MAX_CHARS:
        raise ToolError(f"the expression has {len(expression)} characters; at most {_MAX_CHARS} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "3if" is a SyntaxWarning
            tree = ast.parse(expression.strip(), mode="eval")
        return _value(tree.body)
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ToolError(f"not an arithmetic expression: {expression:.80}") from None
    except OverflowError:
        raise ToolError("a number is too large") from None


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
            return _bounded(Fraction(str(node.value)))
        case ast.UnaryOp(op=ast.USub()):
            return -_value(node.operand)
        case ast.UnaryOp(op=ast.UAdd()):
            return _value(node.operand)
        case ast.BinOp(op=ast.Pow()):
            return _power(_value(node.left), _value(node.right))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            return _bounded(_OPERATORS[type(node.op)](_value(node.left), _value(node.right)))
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            try:
                return _bounded(_FUNCTIONS[name](*map(_value, node.args)))
            except TypeError:
                raise ToolError(f"{name} takes another number of arguments") from None
        case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name):
            raise ToolError(f"{name:.40} is unknown; functions: {', '.join(_FUNCTIONS)}")
        case ast.BinOp(op=ast.BitXor()):
            raise ToolError("write ** for powers, not ^")
        case ast.Tuple():
            raise ToolError("write numbers without commas")
        case _:
            raise ToolError(f"not an arithmetic expression: {ast.unparse(node):.80}")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, float) or isinstance(exponent, float) or exponent.denominator != 1:
        return _real(float(base) ** float(exponent))
    power = exponent.numerator
    if abs(power) * max(base.numerator.bit_length(), base.denominator.bit_length()) > 2 * _MAX_BITS:
        raise ToolError("the power is too large")
    return _bounded(base**power)


def _root(value: Number) -> Number:
    if value < 0:
        raise ToolError("the square root of a negative number is not real")
    if isinstance(value, Fraction):
        parts = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if parts * parts == value:
            return parts
    return _real(math.sqrt(value))


def _gcd(*values: Number) -> Fraction:
    if not all(isinstance(value, Fraction) and value.denominator == 1 for value in values):
        raise ToolError("gcd takes whole numbers")
    return Fraction(math.gcd(*map(int, values)))


def _round(value: Number, digits: Number = 0.0) -> Number:
    if abs(float(digits)) > 100:
        raise ToolError("round takes at most 100 digits")
    return Fraction(round(Fraction(value), int(digits)))


def _bounded(value: Number) -> Number:
    if isinstance(value, float):
        return _real(value)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ToolError(f"a number has more than {_MAX_BITS} bits")
    return value


def _real(value: float | complex) -> float:
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    if not math.isfinite(value):
        raise ToolError("a number is too large")
    return value


def _written(value: Number) -> str:
    if isinstance(value, Fraction) and value.denominator != 1:
        try:
            return repr(float(value))
        except OverflowError:
            return str(value)
    if isinstance(value, float) and not value.is_integer():
        return repr(value)
    return str(int(value))


_OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda left, right: Fraction(left // right),
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "abs": abs,
    "round": _round,
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "sqrt": _root,
    "gcd": _gcd,
}
