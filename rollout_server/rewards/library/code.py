"""The reward for programs: the share of a row's tests that the policy's program passes, in the sandbox.

The program is the last fenced block of the completion. A program that fails, hangs or exceeds a limit is not
an error: its tests count as failed, and the sample is trained on. Programs that read stdin run once for each
test; calls and statements are all tested in one run (see `program_harness.py`). Each worker runs
`rollout.reward_concurrency` programs at a time, in threads.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from areal_like.errors import ConfigError, RewardError
from rollout_server.rewards.library.base import RewardFunction, place_of
from rollout_server.rewards.library.function import row_of
from rollout_server.rewards.library.program_calls import HarnessRun
from rollout_server.rewards.library.program_tests import (
    ProgramTests,
    is_same_output,
    is_same_value,
    tests_of,
)
from rollout_server.rewards.time_limit import reward_time_left_s
from rollout_server.sandbox import Limits, ProgramResult, make_sandbox
from rollout_server.tasks.base import Completion, Example, Score

_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_MARGIN_S = 1.0
"""Time reserved for starting and ending a program before the reward's own limit."""
_OUTPUT_BYTES = 1 << 16
_MAX_THREADS = 1024
"""More than the number of rewards that a worker computes at a time (`rollout.reward_concurrency`)."""


@dataclass(frozen=True, kw_only=True)
class Code(RewardFunction):
    """`{name: code, timeout_s: 5}`."""

    sandbox: str = "bwrap"
    """The job's `rewards.sandbox`."""
    tests_key: str = ""
    """Column of the row that contains the tests; empty: the answer."""
    give: Literal["all", "share"] = "all"
    """`all`: 1 if every test passes, else 0; `share`: the share of the tests that pass."""
    max_tests: int = 32
    """Maximum number of tests used per row, from the first one."""
    timeout_s: float = 5.0
    """Time limit of one program run, in seconds: one test with stdin, or all calls or statements."""
    memory_mb: int = 512
    """Address space of one process, in MiB."""
    tolerance: float = 0.0
    """Tolerated absolute or relative difference of numbers in outputs; 0: every word must be equal."""
    needs_fence: bool = False
    """True: a completion without a fenced block has reward 0; False: its whole text is the program."""

    def __post_init__(self) -> None:
        super().__post_init__()
        make_sandbox(self.sandbox)
        if not (self.timeout_s > 0 and self.max_tests >= 1 and self.memory_mb >= 32 and self.tolerance >= 0):
            raise ConfigError(
                "task.reward code: timeout_s above 0, max_tests at least 1, memory_mb at least 32, and "
                "tolerance at least 0"
            )

    def check(self) -> None:
        """Raises ConfigError if the sandbox cannot run a program."""
        make_sandbox(self.sandbox).check()

    async def score(self, example: Example, completion: Completion) -> Score:
        """Returns a score from 0 to 1. Metrics: `passed` (share of the tests), `timeouts` (programs),
        `has_code`.

        Raises RewardError if the row's tests cannot be read.
        """
        tests = self._tests(example)
        source = program_in(completion, needs_fence=self.needs_fence)
        if source is None:
            return Score(value=0.0, metrics={"passed": 0.0, "timeouts": 0.0, "has_code": 0.0})
        run = self._run_harness if tests.function or tests.statements else self._run_with_stdin
        # The loop has few threads of its own: programs would wait for them and run out of time.
        context = contextvars.copy_context()  # contains the time limit
        scoring = asyncio.get_running_loop().run_in_executor(_threads(), context.run, run, source, tests)
        num_passed, num_timeouts = await scoring
        share = num_passed / tests.num
        return Score(
            value=share if self.give == "share" else float(num_passed == tests.num),
            metrics={"passed": share, "timeouts": float(num_timeouts), "has_code": 1.0},
        )

    def _tests(self, example: Example) -> ProgramTests:
        row = row_of(example)
        value = row.get(self.tests_key) if self.tests_key else example.answer
        try:
            tests = tests_of(value, entry_point=str(row.get("entry_point", "")))
        except ValueError as error:
            raise RewardError(
                f"{place_of(example)} has no tests of a program in "
                f"{self.tests_key or 'the reference answer'}: {error}; see docs/reference/rewards.md"
            ) from None
        return tests.first(self.max_tests)

    def _run_with_stdin(self, source: str, tests: ProgramTests) -> tuple[int, int]:
        """Returns (tests passed, programs that timed out). Stops at the first failure if all tests must
        pass."""
        num_passed = num_timeouts = 0
        for stdin, expected in zip(tests.inputs, tests.outputs, strict=True):
            result = self._run(source, stdin=stdin, output_bytes=_OUTPUT_BYTES + 2 * len(expected))
            if result is None:
                return num_passed, num_timeouts + 1
            num_timeouts += result.timed_out
            if result.succeeded and is_same_output(result.stdout, expected, tolerance=self.tolerance):
                num_passed += 1
            elif self.give == "all":
                break
        return num_passed, num_timeouts

    def _run_harness(self, source: str, tests: ProgramTests) -> tuple[int, int]:
        """Returns the same as `_run_with_stdin`, from one program that runs all tests."""
        harness = HarnessRun(
            source=source, function=tests.function, calls=tests.inputs, statements=tests.statements
        )
        expected_bytes = len(json.dumps(tests.outputs))
        result = self._run(
            harness.program, stdin=harness.stdin, output_bytes=_OUTPUT_BYTES + 2 * expected_bytes
        )
        if result is None:
            return 0, 1
        values = harness.values(result.stdout)
        passed = [number for number in range(tests.num) if number in values]
        if tests.function:
            passed = [
                number
                for number in passed
                if is_same_value(values[number], tests.outputs[number], tolerance=self.tolerance)
            ]
        return len(passed), int(result.timed_out)

    def _run(self, source: str, *, stdin: str, output_bytes: int) -> ProgramResult | None:
        """Runs one program; None if the reward has no time left for it."""
        timeout_s = min(self.timeout_s, reward_time_left_s() - _MARGIN_S)
        if timeout_s <= 0:
            return None
        limits = Limits(timeout_s=timeout_s, memory_mb=self.memory_mb, output_bytes=output_bytes)
        return make_sandbox(self.sandbox).run(source, stdin=stdin, limits=limits)


def program_in(completion: str, *, needs_fence: bool) -> str | None:
    """Returns the last closed fenced block; without one, the whole text, or None if a fence is needed."""
    blocks = _FENCED.findall(completion.replace("\r\n", "\n"))
    if blocks:
        return str(blocks[-1])
    return None if needs_fence or "```" in completion or not completion.strip() else str(completion)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Returns the executor with a thread for each running program; threads are created on use."""
    return ThreadPoolExecutor(max_workers=_MAX_THREADS, thread_name_prefix="programs")
