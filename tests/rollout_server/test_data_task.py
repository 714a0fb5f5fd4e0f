"""The task over rows of files: splits, checks of every row, prompts that fit, and what workers get."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from areal_like.errors import ConfigError
from rollout_server.tasks import Completion, Task, make_task
from rollout_server.tasks.base import Prompt
from tests.support.workers import reward_pool


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's files and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sums(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [{"question": f"{n}+{n}=", "answer": 2 * n} for n in range(first, first + count)]


def made(train: str, **settings: Any) -> Task:
    return make_task({"name": "data", "train": train, "reward": "exact"} | settings, seed=0)


class Words:
    """A tokenizer that counts words."""

    def __init__(self, key: str = "words") -> None:
        self.key, self.max_prompt_tokens, self.num_counted = key, 5, 0

    def num_tokens(self, prompts: Sequence[Prompt]) -> list[int]:
        self.num_counted += len(prompts)
        if any(prompt == "unrenderable" for prompt in prompts):
            raise ValueError("this cannot be rendered")
        return [len(str(prompt).split()) for prompt in prompts]


def test_examples_are_rows_with_rewards(directory: Path) -> None:
    train, held_out = write(directory / "t.jsonl", sums(5)), write(directory / "e.jsonl", sums(3, first=50))
    task = made(train, eval=held_out, system_prompt="Be short.", max_new_tokens=7)
    assert (task.num_train, task.num_eval) == (5, 3)
    example = task.example("eval", 1)
    assert task.is_rewarded(example)
    assert example.prompt == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "51+51="},
    ]
    assert (example.answer, example.max_new_tokens, example.label) == (102, 7, "")
    assert example.metadata == {"row": sums(1, first=51)[0], "place": "e.jsonl:2"}
    assert task.reward(example, Completion("102")).value == 1.0  # type: ignore[union-attr]
    assert task.reward(example, Completion("103")).value == 0.0  # type: ignore[union-attr]
    assert made(train, num_train=2, num_eval=1, eval=held_out).num_train == 2
    only_eval = make_task({"name": "data", "eval": held_out, "reward": "exact", "num_eval": 2}, seed=0)
    assert (only_eval.num_train, only_eval.num_eval) == (0, 2)


def test_equal_prompts_are_on_one_side_wherever_they_stand(directory: Path) -> None:
    rows = sums(400) + [{"question": f" {n}+{n}= ", "answer": 0} for n in range(0, 400, 2)]
    task = made(write(directory / "t.jsonl", rows), eval_share=0.2)

    def questions(task: Task, split: Any, count: int) -> set[str]:
        return {str(task.example(split, index).prompt).strip() for index in range(count)}

    train, held_out = questions(task, "train", task.num_train), questions(task, "eval", task.num_eval)
    assert not train & held_out and len(train | held_out) == 400 and 50 < len(held_out) < 110
    turned = made(write(directory / "u.jsonl", rows[::-1]), eval_share=0.2)
    assert questions(turned, "eval", turned.num_eval) == held_out
    assert made(write(directory / "v.jsonl", sums(30)), num_eval=4).num_eval == 4
    assert made(write(directory / "v.jsonl", sums(30)), eval_share=0).num_eval == 0
    with pytest.raises(ConfigError, match="all 3 rows would be held out"):
        made(write(directory / "w.jsonl", sums(3)), num_eval=3)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"answer": 1}, {}, r"task\.train: t\.jsonl:8: none of the keys prompt, "),
        ({"question": ["x"], "answer": 1}, {}, r"t\.jsonl:8: `question`"),
        ({"question": "x"}, {}, r"t\.jsonl:8: the row has no answer, and others do"),
        ({"question": "x"}, {"answer_key": "answer"}, r"t\.jsonl:8: no `answer`"),
        ({"question": "x", "answer": 1, "data_source": [1]}, {}, r"t\.jsonl:8: `data_source`"),
    ],
)
def test_broken_rows_end_the_start(
    directory: Path, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    train = write(directory / "t.jsonl", [*sums(7), row, *sums(3)])
    for _ in range(2):  # the second time from the cache of rows
        with pytest.raises(ConfigError, match=message):
            made(train, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": ""}, "task.reward is not set"),
        ({"reward": "exakt"}, "task.reward=exakt: choose one of"),
        ({"train": ""}, "task.train is not set"),
        ({"train": "absent.jsonl"}, "task.train=absent.jsonl: there is no such file"),
        ({"eval": "absent.jsonl"}, "task.eval=absent.jsonl"),
        ({"eval_share": 1.0}, "task.eval_share=1: use"),
        ({"promt_key": "q"}, "did you mean prompt_key"),
    ],
)
def test_wrong_settings_say_what_to_change(directory: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**({"train": write(directory / "t.jsonl", sums(9))} | settings))


def test_long_prompts_are_left_out_and_counted(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "w " * (n % 10 + 1), "answer": n} for n in range(2000)]
    train = write(directory / "t.jsonl", rows)
    task = made(train, eval=train, num_eval=3, max_prompt_tokens=4)
    words = Words()
    with caplog.at_level(logging.WARNING):
        fitted = task.without_long_prompts(words)
    assert "task.train: 1200 of 2000 prompts have more than 4 tokens" in caplog.text
    assert "left out, first t.jsonl:5" in caplog.text
    kept = [fitted.example("train", index).answer for index in range(fitted.num_train)]
    assert kept == [n for n in range(2000) if n % 10 < 4] and fitted.num_eval == 3
    assert task.fingerprint() != fitted.fingerprint() and task.num_train == 2000
    counted = words.num_counted
    assert task.without_long_prompts(words).fingerprint() == fitted.fingerprint()
    assert words.num_counted == counted == 2003, "the second time is remembered"
    task.without_long_prompts(Words(key=""))
    task.without_long_prompts(other := Words(key="other"))
    assert other.num_counted == 2003
    with pytest.raises(ConfigError, match=r"2 of 2 prompts have more than 5 tokens.*raise the limit"):
        made(
            write(directory / "l.jsonl", [{"prompt": "a b c d e f"}, {"prompt": "a b c d e g"}]),
            eval=train,
            num_eval=1,
        ).without_long_prompts(words)
    broken = [*sums(3), {"question": "unrenderable", "answer": 0}]
    with pytest.raises(ConfigError, match=r"task\.train: b\.jsonl:4: this cannot be rendered"):
        made(write(directory / "b.jsonl", broken), eval=train).without_long_prompts(words)


def test_fingerprint_follows_the_content(directory: Path) -> None:
    rows = sums(300)
    train = write(directory / "t.jsonl", rows)
    before = made(train)
    rows[250]["answer"] = -1  # far from the first examples
    write(directory / "t.jsonl", rows)
    assert made(train).fingerprint() != before.fingerprint()


def test_workers_see_the_servers_rows_after_the_file_changed(directory: Path) -> None:
    settings = {"name": "data", "train": write(directory / "t.jsonl", sums(40)), "reward": "exact"}
    task = make_task(settings, seed=0).without_long_prompts(Words())
    write(directory / "t.jsonl", sums(40, first=1000))
    os.utime(directory / "t.jsonl", ns=(1, 1))
    given = task.settings_of_workers(settings)
    again = make_task(given, seed=0)
    for split, count in (("train", task.num_train), ("eval", task.num_eval)):
        for index in range(count):
            assert again.example(split, index) == task.example(split, index)  # type: ignore[arg-type]

    async def score() -> list[float]:
        async with reward_pool(given) as pool:
            answers = [task.example("train", index).answer for index in (0, task.num_train - 1)]
            return [
                (await pool.score(split="train", index=index, completion=Completion(str(answer)))).score.value
                for index, answer in zip((0, task.num_train - 1, 1), [*answers, -1], strict=True)
            ]

    assert asyncio.run(score()) == [1.0, 1.0, 0.0]
