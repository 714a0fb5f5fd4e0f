"""The process in which environments and agents run; it serves one environment after another.

    server -> worker   ["check" or "reset", split, index, seed] | ["step", reply] | ["close"]
                       ["agent", split, index, seed, base_url, api_key]
    worker -> server   [value, error]                                 one frame for each request, in order

    value of "agent":  null (the agent returned None) | [value, parts, metrics, turns, tokens]

    IDLE -> reset -> OPEN -> step -> OPEN ... -> close -> IDLE, or false: the server ends this process

The example is rebuilt here from (split, index), so a task's reference answers need not be serializable. The
environment runs in this process's event loop, so its own asyncio tasks continue between calls; calls that
block delay only this environment. The process is reused, because forking a large process costs more than most
episodes, unless the environment left behind a child process, a thread (a tool that was abandoned at its time
limit), or more than half of its memory limit in use (`lasting.py` has exceptions). An agent's process serves
only one sample and is then killed, because libraries keep clients with the address of a session.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from areal_like.errors import ConfigError, EpisodeError, RewardError
from areal_like.runtime.process import adopt_orphans
from rollout_server.agents.base import Session
from rollout_server.environments import lasting
from rollout_server.environments.base import Environment, Message, Reply, Step, messages_of
from rollout_server.environments.exchange import MAX_RESULT_BYTES, awaitable, reply_of, step_fields
from rollout_server.frames import described, messages, pack
from rollout_server.rewards.scores import as_score, score_fields, score_of
from rollout_server.tasks.base import Completion, Example, Score, Split, Task

_LOOPBACK = "127.0.0.1,localhost"
_PAGE_BYTES = resource.getpagesize()


def serve(task: Task, connection: socket.socket, *, memory_mb: int) -> None:
    """Serves until the server closes the socket. `memory_mb`: `episode.memory_mb`."""
    connection.sendall(pack([None, ""]))
    adopt_orphans()
    base_bytes = _address_space()
    limit_bytes = base_bytes + (memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    worker = _Worker(task, memory_mb=memory_mb, retire_at_bytes=base_bytes + (memory_mb << 19))
    asyncio.run(worker.run(connection))


class _Worker:
    """Handles the requests of one socket."""

    def __init__(self, task: Task, *, memory_mb: int, retire_at_bytes: int) -> None:
        self._task = task
        self._memory_mb = memory_mb
        self._retire_at_bytes = retire_at_bytes
        self._environment: Environment | None = None
        self._is_out_of_memory = False
        self._label = ""
        """Label of the newest example."""

    async def run(self, connection: socket.socket) -> None:
        """Returns at the end of the stream."""
        reader, writer = await asyncio.open_unix_connection(sock=connection)
        async for request in messages(reader):
            writer.write(self._packed(*await self._handle(request)))
            with contextlib.suppress(ConnectionError):  # the end of the stream follows
                await writer.drain()

    async def _handle(self, request: list[Any]) -> tuple[Any, str]:
        """Performs a call; returns its value, and the error if there is none."""
        call, *arguments = request
        called = call
        try:
            match call:
                case "check" | "reset":
                    called = "environment"
                    environment = self._make(*arguments)
                    called = call
                    if call == "check":
                        environment.check()
                        return None, ""
                    return await self._reset(environment), ""
                case "step":
                    return await self._step(reply_of(*arguments)), ""
                case "agent":
                    return await self._run_agent(*arguments), ""
                case _:
                    return await self._close(), ""
        # An environment's code may raise anything, even SystemExit; only its own sample fails.
        except BaseException as raised:
            self._is_out_of_memory |= isinstance(raised, MemoryError)
            return False if call == "close" else None, self._described(called, raised)

    async def _reset(self, environment: Environment) -> tuple[list[Message], list[Any], str]:
        self._environment = environment
        messages = await awaitable(environment.reset(), call="reset")
        return list(messages), list(environment.tools), self._label

    async def _run_agent(self, split: Split, index: int, seed: int, base_url: str, api_key: str) -> Any:
        """Returns the fields of the agent's score, or None."""
        example = self._example(split, index, seed)
        # By these variables programs find their model. LangChain and LiteLLM read OPENAI_API_BASE first, and
        # the server's own environment may set it. Loopback addresses are excluded from proxies.
        os.environ |= dict.fromkeys(("OPENAI_BASE_URL", "OPENAI_API_BASE"), base_url)
        session = Session(base_url=base_url, api_key=api_key)
        anthropic = ("ANTHROPIC_BASE_URL", "ANTHROPIC_API_BASE")
        os.environ |= dict.fromkeys(anthropic, session.anthropic_base_url)
        os.environ |= dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY"), api_key)
        os.environ.pop("ANTHROPIC_AUTH_TOKEN", None)  # clients would send it too
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name, ""), _LOOPBACK)))
        returned = await awaitable(self._task.agent(example, session), call="agent")
        return None if returned is None else score_fields(_agent_score(returned))

    def _example(self, split: Split, index: int, seed: int) -> Example:
        """Rebuilds the example for each sample, because an environment may modify it."""
        # A fork copies the generators' states: without this, environments in different processes would draw
        # the same numbers.
        random.seed(seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(seed % (1 << 32))
        example = self._task.example(split, index)
        self._label = example.label
        return example

    def _make(self, split: Split, index: int, seed: int) -> Environment:
        example = self._example(split, index, seed)
        environment = self._task.environment(example)
        if environment is None:
            if not self._task.has_reward:
                raise EpisodeError("environment() returned None for an example of a task without reward()")
            environment = _OneTurn(example)
        if not isinstance(environment, Environment):
            raise EpisodeError(f"environment() returned {type(environment).__name__}: return an Environment")
        environment.seed = seed
        return environment

    async def _step(self, reply: Reply) -> list[Any]:
        assert self._environment is not None
        return step_fields(await awaitable(self._environment.step(reply), call="step"))

    async def _close(self) -> bool:
        """Closes the environment; returns False if this process should not serve another one."""
        environment, self._environment = self._environment, None
        if environment is not None:
            await environment.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()} - lasting.tasks:
            task.cancel()
        is_used_up = self._is_out_of_memory or _address_space() > self._retire_at_bytes
        return not (is_used_up or _has_threads() or _has_children())

    def _described(self, call: str, raised: BaseException) -> str:
        """Returns the message of an exception, and where in the task's code it was raised."""
        if isinstance(raised, EpisodeError | ConfigError):
            return str(raised)
        is_memory = isinstance(raised, MemoryError)
        note = f" (episode.memory_mb={self._memory_mb})" if is_memory else ""
        return f"{call}() raised {described(raised, note=note)}"

    @staticmethod
    def _packed(value: Any, error: str) -> bytes:
        try:
            frame = pack([value, error])
        except (TypeError, ValueError, OverflowError, RecursionError) as unpackable:
            return pack([None, f"messages, tools and metrics must be JSON values: {unpackable}"])
        if len(frame) <= MAX_RESULT_BYTES:
            return frame
        return pack([None, f"a result of {len(frame)} bytes: the limit is {MAX_RESULT_BYTES}"])


