"""Tasks: purity, fingerprints, settings, and a task that a user has written."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from areal_like.config import from_mapping
from areal_like.errors import ConfigError
from areal_like.wire.fingerprint import dataset_fingerprint
from rollout_server.agents.base import Session
from rollout_server.tasks.base import Example, Split, Task, make_task


class BlockingAgent(Task):
    def example(self, split: Split, index: int) -> Example:
        return Example(prompt="", answer=index)

    def agent(self, example: Example, session: Session) -> float:  # type: ignore[override]
        return 1.0


class AgentOfNothing(BlockingAgent):
    async def agent(self) -> float:  # type: ignore[override]
        return 1.0


@dataclass(frozen=True, kw_only=True)
class Add(Task):
    digits: int = 2

    def example(self, split: Split, index: int) -> Example:
        rng = self.rng(split, index)
        a, b = (rng.randrange(10**self.digits) for _ in range(2))
        return Example(prompt=f"{a}+{b}=", answer=a + b)

    def reward(self, example: Example, completion: str) -> float:
        return float(completion.strip() == str(example.answer))


@dataclass(frozen=True, kw_only=True)
class Impure(Add):
    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=str(random.random()), answer=0)


@dataclass(frozen=True, kw_only=True)
class Picky(Add):
    def __post_init__(self) -> None:
        if not self.digits:
            raise ValueError("no digits")


def test_sort_is_pure_and_holds_out_multisets() -> None:
    task = make_task({"name": "sort"}, seed=3)
    again = make_task({"name": "sort"}, seed=3)
    later = [again.example("train", i) for i in reversed(range(50))][::-1]
    assert [task.example("train", i) for i in range(50)] == later
    train = {task.example("train", i).answer for i in range(2000)}
    held_out = {task.example("eval", i).answer for i in range(200)}
    assert not train & held_out
    example = task.example("eval", 0)
    assert task.reward(example, example.answer) == 1.0
    assert task.reward(example, example.answer + "0") == 0.0


def test_fingerprint_depends_on_seed_settings_and_class() -> None:
    tasks = [
        make_task({"name": "sort"}, seed=0),
        make_task({"name": "sort"}, seed=1),
        make_task({"name": "sort", "num_train": 10}, seed=0),
        make_task({"_target_": f"{__name__}.Add"}, seed=0),
    ]
    prints = [task.fingerprint() for task in tasks]
    assert len(set(prints)) == len(prints)
    code = (
        "from rollout_server.tasks import make_task; print(make_task({'name': 'sort'}, seed=0).fingerprint())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == prints[0]
    with pytest.raises(ConfigError, match="two different examples"):
        make_task({"_target_": f"{__name__}.Impure"}, seed=0).fingerprint()


def test_own_task_takes_its_settings() -> None:
    task = make_task({"_target_": f"{__name__}.Add", "digits": 3, "seed": 9}, seed=0)
    assert isinstance(task, Add) and task.digits == 3 and task.seed == 9
    assert task.example("train", 5) == Add(digits=3, seed=9).example("train", 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "sorted"},
            "choose one of adding, adding_agent, coding, data, external, gymnasium, mixture",
        ),
        ({"name": "sort", "num_trian": 5}, "did you mean num_train"),
        ({"name": "sort", "zzz": 5}, "its settings are seed, num_train"),
        ({"name": "sort", "num_train": 0}, "at least 1"),
        ({"name": "sort", "num_train": "many"}, "task.num_train: want int"),
        (
            {"_target_": f"{__name__}.Picky", "digits": 0},
            "task tests.rollout_server.test_tasks.Picky: no digits",
        ),
        ({"_target_": "nowhere_at_all.Task"}, "importable from the directory the job"),
        ({"_target_": f"{__name__}.BlockingAgent"}, "BlockingAgent: write `async def agent"),
        ({"_target_": f"{__name__}.AgentOfNothing"}, "AgentOfNothing: write `async def agent"),
        ({"_target_": "json.dumps"}, "not a subclass"),
        ({"_target_": "json"}, "write module.Class"),
        ({}, "either `name` or `_target_`"),
    ],
)
def test_bad_settings_are_config_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_task(settings, seed=0)


def test_tasks_import_no_torch() -> None:
    modules = "rollout_server.tasks.sort, rollout_server.workers.reward_worker"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reasoning_gym_by_name_or_a_hint_to_install_it() -> None:
    settings = {"name": "reasoning_gym", "dataset": "chain_sum", "params": {"max_terms": 3}}
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"areal-like\[tasks\]"):
            make_task(settings, seed=0)
        return
    task = make_task(settings, seed=0)
    example = task.example("train", 3)
    assert example == make_task(settings, seed=0).example("train", 3)
    assert example.prompt != task.example("eval", 3).prompt
    assert task.reward(example, f"thinking... <answer>{example.answer}</answer>") == 1.0
    assert task.reward(example, str(example.answer)) == 1.0
    assert task.reward(example, "<answer>no</answer>") < 0.5
    for broken, message in (
        ({"dataset": "nope"}, "chain_sum"),
        ({"params": {"foo": 1}}, "foo"),
        ({"params": {"min_terms": -1}}, "min_terms"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task(settings | broken, seed=0)


def test_keys_that_are_no_texts_and_sets_have_a_fingerprint() -> None:
    def of(settings: dict[object, object]) -> tuple[str, str]:
        task = {"_target_": f"{__name__}.Named", "names": settings, "tags": ["a"]}
        fingerprint = dataset_fingerprint(from_mapping({"task": task}))
        return fingerprint, make_task(task, seed=0).fingerprint()

    mixed, other = of({1: "a", "b": 2, None: {True: 1}}), of({1: "a", "b": 2, None: {False: 1}})
    assert mixed == of({None: {True: 1}, "b": 2, 1: "a"}) and mixed[0] != other[0] and mixed[1] != other[1]
    plain = {"task": {"name": "sort"}, "seed": 3}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    assert dataset_fingerprint(from_mapping(plain)) == digest, "ledgers of earlier releases have it"
    prints = {
        subprocess.run(
            [sys.executable, "-c", _SET_FINGERPRINT, str(number)],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PYTHONHASHSEED": str(number)},
        ).stdout
        for number in range(2)
    }
    assert len(prints) == 1, "an answer that is a set, or an object, is the same in every process"


_SET_FINGERPRINT = """
from tests.rollout_server.test_tasks import Named
print([object() for _ in range(1000)] and Named(names={}).fingerprint())
"""


@dataclass(frozen=True, kw_only=True)
class Named(Add):
    names: Mapping[Any, Any]
    tags: Sequence[str] = ()

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt="p", answer=({"x", "y", "z"}, Add))
