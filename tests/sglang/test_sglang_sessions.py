"""Agents against a rollout server on a real SGLang: a framework in the job, the openai package outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, OpenAI

from areal_like.client.areal_like_client import ClaimedSession, ClientError, claim
from launch.audit.run import audit_run
from rollout_server.policy.engines.sglang.process import find_python
from tests.sglang.conftest import START_S
from tests.support.launching import ROOT, launcher, processes_of
from tests.support.ports import free_port

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
NUM_STEPS = 4
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        },
    },
}


def solve(session: ClaimedSession) -> str:
    """What the policy says in the end."""
    messages: list[Any] = [{"role": "user", "content": session.example["prompt"]}]
    with OpenAI(base_url=session.base_url, api_key=session.api_key) as client:
        while True:
            answer = client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])  # type: ignore[list-item]
            message = answer.choices[0].message
            if not message.tool_calls:
                return message.content or ""
            messages.append(message)
            for call in message.tool_calls:
                try:
                    total = str(sum(json.loads(call.function.arguments).values()))  # type: ignore[union-attr]
                except (ValueError, TypeError):
                    total = "0"
                messages.append({"role": "tool", "tool_call_id": call.id, "content": total})


@contextlib.contextmanager
def agents_outside(url: str, *, num_threads: int = 8) -> Iterator[list[str]]:
    """Claims sessions until the block has ended; gives what the sessions answered."""
    is_over = threading.Event()
    answers: list[str] = []

    def work() -> None:
        while not is_over.is_set():
            try:
                session = claim(url, wait_s=5)
                if session is None:
                    continue
                try:
                    answers.append(solve(session))
                except APIError:  # no room for another turn, or not wanted any more
                    answers.append("")
                session.reward(float(answers[-1] == session.example["answer"]))
                session.end()
            except ClientError:  # not started yet, or ended
                is_over.wait(0.5)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_agents_train_on_sglang(where: str, tmp_path: Path) -> None:
    if where == "inside":
        pytest.importorskip("agents", reason="needs openai-agents")
    port = free_port()
    root = tmp_path / "runs" / "x"
    # With max_staleness=0 the weights that sampled compute the log-probs again, so the two must agree.
    settings = (
        *("--config", str(ROOT / "configs" / "jobs" / "agents.yaml")),
        "name=x",
        "model.warm_start_steps=100",
        "trainer.groups_per_step=4",
        "sampling.group_size=4",
        "trainer.entropy_coef=1e-6",
        f"trainer.num_steps={NUM_STEPS}",
        "eval.num_prompts=8",
        "eval.interval=1000",
        "max_staleness=0",
        "rollout.max_running=16",
        "rollout.max_episodes=32",
        "rollout.engine=sglang",
        f"rollout.sglang.python={find_python('')}",
        f"rollout.start_timeout_s={START_S}",
        f"task.external={str(where == 'outside').lower()}",
        *([f"sessions.port={port}"] if where == "outside" else []),
    )
    outside = agents_outside(f"http://127.0.0.1:{port}") if where == "outside" else contextlib.nullcontext()
    try:
        with launcher(*settings, cwd=tmp_path) as process, outside as answers:
            out, err = process.communicate(timeout=850)
        assert (process.returncode, err) == (0, ""), out + err
        rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == NUM_STEPS
        assert max(row["mismatch_abs"] for row in rows) < 1e-4
        assert max(row["turns"] for row in rows) > 1, "no tool was called"
        assert answers is None or len(answers) >= 16 * NUM_STEPS
        audit = audit_run(root)
        assert audit.is_clean, "\n".join(audit.lines())
    finally:
        left = processes_of(root)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert not left, "processes of the job outlived it"
