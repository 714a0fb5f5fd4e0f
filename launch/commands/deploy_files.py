"""`areal-like deploy-files DIR`: copies the files of launch/deploy/ into a directory of the user's.

They are examples to edit: configurations, rules and dashboards of monitoring, and files of schedulers. An
installed package has them too, so a checkout is not needed. Nothing in them is a secret.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from areal_like.errors import ConfigError
from launch.commands.parser import Parser

SOURCE = Path(__file__).resolve().parents[1] / "deploy"
"""The files, package data of `launch`."""


def add_arguments(parser: Parser) -> None:
    """DIR and --force."""
    parser.describe(
        "Write configurations to adapt: of Prometheus (with rules and alerts), Grafana, systemd, Slurm, "
        "Kubernetes and containers.",
        "deploy-files deploy",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to write the files")
    parser.add_argument(
        "--force", action="store_true", help="also into a directory that has files, and over those"
    )


def main(args: argparse.Namespace) -> int:
    """Copies the files and prints their names; returns 0."""
    target = args.directory.expanduser()
    try:
        if target.is_dir() and any(target.iterdir()) and not args.force:
            raise ConfigError(
                f"{target} is not empty: name a new directory, or give --force to write over its files"
            )
        for name in deploy_files():
            destination = target / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(SOURCE / name, destination)
            sys.stdout.write(f"{destination}\n")
    except OSError as error:
        raise ConfigError(f"cannot write to {target}: {error.strerror or error}") from None
    return 0


def deploy_files() -> Iterator[Path]:
    """The files to copy, relative to SOURCE, in alphabetical order."""
    for path in sorted(SOURCE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(SOURCE)
