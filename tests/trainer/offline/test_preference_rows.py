"""Rows of preferences as units of samples, and the pairs in a batch of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.config import RewardModelConfig
from areal_like.data.preference_format import PreferenceFormat
from areal_like.errors import ConfigError
from tests.support.sft_model import write_rows
from trainer.batching.packing import collate
from trainer.distributed.ranks import Ranks
from trainer.models.tiny_chat import chat_tokenizer
from trainer.offline.preference_rows import PreferenceRows, comparisons, completion_tokens

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "33"}
TIE = {"prompt": "1+1=", "chosen": "2.0", "rejected": "2", "tie": True}
RANKED = {"prompt": "1+1=", "responses": ["3", "2", "two"], "ranks": [3, 1, 1]}
GOOD = {"prompt": "1+1=", "completion": "2", "label": True}


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    yield Ranks.alone()
    dist.destroy_process_group()


def read(
    folder: Path, rows: Sequence[dict[str, Any]], ranks: Ranks, *, key: str = "train", **settings: Any
) -> PreferenceRows:
    limits = {"longest": 10, "budget_tokens": 20}
    takes = {name: settings.pop(name) for name in ("takes_pairs", "takes_labels") if name in settings}
    return PreferenceRows(
        RewardModelConfig(**settings),
        write_rows(folder / "rows.jsonl", rows),
        key=f"reward_model.{key}",
        render=completion_tokens(ConversationTokens(chat_tokenizer())),
        ranks=ranks,
        **limits,
        **takes,
    )


def test_completions_of_a_row_are_one_unit(tmp_path: Path, ranks: Ranks) -> None:
    rows = read(tmp_path, [PAIR | {"margin": 0.5}, TIE, RANKED], ranks)
    assert rows.num_tokens_N.tolist() == [6 + 7, 8 + 6, 6 + 6 + 8]
    counts = rows.counts
    assert (counts.num_pairs, counts.num_ties, counts.num_labels) == (5, 2, 0)
    # The first row twice, as where one epoch follows another.
    units = [rows.units(index, group=group) for group, index in enumerate((0, 1, 2, 0))]
    assert [len(each) for each in units] == [1] * 4
    batch = collate([sample for (unit,) in units for sample in unit])
    pairs = comparisons(batch)
    found = zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), pairs.is_tie_P.tolist(), strict=True)
    assert sorted(found) == [
        (0, 1, False),
        (2, 3, True),
        (5, 4, False),
        (5, 6, True),
        (6, 4, False),
        (7, 8, False),
    ]
    assert sorted(pairs.margin_P.tolist()) == [0, 0, 0, 0, 0.5, 0.5]
    better_P, worse_P, *_ = comparisons(batch, with_ties=False)
    assert sorted(zip(better_P.tolist(), worse_P.tolist(), strict=True)) == [(0, 1), (5, 4), (6, 4), (7, 8)]
    tokenizer = chat_tokenizer()
    learned = [tokenizer.decode(batch.tokens_T[batch.sampled_S][at]) for at in range(3)]
    assert learned == ["2", "<eos>", "3"]


def test_labels_are_units_of_one(tmp_path: Path, ranks: Ranks) -> None:
    bad = GOOD | {"completion": "3", "label": False}
    rows = read(tmp_path, [GOOD, bad, GOOD], ranks, takes_pairs=False, takes_labels=True)
    assert rows.counts.num_labels == 3 and rows.counts.num_pairs == 0
    batch = collate([sample for index in range(3) for (unit,) in [rows.units(index)] for sample in unit])
    assert batch.rewards_N.tolist() == [1, 0, 1]
    counts = read(tmp_path, [GOOD, TIE], ranks, takes_labels=True).counts
    assert (counts.num_labels, counts.num_ties) == (1, 1), "beside ties, labels are learned"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([TIE, TIE], {}, "reward_model.train: every comparison is a tie, .*: .*rows.jsonl:1$"),
        ([PAIR, {**PAIR, "rejected": ""}], {}, "rows.jsonl:2: `rejected` is empty"),
        ([PAIR, {**PAIR, "rejected": "2"}], {}, "rows.jsonl:2: `chosen` and `rejected` are equal"),
        ([TIE, {**PAIR, "chosen": "123456"}], {}, "rows.jsonl:2: .* has 11 tokens, and at most 10"),
        ([RANKED | {"responses": ["1", "22", "333"]}], {}, "set trainer.tokens_per_microbatch=21"),
        ([GOOD], {}, "rows.jsonl:1: it has one completion with a label"),
        ([PAIR], {"takes_pairs": False, "takes_labels": True}, "rows.jsonl:1: it compares completions"),
        (
            [GOOD, PAIR, GOOD | {"label": False}],
            {"takes_labels": True},
            "rows.jsonl:1 and rows.jsonl:3 have the same prompt and completion, and different labels",
        ),
        ([{**PAIR, "chosen": "123456"}], {"long_rows": "drop", "key": "eval"}, "eval: no row is left"),
        (
            [{**PAIR, "chosen": "123456"}],
            {"long_rows": "drop"},
            "train: no row is left to learn from; 1 of 1 are left out: they have .* more than 10 tokens",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    rows: list[dict[str, Any]], settings: dict[str, Any], message: str, tmp_path: Path, ranks: Ranks
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, rows, ranks, **settings)


def test_long_rows_may_be_left_out(tmp_path: Path, ranks: Ranks) -> None:
    rows = read(tmp_path, [PAIR, {**PAIR, "chosen": "123456"}], ranks, long_rows="drop")
    assert rows.num_tokens_N.tolist() == [13, 0] and rows.counts.num_too_long == 1


def test_a_completion_is_one_sequence() -> None:
    """A template that changes earlier replies makes several of some completions."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last or m.role == 'user' else 'x' }}{{ '<eos>' if m.role == 'assistant' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    render = completion_tokens(ConversationTokens(tokenizer))
    reply, user = {"role": "assistant", "content": "2"}, {"role": "user", "content": "1+1?"}
    wrong = reply | {"content": "3"}
    read_row = PreferenceFormat().read
    assert render(read_row({"prompt": [user], "chosen": [reply], "rejected": [wrong]}), 0).num_learned == 2
    several = {"prompt": [user], "chosen": [reply, user, reply], "rejected": [wrong]}
    with pytest.raises(ConfigError, match="changes earlier messages"):
        render(read_row(several), 0)
