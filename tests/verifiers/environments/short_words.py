"""A taskset of verifiers: the shorter the answer, the better."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import verifiers.v1 as vf

__all__ = ["ShortWordsTaskset"]


class ShortWordsTask(vf.Task):  # type: ignore[misc]
    """One word to answer to."""

    @vf.reward(weight=1.0)  # type: ignore[untyped-decorator, unused-ignore]
    async def short(self, trace: Any) -> float:
        """1 for an empty answer, 0 for one of 64 characters. Raises RuntimeError for the answer `fail`."""
        branch = trace.branches[-1]
        answer = branch.messages[-1].content or ""
        if answer == "fail":
            raise RuntimeError("the reward has failed")
        if "TRACES" in os.environ:
            line = json.dumps({"idx": self.data.idx, "token_ids": branch.token_ids, "answer": answer})
            with Path(os.environ["TRACES"]).open("a") as file:
                file.write(line + "\n")
        return max(0.0, 1 - len(answer) / 64)


class ShortWordsTaskset(vf.Taskset[ShortWordsTask, vf.TasksetConfig]):  # type: ignore[misc]
    """Eight words."""

    def load(self) -> Iterator[ShortWordsTask]:
        """As Taskset.load."""
        for number in range(8):
            yield ShortWordsTask(vf.TaskData(prompt=f"word {number}"))
