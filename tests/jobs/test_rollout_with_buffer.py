"""Two rollout servers and a buffer as processes, with the test as the trainer; one server is killed."""

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from areal_like.wire.messages.consumer import GetRunCounters, Group, RequestEval
from rollout_server.tasks.sort import SortTask
from tests.support.buffer_harness import BufferProcess, running_buffer, training
from tests.support.launching import TEST_LIMIT_S, WAIT_LIMIT_S
from tests.support.rollout_harness import ServerProcess
from trainer.models.tiny import build_tiny_model, character_tokenizer

NUM_STEPS = 12
SETTINGS: dict[str, Any] = {
    "max_staleness": NUM_STEPS,
    "sampling": {"group_size": 4},
    "trainer": {"num_steps": NUM_STEPS, "groups_per_step": 8},
    "eval": {"num_prompts": 16},
    "buffer": {"lease_timeout_s": 5.0},
    "rollout": {"max_running": 8, "queue_samples": 8},
}


@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.long
def test_a_run_survives_a_killed_server(tmp_path: Path) -> None:
    """Long, because the dead server's leases expire, and its samples are generated again."""
    model = tmp_path / "model"
    build_tiny_model(model, seed=0, warm_start_steps=5, swap_prob=0.5)
    with ExitStack() as stack:
        buffer = stack.enter_context(running_buffer(tmp_path, model={"path": str(model)}, **SETTINGS))
        config = buffer.peers_config
        servers = [ServerProcess(config, name=f"rollout-{i}") for i in range(2)]
        for server in servers:
            stack.callback(server.close)
        groups, counters = asyncio.run(train(buffer, victim=servers[0]))
        check(groups)
        assert (
            counters.tickets["trained"] + counters.tickets["batched"] == NUM_STEPS * 8
            and counters.tickets["evaluated"] == 16
        )
        assert (
            sum(count for state, count in counters.tickets.items() if state != "issued")
            == counters.tickets["issued"]
        )
        assert counters.counters["generation_busy_s"] > 0
        assert counters.counters["tokens_generated"] >= counters.counters["tokens_trained"] > 0
        code, _, errors = servers[1].terminate()
        assert code == 0, errors


async def train(buffer: BufferProcess, *, victim: ServerProcess) -> tuple[list[Group], Any]:
    groups: list[Group] = []
    async with training(buffer) as trainer:
        before = await trainer.call(
            RequestEval(eval_id=0, num_prompts=16, min_version=0), timeout_s=WAIT_LIMIT_S
        )
        assert (before.num_evaluated, before.num_failed, before.newest_version) == (16, 0, 0)
        for step in range(NUM_STEPS):
            if step == 3:
                victim.process.kill()
            groups += await trainer.train(step)
        return groups, await trainer.call(GetRunCounters())


def check(groups: list[Group]) -> None:
    """Every group is complete, has its own ticket, and has the prompt and rewards of the task."""
    task, tokenizer = SortTask(seed=0), character_tokenizer()
    assert len({group.ticket_id for group in groups}) == len(groups) == NUM_STEPS * 8
    for group in groups:
        prompt_of = {closed.ticket_id: closed.prompt_index for closed in group.closed}
        assert len(group.trajectories) == 4
        for record, trajectory in zip(group.records, group.trajectories, strict=True):
            example = task.example("train", prompt_of.get(record.ticket_id, group.prompt_index))
            sampled = trajectory.loss_mask == 1
            assert tokenizer.decode(trajectory.tokens[~sampled]) == example.prompt
            assert trajectory.reward == task.reward(
                example, tokenizer.decode(trajectory.tokens[sampled], skip_special_tokens=True)
            )
