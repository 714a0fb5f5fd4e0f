"""The pure parts of `areal-like data stats`: lengths, repeated prompts, what a run has heard."""

from __future__ import annotations

import sqlite3
from array import array
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_like.errors import StoreCorruptError
from buffer.storage import sql
from launch.observation.heard_prompts import read_heard_prompts
from rollout_server.data_stats.duplicates import PromptHashes, normalised
from rollout_server.data_stats.heard import HeardPrompt, summary
from rollout_server.data_stats.split import length_summary

WORDS = st.lists(st.sampled_from(["a", "A", "b", "a?", " b", "1-1", "1*1", "é"]), max_size=40)


def hashes(prompts: list[str]) -> PromptHashes:
    found = PromptHashes()
    for prompt in prompts:
        found.add(prompt)
    return found


def test_lengths() -> None:
    assert length_summary(array("I")) is None
    assert length_summary(array("I", range(1, 101)), limit=98) == {
        "num": 100,
        "min": 1,
        "mean": 50.5,
        "p50": 50,
        "p90": 90,
        "p99": 99,
        "max": 100,
        "limit": 98,
        "over": 2,
    }


def test_normalised_prompts() -> None:
    assert normalised("  What is “1.5 + 2”?\n") == normalised("what is 1.5 + 2")
    assert normalised("ﬁne") == "fine" and normalised("STRASSE") == normalised("straße")
    different = ["3-1", "3*1", "3/1", "3+1", "(3-1)", "31", "3.1"]
    assert len({normalised(text) for text in different}) == len(different)


@given(WORDS, WORDS)
def test_repeated_prompts_are_counted(train: list[str], held_out: list[str]) -> None:
    of_train, of_held_out = hashes(train), hashes(held_out)
    found = of_train.duplicates()
    assert found["exact"] == len(train) - len(set(train))
    assert found["normalised"] == len(train) - len({normalised(text) for text in train})
    for rows in found["examples"]:
        assert len(rows) > 1 and rows == sorted(rows)
        assert len({normalised(train[row]) for row in rows}) == 1
    overlap = of_held_out.overlap(of_train)
    assert overlap["exact"] == sum(text in train for text in held_out)
    same = [normalised(text) in {normalised(other) for other in train} for text in held_out]
    assert overlap["normalised"] == sum(same)
    for here, there in overlap["examples"]:
        assert normalised(held_out[here]) == normalised(train[there])
    assert len(overlap["examples"]) == min(5, sum(same))


def test_conflicting_answers_are_found() -> None:
    found = PromptHashes()
    for prompt, answer in [("1+1", "2"), ("2+2", "4"), (None, ""), ("1+1?", "3"), ("2+2", "4"), ("3+3", "6")]:
        if prompt is None:
            found.skip()
        else:
            found.add(prompt, answer=answer)
    told = found.duplicates()
    assert (told["normalised"], told["conflicting"]) == (2, 1)
    assert told["conflicting_examples"] == [[0, 3]] and told["examples"] == [[0, 3], [1, 4]]


def test_heard_prompts_by_outcome_and_label() -> None:
    rows = [
        (0, 2, 8, 8, 0, 0.0),
        (1, 1, 4, 0, 4, 4.0),
        (2, 3, 8, 2, 1, 4.4),
        (3, 1, 0, 0, 0, 0.0),
        (9, 1, 4, 4, 0, 0.0),
    ]
    found = summary(
        [HeardPrompt.of_row(row) for row in rows],
        num_train=6,
        num_drawn=15,
        label_of=lambda index: "odd" if index % 2 else "even",
    )
    assert found["epochs"] == 2.5 and found["never_issued"] == 2 and found["beyond_the_split"] == 1
    assert found["issued"] == {"1": 2, "2": 1, "3": 1}
    assert (found["never"], found["sometimes"], found["always"]) == (1, 1, 1)
    assert found["solve_rate"] == pytest.approx(8.4 / 20) and found["heard"] == 3
    assert found["histogram"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert found["by_label"]["odd"]["solve_rate"] == 1 and found["by_label"]["even"]["heard"] == 2
    assert found["never_solved_examples"] == [0]


def test_a_ledger_tells_what_was_heard(tmp_path: Path) -> None:
    with pytest.raises(StoreCorruptError, match="cannot be read"):
        read_heard_prompts([tmp_path], reward_low=0, reward_high=1)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3", isolation_level=None)) as ledger:
        sql.migrate(ledger, path=tmp_path / "ledger.sqlite3")
        columns = (
            "ticket_id, purpose, prompt_index, num_samples, parent, num_reissues, eval_id, max_staleness, "
            "state, num_greedy"
        )
        tickets = [(1, "train", 5, 3, 1), (2, "train", 5, 2, 0), (3, "train", 2, 2, 0), (4, "eval", 5, 1, 0)]
        for ticket, purpose, prompt, num_samples, num_greedy in tickets:
            row = (ticket, purpose, prompt, num_samples, 0, 0, 0, 0, "trained", num_greedy)
            ledger.execute(f"INSERT INTO tickets ({columns}) VALUES (?,?,?,?,?,?,?,?,?,?)", row)
        # (ticket, sample, reward): the last sample of ticket 1 is greedy.
        for ticket, sample, reward in [(1, 0, -1.0), (1, 1, 1.0), (1, 2, 1.0), (2, 0, 9.0), (4, 0, 9.0)]:
            ledger.execute(
                "INSERT INTO samples (ticket_id, sample_index, lease_id, oldest_step, sum_token_steps, "
                "oldest_version, newest_version, num_sampled, reward, segment, offset, num_bytes, crc32) "
                "VALUES (?,?,0,0,0,0,0,1,?,0,0,0,0)",
                (ticket, sample, reward),
            )
        ledger.execute("INSERT INTO marks VALUES ('cursor', 12)")
    heard = read_heard_prompts([tmp_path], reward_low=-1, reward_high=3)
    assert heard.num_drawn == 12
    assert heard.rows == [(2, 1, 0, 0, 0, 0.0), (5, 2, 3, 1, 1, 1.5)]
