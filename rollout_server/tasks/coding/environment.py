"""One sample of the coding task: a repository in a sandbox, three tools, and a reward from hidden calls.

    reset: the repository's files -> the sandbox
    read, edit, run_tests ... -> a reply without a call -> the hidden calls -> reward, done

The agent can change every file in the sandbox, the visible tests included. That does not help it: the calls
that decide are sent when it has finished, and what they have to return never enters the sandbox. Nothing that
runs in the sandbox outlives one call of a tool, and a command that fails, hangs, floods or fills the disk is
what the agent reads. A sandbox that is lost fails the sample.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from areal_like.errors import SandboxError, ToolError
from rollout_server.environments.base import Message, Reply, Step
from rollout_server.rewards.library.program_calls import HarnessRun
from rollout_server.sandbox import Limits, OpenSandbox, make_sandbox
from rollout_server.tasks.coding.repositories import TESTS, Repository
from rollout_server.tools.environment import ToolEnvironment
from rollout_server.tools.python import describe
from rollout_server.tools.tool import Tool

SYSTEM_PROMPT = (
    "You repair a small Python repository. One function has a bug: it does not do what its docstring says. "
    "Use the tools to read files, to edit them and to run the tests. Do not change the tests. When the bug "
    "is repaired, reply DONE without calling a tool."
)
_MAX_FILES, _MAX_FILE_BYTES = 200, 1 << 16
_EXTRA_TIME_S = 10.0
"""Time that a tool may take besides its command, on a busy machine."""
_CALLER = """\
import importlib, sys
sys.path.insert(0, {home!r})
def call(module, function, arguments):
    return [getattr(importlib.import_module(module), function)(*arguments), arguments]
