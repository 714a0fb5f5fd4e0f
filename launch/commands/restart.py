"""`areal-like restart RUN ROLE`: replaces the trainer, a rollout server or the buffer of a running job.

The launcher owns its processes, so this command writes an order into the run's directory and waits until the
launcher has taken it. A role that was started by hand is asked to drain; its supervisor starts it again.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
import time
from collections.abc import Sequence

from areal_like.automatic_settings import start_limit_s
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths, write_json
from areal_like.runtime.command_line import load_config
from areal_like.shards import all_shards
from areal_like.terminal_text import harmless_values
from launch.commands.control import drain
from launch.commands.parser import argument, command, settings_argument
from launch.commands.running_job import JOB, job_of
from launch.local_job.lifecycle import START_PATIENCE
from launch.observation.http_json import post_json
from launch.observation.reach import RunningJob
from launch.run_directory.rundir import has_launcher, is_over, restart_order_file, restart_outcome_file
from launch.run_files import read_object

_TICK_S = 0.2
_TAKE_TIMEOUT_S = 10.0
_SHARED_SETTINGS = ("trainer.groups_per_step", "trainer.num_steps")
"""Settings of the trainer that the buffer uses too, so they cannot change while it runs."""


@command(
    "restart",
    "Replace the trainer, the buffer or a rollout server of a running job, while the others continue. The "
    "trainer may get new settings: they are written to config.yaml once the new trainer is ready; if it "
    "refuses them (exit code 2) or dies before that (1), the run continues with the old ones. A role that "
    "was started by hand drains, and its supervisor has to start it again.",
    JOB,
    argument("role", metavar="ROLE", help="trainer, buffer, or the name of a rollout server"),
    settings_argument(metavar="trainer.KEY=VALUE"),
    examples=["restart myrun rollout-1", "restart myrun trainer trainer.lr=1e-6"],
)
def main(args: argparse.Namespace) -> int:
    """Returns 0 when the launcher has taken the order, or the role has drained.

    If the trainer gets settings, returns 0 when it is ready with them, and 1 when it has failed with them and
    has its previous settings again. Raises ConfigError if it refuses them.
    """
    if "=" in args.role:
        raise ConfigError(
            "restart: put the role before the settings: areal-like restart RUN trainer trainer.KEY=VALUE"
        )
    job = job_of(args)
    _check_settings(args.role, args.settings)
    if job.paths is None or not has_launcher(job.paths):
        print(by_hand(job, args.role, args.settings))
        return 0
    order_id = secrets.token_hex(8)
    print(order(job, job.paths, args.role, args.settings, order_id=order_id), flush=True)
    return wait_until_ready(job, job.paths, args.settings, order_id=order_id) if args.settings else 0


def wait_until_ready(job: RunningJob, paths: RunPaths, settings: Sequence[str], *, order_id: str) -> int:
    """Waits until a trainer is ready with its new settings, or the launcher has given them up.

    Returns the exit code. Raises ConfigError if the trainer refuses them.
    """
    limit_s = job.config.daemon.drain_timeout_s + START_PATIENCE * start_limit_s(job.config)
    deadline_s = time.monotonic() + limit_s
    words = " ".join(settings)
    kept = "it runs with its previous settings, which config.yaml keeps"
    file = restart_outcome_file(paths)
    while order_id not in (outcome := harmless_values(read_object(file))).get("order_ids", []):
        if is_over(paths):
            sys.stderr.write(f"restart: the run ended before the trainer was ready with {words}\n")
            return 1
        if time.monotonic() > deadline_s:
            sys.stderr.write(
                f"restart: the trainer is not ready after {limit_s:.0f} s: see `areal-like why`\n"
            )
            return 1
        time.sleep(_TICK_S)
    if outcome["exit_code"] == 2:
        raise ConfigError(f"restart: the trainer refused {words} ({outcome['reason']}): {kept}")
    if outcome["exit_code"]:
        sys.stderr.write(f"restart: the trainer failed with {words} ({outcome['reason']}): {kept}\n")
        return 1
    print(f"the trainer is ready with {words}, which are now in config.yaml")
    return 0


def order(job: RunningJob, paths: RunPaths, role: str, settings: Sequence[str], *, order_id: str) -> str:
    """Orders the launcher to replace a process; returns a message for the user when it has taken the order.

    Raises ConfigError for a role that it does not run, and if no launcher runs.
    """
    load_config(["--config", str(paths.config), *settings])
    if is_over(paths):
        raise ConfigError(f"restart: no launcher runs {paths.root}: continue the run with resume=latest")
    ours = [f"rollout-{index}" for index in range(job.config.rollout.num_servers)]
    scorers = range(job.config.scorer.num_servers if job.config.scorer.path else 0)
    ours += [f"scorer-{index}" for index in scorers]
    ours += [f"router-{index}" for index in range(job.config.sessions.num_routers)]
    buffers = [shard.name for shard in all_shards(job.config.buffer.num_shards)]
    if role not in ("trainer", *ours, *buffers):
        if role in job.servers():
            raise ConfigError(
                f"restart: {role} was started by `rollout --join`: `drain` it, and join another one"
            )
        raise ConfigError(f"restart: there is no {role!r} (roles: {', '.join(['trainer', *ours, *buffers])})")
    if role in buffers and job.config.buffer.durability == "none":
        raise ConfigError(
            "restart: with buffer.durability=none the groups are lost with the buffer: stop the run instead"
        )
    file = restart_order_file(paths, order_id)
    write_json(file, {"role": role, "settings": list(settings), "order_id": order_id})
    deadline_s = time.monotonic() + _TAKE_TIMEOUT_S
    while file.exists():
        if time.monotonic() > deadline_s:
            with contextlib.suppress(FileNotFoundError):  # it is taken at this moment
                file.unlink()
                raise ConfigError(
                    f"restart: the launcher of {paths.root.name} does not take the order; "
                    "is it closing, or still starting?"
                )
        time.sleep(_TICK_S)
    if role == "trainer":
        return "the trainer finishes its step, writes a checkpoint, and is started again"
    if role in buffers:
        return f"{role} is started again with its ledger; the others wait for it"
    if role.startswith("scorer-"):
        return f"{role} is started again; rewards wait for it or for another score server"
    if role.startswith("router-"):
        return f"{role} is started again; agents wait for it or use another router"
    return f"{role} returns its leases, delivers its finished samples, and is started again"


def by_hand(job: RunningJob, role: str, settings: Sequence[str]) -> str:
    """Asks a role without a launcher to drain; returns a message for the user. Raises ConfigError."""
    if settings:
        raise ConfigError(
            f"restart: {job.short_name} has no launcher: give {settings[0]} to the command that starts the "
            "trainer, then restart it without settings"
        )
    code = job.config.daemon.exit_code_on_drain
    again = f"its supervisor has to start it again, with the same command (its exit code is {code}" + (
        "; daemon.exit_code_on_drain=75, say, tells a supervisor that the run is not finished)"
        if code == 0
        else ")"
    )
    shards = [shard.name for shard in all_shards(job.config.buffer.num_shards)]
    if role in shards:
        return f"{_drain_buffer(job, role)}; {again}"
    if role == "trainer":
        return f"{_hand_over(job)}; {again}"
    drain(job, role)
    return f"{role} has left; {again}"


def _drain_buffer(job: RunningJob, name: str) -> str:
    for address in job.buffers:
        status = job.get(address, "/status") or {}
        if status.get("name") != name:
            continue
        if not any(peer.get("role") == "trainer" for peer in status.get("peers", [])):
            raise ConfigError(
                f"restart: {name} has no trainer now, and draining would end the run: start one first"
            )
        job.post_to(address, "drain", {}, timeout_s=5.0)
        return f"{name} drains"
    raise ConfigError(f"restart: {name} of {job.name} does not respond")


def _hand_over(job: RunningJob) -> str:
    """Asks rank 0 at the address in its own endpoint file, never at one that another daemon reports."""
    endpoint = read_object(job.paths.endpoints / "trainer-0.json") if job.paths is not None else {}
    if "http" not in endpoint:
        raise ConfigError(
            "restart: rank 0 of the trainer is reached only where its endpoint file is: name the run by its "
            "directory, on the trainer's machine, or send SIGTERM to the trainer"
        )
    try:
        post_json(str(endpoint["http"]), "/control/hand_over", {}, operator=job.operator)
    except OSError as error:
        raise ConfigError(f"restart: rank 0 of the trainer does not respond ({error})") from None
    return "the trainer finishes its step, writes a checkpoint, and exits"


def _check_settings(role: str, settings: Sequence[str]) -> None:
    if settings and role != "trainer":
        raise ConfigError(
            f"restart: {role} keeps its settings, which other roles share; only the trainer's can change: "
            "otherwise stop the run and continue it with resume=latest key=value"
        )
    if any(not setting.startswith("trainer.") for setting in settings):
        raise ConfigError("restart: only trainer.* settings may change while the other roles keep theirs")
    if shared := [setting for setting in settings if setting.partition("=")[0] in _SHARED_SETTINGS]:
        raise ConfigError(
            f"restart: the buffer uses {shared[0].partition('=')[0]} too: "
            f"stop the run and continue it with resume=latest {shared[0]}"
        )
