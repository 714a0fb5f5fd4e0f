"""docs/reference/rewards.md: every setting of every reward is there, and the examples can be made."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from rollout_server.rewards.library import make_rewards
from rollout_server.rewards.library.base import RewardFunction
from rollout_server.rewards.library.code import Code
from rollout_server.rewards.library.judge import Judge
from rollout_server.rewards.library.matching import Exact, Regex
from rollout_server.rewards.library.mathematics import Mathematics
from rollout_server.rewards.library.model import ModelReward
from tests.support.launching import ROOT

PAGE = (ROOT / "docs" / "reference" / "rewards.md").read_text()


@pytest.mark.parametrize("reward", [Exact, Regex, Mathematics, Code, Judge, ModelReward])
def test_every_setting_is_on_the_page(reward: type[RewardFunction]) -> None:
    names = {field.name for field in dataclasses.fields(reward)}
    shown = set(re.findall(r"`(\w+)`", PAGE))
    assert names <= shown, names - shown


def test_the_examples_can_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.S):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []
    for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S):
        task = yaml.safe_load(block)["task"]
        made.append(list(make_rewards(task["reward"], gold=task.get("gold_reward")).functions))
    assert made == [
        ["exact"],
        ["math", "format", "judge"],
        ["exact"],
        ["regex"],
        ["code"],
        ["judge"],
        ["judge"],
        ["model"],
        ["model"],
        ["model", "reward_gold"],
        ["score"],
        ["score"],
    ]
