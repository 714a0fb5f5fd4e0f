"""Stands in for the command lines of Docker and Podman, from their documentation: run, exec, rm, ps, inspect.

    HOME=DIR python fake_container_cli.py run --interactive ... IMAGE ...

A container is a directory below $HOME/containers: its record, and its /tmp. Commands run in bwrap with that
/tmp, as the user of `--user`. Only options that both command lines document for these uses are known; another
one ends the call as they would, with exit code 125. What is left out: images, cgroups, the network, and the
limits that are options here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

IMAGE = "python:test"
ROOT = Path(os.environ["HOME"], "containers")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        fail(f"unknown flag: {message}", 125)


def fail(message: str, code: int) -> None:
    sys.stderr.write(f"{message}\n")
    sys.exit(code)


def containers() -> dict[str, dict[str, Any]]:
    """Name -> record of each container."""
    found = {}
    for path in ROOT.glob("*/record.json"):
        with contextlib.suppress(OSError, ValueError):
            found[path.parent.name] = json.loads(path.read_text())
    return found


def in_container(name: str, *, user: str, workdir: str, command: list[str]) -> list[str]:
    python = str(Path(sys.executable).resolve().parent)
    uid, gid = user.split(":")
    return [
        *("bwrap", "--unshare-all", "--unshare-user", "--die-with-parent", "--uid", uid, "--gid", gid),
        *(
            "--ro-bind",
            "/",
            "/",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--bind",
            str(ROOT / name / "tmp"),
            "/tmp",
        ),
        *("--setenv", "PATH", f"{python}:/usr/bin:/bin", "--chdir", workdir, "--", *command),
    ]


def run(words: list[str]) -> int:
    parser = _Parser(prog="run", allow_abbrev=False)
    for flag in ("--interactive", "--rm", "--read-only"):
        parser.add_argument(flag, action="store_true", required=True)
    for option in (
        *("--name", "--pull", "--network", "--hostname", "--tmpfs", "--shm-size", "--workdir"),
        *("--user", "--cap-drop", "--security-opt", "--pids-limit", "--memory", "--memory-swap"),
        "--entrypoint",
    ):
        parser.add_argument(option, required=True)
    parser.add_argument("--label", action="append", required=True)
    if Path(sys.argv[0]).name == "podman":
        parser.add_argument("--read-only-tmpfs", choices=["true", "false"])
    parser.add_argument("image")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    if given.image != IMAGE:
        fail(f"docker: Error response from daemon: No such image: {given.image}", 125)
    folder = ROOT / given.name
    (folder / "tmp").mkdir(parents=True)
    (folder / "tmp").chmod(0o1777)
    (folder / "record.json").write_text(json.dumps(vars(given) | {"pid": os.getpid()}))
    command = [given.entrypoint, *given.command]
    words = in_container(given.name, user=given.user, workdir=given.workdir, command=command)
    code = subprocess.run(words, check=False).returncode  # its program reads this stdin
    shutil.rmtree(folder, ignore_errors=True)
    return code


def exec_(words: list[str]) -> int:
    parser = _Parser(prog="exec", allow_abbrev=False)
    parser.add_argument("--interactive", action="store_true")
    parser.add_argument("--user", default="0:0")
    parser.add_argument("--workdir", default="/tmp")
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("name")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    if given.name not in containers():
        fail(f"Error response from daemon: No such container: {given.name}", 1)
    command = ["env", *given.env, *given.command]
    words = in_container(given.name, user=given.user, workdir=given.workdir, command=command)
    return subprocess.run(words, check=False).returncode


def rm(words: list[str]) -> int:
    parser = _Parser(prog="rm", allow_abbrev=False)
    parser.add_argument("--force", action="store_true", required=True)
    parser.add_argument("names", nargs="+")
    for name in parser.parse_args(words).names:
        record = containers().get(name)
        if record is None:  # `rm --force` ignores that
            sys.stderr.write(f"Error response from daemon: No such container: {name}\n")
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(record["pid"], 9)
        shutil.rmtree(ROOT / name, ignore_errors=True)
        print(name)
    return 0


def ps(words: list[str]) -> int:
    parser = _Parser(prog="ps", allow_abbrev=False)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--filter", action="append", required=True)
    wanted = {word.removeprefix("label=") for word in parser.parse_args(words).filter}
    print("\n".join(name for name, record in containers().items() if wanted <= set(record["label"])))
    return 0


def inspect(words: list[str]) -> int:
    parser = _Parser(prog="inspect", allow_abbrev=False)
    parser.add_argument("--format", required=True)
    parser.add_argument("name")
    given = parser.parse_args(words)
    assert given.format == "{{.State.Running}}"
    if given.name not in containers():
        fail(f"Error: No such object: {given.name}", 1)
    print("true")
    return 0


if __name__ == "__main__":
    verbs = {"run": run, "exec": exec_, "rm": rm, "ps": ps, "inspect": inspect}
    sys.exit(verbs[sys.argv[1]](sys.argv[2:]))
