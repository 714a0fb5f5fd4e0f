"""Runs the tests of a program inside the sandbox. It imports only the standard library.

It is passed as text, because this repository is not visible in the sandbox. It gets one JSON object on stdin:
`source`, `nonce`, and either `function` and `calls` (lists of arguments) or `statements`. To its original
stdout it writes a line `nonce number result` for each test that did not raise; `result` is the value as JSON,
or `null`. Output of the program goes to stderr.

The nonce is needed because a program may end the process early and write arbitrary output. Stdin, which
contains the nonce and the statements, is emptied before the program starts. A test's comparison with a
constant fails if a class of the program decides it (an `__eq__` that returns True). These are hurdles, not
strict isolation: the program shares the interpreter with the statements of a test, and a program that
inspects its caller's frames finds the nonce. Return values are compared outside the sandbox, so they cannot
be forged that way.
"""

import ast
import contextlib
import json
import os
import sys
import types

_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_CHECKED = "__checked__"
_HEAP_TYPE = 1 << 9
"""Flag of classes that are not static types of the interpreter."""


def main() -> None:
    """Runs the tests and writes one line for each that passed."""
    setup = json.loads(sys.stdin.buffer.read())
    _empty_stdin()
    results = os.dup(1)
    os.dup2(2, 1)
    nonce = setup.pop("nonce")
    statements = [_compiled(text, number) for number, text in enumerate(setup.pop("statements", ()))]
    # Bound here, because the program may replace builtins and functions of modules.
    execute, dumps, write, checked = exec, json.dumps, os.write, _checked

    def report(number: int, value: object) -> None:
        write(results, f"{nonce} {number} {dumps(value)}\n".encode())

    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = module.__dict__
    exec(compile(setup["source"], "solution.py", "exec"), names)
    for number, call in enumerate(setup.get("calls", ())):
        try:
            report(number, _called(names, setup["function"], call))
        except BaseException as error:
            _show(error)
    for number, statement in enumerate(statements):
        try:
            names[_CHECKED] = checked
            execute(statement, names)
            report(number, None)
        except BaseException as error:
            _show(error)


def _empty_stdin() -> None:
    with contextlib.suppress(OSError):
        os.ftruncate(0, 0)  # it is a memory file that other processes in the sandbox also have open
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _compiled(text: str, number: int) -> types.CodeType:
    """Compiles a test; if it is not valid Python, returns code that fails."""
    try:
        tree = ast.fix_missing_locations(_Guard().visit(ast.parse(text)))
        return compile(tree, f"test_{number}.py", "exec")
    except (SyntaxError, ValueError, RecursionError):
        return compile("raise SyntaxError", f"test_{number}.py", "exec")


class _Guard(ast.NodeTransformer):
    """Lets `_checked` see what an assertion compares with a constant."""

    is_assertion = False

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        self.is_assertion = True
        node = self.generic_visit(node)  # type: ignore[assignment]
        self.is_assertion = False
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        sides = [node.left, *node.comparators]
        if self.is_assertion and any(map(_is_constant, sides)):
            guarded = [side if _is_constant(side) else _guarded(side) for side in sides]
            node.left, node.comparators = guarded[0], guarded[1:]
        return self.generic_visit(node)


def _guarded(side: ast.expr) -> ast.expr:
    return ast.Call(func=ast.Name(id=_CHECKED, ctx=ast.Load()), args=[side], keywords=[])


def _is_constant(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return False
    return True


def _checked(value: object) -> object:
    """Returns the value. Raises AssertionError if a class of the program defines how a part of it
    compares."""
    waiting, seen = [value], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        kind = next(kind for kind in type(one).__mro__ if any(name in vars(kind) for name in _COMPARISONS))
        if kind.__flags__ & _HEAP_TYPE and not _is_of_library(kind):
            raise AssertionError(f"{kind.__name__} has comparisons of its own")
        if isinstance(one, (list, tuple, set, frozenset)):
            waiting += one
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
    return value


def _is_of_library(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    return kind.__module__ != "solution" and getattr(module, kind.__name__, None) is kind


def _called(names: dict, function: str, arguments: list) -> object:  # type: ignore[type-arg]
    if function in names:
        return names[function](*arguments)
    return getattr(names["Solution"](), function)(*arguments)  # LeetCode's form


def _show(error: BaseException) -> None:
    sys.stderr.write(f"{type(error).__name__}: {str(error)[:200]}\n")


if __name__ == "__main__":
    main()
