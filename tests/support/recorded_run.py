"""A run whose trajectories a real buffer has recorded, and replays of it in this process."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from areal_like.config import Config
from areal_like.paths import RunPaths, write_json
from areal_like.runtime.command_line import load_config, save_config
from areal_like.trajectory import Trajectory
from areal_like.wire.records import Record, RecordLocation, read_record, segment_path
from tests.chaos.job import running_job, train
from tests.support.trainer_helpers import write_model
from trainer.distributed.ranks import Ranks
from trainer.replay.recording import Recording
from trainer.replay.run import replay

NUM_STEPS = 3


def record_run(folder: Path, *, num_steps: int = NUM_STEPS) -> Path:
    """Records made-up conversations (tests/chaos/producer.py) for this many steps; returns the directory."""
    model = write_model(folder / "policy", dtype=torch.float32)
    with running_job(
        folder,
        model={"path": model, "dtype": "float32"},
        objective={"name": "reinforce"},  # made-up log-probs would make importance weights vanish
        trainer={
            "num_steps": num_steps,
            "groups_per_step": 4,
            "fetch_timeout_s": 600.0,
            "checkpoint_interval": 1,
            "keep_checkpoints": 10,
        },
        # The tests look for the samples of a position under its own ticket.
        buffer={"retain_trajectories": True, "overdue": "wait"},
    ) as job:
        job.produce("rollout-0", capacity=16, num_tokens=24)
        with job.trainer() as link:
            train(link, first=0, last=num_steps)
    return job.buffer.paths.root


def replay_run(root: Path, name: str, **trainer: object) -> Path:
    """Replays a recorded run with changed settings of the trainer; returns the new directory."""
    config = load_config(["--config", str(root / "config.yaml")])
    changed: Config = replace(config, name=name, trainer=replace(config.trainer, **trainer))  # type: ignore[arg-type]
    paths = RunPaths.of(changed)
    save_config(changed, paths.config)
    write_json(paths.replay, {"recording": str(root), "own_lr": "lr" in trainer})
    ranks = Ranks.alone()
    try:
        with closing(Recording(root)) as recording:
            replay(changed, recording, ranks, stopping=threading.Event(), follows_changes="lr" not in trainer)
    finally:
        dist.destroy_process_group()
    return paths.root


def change_sample(root: Path, *, step: int, position: int, sample_index: int, token: int) -> int:
    """Changes one sampled token in the record of a sample, with a valid checksum; returns its new id."""
    directory = root / "ledger"
    with closing(sqlite3.connect(directory / "ledger.sqlite3")) as ledger, ledger:
        (ticket_id,) = ledger.execute(
            "SELECT ticket_id FROM tickets WHERE step = ? AND position = ? AND state != 'dropped'",
            (step, position),
        ).fetchone()
        row = ledger.execute(
            "SELECT segment, offset, num_bytes, crc32 FROM samples WHERE ticket_id = ? AND sample_index = ?",
            (ticket_id, sample_index),
        ).fetchone()
        place = RecordLocation(*row)
        old = read_record(directory, place, ticket_id=ticket_id, sample_index=sample_index).trajectory()
        record = Record.of(ticket_id, sample_index, _with_other_token(old, token))
        assert len(record.data) == place.num_bytes and old.loss_mask[token] == 1
        write_at(segment_path(directory, place.segment), place.offset, record.data)
        ledger.execute(
            "UPDATE samples SET crc32 = ? WHERE ticket_id = ? AND sample_index = ?",
            (record.crc32, ticket_id, sample_index),
        )
    return int(record.trajectory().tokens[token])


def _with_other_token(trajectory: Trajectory, token: int) -> Trajectory:
    tokens = np.array(trajectory.tokens)
    tokens[token] = (tokens[token] + 1) % 40
    return replace(trajectory, tokens=tokens)


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Overwrites bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
