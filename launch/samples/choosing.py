"""Chooses the samples of a run to show, and decodes their text with the run's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ConfigError, first_line
from areal_like.paths import RunPaths, find_checkpoints, model_path
from areal_like.runtime.command_line import load_config
from areal_like.runtime.imports import torch_hidden, uncollected
from launch.samples.reading import LocatedRow, RunLedgers, Selection
from launch.samples.transcripts import Decode, Transcript, transcript

NUM_AT_ENDS = 3
"""Number of worst and of best samples that are shown by default."""


def transcripts(
    root: Path,
    selection: Selection,
    *,
    worst: int | None = None,
    best: int | None = None,
    limit: int | None = None,
) -> tuple[list[LocatedRow], list[Transcript]]:
    """Returns (all rows of a selection, the samples of the rows that `choose` takes).

    Raises ConfigError if there are none or the tokenizer is missing, StoreCorruptError for a damaged record.
    """
    ledgers = RunLedgers(root)
    rows = ledgers.find(selection)
    is_ticket = selection.ticket is not None
    chosen = choose(rows, worst=worst, best=best, limit=limit, is_ticket=is_ticket)
    records = [ledgers.read(row) for row in chosen]
    has_text = any(not isinstance(record, str) for record in records)
    decode = _decoder(root) if has_text else _no_text
    steps = ledgers.version_steps()
    return rows, [
        transcript(row, record, decode=decode, version_steps=steps)
        for row, record in zip(chosen, records, strict=True)
    ]


def choose(
    rows: Sequence[LocatedRow], *, worst: int | None, best: int | None, limit: int | None, is_ticket: bool
) -> list[LocatedRow]:
    """The rows to show, each once: the worst, worst first, then the best, best first.

    Among equal rewards, samples of different groups come first. With `limit` alone, and for a ticket, the
    rows keep their order.
    """
    if worst is None and best is None:
        if is_ticket or limit is not None:
            return list(rows[:limit])
        worst = best = NUM_AT_ENDS
    low = sorted(rows, key=lambda row: (row.reward, row.sample, row.order))[: worst or 0]
    others = [row for row in rows if row not in low]
    high = sorted(others, key=lambda row: (-row.reward, row.sample, row.order))[: best or 0]
    return [*low, *high][:limit]


def _decoder(root: Path) -> Decode:
    """Decodes tokens with the run's tokenizer. Raises ConfigError if it cannot be loaded."""
    source = _tokenizer_source(load_config(["--config", str(RunPaths(root).config)]), root)
    with torch_hidden(), uncollected():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except Exception as error:  # for a broken file, tokenizers raises plain exceptions
            raise ConfigError(
                f"the tokenizer in {source} cannot be loaded, so no text can be shown: {first_line(error)}"
            ) from None

    def decode(tokens: Sequence[int]) -> str:
        return str(
            tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    return decode


def _tokenizer_source(config: Config, root: Path) -> str:
    """The newest checkpoint, which has a copy of the tokenizer; else the model with which the run started."""
    checkpoints = find_checkpoints(RunPaths(root).checkpoints)
    if checkpoints:
        return str(checkpoints[max(checkpoints)])
    built = RunPaths(root).built_model  # not the configured path: `root` may have been moved or copied
    return str(built) if (built / "tokenizer.json").exists() else model_path(config)


def _no_text(tokens: Sequence[int]) -> str:
    """Used as the decoder if no sample has a record."""
    raise AssertionError("there is no record to decode")
