"""`python -m buffer [--config run/config.yaml] key=value ...`: the buffer of one job.

`--drop 17,23` does not start a buffer: it drops these tickets from the ledger of a job whose buffer is not
running. Likewise, `--unfence NAME` takes a name from the process that holds it.
"""

from __future__ import annotations

import gc
import sys

from areal_like.errors import ArealError, ConfigError, UserError
from areal_like.runtime.command_line import OneValue, Options, role_arguments, shows_help
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
        options = Options()
        options.add_argument("--drop", action=OneValue)
        options.add_argument("--unfence", action=OneValue)
        values, args = options.parse_known_args(sys.argv[1:])
        config, name = role_arguments(args, default_name="buffer")
        early_signals(config.daemon.exit_code_on_drain)
        shard = Shard.named(name, count=config.buffer.num_shards)
        if values.drop:
            drop_offline(config, _ticket_ids(values.drop), shard)
        if values.unfence:
            unfence_offline(config, values.unfence, shard)
        if values.drop or values.unfence:
            return 0
    except ArealError as error:  # the ledger of a stopped job may be damaged
        sys.stderr.write(f"buffer: {error}\n")
        return 2 if isinstance(error, UserError) else 1
    # The writer's thread needs the GIL about twenty times per batch. A busy event loop that keeps it for
    # Python's default of 5 ms each time would add 100 ms to every acknowledgement.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    # Tickets and records exist for several steps and are in no reference cycle, so the garbage collector
    # should not traverse thousands of them repeatedly. Young objects are collected often, because an ended
    # HTTP connection is a reference cycle, and thousands would accumulate.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    return run_daemon(config, role="buffer", name=name, main=serve)


def _ticket_ids(value: str) -> list[int]:
    ids = value.split(",")
    if not all(ticket_id.isdecimal() for ticket_id in ids):
        raise ConfigError("--drop: name tickets by their numbers, e.g. --drop 17,23")
    return [int(ticket_id) for ticket_id in ids]


if __name__ == "__main__":
    sys.exit(main())
