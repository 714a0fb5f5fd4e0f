"""`python -m buffer [--config run/config.yaml] key=value ...`: the buffer of one job.

`--drop 17,23` does not start a buffer: it drops these tickets from the ledger of a job whose buffer is not
running.
"""

from __future__ import annotations

import gc
import signal
import sys

from areal_like.errors import ConfigError, UserError
from areal_like.runtime.command_line import role_arguments, shows_help
from areal_like.shards import Shard

_SWITCH_INTERVAL_S = 2e-4
_GC_THRESHOLDS = (1_000, 20, 1_000)


def main() -> int:
    """Returns the exit code: 0 drained, 1 failed, 2 a mistake of the user."""
    if shows_help(sys.argv[1:], __doc__):
        return 0
    # The imports below take a second; after them the daemon installs a handler that drains.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    from areal_like.runtime.daemon import run_daemon
    from buffer.service.daemon import main as serve
    from buffer.service.offline_drop import drop_offline

    try:
        dropped, args = _dropped(sys.argv[1:])
        config, name = role_arguments(args, default_name="buffer")
        if dropped:
            drop_offline(config, dropped, Shard.named(name, count=config.buffer.num_shards))
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
    gc.set_threshold(*_GC_THRESHOLDS)
    return run_daemon(config, role="buffer", name=name, main=serve)


def _dropped(argv: list[str]) -> tuple[list[int], list[str]]:
    """(tickets to drop, the other arguments)"""
    if "--drop" not in argv:
        return [], argv
    at = argv.index("--drop")
    ids = argv[at + 1].split(",") if at + 1 < len(argv) else []
    if not ids or not all(ticket_id.isdecimal() for ticket_id in ids):
        raise ConfigError("--drop: name tickets by their numbers, e.g. --drop 17,23")
    return [int(ticket_id) for ticket_id in ids], argv[:at] + argv[at + 2 :]


if __name__ == "__main__":
    sys.exit(main())
