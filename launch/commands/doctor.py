"""`areal-like doctor [CONFIG]`: checks a machine before a run: ports, disks, versions, GPUs, clocks, keys.

With `--gpu` it instead runs the paths that only GPUs have (`launch/doctor/gpu/`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.runtime.command_line import load_config
from areal_like.wire.sockets import bound_socket
from launch.commands.completion import installed_version
from launch.commands.configuration import configuration, settings_of
from launch.commands.output import private_file
from launch.commands.parser import JSON, argument, command, flag, group
from launch.doctor.checks import Finding, Level
from launch.doctor.gathering import ROLES, findings
from launch.doctor.gpu.report import Cleaner, report_of, show
from launch.doctor.gpu.running import run_stages
from launch.doctor.gpu.stages import STAGES, Outcome, Request, Stage
from launch.observation.reach import RunningJob
from launch.view.status import plain_table

PEER_TOKEN = "AREAL_LIKE_PEER_TOKEN"
"""Environment variable with the token of `--peer`: every user of a machine can read command lines."""
_LEAST_TOKEN = 16
_REPORT = "areal-like-gpu.json"
_OF_GPU = ("device", "sglang", "peer", "stage", "out")
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "red"}


@command(
    "doctor",
    "Check this machine before a run: ports, names, disks, versions, GPUs, limits and keys. Exit code 1 on "
    "errors; warnings do not count. With --gpu: run every path that only GPUs have against the CPU's "
    "numbers, in at most ten minutes, and write a file for a report. Exit code 1 if a stage fails.",
    *configuration(),
    argument(
        "--role",
        action="append",
        choices=ROLES,
        metavar="ROLE",
        help="only what this role needs here (buffer, trainer or rollout); may be repeated",
    ),
    argument(
        "--buffer",
        action="append",
        metavar="HOST:PORT",
        help="compare clocks with a running job, at its buffer's HTTP server",
    ),
    JSON,
    flag("--all", "also show what is in order"),
    group(
        "GPUs",
        flag("--gpu", "check the GPUs themselves; takes no configuration"),
        argument(
            "--device",
            choices=("cuda", "cpu"),
            help="cuda (default), or cpu for the small form of every stage, without a GPU",
        ),
        argument("--sglang", metavar="PYTHON", help="interpreter of an environment that has SGLang"),
        argument(
            "--peer",
            metavar="HOST:PORT",
            help="measure the way to a second machine: the same command on both; HOST is one of them",
        ),
        argument(
            "--stage",
            action="append",
            choices=tuple(STAGES),
            metavar="STAGE",
            help=f"only this stage; may be repeated ({', '.join(STAGES)})",
        ),
        argument("--out", metavar="FILE", help=f"the file for a report (default {_REPORT})"),
    ),
    examples=[
        "doctor",
        "doctor job.yaml --role trainer",
        "doctor job.yaml --role rollout --buffer node7:8080",
        "doctor --gpu --sglang /opt/sglang/bin/python",
        "doctor --gpu --peer 10.0.0.1:29400",
    ],
)
def main(args: argparse.Namespace) -> int:
    """Prints the findings; returns 1 if one of them is an error. Raises ConfigError for a wrong setting."""
    if args.gpu:
        return _check_gpus(args)
    if given := [name for name in _OF_GPU if getattr(args, name) is not None]:
        raise ConfigError(f"doctor: --{given[0]} is an option of --gpu: add it")
    config = load_config(settings_of("doctor", args))
    found = list(findings(config, args.role or ROLES, job=_job(config, args.buffer)))
    if args.json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
    else:
        _show(found, shows_all=args.all)
    return int(any(each.level is Level.ERROR for each in found))


def _job(config: Config, addresses: list[str] | None) -> RunningJob | None:
    security = config.security
    if not addresses:
        return None
    return RunningJob.at(addresses, keys=security.keys, tls_certificate=security.tls_certificate)


def _show(found: list[Finding], *, shows_all: bool) -> None:
    rows = [
        (Text(each.level.value, style=_STYLES[each.level]), *map(Text, (each.what, each.found, each.remedy)))
        for each in found
        if shows_all or each.level is not Level.OK
    ]
    console = Console()
    if rows:
        console.print(plain_table(("", "what", "found", "what to do"), rows))
    counts = {level: sum(each.level is level for each in found) for level in Level}
    summary = (
        f"{len(found)} checks: {counts[Level.ERROR]} errors, {counts[Level.WARNING]} warnings, "
        f"{counts[Level.OK]} in order"
    )
    console.print(summary, highlight=False, markup=False)


def _check_gpus(args: argparse.Namespace) -> int:
    """Runs the stages, prints their verdicts and writes the file."""
    if args.configuration or args.config or args.settings or args.role or args.buffer:
        raise ConfigError("doctor: --gpu checks the machine and takes no configuration, --role or --buffer")
    out = Path(args.out or _REPORT)
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(f"doctor: --out {out}: cannot be written: name another file")
    console = Console()
    chosen = [each for each in STAGES.values() if not args.stage or each.is_needed or each.name in args.stage]
    token = _token_of(args) if args.peer else ""

    def announce(stage: Stage) -> None:
        sys.stderr.write(f"{stage.name} (at most {stage.limit_s:.0f} s): {stage.proves}\n")

    with tempfile.TemporaryDirectory(prefix="areal-like-doctor-") as scratch:
        request = Request(
            device=args.device or "cuda",
            scratch=scratch,
            sglang=str(Path(args.sglang).expanduser()) if args.sglang else "",
            peer=args.peer or "",
            token=token,
        )
        results = list(run_stages(chosen, request, on_start=announce))
    report = report_of(
        results,
        device=request.device,
        version=installed_version(),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        cleaner=Cleaner(
            secrets=[token, scratch, str(Path.home())],
            hosts=[request.peer.rpartition(":")[0].strip("[]")],
        ),
    )
    with private_file(out, verb="doctor") as file:
        file.write((json.dumps(report, indent=2) + "\n").encode())
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, console)
        console.print(f"{report['verdict']}: attach {out} to a report", highlight=False, markup=False)
    return int(report["verdict"] == Outcome.FAILED)


def _token_of(args: argparse.Namespace) -> str:
    """The token of `--peer`; the machine that listens makes one. Raises ConfigError."""
    peer: str = args.peer
    host, _, port = peer.rpartition(":")
    is_any = host.strip("[]") in ("", "0.0.0.0", "::", "*")
    if is_any or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ConfigError(f"doctor: --peer {peer}: give an address and a port, such as 10.0.0.1:29400")
    token = os.environ.pop(PEER_TOKEN, "")
    if token and len(token) < _LEAST_TOKEN:
        raise ConfigError(f"doctor: {PEER_TOKEN} has fewer than {_LEAST_TOKEN} characters: use a longer one")
    if token:
        return token
    try:
        bound_socket(host.strip("[]"), 0).close()
    except OSError:
        raise ConfigError(
            f"doctor: {host} is not an address of this machine: start the command there first, and set "
            f"{PEER_TOKEN} here to the token that it prints"
        ) from None
    token = secrets.token_hex(16)
    command = f"areal-like doctor --gpu --peer {peer}" + "".join(
        [
            f" --device {args.device}" if args.device else "",
            *(f" --stage {each}" for each in args.stage or ()),
        ]
    )
    sys.stderr.write(f"on the other machine: {PEER_TOKEN}={token} {command}\n")
    return token
