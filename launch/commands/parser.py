"""The argument parser of every `areal-like` command.

Help, usage lines and completion are made from its arguments, so that each option is stated once. `--help`
has: usage, description, arguments, options, examples (a test parses the examples).
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from areal_like.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a ConfigError with one message. `--help` raises SystemExit(0)."""

    def __init__(self, verb: str, words: Sequence[str] = ()) -> None:
        """`words`: the command line after the verb, as far as it is known."""
        super().__init__(
            prog=f"areal-like {verb}",
            formatter_class=_Formatter,
            allow_abbrev=False,
            conflict_handler="resolve",  # `run` replaces -h
        )
        self.verb = verb
        self.names_buffer = any(word.partition("=")[0] == "--buffer" for word in words)
        """Whether the job is named by `--buffer`, so that there is no RUN."""
        self.examples: tuple[str, ...] = ()

    def describe(self, text: str, *examples: str) -> None:
        """What the command does, in full sentences, and command lines (without `areal-like`) that show it."""
        self.description, self.examples = text, examples
        self.epilog = "examples:\n" + "\n".join(f"  areal-like {example}" for example in examples)

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses the command line after the verb; options may stand anywhere. Raises ConfigError."""
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


def add_run(parser: Parser, *, nargs: str | None = None) -> None:
    """The positional RUN."""
    parser.add_argument("run", metavar="RUN", nargs=nargs, help="a name below runs/ or a directory")


def add_settings(
    parser: Parser,
    *,
    metavar: str = "key=value",
    help: str = "settings (`areal-like run --help` lists them)",
) -> None:
    """The positional settings at the end."""
    parser.add_argument(
        "settings",
        metavar=metavar,
        nargs="*",
        default=[],  # without a default, argparse lists the settings as required
        help=help,
    )
