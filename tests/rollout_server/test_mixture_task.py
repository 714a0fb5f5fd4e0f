"""A mixture of tasks: indices, labels, rewards, environments, and settings that contradict each other."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import from_mapping
from areal_like.errors import ConfigError
from rollout_server.environments.base import Environment
from rollout_server.tasks import Completion, Example, Split, Task, make_task
from rollout_server.tasks.sort import SortTask
from rollout_server.workers.host import WorkerHost
from rollout_server.workers.reward_pool import RewardPool
from tests.rollout_server.test_data_task import Words, directory, sums, write  # noqa: F401

HERE = __name__


@dataclass(frozen=True, kw_only=True)
class Later(Task):
    """With an asynchronous reward."""

    num_eval: int = 6

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=f"{split} {index}", answer=index)

    async def reward(self, example: Example, completion: Completion) -> float:  # type: ignore[override]
        await asyncio.sleep(0)
        return 0.25


def mixture(*tasks: dict[str, Any], **settings: Any) -> Task:
    return make_task({"name": "mixture", "tasks": list(tasks)} | settings, seed=3)


SORT = {"name": "sort", "num_train": 100, "num_eval": 30}
LATER = {"_target_": f"{HERE}.Later", "num_train": 10}


def test_indices_labels_and_rewards_are_those_of_the_parts(directory: Path) -> None:  # noqa: F811
    rows = [row | {"data_source": f"level{n % 2}"} for n, row in enumerate(sums(40))]
    data = {"name": "data", "train": write(directory / "t.jsonl", rows), "reward": "exact", "eval_share": 0.2}
    task = mixture(SORT | {"weight": 2, "max_new_tokens": 9}, data, LATER | {"weight": 0.5, "label": "late"})
    own = make_task(data, seed=3)
    assert task.num_train == 100 + own.num_train + 10
    assert [(one.size, one.weight) for one in task.sources] == [(100, 2.0), (own.num_train, 1.0), (10, 0.5)]
    first, second = task.example("train", 99), task.example("train", 100)
    assert first.prompt == make_task(SORT, seed=3).example("train", 99).prompt
    assert (first.label, first.max_new_tokens) == ("sort", 9)
    assert (second.prompt, second.label) == (own.example("train", 0).prompt, own.example("train", 0).label)
    last = task.example("train", task.num_train - 1)
    assert (last.prompt, last.label, last.max_new_tokens) == ("train 9", "late", 0)
    with pytest.raises(IndexError):
        task.example("train", task.num_train)
    assert task.has_async_reward and task.max_prompt_tokens == 1024

    async def score(example: Example, text: str) -> float:
        returned: Any = task.reward(example, Completion(text))
        scored = await returned if inspect.isawaitable(returned) else returned
        return float(getattr(scored, "value", scored))

    assert asyncio.run(score(first, first.answer)) == 1.0
    assert asyncio.run(score(second, str(second.answer))) == 1.0
    assert asyncio.run(score(last, "x")) == 0.25
    drawn = Counter(task.example("eval", index).label for index in range(task.num_eval))
    held_out = {"sort": 30, "late": 6}
    assert all(drawn[label] <= count for label, count in held_out.items()) and len(drawn) == 4
    assert abs(drawn["sort"] - task.num_eval * 2 / 3.5) < 3
    prompts = [str(task.example("eval", index).prompt) for index in range(task.num_eval)]
    assert len(set(prompts)) == len(prompts), "no held-out prompt comes twice"


def test_workers_and_filters_reach_the_parts(directory: Path) -> None:  # noqa: F811
    rows = [{"prompt": f"{n} " * (n % 10 + 1), "answer": n} for n in range(100)]
    data = {"name": "data", "train": write(directory / "t.jsonl", rows), "reward": "exact", "weight": 3}
    settings = {"name": "mixture", "tasks": [data, SORT]}
    task = make_task(settings, seed=0)
    fitted = task.without_long_prompts(Words())
    assert fitted.sources[0].size < task.sources[0].size and fitted.sources[1] == task.sources[1]
    assert fitted.num_train == sum(one.size for one in fitted.sources)
    assert fitted.fingerprint() != task.fingerprint()
    again = make_task(json.loads(json.dumps(fitted.settings_of_workers(settings))), seed=0)
    assert again.sources == fitted.sources and again.num_eval == fitted.num_eval
    for index in range(0, fitted.num_train, 7):
        ours, theirs = fitted.example("train", index), again.example("train", index)
        assert (ours.prompt, ours.answer, ours.label) == (theirs.prompt, theirs.answer, theirs.label)


def test_tasks_with_and_without_environments() -> None:
    task = mixture({"name": "adding", "num_train": 5}, SORT)
    assert task.has_environment and task.has_reward
    adding, sort = task.example("train", 0), task.example("train", 5)
    assert isinstance(task.environment(adding), Environment) and task.environment(sort) is None
    assert task.reward(adding, Completion("1")) == 0.0, "only its environment gives rewards"
    assert task.reward(sort, Completion(sort.answer)) == 1.0


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        ([SORT], {}, "a list of 2 to 64 tasks"),
        (["sort", SORT], {}, r"task\.tasks\[0\]: want a mapping"),
        ([SORT, SORT | {"weight": 0}], {}, r"task\.tasks\[1\]: weight=0: use a positive number"),
        ([SORT, SORT | {"weight": "x"}], {}, "weight='x'"),
        ([SORT, SORT | {"label": "a\nb"}], {}, "printable"),
        ([SORT, {"name": "nope"}], {}, r"task\.tasks\[1\]: task\.name=nope: choose one of"),
        ([SORT, {"name": "mixture", "tasks": [SORT, SORT]}], {}, "a mixture in a mixture"),
        ([SORT, SORT], {"num_train": 5}, "set them in its tasks"),
        ([SORT, {"name": "adding", "max_new_tokens": 4}], {}, "has no effect next to a task with an env"),
    ],
)
def test_mixtures_that_cannot_be_are_refused(
    tasks: list[Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        mixture(*tasks, **settings)


def test_equal_names_get_numbers() -> None:
    task = mixture(SORT, SORT | {"seed": 9})
    assert {task.example("train", index).label for index in (0, 100)} == {"sort", "sort_2"}


def test_a_part_has_one_name_whatever_the_labels_of_its_rows(directory: Path) -> None:  # noqa: F811
    rows = [row | {"data_source": f"level{n}"} for n, row in enumerate(sums(20))]
    data = {"name": "data", "train": write(directory / "t.jsonl", rows), "reward": "exact", "eval_share": 0.5}
    task = mixture(SORT | {"label": "same"}, SORT | {"label": "same"}, data)
    starts = (0, 100, 200)
    assert [task.part_of("train", index) for index in starts] == ["sort", "sort_2", "data"]
    held_out = {task.part_of("eval", index) for index in range(task.num_eval)}
    assert held_out == {"sort", "sort_2", "data"} and make_task(SORT, seed=0).part_of("train", 0) == ""

    async def body() -> None:
        config = from_mapping({})
        rewards = RewardPool.of(config, task, WorkerHost.of(config, SortTask()))
        assert rewards._part_of("train", 200) == "data"

    asyncio.run(body())
