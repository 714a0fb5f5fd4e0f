"""The directory of a run with `buffer.overdue=close` whose buffer was killed, made by a simulated job."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from areal_like.paths import RunPaths
from areal_like.runtime.command_line import save_config
from areal_like.wire.messages.consumer import Group
from areal_like.wire.messages.producer import Purpose
from buffer.ledger.recovery import recover
from buffer.settings import LedgerSettings
from buffer.storage.durable import DurableStore
from buffer.tickets import Drop, State
from tests.support.buffer_harness import job
from tests.support.ledger_simulation import SimulatedJob, SimulatedServer
from tests.support.store_load import durable, raising

CLOSE_AFTER, MAX_STALENESS = 2, 4
GROUPS, SIZE, NUM_STEPS = 4, 4, 20


def drop_closed_group(plant: SimulatedJob) -> None:
    """As soon as complete samples of a closed group wait for a position, gives up the rest of the group."""
    ledger = plant.ledger
    groups = [
        ticket
        for ticket in ledger.state.tickets.of_purpose(Purpose.TRAIN)
        if ticket.state is State.CLOSED and ticket.samples.keys() - ticket.placed.keys() - ticket.failed
    ]
    if not groups:
        plant.at(0.01, lambda: drop_closed_group(plant))
        return
    ledger.lifecycle.drop(groups[0], Drop.FAILED)
    ledger.lifecycle.record_ready_groups()


def make_closed_run(directory: Path, *, steps_done: int = NUM_STEPS - 4) -> tuple[Path, list[Group]]:
    """Returns the run and the groups that its trainer got. Response lengths have a long tail, so groups are
    closed, tokens exceed the bound, and parts are given up as too old."""
    config = job(
        directory,
        max_staleness=MAX_STALENESS,
        sampling={"group_size": SIZE},
        staleness={"close_after": CLOSE_AFTER},
        trainer={"num_steps": NUM_STEPS, "groups_per_step": GROUPS},
        buffer={"overdue": "close", "retain_trajectories": True, "max_sample_retries": 1},
    )
    paths = RunPaths.of(config)
    save_config(config, paths.config)
    groups: list[Group] = []

    async def simulate() -> None:
        store = DurableStore(paths.root / "ledger", config.buffer, on_error=raising)
        ledger = recover(LedgerSettings.from_config(config), store, now_s=0.0)
        ledger.state.prompts.set_num_train_prompts(1000)
        ledger.trainer.start_training(incarnation=1, step=0, stream={}, settings={"trainer.lr": "0.001"})
        servers = [
            SimulatedServer(name="fast", tokens_per_s=100, max_running=24, capacity=24),
            SimulatedServer(name="slow", tokens_per_s=12, max_running=12, capacity=12),
        ]
        plant = SimulatedJob(ledger=ledger, servers=servers, step_s=0.4, fail_probability=0.02)
        plant.at(1.0, lambda: drop_closed_group(plant))
        plant.run(num_steps=steps_done)
        groups.extend(plant.groups)
        await durable(store)
        store.close()

    asyncio.run(simulate())
    rows = [
        {"step": step, "max_staleness": MAX_STALENESS, "lag_max": MAX_STALENESS} for step in range(steps_done)
    ]
    paths.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths.root, groups
