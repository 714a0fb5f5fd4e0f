"""Small repositories with one bug, generated from a random generator: source, visible tests, hidden calls.

A repository is a package of a few modules with one function each, drawn from the templates below: the names
of package, modules and functions and the constants in them differ, and one function has one of its template's
bugs. The visible tests are a unittest file. One of them fails because of the bug, and so does at least one
hidden call. Hidden calls cover all functions, so that a repair that breaks another function is no repair.

Each bug belongs to one split: what is broken in a held-out repository is never broken in that way in a
training one. Pure: expected values come from running the correct source, which is this file's own.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from areal_like.errors import ConfigError

TESTS = "test_package.py"
"""Path of the visible tests."""
Arguments = list[Any]
_NUM_VISIBLE, _NUM_HIDDEN = 3, 6
"""Calls of each function in the visible tests, and hidden ones."""
_MAX_DRAWS = 1000
_NUM_TELLING = 3
"""Calls that show the bug: one visible, and two or fewer hidden ones."""
_NAMES = ("acorn", "basil", "cedar", "delta", "ember", "fable", "grove", "heron", "indigo", "juniper", "kelp")


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A change of a template's source."""

    kind: str
    """Name of the kind, for labels: at most 64 characters."""
    right: str
    """Text of the correct source, which occurs once."""
    wrong: str
    is_held_out: bool = False
    """True if only held-out repositories have it."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A function: {f} is its name, {k} a constant."""

    names: tuple[str, ...]
    source: str
    bugs: tuple[Bug, ...]
    draw: Callable[[random.Random], Arguments]
    constants: tuple[int, ...] = (0,)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A hidden call and what it has to return."""

    module: str
    function: str
    arguments: Arguments
    expected: Any
    """[value, arguments afterwards]: a function must not change its arguments."""
    shows_bug: bool
    """True if the function with the bug does not return it."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One repository with a bug."""

    files: dict[str, str]
    """Path -> content: the package, README.md, and the visible tests."""
    broken: str
    """Path of the module with the bug."""
    kind: str
    """Kind of the bug."""
    repaired: str
    """The content of that module without the bug."""
    hidden: tuple[Call, ...]

    @property
    def package(self) -> str:
        """Name of the directory with the modules."""
        return self.broken.partition("/")[0]


def make_repository(rng: random.Random, *, held_out: bool, num_modules: int = 2) -> Repository:
    """Draws a repository. Raises ConfigError if there are not so many templates."""
    if not 1 <= num_modules <= min(len(TEMPLATES), len(_NAMES) - 1):
        raise ConfigError(f"task.num_modules={num_modules}: want 1 to {min(len(TEMPLATES), len(_NAMES) - 1)}")
    broken, bug = rng.choice(bugs_of(held_out=held_out))
    others = rng.sample([one for one in TEMPLATES if one is not broken], num_modules - 1)
    templates = [broken, *others]
    rng.shuffle(templates)
    package, *modules = rng.sample(_NAMES, num_modules + 1)
    files = {f"{package}/__init__.py": ""}
    tests: list[str] = []
    hidden: list[Call] = []
    path = repaired = ""
    for module, template in zip(modules, templates, strict=True):
        name, constant = rng.choice(template.names), rng.choice(template.constants)
        source = template.source.replace("{f}", name).replace("{k}", str(constant))
        right, wrong = (text.replace("{k}", str(constant)) for text in (bug.right, bug.wrong))
        content = source
        if template is broken:
            path, repaired = f"{package}/{module}.py", source
            assert source.count(right) == 1, (name, right)
            content = source.replace(right, wrong)
        files[f"{package}/{module}.py"] = content
        function, has_bug = _function(source, name), _function(content, name)
        drawn = _drawn(rng, template, function, has_bug if template is broken else None)
        visible, kept = drawn[:_NUM_VISIBLE], drawn[_NUM_VISIBLE:]
        tests.append(_test(module, name, [(one, _called(function, one)) for one in visible]))
        for one in kept:
            expected = _called(function, one)
            shows_bug = _called(has_bug, one) != expected
            hidden.append(
                Call(
                    module=f"{package}.{module}",
                    function=name,
                    arguments=one,
                    expected=expected,
                    shows_bug=shows_bug,
                )
            )
    imports = f"import unittest\n\nfrom {package} import {', '.join(sorted(modules))}\n\n\n"
    files[TESTS] = f"{imports}class Tests(unittest.TestCase):\n{''.join(tests).rstrip()}\n"
    described = "".join(f"* `{package}/{module}.py`\n" for module in sorted(modules))
    files["README.md"] = f"# {package}\n\n{described}\nTests: `{TESTS}`\n"
    rng.shuffle(hidden)
    return Repository(files=files, broken=path, kind=bug.kind, repaired=repaired, hidden=tuple(hidden))


def bugs_of(*, held_out: bool) -> list[tuple[Template, Bug]]:
    """Returns the bugs of one split."""
    return [(template, bug) for template in TEMPLATES for bug in template.bugs if bug.is_held_out is held_out]


