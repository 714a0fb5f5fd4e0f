"""The warning that the entropy has fallen away: recorded runs, a resume, and once in a run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from areal_like.config import from_mapping
from areal_like.runtime.metrics import Metrics
from trainer.metrics.entropy_watch import FALLEN, WINDOW, EntropyWatch
from trainer.run_record import RunRecord

CURVES = Path(__file__).parent / "entropy_curves.jsonl"
"""Entropy and reward of each step of six runs of `benchmarks.staleness_cell`, and whether it trained any
token."""


def curve(run: str) -> list[dict[str, Any]]:
    """The rows of a recorded run."""
    (rows,) = [one["rows"] for one in map(json.loads, CURVES.read_text().splitlines()) if one["run"] == run]
    return [
        {"step": step, "entropy": entropy, "reward_mean": reward, "num_tokens": is_trained}
        for step, (entropy, reward, is_trained) in enumerate(rows)
    ]


def warned(rows: list[dict[str, Any]]) -> tuple[int, str]:
    """(the step of the warning, the warning); (-1, "") if there is none."""
    watch = EntropyWatch()
    for row in rows:
        watch.observe(row)
        if watch.warning:
            return row["step"], watch.warning
    return -1, ""


def flat(num: int, *, entropy: float = 1.0, reward: float = 0.2, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"step": first + i, "entropy": entropy, "reward_mean": reward, "num_tokens": 5} for i in range(num)
    ]


@pytest.mark.parametrize("run", ["tis lag 0 lr 0.0001", "tis lag 4 lr 0.0001", "vcpo lag 4 lr 0.00016"])
def test_a_run_that_learns_is_not_warned_of(run: str) -> None:
    rows = curve(run)
    assert warned(rows) == (-1, "")
    last = sum(row["entropy"] for row in rows[-WINDOW:])
    assert last < FALLEN * sum(row["entropy"] for row in rows[:WINDOW]), "though its entropy has fallen"


@pytest.mark.parametrize(("run", "earliest"), [("vcpo lag 4 lr 0.0006", 120), ("tis lag 4 lr 0.0003", 200)])
def test_a_run_that_loses_its_reward_too_is_warned_of(run: str, earliest: int) -> None:
    step, text = warned(curve(run))
    assert step > earliest, "it had learned before"
    assert f"step {step}: the entropy has fallen from" in text and "\n" not in text


def test_a_run_whose_entropy_stays_is_not_warned_of() -> None:
    rows = curve("none lag 16 lr 0.0003")
    assert sum(row["reward_mean"] for row in rows[100:]) < 0.05 * len(rows[100:]), "the reward does not"
    assert warned(rows) == (-1, "")


def test_the_rule() -> None:
    assert WINDOW == 10
    beginning = flat(10)
    assert warned([*beginning, *flat(50, entropy=0.49)])[0] > 0, "nothing was gained"
    assert warned([*beginning, *flat(50, entropy=0.51)])[0] < 0
    assert warned([*beginning, *flat(50, entropy=0.1, reward=0.21)])[0] < 0, "a gain that stays"
    peak = [*beginning, *flat(20, entropy=0.3, reward=0.8)]
    assert warned([*peak, *flat(50, entropy=0.1, reward=0.55)])[0] < 0
    assert warned([*peak, *flat(50, entropy=0.1, reward=0.45)])[0] > 0
    # Rewards of any scale and sign.
    shifted = [{**row, "reward_mean": 100 * row["reward_mean"] - 90} for row in peak]
    assert warned([*shifted, *flat(50, entropy=0.1, reward=-35)])[0] < 0
    assert warned([*shifted, *flat(50, entropy=0.1, reward=-45)])[0] > 0
    # Steps that trained nothing have no entropy, and a number that is not finite is null.
    empty = [{**row, "num_tokens": 0, "entropy": 0.0} for row in flat(50)]
    assert warned([*empty, *beginning, *empty])[0] < 0
    assert warned([*beginning, *({**row, "entropy": None} for row in flat(50))])[0] < 0
    assert warned([{"step": 0, "loss": 1.0}])[0] < 0, "a row of supervised training"


def test_it_is_logged_once_in_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = from_mapping({"runs_dir": str(tmp_path), "name": "x"})
    rows = [*flat(15), *flat(35, entropy=0.1, first=15)]

    def trained(*, first: int, last: int) -> tuple[int, float]:
        """(warnings that this trainer logs, the value of its series)."""
        caplog.clear()
        metrics = Metrics()
        record = RunRecord(config, metrics, step=first)
        with caplog.at_level(logging.WARNING):
            for row in rows[first:last]:
                times = {"step_s": 1.0, "wait_data_s": 0.0, "freeze_s": 0.0, "tokens_trained": 5}
                record.stepped({**row, **times}, metrics={})
        record.steps.close()
        record.evaluations.close()
        value = metrics.registry.get_sample_value("areal_trainer_entropy_fallen")
        assert value is not None
        return caplog.text.count("the entropy has fallen"), value

    assert trained(first=0, last=18) == (0, 0), "in the middle of a window"
    assert trained(first=18, last=30) == (1, 1)
    assert trained(first=30, last=50) == (0, 1), "it was said before"
    assert trained(first=16, last=50) == (1, 1), "the steps with the warning were undone"
