"""The rows of the real model's job: questions of reasoning_gym as JSON lines, each in only one file.

reasoning_gym draws its questions at random, so a data set with few distinct questions repeats them. Here each
distinct question is kept once, regardless of its answer, and then assigned to exactly one file: the held-out
rows first, then those of the supervised start, then those of training. A held-out question is therefore never
seen in training, by either method. (A held-out sum may still have the same two numbers as a training sum in
another order or with another sign.)
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYSTEM_PROMPT = "Answer with the result only."
"""Without it the chat template adds its own, longer one."""
SEED = 0
NUM_EVAL, NUM_SFT, NUM_TRAIN = 200, 64, 2000
"""Number of rows of each data set. The held-out rows come first, so that they stay the same when the others
change."""


@dataclass(frozen=True, kw_only=True)
class GymData:
    """A data set of reasoning_gym with answers of a few tokens."""

    name: str
    """Its name in reasoning_gym."""
    params: Mapping[str, Any]
    """Its settings."""

    def questions(self) -> Iterator[dict[str, str]]:
        """Yields rows with distinct questions endlessly."""
        gym = importlib.import_module("reasoning_gym")
        data = gym.create_dataset(self.name, seed=SEED, size=1_000_000, **self.params)
        seen = set()
        for index in range(len(data)):
            entry = data[index]
            question = entry["question"].strip()
            if question not in seen:
                seen.add(question)
                yield {"question": question, "answer": str(entry["answer"]), "label": self.name}


DATA = (
    GymData(name="chain_sum", params={"max_terms": 2, "min_digits": 2, "max_digits": 2}),
    GymData(name="word_sequence_reversal", params={"min_words": 3, "max_words": 5}),
    GymData(name="number_sequence", params={"max_terms": 5, "max_value": 10, "max_complexity": 1}),
)


def write_rows(folder: Path) -> None:
    """Writes `<name>.train.jsonl` and `<name>.eval.jsonl` for each of DATA, and `sft.jsonl` with rows from
    all.

    A folder that has all files is left unchanged.
    """
    files = [folder / f"{data.name}.{split}.jsonl" for data in DATA for split in ("train", "eval")]
    if all(file.exists() for file in [*files, folder / "sft.jsonl"]):
        return
    folder.mkdir(parents=True, exist_ok=True)
    warm = []
    for data in DATA:
        rows = data.questions()
        held_out = [next(rows) for _ in range(NUM_EVAL)]
        warm += [next(rows) for _ in range(NUM_SFT)]
        train = [next(rows) for _ in range(NUM_TRAIN)]
        _write(folder / f"{data.name}.eval.jsonl", held_out)
        _write(folder / f"{data.name}.train.jsonl", train)
    _write(folder / "sft.jsonl", warm)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)


def main() -> None:
    """`python -m benchmarks.real_model_data FOLDER`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_rows(parser.parse_args().folder)


if __name__ == "__main__":
    main()
