"""Slurm's commands, each called with a time limit."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from areal_like.errors import ArealError, ConfigError

_TIMEOUT_S = 60.0
ENDING = (
    *("COMPLETING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"),
    *("OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"),
)
"""States of jobs that have ended or are about to: Slurm shows them for some minutes (MinJobAge)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a run in the queue."""

    job_id: int
    name: str
    state: str
    """`PENDING`, `RUNNING`, ..."""

    @property
    def is_pending(self) -> bool:
        """True if it has not started, or waits for a restart."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def run_command(*words: str) -> str:
    """The output of a command of Slurm.

    Raises ConfigError if it is not installed or refuses, ArealError if it does not respond.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"{words[0]} is not installed here: run this command on a node of the Slurm cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise ArealError(f"{words[0]} has not responded for {_TIMEOUT_S:.0f} s: is slurmctld up?") from None
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"{words[0]} refused: {reason}")
    return done.stdout


def submit(script: Path, *options: str) -> int:
    """Submits a batch script; returns the number of the job. Raises like `run_command`."""
    printed = run_command("sbatch", "--parsable", *options, str(script)).strip()
    number = printed.partition(";")[0]  # the name of the cluster may follow
    if not number.isdecimal():
        raise ArealError(f"sbatch has printed {printed!r}, which is not the number of a job")
    return int(number)


def jobs_in_queue(root: Path, names: Sequence[str]) -> list[Job]:
    """The jobs of the run in the directory `root` that have one of these names, oldest first.

    Another run may have the same name, so the comment is compared too.
    """
    lines = run_command(
        *("squeue", "--noheader", "--states=all", f"--name={','.join(names)}", "--format=%A|%j|%T|%k")
    ).splitlines()
    fields = [line.split("|", 3) for line in lines]
    jobs = [
        Job(job_id=int(number), name=name, state=state)
        for number, name, state, comment in fields
        if comment.strip() == str(root) and state not in ENDING
    ]
    return sorted(jobs, key=lambda job: job.job_id)


def end_job(job: Job) -> None:
    """Drains a running job, cancels a pending one. A job that has ended in the meantime is not an error."""
    words = ("scancel", "--quiet", *([] if job.is_pending else ["--signal=TERM", "--batch"]))
    try:
        run_command(*words, str(job.job_id))
    except ConfigError as error:
        if "nvalid job" not in str(error) and "already" not in str(error):
            raise


def kill_wait_s() -> int | None:
    """Seconds between SIGTERM and SIGKILL of a job that Slurm ends; None if Slurm does not say."""
    for line in run_command("scontrol", "show", "config").splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "KillWait":
            number = value.split()[:1]
            return int(number[0]) if number and number[0].isdecimal() else None
    return None


def node_address(node: str) -> str:
    """The address of a node in Slurm's configuration, often its name. Raises like `run_command`."""
    words = run_command("scontrol", "show", "node", "--oneliner", node).split()
    found = [word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")]
    if not found:
        raise ArealError(f"scontrol does not show the address of node {node}")
    return found[0]
