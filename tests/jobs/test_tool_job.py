"""The tool job, cut short: real daemons, conversations with the calculator in the records, audit, replay."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from areal_like.trajectory import Trajectory
from launch.audit.run import audit_run
from tests.support.launching import ROOT, TEST_LIMIT_S, areal_like, finish, launcher, processes_of
from trainer.replay.recording import Recording

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]
GROUPS = 4
JOB = (
    *("--config", str(ROOT / "configs" / "jobs" / "tools.yaml")),
    "name=x",
    "model.warm_start_steps=75",
    f"trainer.groups_per_step={GROUPS}",
    "sampling.group_size=4",
    "eval.num_prompts=4",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
    "buffer.retain_trajectories=true",
)


def run(tmp_path: Path, cache: dict[str, str], *settings: str, num_steps: int) -> Path:
    """Runs the job to its end; returns its directory."""
    root = tmp_path / "runs" / "x"
    with launcher(
        *JOB, *settings, f"trainer.num_steps={num_steps}", cwd=tmp_path, environment=cache
    ) as process:
        code, out, err = finish(process, root)
    assert (code, err) == (0, ""), out + err
    assert not processes_of(root), "processes of the job outlived it"
    audit = audit_run(root)
    assert audit.is_clean, "\n".join(audit.lines())
    return root


def trajectories(root: Path, *, num_steps: int) -> list[Trajectory]:
    """What was trained on."""
    recording = Recording(root)
    try:
        groups = [group for step in range(num_steps) for group in recording.groups(step, range(GROUPS))]
    finally:
        recording.close()
    return [trajectory for group in groups for trajectory in group.trajectories]


@pytest.mark.chaos
def test_conversations_with_the_calculator_are_trained_on(tmp_path: Path, cache: dict[str, str]) -> None:
    root = run(tmp_path, cache, num_steps=2)
    summary = json.loads((root / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["max_trained_lag"] <= 4
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    num_calls = 0
    samples = trajectories(root, num_steps=2)
    assert len(samples) == 2 * GROUPS * 4
    for sample in samples:
        text = tokenizer.decode(sample.tokens.tolist())
        assert text.startswith("<tools>add<user>"), text
        assert len(sample.segments) <= 1, "the template only appends"
        assert sample.num_turns == text.count("<assistant>") - sampled(tokenizer, sample).count("<assistant>")
        last_end = sample.turns[-1][0] if sample.turns else len(sample.tokens)
        assert last_end == int(np.flatnonzero(sample.loss_mask)[-1]) + 1
        for a, b, answer in re.findall(
            r"<assistant><call>add (\d+) (\d+)</call><eos><tool>(\d+)<assistant>", text
        ):
            assert int(a) + int(b) == int(answer), text
            num_calls += 1
        # A turn that a limit cut is no reply to the environment, which counts errors.
        assert sample.metrics["tool_calls"] >= sample.metrics.get("tool_errors", 0.0)
    assert num_calls > 0, "no sample has called the calculator"
    assert sum(sample.metrics["tool_calls"] for sample in samples) >= num_calls
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert max(row["turns"] for row in rows) > 1 and "tool_calls" in rows[0]["sample_metrics"]


@pytest.mark.chaos
def test_a_replay_of_conversations_gives_the_same_weights(tmp_path: Path, cache: dict[str, str]) -> None:
    # The entropy bonus trains, where so short a warm start gets no reward.
    root = run(tmp_path, cache, "trainer.entropy_coef=0.01", num_steps=8)
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert min(row["grad_norm"] for row in rows) > 0, "without gradients the weights are equal anyway"
    replay = areal_like("replay", "x", cwd=tmp_path)
    assert replay.returncode == 0, replay.stderr
    assert "weights after step 8: equal to the recorded run's, to the last bit" in replay.stdout


def sampled(tokenizer: object, sample: Trajectory) -> str:
    """The text that the policy sampled."""
    tokens = sample.tokens[sample.loss_mask == 1].tolist()
    return str(tokenizer.decode(tokens))  # type: ignore[attr-defined]
