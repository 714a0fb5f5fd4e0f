"""The reward `model` against real score servers that refuse, disappear, come back and change their model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import from_mapping
from areal_like.errors import ConfigError, RewardError
from areal_like.security.keys import KeyRole
from rollout_server.rewards.library import make_rewards
from rollout_server.rewards.library.model import scorers
from rollout_server.rewards.library.model.scorers import Scorers, tell_workers
from rollout_server.rewards.library.service import TryAgainError
from rollout_server.rewards.scores import scorer_in
from rollout_server.rewards.time_limit import begin_reward
from rollout_server.scoring.model import RewardModel
from rollout_server.tasks.base import Completion, Example, Score
from tests.support.judge_server import Answer, judge_server, run_closed
from tests.support.keys import keyring, new_keys
from tests.support.ports import held_port
from tests.support.reward_models import CONTEXT, ScoreServer, StuckModel, loaded, write_reward_model
from tests.support.workers import reward_pool

QUESTION = [{"role": "user", "content": "1+1"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_reward_model(tmp_path_factory.mktemp("rm") / "rm")


@pytest.fixture(scope="module")
def model(path: str) -> RewardModel:
    return loaded(path)


@pytest.fixture(scope="module")
def server(model: RewardModel) -> Iterator[ScoreServer]:
    with ScoreServer(model).serving() as server:
        yield server


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AREAL_LIKE_SCORERS", "")


def scored(
    *texts: str,
    prompt: Any = "1+1=",
    gold: Any = None,
    limit_s: float = 30.0,
    before: Callable[[int], None] = lambda number: None,
    **settings: Any,
) -> list[Score | Exception]:
    """The scores of completions, one after the other. `before`: called before each."""
    rewards = make_rewards({"name": "model", "first_pause_s": 0.01, **settings}, gold=gold)
    example = Example(prompt=prompt, answer="2")

    async def one(text: str) -> Score | Exception:
        begin_reward(limit_s)
        scoring = rewards.score(example, Completion(text))
        assert not isinstance(scoring, Score)
        try:
            return await scoring
        except RewardError as error:
            return error

    async def body() -> list[Score | Exception]:
        found = []
        for number, text in enumerate(texts):
            before(number)
            found.append(await one(text))
        return found

    return list(run_closed(rewards, body))


def one_score(*arguments: str, **settings: Any) -> Score:
    (score,) = scored(*(arguments or ("2",)), **settings)
    assert isinstance(score, Score), score
    return score


def problem(**settings: Any) -> str:
    (error,) = scored("2", **settings)
    assert type(error) is RewardError, error  # a RewardTimeoutError would count as reward 0
    return str(error)


@pytest.fixture
def unused_url() -> Iterator[str]:
    """Where nothing listens."""
    with held_port() as port:
        yield f"http://127.0.0.1:{port}"


def test_the_reward_is_the_score(server: ScoreServer) -> None:
    asked = server.request("POST", "/score", {"prompt": "1+1=", "completion": "2"})[1]["score"]
    score = one_score(url=server.url)
    assert one_score("", url=server.url).value != asked, "an empty completion is scored"
    assert score.value == asked and score.parts == {"model": asked}
    counts = {"calls": 1.0, "cache_hits": 0.0, "retries": 0.0, "failures": 0.0}
    expected = {"score": asked, "scorer/abc": 1.0, **counts}
    assert score.metrics == {f"model/{name}": value for name, value in expected.items()}
    assert one_score(url=server.url, transform="sigmoid").value == pytest.approx(1 / (1 + math.exp(-asked)))
    low, high = asked + 1, asked + 2
    clipped = one_score(url=server.url, transform="clip", low=low, high=high)
    assert clipped.value == low and clipped.metrics["model/score"] == asked


def test_the_prompt_is_text_or_messages(server: ScoreServer) -> None:
    of_messages = server.request("POST", "/score", {"prompt": QUESTION, "completion": "2"})[1]["score"]
    assert one_score(url=server.url, prompt=QUESTION).value == of_messages
    assert one_score(url=server.url, prompt="1+1", chat=True).value == of_messages
    assert one_score(url=server.url, prompt="1+1").value != of_messages


def test_sglangs_format_gives_the_same_score(server: ScoreServer, path: str) -> None:
    for prompt in ("1+1=", QUESTION):
        ours = one_score(url=server.url, prompt=prompt)
        theirs = one_score(url=f"{server.url}/", prompt=prompt, api="classify", tokenizer=path)
        assert theirs.value == pytest.approx(ours.value, abs=1e-6)
        (identity,) = (name for name in theirs.metrics if "scorer/" in name)
        assert len(identity.rpartition("/")[2]) == 16


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"embedding": [1.0, 2.0], "meta_info": {}}', "returned 2 numbers"),
        (b'{"embedding": [NaN]}', "a score that is not a finite number"),
        (b'{"embedding": [1' + b"0" * 400 + b"]}", "a score that is not a finite number"),
        (b'{"choices": []}', "without `embedding`"),
        (b"<html>", "a response that is not JSON"),
        (b'{"embedding": [' + b"1," * 40_000 + b"1]}", "more than 65536 bytes"),
    ],
)
def test_responses_that_are_no_scores(path: str, body: bytes, says: str) -> None:
    with judge_server(Answer(body=body)) as other:
        url = other.url.removesuffix("/v1")
        said = problem(url=url, api="classify", tokenizer=path, max_retries=1)
        assert (says in said and said.startswith(f"scorer {url}")) or "returned 2 numbers" in said


def test_a_tokenizer_that_is_not_the_models_sends_nothing(path: str, tmp_path: Path) -> None:
    """A token id outside the vocabulary would end an SGLang server."""
    folder = Path(shutil.copytree(path, tmp_path / "rm"))
    config = json.loads((folder / "config.json").read_text())
    size = config.pop("vocab_size")
    for facts in ({"vocab_size": 5}, {"text_config": {"vocab_size": 5}}):
        (folder / "config.json").write_text(json.dumps(config | facts))
        with judge_server(Answer(body=b'{"embedding": [0.5]}')) as other:
            url = other.url.removesuffix("/v1")
            said = problem(url=url, api="classify", tokenizer=str(folder))
            assert re.search(r"cannot read this text: token id \d+: the model's vocabulary has 5", said)
            assert size > 5 and not other.requests


def test_a_server_without_an_identity_still_scores(path: str) -> None:
    """Its model has no name; with one of the routes that tell it, the name does not depend on which."""
    answer = Answer(body=b'{"embedding": [0.5], "meta_info": {"weight_version": "default"}}')
    with judge_server(answer) as other:
        asked = {"url": other.url.removesuffix("/v1"), "api": "classify", "tokenizer": path}
        unnamed = one_score(**asked)
        assert unnamed.value == 0.5 and unnamed.metrics["model/scorer/unknown"] == 1
        names = set()
        for where, told in (
            ("/model_info", {"model_path": "/rm"}),
            ("/get_model_info", {"model_path": "/rm", "weight_version": "default"}),
            ("/v1/models", {"data": [{"id": "/rm", "root": "/rm"}]}),
        ):
            other.pages = {where: told}
            names |= {name for name in one_score(**asked).metrics if "scorer/" in name}
        (name,) = names
        assert name != "model/scorer/unknown"
        for broken in ({"data": []}, {"data": [1]}, []):
            other.pages = {"/v1/models": broken}
            assert one_score(**asked).metrics["model/scorer/unknown"] == 1


def test_a_text_that_is_too_long_fails_at_once(server: ScoreServer) -> None:
    before = server.number("scorer_refused_total", reason="too_long")
    failed, right = scored("2" * CONTEXT, "2", url=server.url)
    assert type(failed) is RewardError and f"at most {CONTEXT} are scored" in str(failed)
    assert isinstance(right, Score) and right.metrics["model/failures"] == 1
    assert server.number("scorer_refused_total", reason="too_long") == before + 1, "not sent again"


def test_a_scorer_that_is_out_of_reach_fails_the_sample(unused_url: str) -> None:
    assert "after 3 tries" in problem(url=unused_url, max_retries=2)
    said = problem(url=unused_url, limit_s=0.9, first_pause_s=0.2)
    assert "raise rollout.reward_timeout_s" in said


def test_a_slow_scorer_fails_the_sample(model: RewardModel) -> None:
    stuck = StuckModel(model)
    with ScoreServer(stuck).serving() as server:
        assert "no response within 0.05 s" in problem(url=server.url, timeout_s=0.05, max_retries=1)
        stuck.may_go_on.set()
        assert one_score(url=server.url).value > 0


def test_another_server_takes_the_requests_of_a_dead_one(server: ScoreServer, unused_url: str) -> None:
    scores = scored(*["2"] * 6, url=[unused_url, server.url])
    values = {score.value for score in scores if isinstance(score, Score)}
    assert len(scores) == 6 and len(values) == 1, scores
    assert sum(score.metrics["model/retries"] for score in scores if isinstance(score, Score)) <= 1


def test_a_server_is_chosen_by_its_open_requests() -> None:
    urls = ["http://a", "http://b", "http://c"]
    scorers = Scorers(lambda: urls, path="/score", shown="")
    with scorers.using() as first, scorers.using() as second, scorers.using() as third:
        assert {first, second, third} == {f"{url}/score" for url in urls}
    with pytest.raises(OSError), scorers.using() as failed:
        raise OSError
    for _ in range(6):
        with scorers.using() as url:
            assert url != failed
    urls.clear()
    with pytest.raises(OSError), scorers.using():
        raise OSError  # the addresses are read again
    with pytest.raises(TryAgainError, match="no score server of the job is ready"), scorers.using():
        pass


@pytest.mark.parametrize(
    ("scorer", "reward", "waits"),
    [
        ({"path": "rm"}, "model", True),
        ({"path": "rm"}, {"name": "model", "url": "http://127.0.0.1:9"}, False),
        ({"path": "rm"}, "exact", False),
        ({}, "model", False),
    ],
)
def test_a_rollout_server_waits_for_a_score_server(
    scorer: dict[str, str], reward: Any, waits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = {"name": "data", "train": "rows.jsonl", "reward": reward}
    config = from_mapping({"runs_dir": str(tmp_path), "name": "x", "scorer": scorer, "task": task})
    endpoints = tmp_path / "x" / "endpoints"
    endpoints.mkdir(parents=True)
    num_asked = 0

    def gives_up() -> bool:
        nonlocal num_asked
        num_asked += 1
        (endpoints / "scorer-0.json").write_text('{"pid": 1}' if num_asked == 1 else '{"scores": "http://a"}')
        return num_asked > 2

    monkeypatch.setattr(scorers, "_READ_AGAIN_S", 0.0)
    tell_workers(config)
    asyncio.run(scorers.wait_for_scorers(config, gives_up=gives_up))
    assert num_asked == (2 if waits else 0)


def test_the_jobs_servers_are_found_where_they_are_now(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = new_keys(tmp_path / "keys")
    config = from_mapping(
        {"runs_dir": str(tmp_path), "name": "x", "scorer": {"path": "rm"}, "security": {"keys": str(keys)}}
    )
    tell_workers(config)
    endpoint = tmp_path / "x" / "endpoints" / "scorer-0.json"
    endpoint.parent.mkdir(parents=True)
    make_rewards("model").check()
    ring = keyring(keys, KeyRole.SCORER)
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as first_of_all:
        servers = [
            ScoreServer(model, identity=identity, keyring=ring, security={"keys": str(keys)})
            for identity in ("abc", "new")
        ]
        first = first_of_all.enter_context(servers[0].serving())
        second = stack.enter_context(servers[1].serving())

        def move(number: int) -> None:
            if number == 0:  # it is starting
                asyncio.get_running_loop().call_later(0.05, write, first.url)
            if number == 2:  # it ends, and another is started
                first_of_all.close()
                asyncio.get_running_loop().call_later(0.05, write, second.url)

        def write(url: str) -> None:
            endpoint.write_text(json.dumps({"scores": url, "pid": 1}))

        one, two, three = scored("2", "2", "2", before=move)
    assert isinstance(one, Score) and isinstance(two, Score) and isinstance(three, Score), (one, two, three)
    assert one.metrics["model/retries"] > 0 and three.metrics["model/retries"] > 0
    assert one.metrics["model/scorer/abc"] == two.metrics["model/scorer/abc"] == 1
    assert three.metrics["model/scorer/new"] == 1
    (keys / "scorer.token").unlink()
    with pytest.raises(ConfigError, match=r"areal-like keys add .* scorer --role scorer"):
        make_rewards("model").check()


def test_cached_scores_need_no_request(server: ScoreServer, tmp_path: Path) -> None:
    first, again, other = scored("2", "2", "3", url=server.url, cache=str(tmp_path / "scores.sqlite"))
    assert isinstance(first, Score) and isinstance(again, Score) and isinstance(other, Score)
    assert again.value == first.value != other.value
    assert again.metrics["model/calls"] == 0 and again.metrics["model/cache_hits"] == 1
    assert other.metrics["model/calls"] == 1


def test_a_score_without_an_identity_is_not_cached(path: str, tmp_path: Path) -> None:
    """Another model's would be the same."""
    answers = [Answer(body=b'{"model": "", "score": %d}' % score) for score in (1, 2)]
    with judge_server(*answers) as other:
        url = other.url.removesuffix("/v1")
        first, second = scored("2", "2", url=url, cache=str(tmp_path / "scores.sqlite"))
    assert isinstance(first, Score) and isinstance(second, Score)
    assert (first.value, second.value) == (1, 2) and second.metrics["model/scorer/unknown"] == 1


