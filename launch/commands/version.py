"""`areal-like version`: prints the installed version."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys

from launch.commands.parser import Parser


def add_arguments(parser: Parser) -> None:
    """The command takes no arguments."""
    parser.describe("Print the version of the installed package.", "version")


def main(args: argparse.Namespace) -> int:
    """Prints the version."""
    sys.stdout.write(f"areal-like {installed_version()}\n")
    return 0


def installed_version() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version("areal-like")
    except importlib.metadata.PackageNotFoundError:
        return "(from a checkout)"
