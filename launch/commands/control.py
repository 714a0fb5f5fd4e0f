"""Verbs that change a running job by one request: pause, resume, set, cordon, uncordon, drain, drop, unfence.

Every shard of the buffer gets the request and has the change on disk before it responds, except that one
shard is enough for `drain`: it tells the server over the connection that the server has with it. `drop` and
`unfence` also change the ledger of a stopped job: `python -m buffer OPTION` opens it, and refuses if another
process has it open.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from typing import Any

from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths
from areal_like.shards import Shard, all_shards
from launch.commands.foreground import run_role
from launch.commands.parser import Argument, argument, command
from launch.commands.running_job import JOB, SERVER, job_of
from launch.observation.reach import NoResponseError, RunningJob
from launch.run_files import read_object

CHANGES = ("trainer.lr", "max_staleness", "eval.interval", "daemon.log_level", "evaluate", "checkpoint")
"""Keys of `set`, for help and completion; the buffer decides."""
_TICK_S = 0.2
_TIMEOUT_S = 30.0


def _grants(verb: str, description: str, *arguments: Argument, examples: Sequence[str], done: str) -> None:
    """Declares a verb that decides whether leases are granted, to all rollout servers or to one.

    `done`: printed afterwards; SERVER stands for the server's name.
    """

    @command(verb, description, JOB, *arguments, examples=examples)
    def post(args: argparse.Namespace) -> int:
        server = getattr(args, "server", "")
        responses = job_of(args).post_all(verb, {"server": server} if server else {})
        has_changed = any(response.get("changed") for response in responses)
        print(done.replace("SERVER", server) + ("" if has_changed else ", as before"))
        return 0


_grants(
    "pause",
    "Grant no leases for training until `areal-like resume`: samples that have started are finished, and "
    "evaluations continue.",
    examples=["pause myrun", "pause --buffer node7:8080"],
    done="the run is paused: held samples are finished, and no new ones begin",
)
_grants(
    "resume",
    "End a pause. (A run that was stopped continues with `areal-like run name=RUN resume=latest`.)",
    examples=["resume myrun", "resume --buffer node7:8080"],
    done="the run goes on",
)
_grants(
    "cordon",
    "Grant one rollout server no new leases: it finishes what it holds and still gets weights.",
    SERVER,
    examples=["cordon myrun rollout-1"],
    done="SERVER gets no new leases",
)
_grants(
    "uncordon",
    "Grant a cordoned rollout server leases again.",
    SERVER,
    examples=["uncordon myrun rollout-1"],
    done="SERVER gets leases again",
)


@command(
    "set",
    "Change a running job from its next step on. max_staleness may rise up to the one that the job was "
    "started with, and tickets that have begun keep theirs. evaluate=now and checkpoint=now act once, after "
    "the step in training.",
    JOB,
    argument("changes", metavar="key=value", nargs="+", help=f"keys: {', '.join(CHANGES)}"),
    examples=["set myrun trainer.lr=1e-5", "set myrun evaluate=now checkpoint=now"],
)
def change_settings(args: argparse.Namespace) -> int:
    """Returns 0 when every shard has the changes on disk. Raises ConfigError if one of them is refused."""
    wanted: dict[str, str] = {}
    for change in args.changes:
        key, separator, value = change.partition("=")
        if not separator or not key or not value:
            raise ConfigError(f"set {change}: expected key=value, such as trainer.lr=1e-5")
        if key in wanted:
            raise ConfigError(f"set {change}: {key} is given twice")
        wanted[key] = value
    for made in job_of(args).post_all("set", wanted)[0]["changes"]:
        print(_told(**made))
    return 0


def _told(*, key: str, value: str, before: str, step: int) -> str:
    if not before:
        return f"{key}: after step {step}"
    if before == value:
        return f"{key}={value}, as before"
    return f"{key}={value} from step {step} on (before: {before})"


@command(
    "drain",
    "End one rollout server of a running job: it takes no new leases, finishes or returns those it holds, "
    "and exits. The command waits for that, at most daemon.drain_timeout_s.",
    JOB,
    SERVER,
    examples=["drain myrun rollout-1"],
)
def drain_server(args: argparse.Namespace) -> int:
    """Returns 0 when the server has left."""
    drain(job_of(args), args.server)
    print(f"{args.server} has left")
    return 0


def drain(job: RunningJob, name: str) -> None:
    """Asks one rollout server to end, and waits: it takes no new leases and returns those it holds.

    Raises ConfigError when there is no such server or it cannot be reached, ArealError when it does not leave
    within `daemon.drain_timeout_s`.
    """
    servers = job.servers()
    if name not in servers:
        known = ", ".join(sorted(servers)) or "none is running"
        raise ConfigError(f"drain: {job.short_name} has no rollout server {name!r} (servers: {known})")
    # Not to the server's own HTTP address: that is a claim in the server's hello.
    try:
        job.post("drain_server", {"server": name})
    except ConfigError as error:
        raise ConfigError(f"drain: {name} cannot be told to leave ({error})") from None
    timeout_s = job.config.daemon.drain_timeout_s
    deadline_s = time.monotonic() + timeout_s
    while name in job.servers():
        if time.monotonic() > deadline_s:
            raise ArealError(f"drain: {name} did not leave within {timeout_s:g} s")
        time.sleep(_TICK_S)


def _ticket_id(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a ticket number")
    return int(text)


@command(
    "drop",
    "Permanently remove harmful tickets from the step in which they are recorded; other tickets take their "
    "places. The step must not have been trained yet. All of the tickets are dropped, or none.",
    JOB,
    argument("tickets", metavar="TICKET", nargs="+", type=_ticket_id, help="its number"),
    examples=["drop myrun 1718 1723"],
)
def drop_tickets(args: argparse.Namespace) -> int:
    """Drops the tickets. Raises ConfigError with the reason of a refusal.

    With several shards, each gets the whole list and drops its own tickets.
    """
    tickets = ", ".join(map(str, args.tickets))
    option = ("--drop", tickets.replace(" ", ""))
    if _change_ledger(job_of(args), "drop", {"tickets": args.tickets}, option=option):
        dropped = f"the running buffer has dropped tickets {tickets}"
        print(f"{dropped}; the trainer restarts from its newest checkpoint")
    else:
        dropped = f"dropped tickets {tickets} from the ledger of a job that is not running"
        print(f"{dropped}; continue the job with resume=latest")
    return 0


@command(
    "unfence",
    "Take the name ROLE from the process that has it, so that a new one gets it. This is needed only when a "
    "process that cannot be ended still responds under the name.",
    JOB,
    argument("role", metavar="ROLE", help="trainer, or the name of a rollout server"),
    examples=["unfence myrun trainer"],
)
def unfence(args: argparse.Namespace) -> int:
    """Takes the name at every shard; each shard records it in its ledger's table `operations`.

    A new process gets a name by itself when its predecessor is gone or does not respond. This is for the
    other cases: a predecessor that cannot be ended and still responds, and a ledger with a number that no
    process can have. Raises ConfigError if no process of the job has had the name.
    """
    if _change_ledger(job_of(args), "unfence", {"name": args.role}, option=("--unfence", args.role)):
        print(f"{args.role} is unfenced: its process is refused from now on; start it again")
    else:
        print(f"{args.role} is unfenced in the ledger of a job that is not running")
    return 0


def _change_ledger(job: RunningJob, verb: str, body: Mapping[str, Any], *, option: Sequence[str]) -> bool:
    """Changes the ledger of every shard; returns True when a buffer is running.

    `verb`, `body`: the request to a running buffer. `option`: the same for `python -m buffer`. Raises
    ConfigError with the reason of a refusal.
    """
    if job.paths is None:
        job.post_all(verb, body, timeout_s=_TIMEOUT_S)
        return True
    are_running = []
    for shard in all_shards(job.config.buffer.num_shards):
        address = read_object(job.paths.endpoints / f"{shard.name}.json").get("http")
        is_running = address is not None and _request(job, str(address), verb, body)
        if not is_running:
            _change_stopped(job.paths, shard, option)
        are_running.append(is_running)
    return any(are_running)


def _request(job: RunningJob, address: str, verb: str, body: Mapping[str, Any]) -> bool:
    """Sends the request to a running buffer; returns False if no process listens at the address.

    A killed buffer leaves its endpoint file behind.
    """
    try:
        job.post_to(address, verb, body, timeout_s=_TIMEOUT_S)
    except NoResponseError as error:
        if not isinstance(error.__cause__, ConnectionRefusedError):
            raise
        return False
    return True


def _change_stopped(paths: RunPaths, shard: Shard, option: Sequence[str]) -> None:
    if not paths.ledgers:
        raise ConfigError(f"{paths.root} has no ledger: with buffer.durability=none there is none to change")
    root = paths.root.resolve()
    # The stored configuration has an old path if the run's directory was moved.
    where = (f"runs_dir={root.parent}", f"name={root.name}")
    words = ("--name", shard.name, *option, "--config", str(paths.config), *where)
    done = run_role("buffer", *words, capture_output=True)
    if done.returncode:
        error = ConfigError if done.returncode == 2 else ArealError
        told = done.stderr.strip().split("\n")[-1]  # below a traceback: the exception
        raise error(
            told.removeprefix("buffer: ") or f"the ledger could not be opened (exit code {done.returncode})"
        )