def test_a_gold_reward_is_recorded_and_not_trained_on(server: ScoreServer, unused_url: str) -> None:
    right, wrong = scored("2", "3", url=server.url, gold="exact")
    assert isinstance(right, Score) and isinstance(wrong, Score)
    assert (right.metrics["reward_gold"], wrong.metrics["reward_gold"]) == (1.0, 0.0)
    assert right.value == right.parts["model"] and set(right.parts) == {"model"}
    (lost,) = scored(
        "2", url=server.url, gold={"name": "judge", "url": unused_url, "rubric": "?", "max_retries": 0}
    )
    assert isinstance(lost, Score) and lost.metrics["reward_gold/failed"] == 1
    for gold in (["exact"], {"name": "exact", "weight": 1}, "nothing", 7):
        with pytest.raises(ConfigError, match=r"^task\.gold_reward"):
            make_rewards("exact", gold=gold)


def test_the_identity_is_in_the_name_of_a_metric() -> None:
    assert scorer_in("scorer/abc") == ("", "abc") and scorer_in("model/scorer/abc") == ("model", "abc")
    assert scorer_in("my_scorer/accuracy") is None and scorer_in("score") is None


def test_another_model_in_mid_run_is_named(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
    urls: list[str] = []

    async def body(*servers: ScoreServer) -> int:
        spec = {"name": "model", "url": [server.url for server in servers]}
        task = {"_target_": "tests.support.library_rewards.Rewarded", "reward_spec": spec}
        async with reward_pool(task, sandbox="rlimits", concurrency=4) as pool:
            for _ in range(6):
                reward = await pool.score(split="train", index=0, completion=Completion("2"))
                urls.extend(name for name in reward.score.metrics if "scorer/" in name)
            return pool.num_scorer_changes

    with (
        ScoreServer(model).serving() as one,
        ScoreServer(model, identity="new").serving() as other,
        caplog.at_level(logging.WARNING),
    ):
        assert asyncio.run(body(one, other)) == 1
    assert {name.rpartition("/")[2] for name in urls} == {"abc", "new"}
    assert caplog.text.count("another reward model scores samples of this run") == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"url": "ftp://x"}, "want http://host:port"),
        ({"url": "http://user:pw@host"}, "a user name, password or query does not belong"),
        ({"url": ["http://a", 1]}, "want a URL, or a list"),
        ({"url": {"a": "http://a"}}, "want a URL, or a list"),
        ({"api": "classify"}, "needs `url`, and `tokenizer`"),
        ({"api": "openai"}, "use score or classify"),
        ({"tokenizer": "x"}, "are only for api=classify"),
        ({"transform": "clip", "low": 1.0, "high": 1.0}, "must be above low"),
        ({"timeout_s": 0}, "must be above 0"),
        ({"max_retries": -1}, "must be at least 0"),
        ({"path": "x"}, "unknown key `task.reward.path`"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_rewards({"name": "model", **settings})


def test_a_start_without_a_scorer_is_refused(unused_url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set scorer\.path .* or task\.reward\.url"):
        make_rewards("model").check()
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for tokenizer in (tmp_path / "absent", tmp_path):
        spec = {"name": "model", "url": "http://a", "api": "classify", "tokenizer": str(tokenizer)}
        with pytest.raises(ConfigError, match=r"task\.reward\.tokenizer=.*its tokenizer and config\.json"):
            make_rewards(spec).check()
    make_rewards({"name": "model", "url": unused_url}).check()
