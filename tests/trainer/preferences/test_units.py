"""Units of preference rows: pairs and labelled completions, their tokens, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from areal_like.chat.token_row import TokenRow
from areal_like.errors import ConfigError
from tests.support.preference_rows import sum_pairs, units_of_rows
from trainer.models.tiny_chat import chat_tokenizer
from trainer.preferences.units import PreferenceUnits

RANKING = {"prompt": "7+8=", "responses": ["15", "51", "1", "16"], "ranks": [1, 2, 2, 4]}
EOS = chat_tokenizer().decode([chat_tokenizer().eos_token_id])


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    yield
    dist.destroy_process_group()


def texts(units: PreferenceUnits) -> list[tuple[str, ...]]:
    """Learned texts of every unit; with a bad label in brackets."""
    found = []
    for index in range(len(units.num_tokens_N)):
        unit = units.unit(index)
        learned = [learned_text(each.sequences[0]) for each in unit]
        found.append(tuple(learned if len(unit) > 1 or unit[0].is_desirable else [f"({learned[0]})"]))
    return found


def learned_text(row: TokenRow) -> str:
    tokens = [token for token, is_learned in zip(row.tokens, row.loss_mask, strict=True) if is_learned]
    return str(chat_tokenizer().decode(tokens)).removesuffix(EOS)


def test_pairs_are_chosen_then_rejected(tmp_path: Path) -> None:
    """Also of a ranking, whose ties give no pair."""
    rows = [*sum_pairs(3, seed=1), RANKING]
    units = units_of_rows(tmp_path, rows)
    assert texts(units) == [
        *((row["chosen"], row["rejected"]) for row in rows[:3]),
        ("15", "51"),
        ("15", "1"),
        ("15", "16"),
        ("51", "16"),
        ("1", "16"),
    ]
    assert (units.counts.num_units, units.counts.num_ties, units.counts.num_rows) == (8, 1, 4)
    chosen, rejected = units.unit(0)
    assert (chosen.is_desirable, rejected.is_desirable) == (True, False)
    assert units.num_tokens_N[0] == len(chosen.sequences[0].tokens) + len(rejected.sequences[0].tokens)


def test_completions_have_labels(tmp_path: Path) -> None:
    """Of labelled rows, of pairs, and the best and the worst of a ranking."""
    labelled = sum_pairs(4, seed=2, kind="label")
    pair = sum_pairs(1, seed=3, kind="chat")[0]
    tie = {"prompt": "1+1=", "chosen": "2", "rejected": "02", "tie": True}
    units = units_of_rows(tmp_path, [*labelled, pair, RANKING, tie], of_pairs=False)
    assert texts(units) == [
        *((row["completion"] if row["label"] else f"({row['completion']})",) for row in labelled),
        (pair["chosen"][0]["content"],),
        (f"({pair['rejected'][0]['content']})",),
        ("15",),
        ("(16)",),
    ]
    assert units.counts.num_ties == 2


def test_a_label_is_no_pair(tmp_path: Path) -> None:
    rows = [*sum_pairs(2, seed=1), *sum_pairs(1, seed=2, kind="label")]
    with pytest.raises(ConfigError, match=r"rows.jsonl:3: `label` is of one .*preferences.method=kto"):
        units_of_rows(tmp_path, rows)


@pytest.mark.parametrize("truncates", [False, True])
def test_long_pairs_are_left_out_or_cut(tmp_path: Path, truncates: bool) -> None:
    """One completion is longer than the limit of a sequence; one pair only both together."""
    rows: list[dict[str, Any]] = [
        {"prompt": "1=", "chosen": "1", "rejected": "2"},
        {"prompt": "1=", "chosen": "1", "rejected": "2" * 40},
        {"prompt": "1=", "chosen": "1" * 16, "rejected": "2" * 19},
    ]
    units = units_of_rows(tmp_path, rows, longest=30, budget_tokens=40, truncates=truncates)
    counts = units.counts
    assert (counts.num_too_long, counts.num_truncated) == ((0, 2) if truncates else (2, 0))
    assert [bool(num) for num in units.num_tokens_N] == [True, truncates, truncates]
    if truncates:
        assert max(units.num_tokens_N) <= 40 and texts(units)[0] == ("1", "2")
        lengths = [[len(each.sequences[0].tokens) for each in units.unit(index)] for index in range(3)]
        assert max(lengths[1]) == 20 and lengths[2] == [19, 20]


def test_mismatched_joins_tokens(tmp_path: Path) -> None:
    """The prompt of one completion and the completion of another one, with its EOS."""
    units = units_of_rows(tmp_path, sum_pairs(3, seed=5, kind="label"), of_pairs=False)
    mismatched = units.mismatched(0, 2)
    assert mismatched is not None
    (row,), (before,), (after,) = (
        each.sequences for each in (mismatched, units.unit(0)[0], units.unit(2)[0])
    )
    assert learned_text(row) == learned_text(after)
    num_prompt = list(before.loss_mask).index(1)
    assert list(row.tokens[:num_prompt]) == list(before.tokens[:num_prompt])
    assert row.num_learned == after.num_learned and not any(row.loss_mask[:num_prompt])
    short = units_of_rows(tmp_path, sum_pairs(3, seed=5, kind="label"), of_pairs=False, longest=11)
    cut = short.mismatched(0, 2)
    assert cut is None or len(cut.sequences[0].tokens) <= 11


def test_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    rows = sum_pairs(3, seed=1)
    first = units_of_rows(tmp_path, rows).fingerprint
    assert units_of_rows(tmp_path, [{**row, "note": "x"} for row in rows]).fingerprint == first
    assert units_of_rows(tmp_path, [*rows[:2], {**rows[2], "rejected": "3"}]).fingerprint != first
