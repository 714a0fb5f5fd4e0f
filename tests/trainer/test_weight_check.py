"""Checks of the engines' log-probs after pushes: the pure rules, and when a check is made."""

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from areal_like.trajectory import FinishReason, Trajectory
from areal_like.wire.messages.consumer import Directory, ServerEntry
from areal_like.wire.messages.weights import ScoreTokens, TokenScores, WeightsFailed
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.leader import Leader
from trainer.weights.checks import (
    MAX_CONTEXT,
    NOISE,
    CheckReport,
    CheckTokens,
    JumpDetector,
    RepushRule,
    WeightChecks,
    check_tokens,
)
from trainer.weights.receivers import ReceiverId


def test_a_server_that_has_left_does_not_count() -> None:
    """Its last difference may be that of a jump. The training thread may read while a server is added."""
    leader: Any = Leader.__new__(Leader)
    servers = [
        ServerEntry(name=name, incarnation=1, weights_address="", device="", state="", weights_version=1)
        for name in ("a", "b")
    ]
    leader._buffer = SimpleNamespace(directory=Directory(servers=servers))
    leader._record = SimpleNamespace(series=SimpleNamespace(checked=lambda report: None))
    leader._last_checks = {}
    reports = {
        name: CheckReport(server=name, version=1, difference=0.1, limit=0.5, is_jump=False) for name in "ab"
    }
    leader._checked(reports["a"])
    reading = iter(leader._last_checks.items())
    leader._checked(reports["b"])
    assert [*reading] == [("a", reports["a"])] and leader._checks_of_present() == reports
    leader._buffer.directory = Directory(servers=servers[1:])
    assert leader._checks_of_present() == {"b": reports["b"]}


def sample(mask: list[int], *, first_token: int) -> TrainingSample:
    length = len(mask)
    trajectory = Trajectory(
        tokens=np.arange(first_token, first_token + length, dtype=np.int32),
        loss_mask=np.array(mask, dtype=np.uint8),
        logprobs=np.zeros(length, dtype=np.float32),
        versions=np.array([0 if one else -1 for one in mask], dtype=np.int32),
        reward=0.0,
        finish_reason=FinishReason.STOP,
    )
    return TrainingSample(trajectory=trajectory, advantage=1.0, group=0)


def test_check_tokens_are_the_longest_first_turn() -> None:
    # The first sequence is too long; the second has two turns with a tool's answer between them.
    long = [0] * MAX_CONTEXT + [1, 1]
    batch = collate([sample(long, first_token=0), sample([0, 0, 1, 1, 1, 0, 1], first_token=50)])
    logp_S = -torch.arange(1.0, 7.0)
    found = check_tokens(batch, logp_S, step=3)
    assert found == CheckTokens(step=3, tokens=[50, 51, 52, 53, 54], first=2, logprobs=[-3.0, -4.0, -5.0])
    assert check_tokens(collate([sample(long, first_token=0)]), logp_S[:2], step=3) is None
    shorter, longer = sample([0, 1], first_token=10), sample([0, 1, 1], first_token=20)
    found = check_tokens(collate([shorter, longer, shorter]), logp_S[:4], step=3)
    assert found == CheckTokens(step=3, tokens=[20, 21, 22], first=1, logprobs=[-2.0, -3.0])
    many = check_tokens(collate([sample([0] + [1] * 100, first_token=0)]), -torch.ones(100), step=0)
    assert many is not None and (many.first, len(many.tokens), len(many.logprobs)) == (1, 33, 32)


def test_a_jump_stands_out_from_earlier_checks() -> None:
    bf16, fp32 = JumpDetector(noise=NOISE["bfloat16"]), JumpDetector()
    assert bf16.is_jump(2.0) and bf16.is_jump(math.nan), "far above any noise, without a history"
    for difference in (0.02, 0.03, 0.02, 0.025):
        assert not bf16.is_jump(difference)
    assert bf16.is_jump(0.08) and bf16.is_jump(math.inf) and not bf16.is_jump(0.06)
    certain = JumpDetector(noise=NOISE["bfloat16"])
    for difference in (0.004, 0.002, 0.003, 0.04, 0.003):
        assert not certain.is_jump(difference), "tokens that are nearly certain have little noise"
    assert certain.is_jump(0.2)
    for _ in range(5):
        assert not fp32.is_jump(1e-6)
    assert fp32.is_jump(0.01) and not fp32.is_jump(5e-4), "float32 noise varies by orders of magnitude"


def test_the_mean_of_few_tokens_varies_more() -> None:
    detector = JumpDetector(noise=NOISE["bfloat16"])
    for _ in range(5):
        assert not detector.is_jump(0.012, 32)
    assert detector.limit(32) == 0.05 and detector.limit(8) == 0.1
    assert not detector.is_jump(0.098, 3), "measured on an H100, with the right weights"
    assert detector.is_jump(0.2, 3) and detector.is_jump(0.098, 32)


def test_fewer_and_fewer_pushes_if_they_do_not_help() -> None:
    rule, receiver = RepushRule(), ("one", 1)
    assert [rule.jumped(receiver) for _ in range(8)] == [True, True, False, True, False, False, False, True]
    assert rule.passed(receiver) and not rule.passed(receiver) and rule.jumped(receiver)


def test_a_check_needs_both_sides_of_one_step() -> None:
    asked: list[ReceiverId] = []
    reports: list[CheckReport] = []
    reply: list[TokenScores | WeightsFailed] = [TokenScores(version=7, logprobs=[-1.0, -2.0])]

    async def score_at(receiver: ReceiverId, request: ScoreTokens) -> TokenScores | WeightsFailed:
        assert request == ScoreTokens(tokens=[1, 2, 3], first=1)
        asked.append(receiver)
        return reply[0]

    def tokens(step: int) -> CheckTokens:
        return CheckTokens(step=step, tokens=[1, 2, 3], first=1, logprobs=[-1.0, -2.0])

    async def body() -> None:
        checks = WeightChecks(score_at, interval_s=60, on_report=reports.append, on_repush=lambda _: None)
        checks.activated(("one", 1), step=4, version=7)
        checks.scored_by_trainer(tokens(3))
        await asyncio.sleep(0)
        assert not asked and checks.next_due_s == 0
        checks.scored_by_trainer(tokens(4))
        await asyncio.sleep(0.01)
        assert asked == [("one", 1)] and checks.next_due_s > 0
        assert reports == [CheckReport(server="one", version=7, difference=0.0, limit=0.5, is_jump=False)]
        checks.activated(("one", 1), step=4, version=8)
        await asyncio.sleep(0.01)
        assert len(asked) == 1, "the interval is not over"
        # A refused check, or one that another version answers, does not count.
        for answer in (WeightsFailed(version=7, reason="no engine"), TokenScores(version=9, logprobs=[0.0])):
            reply[0] = answer
            checks.activated(("two", 1), step=4, version=8)
            await asyncio.sleep(0.01)
        assert asked[1:] == [("two", 1)] * 2 and len(reports) == 1
        await checks.close()

    asyncio.run(body())
