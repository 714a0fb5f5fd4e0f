"""The score server over HTTP: the scores of transformers, and requests that are refused alone."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from areal_like.chat.scored_text import scored_tokens
from areal_like.errors import ConfigError
from areal_like.runtime.metrics import Metrics
from areal_like.security.keys import KeyRole
from rollout_server.scoring.model import RewardModel
from rollout_server.scoring.service import RefusedTextError, ScoreService
from tests.support.keys import keyring, make_keys
from tests.support.reward_models import CONTEXT, ScoreServer, StuckModel, loaded, write_reward_model
from tests.support.waiting import HANG_LIMIT_S


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


def test_scores_are_those_of_transformers(server: ScoreServer, model: RewardModel, path: str) -> None:
    reference: Any = AutoModelForSequenceClassification.from_pretrained(path).eval()
    user = {"role": "user", "content": "12+30"}
    asked = [("1+1=", "2" * length) for length in range(12)] + [([user], "42"), ([user], "41")]
    scores, threads = {}, []
    for number, (prompt, completion) in enumerate(asked):

        def ask(number: int, prompt: Any, completion: str) -> None:
            scores[number] = server.request("POST", "/score", {"prompt": prompt, "completion": completion})

        threads.append(threading.Thread(target=ask, args=(number, prompt, completion)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    for number, (prompt, completion) in enumerate(asked):
        ids = scored_tokens(model.tokenizer, prompt, completion, pad_token_id=model.pad_token_id)  # type: ignore[arg-type]
        with torch.inference_mode():
            logit = float(reference(input_ids=torch.tensor([ids])).logits[0, 0])
        status, body = scores[number]
        assert status == 200 and body["model"] == "abc" and body["num_tokens"] == len(ids)
        assert body["score"] == pytest.approx(logit, abs=1e-5), "alone, and in a padded batch"
    assert len({body["score"] for _, body in scores.values()}) == len(asked)
    assert server.number("scorer_scores_total") >= len(asked) >= server.number("scorer_batches_total")


def test_sglangs_format(server: ScoreServer, model: RewardModel) -> None:
    ids = model.tokenizer("1+1=2")["input_ids"]
    status, one = server.request("POST", "/classify", {"text": "1+1=2", "model": "default"})
    assert status == 200 and one["meta_info"]["prompt_tokens"] == len(ids) and len(one["embedding"]) == 1
    assert one["embedding"] == pytest.approx(model.scores([ids]), abs=1e-5)
    for body in ({"text": ["1+1=2"] * 3}, {"input_ids": [ids] * 3}):
        status, several = server.request("POST", "/classify", body)
        # In a batch the last bits may differ, by what the CPU computes with.
        assert (
            status == 200
            and [each["embedding"] for each in several] == [pytest.approx(one["embedding"], abs=1e-6)] * 3
        )
    assert server.request("POST", "/classify", {"input_ids": ids})[1]["embedding"] == one["embedding"]
    status, info = server.request("GET", "/get_model_info")
    assert status == 200 and info["is_generation"] is False and info["weight_version"] == "abc"
    assert server.request("GET", "/health")[0] == 200
    assert server.request("POST", "/classify", {"input_ids": ids, "timeout_s": 1e9})[0] == 200


LONG = "1" * CONTEXT


@pytest.mark.parametrize(
    ("where", "body", "reason"),
    [
        ("/score", {"prompt": "1", "completion": LONG}, "too_long"),
        ("/score", {"prompt": [{"role": "user", "content": LONG}], "completion": "1"}, "too_long"),
        ("/classify", {"text": LONG + "1"}, "too_long"),
        ("/classify", {"input_ids": [1] * (CONTEXT + 1)}, "too_long"),
        ("/score", {}, "invalid"),
        ("/score", {"prompt": "1", "completion": 2}, "invalid"),
        ("/score", {"prompt": 1, "completion": "2"}, "invalid"),
        ("/score", {"prompt": [], "completion": "2"}, "invalid"),
        ("/score", {"prompt": [1], "completion": "2"}, "invalid"),
        ("/score", {"prompt": [{"role": "user"}], "completion": "2"}, "invalid"),
        ("/score", {"prompt": [{"role": "user", "content": [[1]]}], "completion": "2"}, "invalid"),
        ("/score", {"prompt": [{"role": "user", "content": 1e400}], "completion": "2"}, "invalid"),
        ("/score", {"prompt": "", "completion": ""}, "invalid"),
        ("/score", {"prompt": "1", "completion": "2", "timeout_s": -1}, "invalid"),
        ("/score", {"prompt": "1", "completion": "2", "timeout_s": True}, "invalid"),
        ("/score", [1, 2], "invalid"),
        ("/classify", {}, "invalid"),
        ("/classify", {"text": "1", "input_ids": [1]}, "invalid"),
        ("/classify", {"text": []}, "invalid"),
        ("/classify", {"text": ["1"] * 300}, "invalid"),
        ("/classify", {"text": [1]}, "invalid"),
        ("/classify", {"input_ids": [1.5]}, "invalid"),
        ("/classify", {"input_ids": [True]}, "invalid"),
        ("/classify", {"input_ids": [-1]}, "invalid"),
        ("/classify", {"input_ids": [10**30]}, "invalid"),
        ("/classify", {"input_ids": [[1], []]}, "invalid"),
    ],
)
def test_a_bad_request_is_refused_alone(server: ScoreServer, where: str, body: Any, reason: str) -> None:
    before = server.number("scorer_refused_total", reason=reason)
    status, told = server.request("POST", where, body)
    assert status == 400 and told["error"]["reason"] == reason, told
    assert server.number("scorer_refused_total", reason=reason) == before + 1
    assert server.request("POST", "/score", {"prompt": "1+1=", "completion": "2"})[0] == 200


def test_bodies_that_are_no_requests(server: ScoreServer) -> None:
    for raw in (b"{", b"\xff\xfe", b"NaN", b"[" * 5000, b'{"prompt": "\\ud800", "completion": "1"}'):
        assert server.request("POST", "/score", raw=raw)[0] == 400
    host, _, port = urlsplit(server.url).netloc.partition(":")
    head = b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n{"
    with socket.create_connection((host, int(port))) as huge:
        huge.sendall(head % (1 << 40))
        assert huge.recv(1 << 16).startswith(b"HTTP/1.1 413 ")
    with socket.create_connection((host, int(port))) as gone:  # leaves before it has sent its body
        gone.sendall(head % 100)
    assert server.request("GET", "/score")[0] == 405 and server.request("GET", "/nothing")[0] == 404
    status, _ = server.request("POST", "/score", {"prompt": "1", "completion": "2"})
    assert status == 200


def test_texts_that_wait_for_the_tokenizer_count(model: RewardModel) -> None:
    async def body() -> None:
        limits = {"max_length": 9, "max_batch_tokens": 9, "max_waiting": 1}
        stuck = StuckModel(model)
        service = ScoreService(stuck, Metrics(), identity="abc", **limits)
        may_go_on = threading.Event()
        first = asyncio.create_task(service.score(lambda: [3][: may_go_on.wait()], timeout_s=60))
        await asyncio.sleep(0)
        try:
            second = service.score(lambda: [3], timeout_s=60)
            with pytest.raises(RefusedTextError, match="1 texts wait already"):
                await asyncio.wait_for(second, HANG_LIMIT_S)
        finally:
            may_go_on.set()
            stuck.may_go_on.set()
        running = asyncio.create_task(service.run())
        assert await first == (1.0, 1)
        running.cancel()
        await service.close()

    asyncio.run(body())


def test_a_full_queue_and_late_texts(model: RewardModel) -> None:
    stuck = StuckModel(model)
    text = {"prompt": "1", "completion": "2"}
    with ScoreServer(stuck, max_waiting=1).serving() as server:
        told: list[Any] = []

        def ask(**more: Any) -> threading.Thread:
            thread = threading.Thread(
                target=lambda: told.append(server.request("POST", "/score", text | more))
            )
            thread.start()
            return thread

        first = ask()
        stuck.began.wait()  # in the forward pass: it waits no more
        second = ask(timeout_s=0)
        while server.number("scorer_waiting") < 2:
            pass
        status, refused = server.request("POST", "/score", text)
        while refused.get("score"):  # the second was not in the queue yet
            status, refused = server.request("POST", "/score", text)
        assert status == 503 and refused["error"]["reason"] == "full"
        stuck.may_go_on.set()
        for thread in (first, second):
            thread.join()
        assert sorted(status for status, _ in told) == [200, 503]
        assert server.number("scorer_refused_total", reason="late") == 1


def test_a_pass_that_fails_costs_its_own_texts(model: RewardModel) -> None:
    stuck = StuckModel(model)
    stuck.may_go_on.set()
    raised = [RuntimeError("shapes"), MemoryError(), AssertionError(), OverflowError()]
    stuck.answers = [*raised, float("nan"), float("inf"), 2.5]
    text = {"prompt": "1", "completion": "2"}
    with ScoreServer(stuck).serving() as server:
        told = [server.request("POST", "/score", text) for _ in range(7)]
    assert [status for status, _ in told] == [500] * 4 + [422, 422, 200] and told[-1][1]["score"] == 2.5


def test_keys_decide_who_may_ask(model: RewardModel, tmp_path: Path) -> None:
    tokens = make_keys(tmp_path / "keys")
    ring = keyring(tmp_path / "keys", KeyRole.SCORER)
    text = {"prompt": "1", "completion": "2"}
    with ScoreServer(model, keyring=ring, security={"keys": str(tmp_path / "keys")}).serving() as server:
        status = {role: server.request("POST", "/score", text, token=one)[0] for role, one in tokens.items()}
        assert {role for role, code in status.items() if code == 200} == {"scorer", "operator"}, status
        assert server.request("POST", "/score", text)[0] == 401 and server.request("GET", "/health")[0] == 200
        assert set(status.values()) == {200, 401, 403} and len(server.refused) == len(tokens) - 1


def test_an_address_needs_keys_and_to_be_free(model: RewardModel) -> None:
    with (
        pytest.raises(ConfigError, match="is not a loopback address"),
        ScoreServer(model, host="0.0.0.0").serving(),
    ):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = min(taken.getsockname()[1], 65471)
        with socket.socket() as other:
            if port != taken.getsockname()[1]:
                other.bind(("127.0.0.1", port))
                other.listen()
            with (
                pytest.raises(ConfigError, match=r"cannot bind scorer\.host=127"),
                ScoreServer(model, port=port).serving(),
            ):
                pass
