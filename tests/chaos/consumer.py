"""Trainer rank 0 without a model, as a process that a test can stop.

`python -m tests.chaos.consumer NUM_STEPS --config FILE key=value ...` prints one line per step, `step ticket
ticket ...`, and checks that every group is complete.
"""

from __future__ import annotations

import secrets
import sys

from areal_like.runtime.command_line import load_config
from areal_like.runtime.process import die_with_parent
from tests.chaos.job import check_groups, train
from trainer.buffer_client.client import TrainerBufferClient


def main() -> None:
    """Fetches and completes every step."""
    num_steps, *settings = sys.argv[1:]
    config = load_config(settings)
    with TrainerBufferClient(
        config, rank=0, world_size=1, device="cpu", process=secrets.token_hex(16)
    ) as client:
        for step in range(int(num_steps)):
            groups = train(client, first=step, last=step + 1)
            check_groups(groups, config, first=step, last=step + 1)
            print(step, *(group.ticket_id for group in groups), flush=True)


if __name__ == "__main__":
    die_with_parent()
    main()