def _drawn(
    rng: random.Random,
    template: Template,
    function: Callable[..., Any],
    has_bug: Callable[..., Any] | None,
) -> list[Arguments]:
    """Draws different arguments; with a bug, some of the visible ones and some of the hidden ones show it."""
    plain: list[Arguments] = []
    telling: list[Arguments] = []
    for _ in range(_MAX_DRAWS):
        if len(plain) >= _NUM_VISIBLE + _NUM_HIDDEN and (has_bug is None or len(telling) >= _NUM_TELLING):
            break
        one = template.draw(rng)
        if one in plain or one in telling:
            continue
        shows = has_bug is not None and _called(has_bug, one) != _called(function, one)
        (telling if shows else plain).append(one)
    assert has_bug is None or len(telling) >= 2, template.source
    if len(plain) < _NUM_VISIBLE:  # a bug that shows nearly always
        plain, telling = plain + telling[_NUM_TELLING:], telling[:_NUM_TELLING]
    num_plain = _NUM_VISIBLE - len(telling[:1])
    return [*telling[:1], *plain[:num_plain], *telling[1:], *plain[num_plain:]][: _NUM_VISIBLE + _NUM_HIDDEN]


def _function(source: str, name: str) -> Callable[..., Any]:
    """Returns the function of a source of this file."""
    names: dict[str, Any] = {}
    exec(source, names)
    function: Callable[..., Any] = names[name]
    return function


def _called(function: Callable[..., Any], arguments: Arguments) -> Any:
    """Returns [value, arguments afterwards] after JSON, or the name of the exception."""
    given = copy.deepcopy(arguments)
    try:
        value = function(*given)
    except Exception as error:  # a bug may raise anything
        return type(error).__name__
    return json.loads(json.dumps([value, given]))


def _test(module: str, name: str, calls: Sequence[tuple[Arguments, Any]]) -> str:
    """Returns a test method. Its first call also checks that the arguments do not change."""
    lines = [f"    def test_{name}(self):\n"]
    for number, (arguments, (value, _)) in enumerate(calls):
        shown = ", ".join(map(repr, arguments))
        if number == 0 and any(isinstance(one, (list, dict)) for one in arguments):
            lines.append(f"        arguments = [{shown}]\n")
            lines.append(f"        self.assertEqual({module}.{name}(*arguments), {value!r})\n")
            lines.append(f"        self.assertEqual(arguments, [{shown}])\n")
        else:
            lines.append(f"        self.assertEqual({module}.{name}({shown}), {value!r})\n")
    return "".join(lines) + "\n"


def _numbers(rng: random.Random, least: int = 0, most: int = 7) -> list[int]:
    return [rng.randrange(-9, 10) for _ in range(rng.randint(least, most))]


def _words(rng: random.Random, most: int = 5) -> list[str]:
    return [rng.choice(("fig", "pear", "plum", "kiwi", "lime", "date")) for _ in range(rng.randint(0, most))]


