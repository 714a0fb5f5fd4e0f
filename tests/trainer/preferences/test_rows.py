"""Rows of preference optimization: which completions are used, their tokens, and mismatched ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from areal_like.chat.token_row import TokenRow
from areal_like.errors import ConfigError
from tests.support.preference_rows import rows_of, sum_pairs
from trainer.batching.packing import collate
from trainer.models.tiny_chat import chat_tokenizer
from trainer.preferences.rows import OptimizationRows

RANKING = {"prompt": "7+8=", "responses": ["15", "51", "1", "16"], "ranks": [1, 2, 2, 4]}
TIE = {"prompt": "1+1=", "chosen": "2", "rejected": "02", "tie": True}


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    yield
    dist.destroy_process_group()


def learned_text(row: TokenRow) -> str:
    tokens = [token for token, is_learned in zip(row.tokens, row.loss_mask, strict=True) if is_learned]
    return str(chat_tokenizer().decode(tokens)).removesuffix("<eos>")


def units(rows: OptimizationRows) -> list[list[tuple[str, float]]]:
    """Learned text and level of the completions of every unit."""
    found = []
    for index in range(len(rows.num_tokens_N)):
        for unit in rows.units(index, group=3) if rows.num_tokens_N[index] else ():
            trajectories = [sample.trajectory for sample in unit]
            texts = [
                learned_text(TokenRow(tokens=each.tokens.tolist(), loss_mask=each.loss_mask.tolist()))
                for each in trajectories
            ]
            found.append(list(zip(texts, (each.reward for each in trajectories), strict=True)))
    return found


def test_comparisons_are_units(tmp_path: Path) -> None:
    """Of pairs and rankings; a row with only ties is left out."""
    given = [*sum_pairs(2, seed=1), TIE, RANKING]
    rows = rows_of(tmp_path, given)
    assert units(rows) == [
        *([(row["chosen"], 1.0), (row["rejected"], 0.0)] for row in given[:2]),
        [("15", -1.0), ("51", -2.0), ("1", -2.0), ("16", -4.0)],
    ]
    counts = rows.counts
    assert (counts.num_pairs, counts.num_ties, counts.num_completions) == (9, 2, 8)
    assert counts.num_without_target == 1
    assert rows.facts["num_better"].tolist() == [1, 1, 0, 5]
    assert rows.facts["num_best_tokens"].tolist()[-1] == len("15") + 1
    (unit,) = rows.units(3, group=3)
    assert collate(unit).groups_N.tolist() == [4] * 4


@pytest.mark.parametrize("of_pairs", [True, False])
def test_ties_alone_teach_nothing(tmp_path: Path, of_pairs: bool) -> None:
    with pytest.raises(
        ConfigError, match=r"^preferences\.train: every comparison is a tie, .*rows\.jsonl:1$"
    ):
        rows_of(tmp_path, [TIE, {**TIE, "rejected": "002"}], of_pairs=of_pairs)


def test_single_completions_have_labels(tmp_path: Path) -> None:
    """Of labelled rows, of pairs, and the best and the worst of a ranking."""
    labelled = sum_pairs(4, seed=2, kind="label")
    pair = sum_pairs(1, seed=3, kind="chat")[0]
    rows = rows_of(tmp_path, [*labelled, pair, RANKING, TIE], of_pairs=False)
    assert units(rows) == [
        *([(row["completion"], float(row["label"]))] for row in labelled),
        [(pair["chosen"][0]["content"], 1.0)],
        [(pair["rejected"][0]["content"], 0.0)],
        [("15", 1.0)],
        [("16", 0.0)],
    ]
    assert rows.counts.num_desirable == sum(row["label"] for row in labelled) + 2
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: it has one completion with a label"):
        rows_of(tmp_path, labelled)


def test_mismatched_joins_tokens(tmp_path: Path) -> None:
    """The prompt of one row and the completion of another one, with its EOS."""
    given = sum_pairs(3, seed=5, kind="label")
    rows = rows_of(tmp_path, given, of_pairs=False)
    (row,), (before,), (after,) = rows.mismatched(0, 2), rows.completions(0), rows.completions(2)
    assert row is not None and learned_text(row) == given[2]["completion"]
    num_prompt = list(before.loss_mask).index(1)
    assert list(row.tokens[:num_prompt]) == list(before.tokens[:num_prompt])
    assert row.num_learned == after.num_learned and not any(row.loss_mask[:num_prompt])
    long = {"prompt": "1=", "completion": "2" * 20, "label": True}
    rows = rows_of(tmp_path, [given[0], long], of_pairs=False, longest=23)
    ((cut,), (whole,)) = rows.mismatched(0, 1), rows.mismatched(1, 0)
    assert cut is not None and len(cut.tokens) == 23 and whole is not None and len(whole.tokens) < 23
    rows = rows_of(
        tmp_path, [{**long, "prompt": "2" * 20 + "=", "completion": "2"}, long], of_pairs=False, longest=23
    )
    (cut,) = rows.mismatched(0, 1)
    assert cut is not None and cut.num_learned == 2
