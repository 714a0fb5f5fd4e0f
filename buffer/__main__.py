"""`python -m buffer [--config run/config.yaml] key=value ...`: the buffer of one job.

`--drop 17,23` does not start a buffer: it drops these tickets from the ledger of a job whose buffer is not
running. Likewise, `--unfence NAME` takes a name from the process that holds it.
"""

from __future__ import annotations

import gc
import sys

from areal_like.errors import ConfigError, UserError
from areal_like.runtime.command_line import role_arguments, shows_help
from areal_like.runtime.process import early_signals, keep_files_private
from areal_like.shards import Shard

_SWITCH_INTERVAL_S = 2e-4
GC_THRESHOLDS = (1_000, 20, 1_000)
"""Thresholds of the garbage collector; the reason is given where they are set."""


def main() -> int:
    """Returns the exit code (see `areal_like.runtime.daemon`)."""
    if shows_help(sys.argv[1:], __doc__):
        return 0
    early_signals()
    keep_files_private()
    from areal_like.runtime.daemon import run_daemon
    from buffer.service.daemon import main as serve
    from buffer.service.operations import drop_offline, unfence_offline

    try:
        dropped, args = _option(sys.argv[1:], "--drop", "name tickets by their numbers, e.g. --drop 17,23")
        unfenced, args = _option(args, "--unfence", "name a role, e.g. --unfence rollout-0")
        config, name = role_arguments(args, default_name="buffer")
        early_signals(config.daemon.exit_code_on_drain)
        shard = Shard.named(name, count=config.buffer.num_shards)
        if dropped:
            drop_offline(config, _ticket_ids(dropped), shard)
        if unfenced:
            unfence_offline(config, unfenced, shard)
        if dropped or unfenced:
            return 0
    except UserError as error:
        sys.stderr.write(f"buffer: {error}\n")
        return 2
    # The writer's thread needs the GIL about twenty times per batch. A busy event loop that keeps it for
    # Python's default of 5 ms each time would add 100 ms to every acknowledgement.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # Tickets and records exist for several steps and are in no reference cycle, so the garbage collector
    # should not traverse thousands of them repeatedly. Young objects are collected often, because an ended
    # HTTP connection is a reference cycle, and thousands would accumulate.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    return run_daemon(config, role="buffer", name=name, main=serve)


def _option(argv: list[str], option: str, missing: str) -> tuple[str, list[str]]:
    """(the option's value or an empty string, the other arguments)"""
    if option not in argv:
        return "", argv
    at = argv.index(option)
    if at + 1 >= len(argv) or not argv[at + 1]:
        raise ConfigError(f"{option}: {missing}")
    return argv[at + 1], argv[:at] + argv[at + 2 :]


def _ticket_ids(value: str) -> list[int]:
    ids = value.split(",")
    if not all(ticket_id.isdecimal() for ticket_id in ids):
        raise ConfigError("--drop: name tickets by their numbers, e.g. --drop 17,23")
    return [int(ticket_id) for ticket_id in ids]


if __name__ == "__main__":
    sys.exit(main())
