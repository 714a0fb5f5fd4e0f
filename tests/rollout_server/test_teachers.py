"""Teachers at servers: what they are asked, which answers are taken, failures, checks at the start."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from areal_like.config import DistillConfig, EvalSetConfig, from_mapping
from areal_like.errors import ConfigError, RewardError, TeacherError
from areal_like.failures import FailureKind
from areal_like.trajectory import TEACHER_LOGPROBS, Trajectory
from areal_like.wire.fingerprint import shared_settings
from areal_like.wire.messages.hello import Role
from areal_like.wire.messages.producer import SampleDone, SampleFailed
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.teachers.pool import TeacherPool
from tests.rollout_server.test_lease_runner import GROUP, FixedRewards, Slow, serving, source
from tests.support import moved_clock
from tests.support.moved_clock import advance
from tests.support.played_teacher import PlayedTeacher, logprob_of
from tests.support.ports import held_port
from tests.support.trainer_helpers import joined, random_groups, write_model
from tests.support.waiting import HANG_LIMIT_S

NOBODY = "http://127.0.0.1:9"
"""Where nothing listens."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def renderer(model: str) -> PromptRenderer:
    return PromptRenderer(model)


@contextlib.asynccontextmanager
async def pool_of(
    renderer: PromptRenderer, teachers: dict[str, Any], *, longest: int = 100, **settings: Any
) -> AsyncIterator[TeacherPool]:
    distill = DistillConfig(teachers=teachers, **settings)
    model = renderer._model
    async with TeacherPool(distill, renderer=renderer, model=model, longest=longest) as pool:
        yield pool


def want_of(trajectory: Trajectory) -> list[float]:
    """The log-probs of a PlayedTeacher, by their definition."""
    found = []
    for part in trajectory.segment_slices:
        tokens = trajectory.tokens[part].tolist()
        mask = trajectory.loss_mask[part]
        found += [logprob_of(tokens[:i], token) if mask[i] and i else 0.0 for i, token in enumerate(tokens)]
    return found


def samples() -> list[Trajectory]:
    """One segment, several, and one whose first token was sampled."""
    first, second, third = random_groups(1, longest=9)[0]
    mask = second.loss_mask.copy()
    mask[0] = 1
    versions = np.where(mask, 5, -1).astype(np.int32)
    return [first, replace(second, loss_mask=mask, versions=versions), joined([first, second, third])]


@pytest.mark.parametrize("engine", ["sglang", "embedded"])
def test_log_probs_of_sampled_tokens(renderer: PromptRenderer, engine: str) -> None:
    async def body() -> None:
        async with (
            PlayedTeacher(engine=engine).running() as teacher,
            pool_of(renderer, {"math": teacher.url}) as pool,
        ):
            for trajectory in samples():
                found = await pool.logprobs(replace(trajectory, label="math"))
                assert found is not None and found.dtype == np.float32
                assert found.tolist() == want_of(trajectory)
            asked = [body for body in teacher.bodies if body["input_ids"] != [0, 1]]
            num_segments = sum(len(t.segments) or 1 for t in samples())
            assert len(asked) == num_segments == pool.num_requests and not pool.num_failures
            assert await pool.logprobs(replace(samples()[0], label="other")) is None

    asyncio.run(body())


def test_an_embedded_engine_gets_short_ranges(renderer: PromptRenderer) -> None:
    """It scores at most 256 tokens in a request."""

    async def body() -> None:
        (short,) = random_groups(1, group_size=1, longest=3)[0]
        mask = np.ones(700, np.uint8)
        mask[:5] = 0
        long = replace(
            short,
            tokens=np.arange(700, dtype=np.int32) % 40,
            loss_mask=mask,
            logprobs=np.zeros(700, np.float32),
            versions=np.where(mask, 5, -1).astype(np.int32),
        )
        async with (
            PlayedTeacher(engine="embedded").running() as teacher,
            pool_of(renderer, {"default": teacher.url}, longest=700) as pool,
        ):
            found = await pool.logprobs(long)
        assert found is not None and found.tolist() == want_of(long)
        lengths = [len(b["input_ids"]) - b["logprob_start_len"] - 1 for b in teacher.bodies[1:]]
        assert lengths == [256, 256, 700 - 5 - 512]

    asyncio.run(body())


