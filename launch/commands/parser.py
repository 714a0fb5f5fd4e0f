"""The declaration of a verb of `areal-like` (`command`), and the parser that is made from it.

Usage, help, examples and completion come from the declaration, so that each option is stated once. `--help`
has: usage, description, arguments, options, examples (a test parses the examples).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from areal_like.errors import ConfigError
from launch.formatting import typed_seconds

Main = Callable[[argparse.Namespace], int]
"""What a verb does; returns the exit code."""
Argument = Callable[[argparse._ActionsContainer], object]
"""Adds one argument, or several, to a parser or to a group of a parser."""


class Command(NamedTuple):
    """The declaration of one verb."""

    description: str
    """What the verb does, in full sentences."""
    arguments: tuple[Argument, ...]
    """The arguments, in the order of the help."""
    examples: tuple[str, ...]
    """Command lines without `areal-like`."""
    main: Main


VERBS: dict[str, Command] = {}
"""The verbs of the modules in launch/commands/ that are imported so far."""


def command(
    verb: str, description: str, *arguments: Argument, examples: Sequence[str]
) -> Callable[[Main], Main]:
    """Declares a verb; decorates the function that does it."""

    def declare(main: Main) -> Main:
        VERBS[verb] = Command(description, arguments, tuple(examples), main)
        return main

    return declare


def argument(*names: str, **options: Any) -> Argument:
    """An argument or option, with the parameters of `ArgumentParser.add_argument`."""
    return lambda parser: parser.add_argument(*names, **options)


def flag(name: str, help: str) -> Argument:
    """An option without a value."""
    return argument(name, action="store_true", help=help)


def seconds(least: float, most: float, *, hint: str = "") -> Callable[[str], float]:
    """The type of an argument that is a time between two limits: `90`, `90s`, `10m`, `2h`.

    `hint`: what to do if the word was meant for another argument.
    """

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if least <= (found := typed_seconds(text)) <= most:
                return found
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time from {least:g} to {most:g} s, such as 60s or 5m"
            + (f"; {hint}" if hint else "")
        )

    return parse


def group(title: str, *arguments: Argument) -> Argument:
    """Options under a heading of their own in the help."""

    def add(parser: argparse._ActionsContainer) -> None:
        titled = parser.add_argument_group(title)
        for each in arguments:
            each(titled)

    return add


def run_argument(*, nargs: str | None = None) -> Argument:
    """The positional RUN."""
    return argument("run", metavar="RUN", nargs=nargs, help="a name below runs/ or a directory")


def settings_argument(
    *, metavar: str = "key=value", help: str = "settings (`areal-like run --help` lists them)"
) -> Argument:
    """The positional settings at the end."""
    # Without a default, argparse lists the settings as required.
    return argument("settings", metavar=metavar, nargs="*", default=[], help=help)


RUN = run_argument()
SETTINGS = settings_argument()
JSON = flag("--json", "print JSON")


def as_typed(args: argparse.Namespace, *names: str) -> list[str]:
    """The options of these names as they were given, for another process: `--json`, `--rows`, `5`."""
    words = []
    for name in names:
        if (value := getattr(args, name)) not in (None, False):
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError with one message for a mistake. `--help` raises
    SystemExit(0)."""

    def __init__(self, verb: str, words: Sequence[str] = ()) -> None:
        """`verb`: already declared. `words`: the command line after the verb, as far as it is known."""
        self.declared = VERBS[verb]
        examples = "\n".join(f"  areal-like {example}" for example in self.declared.examples)
        super().__init__(
            prog=f"areal-like {verb}",
            description=self.declared.description,
            epilog=f"examples:\n{examples}",
            formatter_class=_Formatter,
            allow_abbrev=False,
            conflict_handler="resolve",  # `run` replaces -h
        )
        self.verb = verb
        self.names_buffer = any(word.partition("=")[0] == "--buffer" for word in words)
        """Whether the job is named by `--buffer`, so that there is no RUN."""
        for add in self.declared.arguments:
            add(self)

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses the command line after the verb; options may come anywhere. Raises ConfigError."""
        self.usage = self.format_usage()  # argparse changes the arguments while it parses them
        parsed, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], options, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed

    def format_usage(self) -> str:
        """One line: the arguments and required options; the others are listed below it."""
        needed = [action for action in self._actions if action.required or not action.option_strings]
        formatter = self._get_formatter()
        formatter.add_usage(None, needed, (), prefix="")
        return " ".join([*formatter.format_help().split(), "[options]"])

    def format_help(self) -> str:
        """The text of `--help`."""
        self.usage = self.usage or self.format_usage()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{self.verb}: {message} (usage: {self.usage or self.format_usage()})")


class _Formatter(argparse.HelpFormatter):
    """Wraps the description; examples keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:\n"):
            return text
        return super()._fill_text(text, width, indent)
