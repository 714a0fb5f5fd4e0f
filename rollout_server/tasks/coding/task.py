"""The coding task: repair a small repository with three tools, in a sandbox of the sample's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rollout_server.environments.base import Environment
from rollout_server.sandbox import Limits, make_sandbox
from rollout_server.tasks.base import Example, Split, Task
from rollout_server.tasks.coding.environment import RepairEnvironment
from rollout_server.tasks.coding.repositories import make_repository


@dataclass(frozen=True, kw_only=True)
class CodingTask(Task):
    """A repository with one bug; the label is the kind of the bug, the answer the repository."""

    num_train: int = 100_000
    num_modules: int = 2
    """Number of modules of a repository; one of them has the bug."""
    give: Literal["all", "share"] = "all"
    """`all`: reward 1 if every hidden call returns what it has to; `share`: if none fails that did not fail
    before, the share of those that did."""
    describes_tools: bool = False
    """True: the system prompt describes the tools, for a chat template that renders none; a call is then
    written as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""
    timeout_s: float = 10.0
    """Time limit of one run of the tests, in seconds."""
    memory_mb: int = 256
    """Address space of one process, in MiB."""
    file_mb: int = 16
    """All files of the sandbox together, in MiB."""
    max_output_bytes: int = 4096
    """Bytes of a test run's stdout that the agent reads, and the same number of stderr."""

    def __post_init__(self) -> None:
        super().__post_init__()
        make_sandbox(self.sandbox)
        self.limits  # noqa: B018, raises ConfigError

    @property
    def limits(self) -> Limits:
        """Returns the limits of a sample's sandbox."""
        return Limits(
            timeout_s=self.timeout_s,
            memory_mb=self.memory_mb,
            file_mb=self.file_mb,
            output_bytes=self.max_output_bytes,
        )

    def example(self, split: Split, index: int) -> Example:
        """Returns a repository; those of `eval` have bugs that no training repository has."""
        repository = make_repository(
            self.rng(split, index), held_out=split == "eval", num_modules=self.num_modules
        )
        return Example(prompt="", answer=repository, label=repository.kind)

    def environment(self, example: Example) -> Environment:
        return RepairEnvironment(
            example.answer,
            sandbox=self.sandbox,
            limits=self.limits,
            give=self.give,
            describes_tools=self.describes_tools,
        )