def test_the_next_server_is_asked(renderer: PromptRenderer, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with (
            PlayedTeacher().running() as teacher,
            pool_of(renderer, {"default": [NOBODY, teacher.url]}) as pool,
        ):
            assert f"the teacher at {NOBODY} does not respond, and will be asked again" in caplog.text
            for trajectory in samples():
                found = await asyncio.wait_for(pool.logprobs(trajectory), HANG_LIMIT_S)
                assert found is not None and found.tolist() == want_of(trajectory)
            assert pool.num_requests == 5 and pool.num_failures > 0 and not pool.waits()

    with caplog.at_level(logging.WARNING):
        asyncio.run(body())


def test_a_hanging_server_is_avoided_for_a_while(renderer: PromptRenderer) -> None:
    """By the requests that wait for a slot at it, too."""

    async def body() -> None:
        async with PlayedTeacher().running() as hanging, PlayedTeacher().running() as other:
            urls = [hanging.url, other.url]
            async with pool_of(renderer, {"default": urls}, max_requests=1, retry_s=500.0) as pool:
                hanging.released.clear()
                asked = [asyncio.create_task(pool.logprobs(samples()[0])) for _ in range(6)]
                await hanging.asked.wait()
                while sum(task.done() for task in asked) < 3:
                    await asyncio.sleep(0.001)
                advance(61)
                while pool.num_failures < 1:
                    await asyncio.sleep(0.001)
                advance(11)  # the pause before the failed one asks again
                await asyncio.wait_for(asyncio.gather(*asked), HANG_LIMIT_S)
                for _ in range(4):
                    await asyncio.wait_for(pool.logprobs(samples()[0]), HANG_LIMIT_S)
                assert pool.num_failures == 1 and pool.num_requests == 10
                hanging.released.set()
                advance(61)
                before = len(hanging.bodies)
                for _ in range(2):
                    await pool.logprobs(samples()[0])
                assert len(hanging.bodies) == before + 1, "it is used again"

    moved_clock.run(body())


def test_a_dead_teacher_delays_and_fails_its_samples(renderer: PromptRenderer) -> None:
    """It is named among the waits meanwhile. Another teacher's samples are not affected."""

    async def body() -> None:
        async with PlayedTeacher().running() as teacher:
            teachers = {"math": teacher.url, "code": NOBODY}
            async with pool_of(renderer, teachers, retry_s=50.0) as pool:
                math, code = (replace(samples()[0], label=label) for label in ("math", "code"))
                waiting = asyncio.create_task(pool.logprobs(code))
                assert await pool.logprobs(math) is not None
                while not pool.num_failures:
                    await asyncio.sleep(0)
                advance(10)
                ((name, seconds),) = pool.waits().items()
                assert name.startswith("teachers: 1 samples at distill.teachers.code (") and "Connect" in name
                assert 10 <= seconds < 50 and not waiting.done()
                while not waiting.done():
                    advance(10)
                    await asyncio.sleep(0.001)
                with pytest.raises(TeacherError, match=r"distill\.teachers\.code: "):
                    await waiting
                assert pool.num_failures > 2 and pool.num_waiting == 0

    moved_clock.run(body())


def http(status: Callable[..., web.HTTPException]) -> Any:
    def answer(body: dict[str, Any], entries: list[Any]) -> Any:
        if body["input_ids"] == [0, 1]:
            return {"meta_info": {"input_token_logprobs": entries}}
        raise status(text="not now")

    return answer


def deep_nesting(text: str) -> web.HTTPException:
    return web.HTTPOk(text="[" * 100_000)


def of_entries(change: Any) -> Any:
    """Changes the entries of all requests but the check's."""

    def answer(body: dict[str, Any], entries: list[Any]) -> Any:
        changed = entries if body["input_ids"] == [0, 1] else change(entries)
        return {"meta_info": {"input_token_logprobs": changed}}

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        http(web.HTTPInternalServerError),
        http(web.HTTPBadRequest),
        of_entries(lambda entries: None),
        of_entries(lambda entries: entries[:-1]),
        of_entries(lambda entries: [*entries, entries[-1]]),
        of_entries(lambda entries: [[e[0], e[1] + 1, None] for e in entries]),
        of_entries(lambda entries: [[float("nan"), e[1], None] for e in entries]),
        of_entries(lambda entries: [[0.5, e[1], None] for e in entries]),
        of_entries(lambda entries: [[-1e30, e[1], None] for e in entries]),
        of_entries(lambda entries: [["-1", [], {}] for e in entries]),
        of_entries(lambda entries: [None] * len(entries)),
        of_entries(lambda entries: [[] for e in entries]),
        of_entries(lambda entries: [{} for e in entries]),
        of_entries(lambda entries: [[-(10**400), e[1], None] for e in entries]),
        of_entries(lambda entries: [[-1.0, float("inf"), None] for e in entries]),
        http(deep_nesting),
        of_entries(lambda entries: {"a": 1}),
        of_entries(lambda entries: "x" * len(entries)),
    ],
)
def test_wrong_answers_fail_only_the_sample(renderer: PromptRenderer, answer: Any) -> None:
    async def body() -> None:
        async with PlayedTeacher().running() as teacher:
            right, teacher.answer = teacher.answer, answer
            async with pool_of(renderer, {"default": teacher.url}, retry_s=0.0) as pool:
                with pytest.raises(TeacherError, match=r"distill\.teachers\.default: "):
                    await pool.logprobs(samples()[0])
                teacher.answer = right
                assert await pool.logprobs(samples()[0]) is not None

    asyncio.run(body())


