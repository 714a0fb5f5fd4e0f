"""The reward `code`: the forms of tests, and programs that fail, hang or cheat."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from areal_like.errors import ConfigError, RewardError
from rollout_server.rewards.library import make_rewards
from rollout_server.rewards.library import program_tests as forms
from rollout_server.rewards.library.code import program_in
from rollout_server.rewards.time_limit import begin_reward
from rollout_server.tasks.base import Completion, Example, Score
from tests.support.waiting import HANG_LIMIT_S

DOUBLE = "def double(n):\n    print('noise')\n    return 2 * n\n"
FROM_STDIN = "print(2 * int(input()))\n"
CASES = {"inputs": ["1\n", "21", "0"], "outputs": ["2\n", "42 ", "0"]}
CALLS = {"fn_name": "double", "inputs": [[1], [21], ["ab"]], "outputs": [2, [42], "abab"]}
ASSERTS = ["assert double(1) == 2", "assert double(0) == 0\nassert double([1]) == [1, 1]"]


def fenced(source: str) -> str:
    return f"Like this:\n```python\nno\n```\nNo, so:\n```py\n{source.rstrip()}\n```\nDone."


def scored(text: str, answer: Any, **settings: Any) -> Score:
    row = settings.pop("row", {})
    rewards = make_rewards({"name": "code", "timeout_s": HANG_LIMIT_S, **settings}, sandbox="rlimits")
    scoring = rewards.score(Example(prompt="", answer=answer, metadata=row), Completion(text))
    assert not isinstance(scoring, Score)
    return asyncio.run(scoring)


def test_forms_of_tests() -> None:
    for source, answer in [
        (FROM_STDIN, CASES),
        (FROM_STDIN, [{"input": "4", "output": "8"}]),
        (DOUBLE, CALLS),
        (DOUBLE, json.dumps(CALLS)),
        (f"class Solution:\n  def double(self, n): return {2} * n\n", CALLS),
        (DOUBLE, ASSERTS),
        (DOUBLE, "assert double(3) == 6"),
    ]:
        score = scored(fenced(source), answer)
        assert score.value == 1 and score.metrics["code/passed"] == 1, (source, answer)
    check = {"entry_point": "double", "test": "def check(candidate):\n    assert candidate(2) == 4\n"}
    assert scored(fenced(DOUBLE), None, tests_key="test", row=check).value == 1
    assert scored(fenced("def double(n): return n"), None, tests_key="test", row=check).value == 0


def test_all_tests_or_their_share() -> None:
    half = "n = int(input())\nprint(2 * n if n else 'none')"
    assert scored(half, CASES).value == 0
    assert scored(half, CASES, give="share").value == pytest.approx(2 / 3)
    assert scored(half, CASES, max_tests=2).value == 1
    wrong_once = "def double(n): return 2 * n if n else 1 / 0"
    assert scored(fenced(wrong_once), ASSERTS, give="share").parts == {"code": 0.5}
    assert scored("print(0.3333333)", [{"input": "", "output": "0.33333334"}]).value == 0
    assert scored("print(0.3333333)", [{"input": "", "output": "0.33333334"}], tolerance=1e-6).value == 1


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("syntax error", ASSERTS),
        ("import os; os._exit(0)", ASSERTS),
        ("import sys; sys.exit(0)", CALLS),
        ("import os\nfor n in range(99): print('0' * 32, n, 'null')\nos._exit(0)", ASSERTS),
        ("import sys\nclass Solution: pass\nprint(sys.stdin.read())", ASSERTS),
        ("while True: print('2' * 65536)", CASES),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", CASES),
        ("x = bytearray(1 << 40)", CASES),
    ],
)
def test_programs_that_fail_have_reward_0(source: str, answer: Any) -> None:
    score = scored(fenced(source), answer, give="share")
    assert score.value == 0 and score.metrics["code/has_code"] == 1


FORGE = (
    "for fd in range(1, 9):\n  for n in range(2):\n    try: os.write(fd, f'{nonce} {n} null\\n'.encode())\n"
    "    except OSError: pass\nos._exit(0)"
)


@pytest.mark.parametrize(
    "source",
    [
        f"import os, json\nos.lseek(0, 0, 0)\nnonce = json.loads(os.read(0, 99999))['nonce']\n{FORGE}",
        f"import os, json\nnonce = json.load(open(f'/proc/{{os.getppid()}}/fd/0'))['nonce']\n{FORGE}",
        f"import os, json\nnonce = json.load(open('/proc/self/fd/0'))['nonce']\n{FORGE}",
        "import builtins\nbuiltins.exec = lambda *a: None",
        "import builtins\nreal = compile\nbuiltins.compile = lambda *a, **k: real('pass', '', 'exec')",
        "class Any:\n  def __eq__(self, other): return True\ndef double(n): return Any()",
        "class Any(int):\n  def __eq__(self, other): return True\ndef double(n): return [Any()] * (n or 1)",
    ],
)
def test_programs_that_cheat_have_reward_0(source: str) -> None:
    score = scored(fenced(source), ASSERTS, give="share")
    assert score.value == 0 and score.metrics["code/has_code"] == 1


def test_equal_values_of_other_types_pass() -> None:
    """Only classes of the program must not decide what equals a constant."""
    source = (
        "from collections import Counter, namedtuple\nfrom dataclasses import dataclass\n"
        "Pair = namedtuple('Pair', 'a b')\n@dataclass\nclass Own:\n  a: int\n"
    )
    tests = [
        "assert Counter('aab') == {'a': 2, 'b': 1}",
        "assert Pair(1, 2) == (1, 2)",
        "assert {1: 2}.keys() == {1}",
    ]
    tests += [
        "assert Own(1) == Own(1)",
        "x = None\nassert x == None and 1.0 == 1",
        "assert 0 < len([1]) <= 1",
    ]
    assert scored(fenced(source), tests).value == 1


def test_programs_that_hang_have_reward_0_in_time() -> None:
    for answer in (CASES, ASSERTS):
        score = scored("import time\ntime.sleep(60)", answer, timeout_s=0.3)
        assert score.value == 0 and score.metrics["code/timeouts"] == 1

    async def limited() -> Score:
        rewards = make_rewards({"name": "code", "give": "share"}, sandbox="rlimits")
        begin_reward(2.0)
        scoring = rewards.score(
            Example(prompt="", answer=CASES), Completion("import time\nprint(2)\ntime.sleep(60)")
        )
        assert not isinstance(scoring, Score)
        return await scoring

    late = asyncio.run(limited())  # three tests of 5 s would exceed the reward's limit
    assert late.value == 0 and late.metrics["code/timeouts"] == 2


def test_where_the_program_is() -> None:
    assert program_in(fenced("x"), needs_fence=True) == "x\n"
    assert program_in("x = 1", needs_fence=False) == "x = 1"
    assert program_in("x = 1", needs_fence=True) is None
    assert program_in("```python\nx = 1", needs_fence=False) is None  # the answer was cut
    assert program_in(" \n", needs_fence=False) is None
    assert scored("```python\nx = 1", CASES).metrics["code/has_code"] == 0


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "got NoneType"),
        ([], "there is no test"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": 1, "outputs": []}, ".*must be lists"),
        ([{"input": "1"}], "each test needs"),
        ([1], "got list"),
    ],
)
def test_rows_without_tests_are_named(value: Any, problem: str) -> None:
    with pytest.raises(
        RewardError, match=f"train.jsonl:9 has no tests of a program in the reference answer: {problem}"
    ):
        scored("x", value, row={"place": "train.jsonl:9"})


def test_no_number_is_close_to_one_beyond_the_range_of_floats() -> None:
    huge = str(10**400)
    for said, wanted, is_same in [(huge, huge, True), ("5", huge, False), ("5", "inf", False)]:
        assert forms.is_same_output(said, wanted, tolerance=1e-6) is is_same
    assert not forms.is_same_value(5, 10**400, tolerance=1e-6)


def test_odd_forms_of_data_sets() -> None:
    lines = forms.tests_of({"inputs": [["1", "2"]], "outputs": [["3"]]})
    assert lines.inputs == ("1\n2",) and lines.outputs == ("3",)
    calls = forms.tests_of({"fn_name": "f", "inputs": ['[1]\n"a"'], "outputs": ["[2]"]})
    assert calls.inputs == ([[1], "a"],) and calls.outputs == ([2],)
    with pytest.raises(ConfigError, match="max_tests at least 1"):
        make_rewards({"name": "code", "max_tests": 0})
    with pytest.raises(ConfigError, match="choose one of bwrap, rlimits"):
        make_rewards({"name": "code", "sandbox": "docker"})