TEMPLATES = (
    Template(
        names=("moving_sums", "window_sums", "rolling_sums"),
        source=(
            "def {f}(values, size):\n"
            '    """Sums of all windows of `size` neighbors."""\n'
            "    sums = []\n"
            "    for start in range(len(values) - size + 1):\n"
            "        sums.append(sum(values[start : start + size]))\n"
            "    return sums\n"
        ),
        bugs=(
            Bug(kind="off_by_one", right="len(values) - size + 1", wrong="len(values) - size"),
            Bug(kind="wrong_bound", right="start + size]", wrong="size]", is_held_out=True),
        ),
        draw=lambda rng: [_numbers(rng, 2), rng.randint(1, 3)],
    ),
    Template(
        names=("clamp_all", "limit_all", "bounded"),
        source=(
            "def {f}(values, low, high):\n"
            '    """The values, none below `low` and none above `high`."""\n'
            "    return [max(low, min(high, value)) for value in values]\n"
        ),
        bugs=(
            Bug(kind="swapped_names", right="max(low, min(high, value))", wrong="max(high, min(low, value))"),
            Bug(kind="missing_case", right="max(low, min(high, value))", wrong="min(high, value)"),
        ),
        draw=lambda rng: [_numbers(rng), rng.randint(-5, 0), rng.randint(1, 5)],
    ),
    Template(
        names=("count_words", "tally", "frequencies"),
        source=(
            "def {f}(words):\n"
            '    """How often each word occurs."""\n'
            "    counts = {}\n"
            "    for word in words:\n"
            "        counts[word] = counts.get(word, 0) + 1\n"
            "    return counts\n"
        ),
        bugs=(
            Bug(kind="wrong_constant", right="counts.get(word, 0)", wrong="counts.get(word, 1)"),
            Bug(kind="lost_update", right="counts.get(word, 0) + 1", wrong="1"),
        ),
        draw=lambda rng: [_words(rng)],
    ),
    Template(
        names=("top_scores", "largest", "best_of"),
        source=(
            "def {f}(scores):\n"
            '    """The {k} largest scores, largest first; the argument is not changed."""\n'
            "    ordered = sorted(scores, reverse=True)\n"
            "    return ordered[:{k}]\n"
        ),
        bugs=(
            Bug(kind="wrong_order", right="sorted(scores, reverse=True)", wrong="sorted(scores)"),
            Bug(kind="off_by_one", right="ordered[:{k}]", wrong="ordered[1:{k}]"),
            Bug(
                kind="changes_argument",
                right="ordered = sorted(scores, reverse=True)",
                wrong="scores.sort(reverse=True)\n    ordered = scores",
                is_held_out=True,
            ),
        ),
        draw=lambda rng: [_numbers(rng)],
        constants=(2, 3, 4),
    ),
    Template(
        names=("mean_or_else", "average", "typical"),
        source=(
            "def {f}(values, otherwise):\n"
            '    """The mean, rounded down to a whole number; `otherwise` without values."""\n'
            "    if not values:\n"
            "        return otherwise\n"
            "    return sum(values) // len(values)\n"
        ),
        bugs=(
            Bug(kind="missing_case", right="    if not values:\n        return otherwise\n", wrong=""),
            Bug(kind="wrong_operator", right="sum(values) // len(values)", wrong="sum(values) % len(values)"),
            Bug(kind="wrong_function", right="sum(values) //", wrong="max(values) //"),
        ),
        draw=lambda rng: [_numbers(rng, 0, 2), rng.randint(-9, 0)],
    ),
    Template(
        names=("shipping_price", "ticket_price", "fee"),
        source=(
            "def {f}(weight):\n"
            '    """{k} up to a weight of 10; 2 more for each started 5 above."""\n'
            "    if weight <= 10:\n"
            "        return {k}\n"
            "    return {k} + 2 * -(-(weight - 10) // 5)\n"
        ),
        bugs=(
            Bug(kind="wrong_comparison", right="weight <= 10", wrong="weight < 15"),
            Bug(
                kind="wrong_rounding",
                right="-(-(weight - 10) // 5)",
                wrong="((weight - 10) // 5)",
                is_held_out=True,
            ),
            Bug(kind="wrong_constant", right="+ 2 *", wrong="+ 3 *"),
        ),
        draw=lambda rng: [rng.randint(0, 40)],
        constants=(4, 7, 12),
    ),
    Template(
        names=("merge_settings", "combined", "with_defaults"),
        source=(
            "def {f}(defaults, given):\n"
            '    """The defaults, replaced by what is given; the arguments are not changed."""\n'
            "    merged = dict(defaults)\n"
            "    merged.update(given)\n"
            "    return merged\n"
        ),
        bugs=(
            Bug(kind="changes_argument", right="dict(defaults)", wrong="defaults"),
            Bug(
                kind="swapped_names",
                right="dict(defaults)\n    merged.update(given)",
                wrong="dict(given)\n    merged.update(defaults)",
            ),
        ),
        draw=lambda rng: [
            {word: rng.randrange(9) for word in _words(rng)},
            {word: rng.randrange(9) for word in _words(rng)},
        ],
    ),
    Template(
        names=("unique", "without_repeats", "distinct"),
        source=(
            "def {f}(items):\n"
            '    """Each item once, in the order of its first occurrence."""\n'
            "    seen = []\n"
            "    for item in items:\n"
            "        if item not in seen:\n"
            "            seen.append(item)\n"
            "    return seen\n"
        ),
        bugs=(
            Bug(kind="wrong_condition", right="if item not in seen", wrong="if item in items[1:]"),
            Bug(kind="wrong_order", right="return seen", wrong="return sorted(seen)"),
            Bug(
                kind="early_return",
                right="    return seen\n",
                wrong="        return seen\n    return seen\n",
                is_held_out=True,
            ),
        ),
        draw=lambda rng: [_words(rng, 6)],
    ),
    Template(
        names=("is_leap_year", "has_extra_day", "is_long_year"),
        source=(
            "def {f}(year):\n"
            '    """True in years divisible by 4; of full centuries only in those divisible by 400."""\n'
            "    if year % 100 == 0:\n"
            "        return year % 400 == 0\n"
            "    return year % 4 == 0\n"
        ),
        bugs=(
            Bug(
                kind="missing_case",
                right="    if year % 100 == 0:\n        return year % 400 == 0\n",
                wrong="",
            ),
            Bug(kind="wrong_constant", right="year % 400 == 0", wrong="year % 200 == 0", is_held_out=True),
        ),
        draw=lambda rng: [rng.choice((rng.randint(1800, 2100), 100 * rng.randint(10, 40)))],
    ),
    Template(
        names=("initials", "short_name", "abbreviated"),
        source=(
            "def {f}(name):\n"
            '    """The first letters of all words, in capitals, with a period after each."""\n'
            "    return ''.join(word[0].upper() + '.' for word in name.split())\n"
        ),
        bugs=(
            Bug(kind="wrong_index", right="word[0]", wrong="word[-1]"),
            Bug(kind="wrong_argument", right="name.split()", wrong="name.split(' ')"),
            Bug(kind="missing_call", right="word[0].upper()", wrong="word[0]", is_held_out=True),
        ),
        draw=lambda rng: [rng.choice((" ", "  ")).join(_words(rng))],
    ),
)