def test_a_token_without_a_name_is_not_sent(renderer: PromptRenderer) -> None:
    """An id outside the vocabulary would end an SGLang server."""

    async def body() -> None:
        async with PlayedTeacher().running() as teacher, pool_of(renderer, {"default": teacher.url}) as pool:
            sample = samples()[0]
            sample.tokens[-1] = renderer.num_token_ids
            with pytest.raises(TeacherError, match="is none of the tokenizer's"):
                await pool.logprobs(sample)
            assert len(teacher.bodies) == 1

    asyncio.run(body())


def test_unsuitable_servers_are_refused_at_the_start(
    renderer: PromptRenderer, model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write_model(tmp_path / "other")
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace('"a"', '"new"'))

    async def refused(teacher: PlayedTeacher, match: str, **settings: Any) -> None:
        async with teacher.running():
            with pytest.raises(ConfigError, match=match):
                async with pool_of(renderer, {"x": teacher.url}, **settings):
                    pass

    async def body() -> None:
        await refused(PlayedTeacher(context_length=99), r"has 99 tokens, and a sample may have 100: start it")
        await refused(PlayedTeacher(tokenizer_path=other), "its tokenizer is not the policy's: ")
        broken = PlayedTeacher(tokenizer_path=write_model(tmp_path / "broken"))
        (tmp_path / "broken" / "tokenizer.json").write_text('{"added_tokens": []}')
        await refused(broken, "cannot load a tokenizer from it")
        without = PlayedTeacher()
        without.answer = lambda body, entries: {"text": "", "meta_info": {}}
        await refused(without, "it returns no log-probs of prompts .*: SGLang and the embedded engine do")

        def absent(body: Any, entries: Any) -> Any:
            raise web.HTTPNotFound(text="no such route")

        without.answer = absent
        await refused(without, "it returns no log-probs of prompts")
        without.has_facts = False  # as a server with OpenAI's API alone
        await refused(without, "it returns no log-probs of prompts .*no such route")
        foreign = PlayedTeacher(tokenizer_path="/on/another/machine")
        foreign.tokens_of_text = lambda text: [1, 2, 3]
        await refused(foreign, "its tokenizer is not the policy's: it makes other tokens of a text")
        foreign.tokens_of_text = lambda text: renderer._tokenizer(text)["input_ids"]
        async with foreign.running(), pool_of(renderer, {"x": foreign.url}):
            assert "cannot be compared" not in caplog.text
        for path in ("/on/another/machine", f"/{'x' * 300}", "/\0"):
            caplog.clear()
            unknown = PlayedTeacher(tokenizer_path=path)
            async with unknown.running(), pool_of(renderer, {"x": unknown.url}):
                assert "the vocabulary of the teacher at" in caplog.text

    with caplog.at_level(logging.WARNING):
        asyncio.run(body())


def test_a_busy_server_is_not_unsuitable(renderer: PromptRenderer, caplog: pytest.LogCaptureFixture) -> None:
    def busy(body: Any, entries: Any) -> Any:
        raise web.HTTPTooManyRequests(text="later")

    async def body() -> None:
        teacher = PlayedTeacher()
        right, teacher.answer = teacher.answer, busy
        async with teacher.running(), pool_of(renderer, {"default": teacher.url}) as pool:
            assert "does not respond, and will be asked again" in caplog.text
            teacher.answer = right
            assert await pool.logprobs(samples()[0]) is not None

    with caplog.at_level(logging.WARNING):
        asyncio.run(body())


