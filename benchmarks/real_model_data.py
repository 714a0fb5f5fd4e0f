"""The rows of the real model's study as JSON lines, each question in only one file.

    python -m benchmarks.real_model_data FOLDER

Three data sets are of reasoning_gym, and one has expressions for the calculator. reasoning_gym draws its
questions at random, so a data set with few distinct questions repeats them. Here each distinct question is
kept once, regardless of its answer, and then assigned to exactly one file: the held-out rows first, then
those of the supervised start, then those of training. A held-out question is therefore never seen in
training, by any method; `disjoint` checks the files by hash before each run. (A held-out sum may still have
the same two numbers as a training sum in another order or with another sign.)
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_server.tools.calculator import evaluate

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


CALCULATOR = "calculator"
TOOL_PROMPT = (
    'Answer with the result only. You can use a calculator: write <tool_call>{"name": "calculator", '
    '"arguments": {"expression": "12 + 3 * 4"}}</tool_call> and read its result.'
)
"""System prompt of the tool task. SmolLM2's chat template renders no schemas of tools, so this describes the
only one."""
_CALL_SHARE = 0.5
"""Share of the demonstrations that use the calculator. The others answer at once, which a model of this size
cannot do: rewards have to teach it to use the calculator always."""


def calculations() -> Iterator[dict[str, Any]]:
    """Yields rows with distinct expressions endlessly: three numbers, + - and at most one *."""
    rng = random.Random(f"calculator/{SEED}")
    seen = set()
    while True:
        first, second = rng.choice(["+ +", "+ -", "- +", "* +", "* -", "+ *", "- *"]).split()
        a, b, c = (rng.randint(11, 99) for _ in range(3))
        expression = f"{a} {first} {b} {second} {c}"
        if expression not in seen:
            seen.add(expression)
            answer = str(int(evaluate(expression)))
            yield {"question": f"What is {expression}?", "answer": answer, "label": CALCULATOR}


def demonstration(row: Mapping[str, Any], *, uses_calculator: bool) -> dict[str, Any]:
    """A row of the supervised start: the question of `row` as a conversation that ends with its answer."""
    messages = [
        {"role": "system", "content": TOOL_PROMPT},
        {"role": "user", "content": row["question"]},
    ]
    if uses_calculator:
        expression = row["question"].removeprefix("What is ").removesuffix("?")
        call = json.dumps({"name": CALCULATOR, "arguments": {"expression": expression}})
        messages += [
            {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
            {"role": "tool", "content": row["answer"]},
        ]
    return {**row, "messages": [*messages, {"role": "assistant", "content": row["answer"]}]}


def write_rows(folder: Path) -> None:
    """Writes `<name>.train.jsonl` and `<name>.eval.jsonl` for each of DATA and the calculator, `sft.jsonl`
    with rows from all of DATA, and `calculator.sft.jsonl` with conversations.

    A folder that has all files is left unchanged.
    """
    names = [*(data.name for data in DATA), CALCULATOR]
    files = [folder / f"{name}.{split}.jsonl" for name in names for split in ("train", "eval")]
    if all(file.exists() for file in [*files, folder / "sft.jsonl", folder / f"{CALCULATOR}.sft.jsonl"]):
        return
    folder.mkdir(parents=True, exist_ok=True)
    warm: list[dict[str, Any]] = []
    for name, rows in [*((data.name, data.questions()) for data in DATA), (CALCULATOR, calculations())]:
        held_out, start, train = (list(itertools.islice(rows, n)) for n in (NUM_EVAL, NUM_SFT, NUM_TRAIN))
        _write(folder / f"{name}.eval.jsonl", held_out)
        _write(folder / f"{name}.train.jsonl", train)
        if name == CALCULATOR:
            rng = random.Random(f"demonstrations/{SEED}")
            shown = [demonstration(row, uses_calculator=rng.random() < _CALL_SHARE) for row in start]
            _write(folder / f"{name}.sft.jsonl", shown)
        else:
            warm += start
    _write(folder / "sft.jsonl", warm)


def write_more(folder: Path, num: int) -> None:
    """Writes `<name>.more.jsonl` for each of DATA: `num` held-out questions beside those of `write_rows`."""
    for data in DATA:
        if not (path := folder / f"{data.name}.more.jsonl").exists():
            first = NUM_EVAL + NUM_SFT + NUM_TRAIN
            _write(path, list(itertools.islice(data.questions(), first, first + num)))


def disjoint(folder: Path) -> dict[str, Any]:
    """Facts about the files: number of rows and SHA-256 of each, and number of questions.

    Raises ValueError if there are no files, or if a question, compared by the hash of its text without
    regard to case and spaces, is in two rows.
    """
    places: dict[bytes, str] = {}
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*.jsonl")):
        content = path.read_bytes()
        lines = content.splitlines()
        files[path.name] = {"rows": len(lines), "sha256": hashlib.sha256(content).hexdigest()}
        for number, line in enumerate(lines, start=1):
            question = " ".join(json.loads(line)["question"].split()).casefold()
            digest, place = hashlib.sha256(question.encode()).digest(), f"{path.name}:{number}"
            if digest in places:
                raise ValueError(
                    f"{folder}: {places[digest]} and {place} have the same question: delete the folder, and "
                    "it is written again"
                )
            places[digest] = place
    if not files:
        raise ValueError(f"{folder} has no rows: python -m benchmarks.real_model_data {folder}")
    return {"files": files, "questions": len(places)}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
    partial.replace(path)


def main() -> None:
    """Writes the rows and checks them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write_rows(folder)
    print(f"{disjoint(folder)['questions']} questions, each in one file")


if __name__ == "__main__":
    main()
