"""The command `areal-like`: looks up the verb and runs its module in launch/commands/.

It starts quickly, because only the module of the verb is imported, and no such module imports torch; the
overview imports next to nothing. So each verb's line of the overview is here; its arguments and the text of
`areal-like VERB --help` are in its module.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from areal_like.errors import ArealError, ConfigError, UserError
from areal_like.terminal_text import harmless

if TYPE_CHECKING:
    from launch.commands.parser import Parser

GROUPS = {
    "run": {
        "run": "train with reinforcement learning: a whole job on this machine",
        "plan": "tell whether a job fits on its GPUs, and how fast it will be",
        "doctor": "check this machine before a run",
        "replay": "train again on the recorded trajectories of a run",
    },
    "watch": {
        "status": "show the daemons, rates, leases and weights of a running job",
        "top": "show the live view of a running job",
        "why": "say what a running job waits on, or which pool limits its speed",
        "logs": "show the logs of all daemons, merged by time",
    },
    "change a running job": {
        "pause": "begin no new samples for training",
        "resume": "end a pause (to continue a stopped run: run name=RUN resume=latest)",
        "set": "change a setting from the next step on",
        "restart": "replace the trainer, the buffer or a rollout server",
        "cordon": "give a rollout server no new samples",
        "uncordon": "give it samples again",
        "drain": "end a rollout server, with its samples finished or returned",
        "drop": "remove harmful tickets from a step that is not trained yet",
        "unfence": "take a role's name from a process that cannot be ended",
        "reap": "remove the sandboxes that a stopped run has left behind",
    },
    "inspect": {
        "samples": "show samples as text, with rewards and lags",
        "report": "write an HTML page about one run or two",
        "trace": "write what all daemons did when, for Perfetto",
        "profile": "record steps of a running trainer with torch's profiler",
        "audit": "check a run's ledger, trajectories and checkpoints",
    },
    "data and models": {
        "data": "count and check the rows of a data set or task",
        "sft": "train on conversations or completions (supervised)",
        "reward-model": "train a reward model on comparisons of completions",
        "preferences": "train on comparisons of completions (DPO, IPO, KTO, SimPO, ORPO)",
        "eval": "evaluate a model on the sets of a configuration",
        "merge": "write the model that a LoRA adapter makes of its base",
        "score-server": "serve a reward model over HTTP",
        "fetch": "download the weights of model=smollm2",
    },
    "clusters": {
        "submit": "start or continue a run on Slurm or Ray",
        "scale": "change the number of rollout servers on Slurm or Ray",
        "rollout": "add a rollout server to a running job, from any machine",
        "router": "give agents one address for all rollout servers of a running job",
        "keys": "make and change the keys that daemons authenticate with",
        "deploy-files": "write configurations for Prometheus, Grafana and schedulers",
    },
    "this command": {
        "completion": "print the completion script of a shell",
        "version": "print the version",
    },
}
"""Group -> verb -> what it does, in one line."""
COMMANDS = {verb: summary for group in GROUPS.values() for verb, summary in group.items()}
_MODULES = {
    "completion": ("version",),
    "control": ("pause", "resume", "set", "cordon", "uncordon", "drain", "drop", "unfence"),
    "join": ("rollout",),
    "offline": ("sft", "reward-model", "preferences"),
    "watch": ("status", "top", "why"),
}
"""Module in launch/commands/ -> its verbs, where their names differ."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 failed, 2 the user's mistake.

    A mistake or failure prints one message to stderr. If the reader of stdout, such as `head`, has ended, the
    code is 0.
    """
    try:
        code = _run(argv)
        if sys.stdout is not None:  # None: the caller has closed it
            sys.stdout.flush()
    except BrokenPipeError:  # Python would complain when it flushes at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) > 1 and words[0] == "help":
        words = [words[1], "--help"]
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0 if words else 2
    try:
        parser = parser_of(words[0], words[1:])
        return parser.declared.main(parser.parse_words(words[1:]))
    except SystemExit as ended:  # raised by --help, and by rich if the reader of its output has ended
        return 0 if not ended.code or isinstance(ended.__context__, BrokenPipeError) else 1
    except UserError as error:
        sys.stderr.write(f"areal-like: {harmless(str(error))}\n")
        return 2
    except ArealError as error:
        sys.stderr.write(f"areal-like: {harmless(str(error))}\n")
        return 1
    except KeyboardInterrupt:  # before `run` has installed its signal handlers, or in another command
        return 130


def parser_of(verb: str, words: Sequence[str] = ()) -> Parser:
    """The parser of a verb's arguments. Raises ConfigError for an unknown verb. `words`: the words after
    it."""
    if verb not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(verb, COMMANDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "`areal-like --help` lists them"
        raise ConfigError(f"unknown command {verb!r}: {hint}")
    from launch.commands.parser import Parser

    module = next((module for module, verbs in _MODULES.items() if verb in verbs), verb.replace("-", "_"))
    importlib.import_module(f"launch.commands.{module}")
    return Parser(verb, words)


def overview() -> str:
    """The text of `areal-like --help`."""
    width = max(map(len, COMMANDS))
    lines = ["usage: areal-like VERB ...", ""]
    for group, verbs in GROUPS.items():
        lines += [group, *(f"  {verb:{width}}  {summary}" for verb, summary in verbs.items()), ""]
    lines.append("`areal-like VERB --help` explains a verb, its arguments and options, with examples.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
