"""`areal-like profile RUN`: records the next steps of a running trainer and shows where their time goes.

Each rank is asked over HTTP, records its steps with torch's profiler, and writes traces and a report into the
run's directory. This command waits for the reports, so it also succeeds when the trainer ends in between.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import load_config
from launch.commands.parser import RUN, argument, command, flag
from launch.observation.http_json import COMMAND_TIMEOUT_S, Operator, fetch_json, post_json
from launch.run_directory.rundir import find_run
from launch.run_files import read_object
from launch.view.profile import profile_lines

_TICK_S = 0.2
_SILENCE_S = 20.0
"""Longest time without a response of a rank and without its report."""


@command(
    "profile",
    "Record the next steps of a running trainer with torch's profiler: traces for Perfetto in RUN/profiles, "
    "and a table of where the time goes. Exit code 1 if a rank has recorded fewer steps.",
    RUN,
    argument("--steps", type=int, default=3, metavar="N", help="steps to record (3)"),
    argument("--rank", default="0", metavar="R", help="ranks: 0 (the default), 0,3 or all"),
    argument("--out", metavar="DIR", help="also copy the files to DIR"),
    flag("--shapes", "with the shapes of the operations' inputs"),
    flag("--memory", "with allocations"),
    argument("--timeout", type=float, default=3600.0, metavar="S", help="longest wait (3600)"),
    examples=["profile myrun", "profile myrun --steps 5 --rank 0,3 --memory"],
)
def main(args: argparse.Namespace) -> int:
    """Returns 0 when every rank has recorded all steps, 1 when one has recorded fewer."""
    if args.steps < 1:
        raise ConfigError(f"profile: --steps {args.steps}: use at least 1")
    if not args.timeout > 0:
        raise ConfigError(f"profile: --timeout {args.timeout:g}: use a number of seconds above 0")
    paths = RunPaths(find_run(args.run))
    out = None if args.out is None else Path(args.out)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"profile: --out {out}: {error.strerror}") from None
    config = load_config(["--config", str(paths.config)])
    ranks = _ranks_of(args.rank, paths, Operator(config.security, paths.endpoints))
    step, num_steps = max(int(rank.status["step"]) for rank in ranks), int(ranks[0].status["num_steps"])
    if step >= num_steps or ranks[0].status["state"] == "draining":
        raise ConfigError("profile: the trainer is ending, and will not train another step")
    request = {"id": secrets.token_hex(8), "steps": args.steps, "ranks": len(ranks)}
    for rank in ranks:
        rank.ask(request | {"shapes": args.shapes, "memory": args.memory})
    reports = [rank.wait(str(request["id"]), timeout_s=args.timeout) for rank in ranks]
    if out is not None:
        for rank, report in zip(ranks, reports, strict=True):
            for file in (*report["traces"], rank.report_file(str(request["id"])).name):
                shutil.copy(paths.profiles / Path(file).name, out / Path(file).name)
    print("\n".join(profile_lines(reports, directory=out or paths.profiles)))
    return int(any(len(report["steps"]) < args.steps for report in reports))


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """A rank of the trainer."""

    number: int
    address: str
    status: dict[str, Any]
    """Its response at the start."""
    paths: RunPaths
    operator: Operator

    def ask(self, request: dict[str, Any]) -> None:
        """Asks it to record. Raises ConfigError with its reason if it refuses."""
        try:
            post_json(self.address, "/control/profile", request, operator=self.operator)
        except OSError as error:
            raise ConfigError(f"profile: rank {self.number} does not respond ({error})") from None

    def report_file(self, profile_id: str) -> Path:
        """The path of the report that it writes."""
        return self.paths.profiles / f"report-{profile_id}-rank{self.number}.json"

    def wait(self, profile_id: str, *, timeout_s: float) -> dict[str, Any]:
        """Waits for its report. Raises ArealError if it ends without one, or after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        heard_s = time.monotonic()
        report = self.report_file(profile_id)
        while not report.exists():
            status = fetch_json(self.address, "/status", operator=self.operator)
            now_s = time.monotonic()
            if status is not None and status.get("profile", {}).get("id") == profile_id:
                heard_s = now_s
            elif now_s > heard_s + _SILENCE_S:
                raise ArealError(
                    f"profile: rank {self.number} has ended without a report; its log is in {self.paths.logs}"
                )
            if now_s > deadline_s:
                raise ArealError(
                    f"profile: rank {self.number} has not finished within {timeout_s:g} s "
                    f"({(status or {}).get('profile', {}).get('progress', 'no response')}): it writes "
                    f"{report} when it has, or wait longer with --timeout"
                )
            time.sleep(_TICK_S)
        return dict(json.loads(report.read_text()))


def _ranks_of(given: str, paths: RunPaths, operator: Operator) -> list[_Rank]:
    """The ranks that the user names. Raises ConfigError if one does not run or cannot record now."""
    found = {}
    for path in paths.endpoints.glob("trainer-*.json"):
        digits, endpoint = path.stem.removeprefix("trainer-"), read_object(path)
        if digits.isdecimal() and endpoint.get("http"):
            found[int(digits)] = str(endpoint["http"])
    if not found:
        raise ConfigError(
            f"profile: no trainer of {paths.root} is running; only a job that trains can be profiled"
        )
    if given == "all":
        numbers = sorted(found)
    else:
        parts = given.split(",")
        if not all(part.isdecimal() and len(part) < 7 for part in parts):
            raise ConfigError(f"profile: --rank {given}: use numbers with commas, such as 0,3, or all")
        numbers = sorted({int(part) for part in parts})
    if unknown := [number for number in numbers if number not in found]:
        raise ConfigError(
            f"profile: --rank {given}: there is no rank {unknown[0]} (ranks: {min(found)} to {max(found)})"
        )
    ranks = []
    for number in numbers:
        status = fetch_json(found[number], "/status", operator=operator, timeout_s=COMMAND_TIMEOUT_S)
        if status is None:
            raise ConfigError(
                f"profile: rank {number} at {found[number]} does not respond; is the job running?"
            )
        if "profile" not in status:
            raise ConfigError(f"profile: rank {number} is still starting: ask again when it trains")
        if status["profile"]:
            raise ConfigError(
                f"profile: rank {number} is still recording another profile "
                f"({status['profile']['progress']}): ask again when it is done"
            )
        ranks.append(
            _Rank(number=number, address=found[number], status=status, paths=paths, operator=operator)
        )
    return ranks
