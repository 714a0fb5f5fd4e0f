"""Bystanders: the settings of the jobs, what the disturbers send, and the table."""

from __future__ import annotations

import zlib
from typing import Any

from areal_like.config import Config
from areal_like.runtime.command_line import load_config
from areal_like.wire.codec import encode
from areal_like.wire.messages.producer import Lease, Purpose
from benchmarks.broken_task import BrokenTask
from benchmarks.bystanders import as_table, mixture, ratio_of
from benchmarks.disturbers import LyingServer
from rollout_server.tasks.base import Completion, Example, make_task
from rollout_server.tasks.mixture import MixtureTask


def rewarded(task: BrokenTask, text: str) -> str:
    try:
        return f"{task.reward(Example(prompt='', answer=None), Completion('', raw_text=text)):g}"
    except (ValueError, RuntimeError) as error:
        return type(error).__name__


def test_one_of_the_two_tasks_may_be_broken() -> None:
    for is_broken in (False, True):
        task = make_task(load_config([mixture(is_broken=is_broken)]).task, seed=0)
        assert isinstance(task, MixtureTask)
        parts = [part.task for part in task.parts]
        assert [isinstance(part, BrokenTask) and part.is_broken for part in parts] == [False, is_broken]


def test_mishaps_of_rewards() -> None:
    texts = [text for text in map(str, range(100)) if zlib.crc32(text.encode()) % 100]  # the others hang
    assert {rewarded(BrokenTask(is_broken=True), text) for text in texts} == {
        "nan", "1e+20", "ValueError", "RuntimeError",
    }  # fmt: skip
    assert rewarded(BrokenTask(), "7") == f"{55 % 7 / 6:g}"


def test_every_lie_of_a_server_can_be_sent() -> None:
    server, kinds = LyingServer(Config(), "tcp://127.0.0.1:9"), set()
    for number in range(10):
        server._held[number] = Lease(
            lease_id=number,
            ticket_id=number,
            prompt_index=0,
            purpose=Purpose.TRAIN,
            sample_indices=[0],
            seed=0,
        )
    lies = server._lies()
    for _ in range(120):
        kind, message = next(lies)
        kinds.add(kind)
        assert message if isinstance(message, list) else encode(message)
    assert len(kinds) == 9, kinds


def test_ratio_is_of_medians_and_the_table_shows_every_run() -> None:
    def run(rate: float) -> dict[str, Any]:
        return {
            "steps_per_minute": rate,
            "exit_code": 0,
            "audit_is_clean": True,
            "disturber": {"requests": 9},
        }

    runs = {"alone": [run(x) for x in (100.0, 90.0, 500.0)], "disturbed": [run(x) for x in (95.0, 1.0, 96.0)]}
    assert ratio_of(runs) == 0.95
    row = as_table({"agent": {"ratio": ratio_of(runs), "runs": runs}}).splitlines()[-1]
    assert row == "| agent | 100 90 500 | 95 1 96 | 0.95 | 0 0 0 | clean | 9 |"