def checked_agent_score(fields: Any) -> Score | None:
    """Checks the value of "agent" in the server. Raises EpisodeError."""
    if fields is None:
        return None
    try:
        score = score_of(fields)
    except (ValueError, TypeError):
        raise EpisodeError("the agent's process sent no valid score") from None
    return _agent_score(score)


def _agent_score(returned: Any) -> Score:
    """Converts to a Score, or raises EpisodeError that says what to return. Numbers of turns and tokens are
    checked later."""
    turns: Sequence[Any] = getattr(returned, "turns", ())
    tokens: Sequence[Any] = getattr(returned, "tokens", ())
    try:
        if len(getattr(returned, "steps", ())):
            raise RewardError(
                "agent() returned Score.steps: only a task's reward() can reward steps of a text"
            )
        of_any_length = Completion("", turn_lengths=turns, token_ids=tokens)
        return as_score(returned, of_any_length, call="agent")
    except (RewardError, TypeError) as error:
        raise EpisodeError(str(error)) from None


class _OneTurn(Environment):
    """The environment of an example that has none, in a task where others have one."""

    def __init__(self, example: Example) -> None:
        self._prompt = example.prompt

    async def reset(self) -> list[Message]:
        return messages_of(self._prompt)

    async def step(self, reply: Reply) -> Step:
        return Step(done=True)


def _address_space() -> int:
    """Returns the size of this process's address space in bytes, as RLIMIT_AS counts it."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE_BYTES


def _has_threads() -> bool:
    """True if threads run other than those of asyncio's executor, which stay alive without work."""
    others = set(threading.enumerate()) - {threading.main_thread()}
    return any(not thread.name.startswith("asyncio_") for thread in others)


def _has_children() -> bool:
    """True if there is a live child process that may not outlive an episode; reaps those that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    if not lasting.pids:
        return True
    lists: list[str] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            lists.append(path.read_text())
    return not lists or not lasting.pids.issuperset(int(pid) for one in lists for pid in one.split())
