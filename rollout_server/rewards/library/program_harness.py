"""Runs the tests of a program inside the sandbox. It imports only the standard library.

It is sent as a text: the sandbox does not show this repository. It gets one JSON object on stdin: `source`,
`nonce`, and either `function` and `calls` (lists of arguments) or `statements`. To the stdout that it was
started with it writes a line `nonce number result` for each test that did not raise: `result` is the value
as JSON, or `null`. What the program prints goes to stderr.

The nonce exists because a program may end the process early and write what it likes. It is a hurdle and no
wall: the program shares the interpreter with the statements of a test, and one that inspects the frames of
its caller finds the nonce. Return values are compared outside, so there nothing can be gained.
"""

import json
import os
import sys
import types


def main() -> None:
    """One line for each test that passed."""
    setup = json.loads(sys.stdin.buffer.read())
    results = os.dup(1)
    os.dup2(2, 1)
    nonce = setup.pop("nonce")

    def report(number: int, value: object) -> None:
        os.write(results, f"{nonce} {number} {json.dumps(value)}\n".encode())

    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = module.__dict__
    exec(compile(setup["source"], "solution.py", "exec"), names)
    for number, call in enumerate(setup.get("calls", ())):
        try:
            report(number, _called(names, setup["function"], call))
        except BaseException as error:
            _show(error)
    for number, statement in enumerate(setup.get("statements", ())):
        try:
            exec(compile(statement, f"test_{number}.py", "exec"), names)
            report(number, None)
        except BaseException as error:
            _show(error)


def _called(names: dict, function: str, arguments: list) -> object:  # type: ignore[type-arg]
    if function in names:
        return names[function](*arguments)
    return getattr(names["Solution"](), function)(*arguments)  # LeetCode's form


def _show(error: BaseException) -> None:
    sys.stderr.write(f"{type(error).__name__}: {str(error)[:200]}\n")


if __name__ == "__main__":
    main()
