"""`areal-like audit RUN`: checks a run's ledgers, trajectories and checkpoints (launch/audit/)."""

from __future__ import annotations

import argparse

from launch.audit.run import audit_run
from launch.commands.parser import JSON, RUN, command
from launch.run_directory.rundir import find_run


@command(
    "audit",
    "Check a run's ledger, trajectories and checkpoints against one another. Exit code 1, with the offending "
    "ids, if they contradict each other.",
    RUN,
    JSON,
    examples=["audit myrun"],
)
def main(args: argparse.Namespace) -> int:
    """Prints the result; returns 1 when a check has failed, else 0."""
    audit = audit_run(find_run(args.run))
    print(audit.dumps() if args.json else "\n".join(audit.lines()))
    return 0 if audit.is_clean else 1