"""


class RepairEnvironment(ToolEnvironment):
    """The reward is 1 if all hidden calls return what they have to."""

    def __init__(
        self, repository: Repository, *, sandbox: str, limits: Limits, give: str, describes_tools: bool
    ) -> None:
        """For the arguments see `CodingTask`."""
        time_s = limits.timeout_s + _EXTRA_TIME_S
        tools = [Tool.of(one, timeout_s=time_s) for one in (self.read, self.edit, self.run_tests)]
        described = "\n\n" + _described(tools) if describes_tools else ""
        listed = "\n".join(sorted(repository.files))
        super().__init__(
            [
                {"role": "system", "content": SYSTEM_PROMPT + described},
                {"role": "user", "content": f"Repair the repository. Its files:\n{listed}"},
            ],
            tools,
        )
        if describes_tools:
            self.tools = []  # a chat template that renders no schemas would be refused
        self._repository = repository
        self._sandbox = make_sandbox(sandbox)
        self._limits = limits
        self._give = give
        self._box: OpenSandbox | None = None
        self._counts = {"edits": 0.0, "test_runs": 0.0, "tests_passed": 0.0}

    def check(self) -> None:
        super().check()
        self._sandbox.check()

    async def reset(self) -> list[Message]:
        """Opens the sandbox. Raises SandboxError."""
        self._box = self._sandbox.open(limits=self._limits)  # here, because this thread lives on
        await asyncio.to_thread(self._box.write, self._repository.files)
        return await super().reset()

    async def close(self) -> None:
        """Ends the sandbox."""
        await super().close()
        if self._box is not None:
            self._box.close()

    async def final(self, reply: Reply) -> Step:
        """Makes the hidden calls. Metrics: `repaired`, `broke` (a call that the bug did not change fails),
        `edits`, `test_runs`, `tests_passed` (1 if the last run of the visible tests passed)."""
        passed = await asyncio.to_thread(self._hidden_passed)
        calls = self._repository.hidden
        repaired = [ok for ok, call in zip(passed, calls, strict=True) if call.shows_bug]
        broke = not all(ok for ok, call in zip(passed, calls, strict=True) if not call.shows_bug)
        share = 0.0 if broke else sum(repaired) / len(repaired)
        reward = share if self._give == "share" else float(share == 1.0)
        metrics = {"repaired": float(share == 1.0), "broke": float(broke), **self._counts}
        return Step(reward=reward, done=True, metrics=metrics)

    def read(self, path: str = ".") -> str:
        """Shows a file, or lists the files of a directory.

        Args:
            path: Path of a file or directory, such as README.md; without it, all files are listed.
        """
        name = self._relative(path)
        below = [one for one in self._files() if not name or one.startswith(f"{name}/")]
        return "\n".join(below) if below or not name else self._text(name)

    def edit(self, path: str, old: str, new: str) -> str:
        """Replaces a text in a file, which must occur in it exactly once.

        Args:
            path: Path of the file.
            old: The text to replace; empty: the whole file is replaced, or made.
            new: The text in its place.
        """
        name = self._relative(path)
        content = new
        if old:
            before = self._text(name)
            if (count := before.count(old)) != 1:
                raise ToolError(f"`old` occurs {count} times in {name}; it must occur exactly once")
            content = before.replace(old, new)
        if len(content) > _MAX_FILE_BYTES:
            raise ToolError(f"the file would have {len(content)} characters; at most {_MAX_FILE_BYTES}")
        try:
            self._open.write({name: content})
        except ValueError as error:
            raise ToolError(str(error)) from None
        except SandboxError as error:
            # A full disk, or a directory of that name: the agent's own doing. A lost sandbox is found next.
            self._open.exec(["true"])
            raise ToolError(str(error)) from None
        self._counts["edits"] += 1
        return f"{name} is written"

    def run_tests(self) -> str:
        """Runs the tests of the repository, and shows what fails."""
        module = TESTS.removesuffix(".py")
        result = self._open.exec([self._open.python, "-B", "-m", "unittest", module])
        self._counts["test_runs"] += 1
        self._counts["tests_passed"] = float(result.succeeded)
        return describe(result, self._limits)

    @property
    def _open(self) -> OpenSandbox:
        assert self._box is not None
        return self._box

    def _files(self) -> list[str]:
        result = self._open.exec(["find", ".", "-type", "f", "-not", "-name", "*.pyc"])
        return sorted(line.removeprefix("./") for line in result.stdout.splitlines())[:_MAX_FILES]

    def _text(self, name: str) -> str:
        try:
            return self._open.read(name, max_bytes=_MAX_FILE_BYTES).decode(errors="replace")
        except (OSError, ValueError) as error:
            raise ToolError(str(error)) from None

    def _hidden_passed(self) -> Sequence[bool]:
        """Returns for each hidden call whether it returned what it has to."""
        calls = self._repository.hidden
        harness = HarnessRun(
            source=_CALLER.format(home=self._open.home),
            function="call",
            calls=[[one.module, one.function, one.arguments] for one in calls],
        )
        result = self._open.exec(
            [self._open.python, "-I", "-B", "-c", harness.program],
            stdin=harness.stdin,
            output_bytes=self._limits.output_bytes + 4 * len(str(calls)),
        )
        values = harness.values(result.stdout)
        return [values.get(number) == one.expected for number, one in enumerate(calls)]

    def _relative(self, path: str) -> str:
        """Returns a path below the home, as tracebacks and people write it; empty for the home itself."""
        path = path.strip().removeprefix(self._open.home).strip("/")
        return "" if path == "." else path.removeprefix("./")


def _described(tools: Sequence[Tool]) -> str:
    """Returns the tools as text, in the words of the Hermes and Qwen templates."""
    schemas = "\n".join(json.dumps(tool.schema["function"]) for tool in tools)
    return (
        f"Tools, as JSON schemas:\n{schemas}\n\nTo call a tool, write one line such as\n"
        '<tool_call>{"name": "read", "arguments": {"path": "README.md"}}</tool_call>\n'
        "and wait for its result."
    )
