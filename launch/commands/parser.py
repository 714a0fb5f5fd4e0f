"""The argument parser of every `areal-like` command."""

from __future__ import annotations

import argparse
from typing import NoReturn

from areal_like.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are a ConfigError with one message. `--help` raises SystemExit(0)."""

    def __init__(self, verb: str, *, usage: str, summary: str) -> None:
        super().__init__(
            prog=f"areal-like {verb}",
            usage=f"areal-like {usage}",
            description=summary,
            allow_abbrev=False,
            conflict_handler="resolve",  # `run` replaces -h
        )
        self._verb, self._usage = (
            verb,
            " or ".join(part.strip() for part in f"areal-like {usage}".splitlines()),
        )

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(f"{self._verb}: {message} (usage: {self._usage})")


def add_run(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    """The positional RUN."""
    parser.add_argument("run", metavar="RUN", nargs=nargs, help="a name below runs/ or a directory")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The positional settings at the end."""
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],  # without a default, argparse lists the settings as required
        help="settings (see `areal-like run --help`)",
    )