def test_a_late_server_is_checked_before_it_is_used(renderer: PromptRenderer) -> None:
    """One that turns out to be unsuitable fails its samples, and not the rollout server."""

    async def body() -> None:
        teacher = PlayedTeacher(context_length=99)
        url = f"http://127.0.0.1:{port}"
        async with pool_of(renderer, {"default": url}, retry_s=0.0) as pool, teacher.running(port=port):
            with pytest.raises(TeacherError, match="its context has 99 tokens"):
                await pool.logprobs(samples()[0])
            teacher.facts["context_length"] = 100
            assert await pool.logprobs(samples()[0]) is not None

    with held_port() as port:
        asyncio.run(body())


def teachers_of(renderer: PromptRenderer, url: str, **settings: Any) -> Any:
    return pool_of(renderer, {"default": url}, longest=1000, **settings)


def test_training_samples_are_scored_beside_their_reward(renderer: PromptRenderer) -> None:
    """The teacher is asked before the reward is there. Greedy samples and evaluations have no teacher."""

    async def body() -> None:
        rewards, task = FixedRewards(), Slow()
        async with PlayedTeacher().running() as teacher, teachers_of(renderer, teacher.url) as pool:
            rewards.released.clear()
            evaluation = {"set": replace(source(task), settings=EvalSetConfig(num_prompts=1))}
            async with serving(task, rewards=rewards, eval_sets=evaluation, teachers=pool) as served:
                served.grant(1)
                await asyncio.wait_for(teacher.asked.wait(), HANG_LIMIT_S)
                assert not served.results
                rewards.released.set()
                await served.until(lambda: len(served.of(1)) == GROUP)
                for result in served.of(1):
                    assert isinstance(result, SampleDone)
                    trajectory = result.record.trajectory()
                    assert trajectory.arrays[TEACHER_LOGPROBS].tolist() == pytest.approx(want_of(trajectory))
                before = len(teacher.bodies)
                served.grant(2, eval_set="set")
                await served.until(lambda: len(served.of(2)) == GROUP)
                assert len(teacher.bodies) == before
                for result in served.of(2):
                    assert isinstance(result, SampleDone) and not result.record.trajectory().arrays

    asyncio.run(body())


def test_a_failed_teacher_is_a_failure_of_its_kind(renderer: PromptRenderer) -> None:
    async def body() -> None:
        async with (
            teachers_of(renderer, NOBODY, retry_s=0.0) as pool,
            serving(Slow(), teachers=pool) as served,
        ):
            served.grant(1)
            await served.until(lambda: len(served.results) == GROUP)
            for result in served.results:
                assert isinstance(result, SampleFailed) and result.kind is FailureKind.TEACHER
                assert result.error.startswith("distill.teachers.default: ") and result.num_tokens > 0
            assert served.runner.num_failed == {FailureKind.TEACHER: GROUP}

    asyncio.run(body())


def test_a_failed_reward_ends_the_request(renderer: PromptRenderer) -> None:
    async def body() -> None:
        rewards = FixedRewards(RewardError("x"))
        async with PlayedTeacher().running() as teacher, teachers_of(renderer, teacher.url) as pool:
            teacher.released.clear()
            async with serving(Slow(), rewards=rewards, teachers=pool) as served:
                served.grant(1)
                await served.until(lambda: len(served.results) == GROUP)
                assert {r.kind for r in served.results if isinstance(r, SampleFailed)} == {FailureKind.REWARD}
                assert pool.num_waiting == 0
            teacher.released.set()

    asyncio.run(body())


def test_settings_of_servers() -> None:
    url = {"teachers": {"default": NOBODY}}
    config = from_mapping({"distill": url})
    assert "distill.teachers=" in shared_settings(config, Role.ROLLOUT)
    assert "on_failure.teacher=retry" in shared_settings(config, Role.ROLLOUT)
    assert "teacher" not in shared_settings(from_mapping({}), Role.ROLLOUT)
    assert "teacher" not in shared_settings(
        from_mapping({"distill": {"teachers": {"default": "x"}}}), Role.ROLLOUT
    )
    with pytest.raises(ConfigError, match=r"distill\.retry_s=900 and distill\.timeout_s=60 together"):
        from_mapping({"distill": {**url, "retry_s": 900}})
    with pytest.raises(ConfigError, match=r"on_failure\.teacher=zero: such a sample has no log-probs of its"):
        from_mapping({"buffer": {"on_failure": {"teacher": "zero"}}})
    with pytest.raises(ConfigError, match=r"name it with distill\.api_key_file") as refused:
        from_mapping({"distill": {"teachers": {"x": ["http://a", "https://user:secret@b:1/c"]}}})
    assert "secret" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"sampling\.temperature=0\.5: .* distill\.teachers"):
        from_mapping({"distill": url, "sampling": {"temperature": 0.5}})
