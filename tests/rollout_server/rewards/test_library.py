"""`task.reward`: what can be written there, and what comes out."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.errors import ConfigError, RewardError
from rollout_server.rewards.library import make_rewards
from rollout_server.rewards.library.answers import after_marker, number_in
from rollout_server.tasks.base import Completion, Example, Score
from tests.support.launching import ROOT

USERS = "tests.support.library_rewards"


def scored(spec: Any, text: str, answer: Any = "4", **row: Any) -> Score:
    completion = Completion(text, token_ids=[1, 2, 3], turn_lengths=[2, 1])
    score = make_rewards(spec).score(Example(prompt="2+2=", answer=answer, metadata=row), completion)
    return score if isinstance(score, Score) else asyncio.run(score)


def value(spec: Any, text: str, answer: Any = "4", **row: Any) -> float:
    return scored(spec, text, answer, **row).value


def test_exact() -> None:
    assert value("exact", " 4\n") == 1 and value("exact", "4.") == 0 and value("exact", "4", 4) == 1
    assert value({"name": "exact", "strip": False}, "4 ") == 0
    assert value({"name": "exact", "ignore_case": True}, "PARIS", ["Lyon", "Paris"]) == 1
    assert value({"name": "exact", "collapse_spaces": True}, "a  b\nc", "a b c") == 1
    assert value({"name": "exact", "last_line": True}, "It is 5.\nNo:\n4\n\n") == 1
    numbers = {"name": "exact", "numbers": True}
    assert value(numbers, "$1,234.50", "1234.5") == 1 and value(numbers, "1/2", "0.5") == 1
    assert value(numbers, "nan", "nan") == 1 and value(numbers, "12", "1,2") == 0
    with pytest.raises(ValueError, match=r"rows.jsonl:3 has no reference answer"):
        value("exact", "4", None, place="rows.jsonl:3")


def test_exact_after_a_marker() -> None:
    gsm8k = {"name": "exact", "after": "####", "numbers": True}
    right = scored(gsm8k, "2+2 #### 5\nWait.\n#### 4\nDone", "First 2+2=4.\n#### 4")
    assert (right.value, right.parts, right.metrics) == (1.0, {"exact": 1.0}, {"exact/found": 1.0})
    assert scored(gsm8k, "It is 4", "4").metrics == {"exact/found": 0.0} and value(gsm8k, "", "#### ") == 0
    assert value({"name": "exact", "after": "<answer>"}, "<answer>5</answer> <answer> 4 </answer> ok") == 1
    assert value({"name": "exact", "after": "\\boxed{"}, r"so \boxed{\frac{1}{2}} .", r"\frac{1}{2}") == 1


def test_regex() -> None:
    tagged = {"name": "regex", "pattern": "(?s)<think>.*</think>.+", "whole": True}
    assert value(tagged, "<think>\nx</think>\n4\n") == 1 and value(tagged, "4 <think></think>4") == 0
    last = {"name": "regex", "pattern": r"answer: (?P<said>\S+)", "group": "said", "ignore_case": True}
    assert scored(last, "Answer: 3, ANSWER: 4").value == 1
    assert scored(last, "none", "").metrics == {"regex/found": 0.0} and value(last, "none", "") == 0
    with pytest.raises(ConfigError, match=r"task.reward.pattern=\(: missing \)"):
        make_rewards({"name": "regex", "pattern": "("})
    with pytest.raises(ConfigError, match=r"task.reward.group=2: the pattern has 0, 1"):
        make_rewards({"name": "regex", "pattern": "(a)", "group": 2})


def test_functions_of_users() -> None:
    assert scored(f"{USERS}.score", "4", level=3).parts == {"score": 1.0}
    waited = make_rewards(f"{USERS}.awaited")
    assert waited.is_async and not make_rewards("exact").is_async
    assert scored(f"{USERS}.awaited", "abc", level=3).parts == {"length": 0.3, "level": 3.0}
    assert value(f"{USERS}.compute_score", "4", data_source="math", extra_info={"bonus": 10}) == 15
    # A column named `completion` cannot take its place.
    assert value(f"{USERS}.score", "5", completion="4") == 0
    with pytest.raises(
        RewardError, match=r"awaited needs level, which a.jsonl:7 does not have: it has place"
    ):
        scored(f"{USERS}.awaited", "abc", place="a.jsonl:7")


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (
            "exakt",
            r"task.reward=exakt: choose one of code, exact, judge, math, model, regex; for your own function",
        ),
        ({"name": "exact", "numebrs": True}, r"unknown key `task.reward.numebrs` .* did you mean numbers"),
        ([], "empty list"),
        (3, r"want a name \(code, exact, .*got 3"),
        ([{"name": "exact", "weight": 0}], "every weight is 0"),
        ({"name": "exact", "weight": float("nan")}, "must be a finite number"),
        ("no.such.module", r"task.reward=no.such.module: No module named 'no'; it must be importable"),
        (f"{USERS}.missing", "has no missing"),
        (f"{USERS}.not_a_function", "not a function"),
        (f"{USERS}.positional", r"no argument `completion`: write def positional\(completion, answer"),
        ({"name": f"{USERS}.scaled", "faktor": 2}, r"unknown key `task.reward.faktor`"),
        ({"name": f"{USERS}.scaled", "weight": "x"}, r"task.reward.weight: want a number"),
    ],
)
def test_mistakes_are_named(spec: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_rewards(spec)


def test_weighted_parts_add_up() -> None:
    spec = [
        {"name": "exact", "weight": 2.0},
        {"name": "regex", "pattern": "4", "weight": -0.5, "part": "four"},
        {"name": "regex", "pattern": "5"},
        {"name": "regex", "pattern": "6"},
        {"name": f"{USERS}.awaited", "weight": 0},
        {"name": f"{USERS}.scaled", "factor": 3, "weight": 0.5},
    ]
    score = scored(spec, "4", level=7)
    assert score.parts == {"exact": 2.0, "four": -0.5, "regex": 0.0, "regex_2": 0.0, "scaled": 1.5}
    assert score.value == sum(score.parts.values()) and score.turns == (0.5, 1.0)
    assert score.metrics == {
        "awaited": 7.1,
        "awaited/length": 0.1,
        "awaited/level": 7.0,
        "scaled/chars": 1.0,
    }


@pytest.mark.parametrize("function", ["misbehaves", "misbehaves_later"])
def test_failures_of_parts_and_of_metrics(function: str) -> None:
    for text, problem in [
        ("nan", "finite"),
        ("inf", "finite"),
        ("rubbish", "must be a number, got str"),
        ("raise", "no such move"),
    ]:
        with pytest.raises((RewardError, LookupError), match=problem):
            scored(["exact", f"{USERS}.{function}"], text)
        as_metric = scored(["exact", {"name": f"{USERS}.{function}", "weight": 0}], text, text)
        assert as_metric.value == 1.0 and as_metric.metrics == {f"{function}/failed": 1.0}


@given(st.text(), st.text(min_size=1))
def test_any_text_has_an_answer_or_none(text: str, marker: str) -> None:
    assert (after_marker(text, marker) is None) == (marker not in text)
    number = number_in(text)
    assert number is None or any(char.isdigit() for char in text)


@given(st.integers(), st.sampled_from(["", "$", "+"]), st.sampled_from(["", ".", ".0", "%", "/1", "e0"]))
def test_numbers_are_read(number: int, before: str, after: str) -> None:
    assert number_in(f"{before}{number}{after}") == number
    assert number_in(f"{number:,}{after}") == number


def test_many_digits_take_no_time() -> None:
    started = time.process_time()
    assert number_in("1" * 20_000 + "x") is None and number_in("1" * 20_000) is None
    assert time.process_time() - started < 1


def test_steps_of_several_rewards_are_added() -> None:
    spec = [
        {"name": f"{USERS}.of_words", "weight": 2.0},
        {"name": f"{USERS}.last_character", "weight": -0.5},
        {"name": f"{USERS}.of_words", "weight": 0, "part": "metric", "reward": 3.0},
    ]
    score = scored(spec, "one two")
    assert score.steps == ((3, 2.0), (7, 1.5)) and score.value == 0.0 and score.metrics["metric"] == 6.0


def test_the_example_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "reference" / "rewards.md").read_text()
    code = page.partition("```python\n# my_steps.py\n")[2].partition("```")[0]
    (tmp_path / "my_steps.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    score = scored("my_steps.score", "1+2=3\n\n3+4=8\n5", 5)
    tenth = float(np.float32(0.1))
    assert (score.value, score.steps) == (1.0, ((5, tenth), (12, 0.0), (14, 0.0)))
