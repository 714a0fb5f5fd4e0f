"""`areal-like version`: prints the installed version."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Does nothing: the command takes no arguments."""


def main(args: argparse.Namespace) -> int:
    """Prints the version."""
    try:
        version = importlib.metadata.version("areal-like")
    except importlib.metadata.PackageNotFoundError:
        version = "(from a checkout)"
    sys.stdout.write(f"areal-like {version}\n")
    return 0
