"""Slurm's commands as the launcher sees them, with the queue in a file: sbatch, squeue, scancel and scontrol.

fake_slurm.py COMMAND [OPTION ...]     $FAKE_SLURM: the directory with queue.json and calls.txt
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

_LAUNCHER = '#!/bin/sh\nexec {python} {file} {command} "$@"\n'


def install(directory: Path) -> dict[str, str]:
    """Writes the commands into `directory`; returns the environment in which they are found."""
    (directory / "bin").mkdir(parents=True)
    for command in ("sbatch", "squeue", "scancel", "scontrol"):
        file = directory / "bin" / command
        file.write_text(_LAUNCHER.format(python=sys.executable, file=Path(__file__), command=command))
        file.chmod(0o755)
    (directory / "queue.json").write_text("[]")
    (directory / "calls.txt").touch()
    return {"PATH": f"{directory / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(directory)}


def calls(directory: Path) -> list[str]:
    """The command lines so far."""
    return (directory / "calls.txt").read_text().splitlines()


def main() -> int:
    home = Path(os.environ["FAKE_SLURM"])
    command, *options = sys.argv[1:]
    with (home / "calls.txt").open("a") as file:
        file.write(" ".join([command, *options]) + "\n")
    queue = json.loads((home / "queue.json").read_text())
    match command:
        case "sbatch":
            if len(queue) == int(os.environ.get("FAKE_SLURM_MOST", "100")):
                sys.stderr.write("sbatch: error: QOSMaxSubmitJobPerUserLimit\n")
                return 1
            fields = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", Path(options[-1]).read_text(), re.M))
            number = max([100, *(job["number"] for job in queue)]) + 1
            state = "PENDING" if number > 104 else "RUNNING"
            queue.append(
                {"number": number, "name": fields["job-name"], "state": state}
                | {"comment": fields["comment"]}
            )
            sys.stdout.write(f"{number};cluster\n")
        case "squeue":
            names = (
                next(each for each in options if each.startswith("--name="))
                .removeprefix("--name=")
                .split(",")
            )
            for job in queue:
                if job["name"] in names:
                    sys.stdout.write("{number}|{name}|{state}|{comment}\n".format(**job))
        case "scancel":
            ended = {int(option) for option in options if option.isdecimal()}
            queue = [job for job in queue if job["number"] not in ended]
        case "scontrol" if options[:2] == ["show", "config"]:
            sys.stdout.write(
                f"KillWait                = {os.environ.get('FAKE_SLURM_KILL_WAIT', '60')} sec\n"
            )
        case "scontrol" if options[:2] == ["show", "job"]:
            restarts = os.environ.get("FAKE_SLURM_RESTARTS", "0")
            sys.stdout.write(
                f"JobId=7 JobState=RUNNING Reason=None Requeue=1 Restarts={restarts} BatchFlag=1\n"
            )
        case "scontrol" if options[:2] == ["show", "node"]:
            sys.stdout.write(f"NodeName=n1 NodeAddr={os.environ['FAKE_SLURM_ADDRESS']} NodeHostName=n1\n")
    (home / "queue.json").write_text(json.dumps(queue))
    return 0


if __name__ == "__main__":
    sys.exit(main())
