"""`areal-like deploy-files DIR`: copies the files of launch/deploy/ into one of the user's directories.

They are examples to edit: configurations and rules of monitoring, and files of schedulers. The dashboards are
made from their panels. An installed package has the files too, so a checkout is not needed. Nothing in them
is a secret.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path

from areal_like.errors import ConfigError
from launch.commands.parser import argument, command, flag
from launch.deploy.grafana.build import write_dashboards

SOURCE = Path(__file__).resolve().parents[1] / "deploy"
"""The files, package data of `launch`."""


@command(
    "deploy-files",
    "Write configuration files to adapt, for Prometheus (with rules and alerts), Grafana, systemd, Slurm, "
    "Kubernetes and containers.",
    argument("directory", metavar="DIR", type=Path, help="where to write the files"),
    flag("--force", "also into a directory that has files, and over those"),
    examples=["deploy-files deploy"],
)
def main(args: argparse.Namespace) -> int:
    """Writes the files and prints their names; returns 0."""
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
            print(destination)
        for dashboard in write_dashboards(target / "grafana" / "dashboards"):
            print(dashboard)
    except OSError as error:
        raise ConfigError(f"cannot write to {target}: {error.strerror or error}") from None
    return 0


def deploy_files() -> Iterator[Path]:
    """The files to copy, relative to SOURCE, in alphabetical order."""
    for path in sorted(SOURCE.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path.relative_to(SOURCE)
