r"""Demonstrations of the coding task, for the supervised start of a small model (configs/jobs/coding.yaml).

    python -m benchmarks.coding rows runs/coding/demonstrations.jsonl --num 200

A demonstration is an episode in the real environment, played by a policy that knows the repair: it reads the
module with the bug, edits what differs, runs the tests, and ends. They are of training repositories.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rollout_server.environments.base import Message, Reply
from rollout_server.environments.scripted import call, play, say
from rollout_server.tasks.coding import CodingTask
from rollout_server.tasks.coding.repositories import Repository


def changed_lines(before: str, after: str) -> tuple[str, str]:
    """Returns a text that occurs in `before` once, and the text in its place in `after`: whole lines."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    start = next(
        (at for at, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )
    end = 0
    while end < min(len(old), len(new)) - start and old[-1 - end] == new[-1 - end]:
        end += 1
    while True:
        text = "".join(old[start : len(old) - end])
        if text and before.count(text) == 1:
            return text, "".join(new[start : len(new) - end])
        start, end = max(0, start - 1), max(0, end - 1)


def repair(repository: Repository) -> list[Reply]:
    """Returns the turns of the demonstration."""
    old, new = changed_lines(repository.files[repository.broken], repository.repaired)
    return [
        call("run_tests"),
        call("read", path=repository.broken),
        call("edit", path=repository.broken, old=old, new=new),
        call("run_tests"),
        say("DONE"),
    ]


def demonstration(task: CodingTask, index: int) -> dict[str, Any]:
    """Returns a row for `areal-like sft`: calls are text of the replies, as the policy writes them."""
    example = task.example("train", index)
    environment = task.environment(example)
    episode = play(environment, repair(example.answer))
    assert episode.reward == 1.0, index
    messages = [
        {"role": message["role"], "content": (message["content"] or "") + _calls(message)}
        for message in episode.messages
    ]
    return {"messages": messages, "label": example.label}


def _calls(message: Message) -> str:
    """Returns the calls of a reply as text."""
    functions = [one["function"] for one in message.get("tool_calls", ())]
    return "".join(
        f'<tool_call>{{"name": "{one["name"]}", "arguments": {one["arguments"]}}}</tool_call>'
        for one in functions
    )


def write_rows(file: Path, *, num: int, seed: int) -> None:
    """Writes demonstrations of the last `num` training repositories, which a short run does not reach."""
    task = CodingTask(seed=seed, describes_tools=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as rows:
        for index in range(task.num_train - num, task.num_train):
            rows.write(json.dumps(demonstration(task, index)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    rows = verbs.add_parser("rows")
    rows.add_argument("file", type=Path)
    rows.add_argument("--num", type=int, default=200)
    rows.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write_rows(given.file, num=given.num, seed=given.seed)


if __name__ == "__main__":
    main()
