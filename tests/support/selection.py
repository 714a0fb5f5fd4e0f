"""Which tests are quick, and which files run first: rules on what the code of a test uses, not lists.

A test *uses processes* if its code, that of its fixtures or of the helpers that these call names a module
that starts processes or opens connections, or something of the product from a module that imports one. Names
are looked up and not run, so a test may be counted that would start nothing.
"""

from __future__ import annotations

import builtins
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from pytest import CallInfo, TestReport

PROCESSES = (
    "aiohttp",
    "http.client",
    "multiprocessing",
    "socket",
    "subprocess",
    "urllib.request",
    "uvicorn",
    "zmq",
    "tests.support.launching",
    "tests.support.warm_start",
)
_HEAVY = ("areal_like.runtime.command_line", "launch.cli", "torch", "transformers")
"""Named by tests of models and of command lines, of which each takes a part of a second."""
_PRODUCT = ("areal_like", "buffer", "launch", "rollout_server", "trainer")
_FORKS = ("fork", "posix_spawn", "open_connection", "start_server")
_START_EVENTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec")


@cache
def uses(function: Callable[..., object], modules: tuple[str, ...]) -> bool:
    """True if this function, or a helper of the tests that it uses, names one of `modules`."""
    seen: set[int] = set()
    waiting: list[Any] = [function]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _names_one_of(modules, value):
            return True
        for code, names in _code_of(value):
            used = set(_names(code))
            if used & set(_FORKS):
                return True
            waiting += [names[name] for name in used if name in names and not hasattr(builtins, name)]
    return False


def _names_one_of(modules: tuple[str, ...], value: object) -> bool:
    if isinstance(value, ModuleType):
        return value.__name__ in modules
    module = getattr(value, "__module__", None)
    return isinstance(module, str) and (module in modules or _product_imports(modules, module))


@cache
def _product_imports(modules: tuple[str, ...], name: str) -> bool:
    if name.partition(".")[0] not in _PRODUCT or name not in sys.modules:
        return False
    values = vars(sys.modules[name]).values()
    return any(isinstance(value, ModuleType) and value.__name__ in modules for value in values)


def _code_of(value: object) -> Iterator[tuple[CodeType, dict[str, Any]]]:
    """The code of a function of the tests, or of all methods of a class, with the names it can see."""
    value = getattr(value, "__wrapped__", value)
    value = getattr(value, "_fixture_function", value)
    if not str(getattr(value, "__module__", "")).startswith("tests."):
        return
    if isinstance(value, FunctionType):
        yield value.__code__, value.__globals__
    elif isinstance(value, type):
        for member in vars(value).values():
            member = getattr(member, "__func__", getattr(member, "fget", member))
            if isinstance(member, FunctionType):
                yield member.__code__, member.__globals__


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def item_uses(item: pytest.Item, modules: tuple[str, ...]) -> bool:
    """`uses` of a test and its fixtures."""
    assert isinstance(item, pytest.Function)
    fixtures = [one.func for defined in item._fixtureinfo.name2fixturedefs.values() for one in defined]
    return any(uses(function, modules) for function in (item.function, *fixtures))


def is_fast(item: pytest.Item) -> bool:
    """True for a test of `make test-fast`: no processes, models or command lines, and not marked as slow."""
    return not item.get_closest_marker("slow") and not item_uses(item, (*PROCESSES, *_HEAVY))


def largest_first(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Files with many tests that use processes first: a long one that starts last leaves workers idle."""
    sizes: Counter[Path] = Counter()
    for item in items:
        if item_uses(item, PROCESSES):
            sizes[item.path] += 10 if item.get_closest_marker("slow") else 1
    return sorted(items, key=lambda item: -sizes[item.path])


class _ProcessRefusedError(PermissionError):
    """A test that counts as fast was about to start a process."""


class ProcessRefusal:
    """A plugin of pytest: a test that starts a process, against the rule above, is skipped.

    Code under test may catch what the start raises, or start it in a thread. So the report decides.
    """

    def __init__(self) -> None:
        self._refused = ""
        sys.addaudithook(self._audit)

    def _audit(self, event: str, _: object) -> None:
        if event in _START_EVENTS:
            self._refused = event
            raise _ProcessRefusedError(f"the fast tests start no processes: {event}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: CallInfo[None]
    ) -> Generator[None, TestReport, TestReport]:
        report = yield
        in_fixture = call.excinfo is not None and call.excinfo.errisinstance(_ProcessRefusedError)
        if report.failed and (self._refused or in_fixture):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), None, "Skipped: it starts a process")
        if report.when == "teardown":
            self._refused = ""
        return report
