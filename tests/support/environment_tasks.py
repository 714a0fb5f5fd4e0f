"""Tasks with scripted environments, in a module that their processes import quickly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout_server.environments.base import Environment, Message, Reply, Step
from rollout_server.tasks.base import Completion, Example, Split, Task


def said(text: str) -> Message:
    return {"role": "user", "content": text}


class Echo(Environment):
    """Repeats each reply. A reply that names a mishap causes it, and so does `start` in `reset`."""

    def __init__(self, prompt: str, *, start: str, num_turns: int) -> None:
        self.prompt = prompt
        self.start = start
        self.num_turns = num_turns

    async def reset(self) -> list[Message]:
        await self.mishap(self.start)
        self.left = self.num_turns
        return [said(f"{self.prompt} seed {self.seed}")]

    async def step(self, reply: Reply) -> Step:
        self.left -= 1
        if (answer := await self.mishap(reply.text)) is not None:
            return answer
        return Step(
            messages=[said(reply.text)],
            reward=0.5,
            done=self.left == 0,
            metrics={"chars": len(reply.text)},
        )

    async def mishap(self, name: str) -> Any:
        match name.partition(" ")[0]:
            case "raise":
                raise KeyError("no such door")
            case "exit":
                sys.exit(3)
            case "hang":
                time.sleep(3600)
            case "held":
                while not Path(os.environ["MAY_GO_ON"]).exists():
                    await asyncio.sleep(0.01)
            case "wait":
                await asyncio.sleep(float(name.partition(" ")[2]))
            case "allocate":
                hoard = []
                while True:
                    hoard.append(bytearray(16 << 20))
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "print":
                os.write(1, b"raw noise on stdout\n" * 100)
                print("more noise", flush=True)
            case "garble":
                for descriptor in range(3, 20):
                    with contextlib.suppress(OSError):
                        os.write(descriptor, b"\x01\x00\x00\x00\xc1")
            case "fork" | "child" as kind:
                # The child holds this process's socket, and is in a session of its own.
                if (pid := os.fork()) == 0:
                    os.setsid()
                    if kind == "child":
                        _wait_for_the_end_of_parents()
                    time.sleep(3600)
                return Step(messages=[said(str(pid))])
            case "daemon":
                # An orphan in a session of its own.
                made = subprocess.run(
                    [sys.executable, "-c", _DAEMON], check=True, stdout=subprocess.PIPE, text=True
                )
                return Step(messages=[said(made.stdout)])
            case "thread":
                threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
            case "pid":
                return Step(messages=[said(str(os.getpid()))])
            case "random":
                return Step(messages=[said(str(random.random()))])
            case "no_number":
                return Step(messages=[said("")], reward=float("nan"))
            case "nothing":
                return Step()
            case "text":
                return "well done"
            case "set":
                return Step(messages=[{"role": "user", "content": {1, 2}}])
            case "role":
                return Step(messages=[{"content": "who?"}])
            case "long":
                return Step(messages=[said("x" * (5 << 20))])
            case "metrics":
                return Step(messages=[said("")], metrics={str(n): 1.0 for n in range(100)})
        return None


def _wait_for_the_end_of_parents() -> None:
    """Ends this process when worker and zygote are gone: where a test kills the zygote, nobody else does.

    The test would wait for the end of the server's stderr, which this process holds.
    """
    with contextlib.suppress(OSError):
        while b"rollout_server.workers" in Path(f"/proc/{os.getppid()}/cmdline").read_bytes():
            time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


_DAEMON = """
import os, time
if (pid := os.fork()) == 0:
    os.setsid()
    os.close(1)
    time.sleep(3600)
print(pid)
"""


@dataclass(frozen=True, kw_only=True)
class EchoTask(Task):
    """`Echo` environments; `start` is what their reset does (see `Echo.mishap`)."""

    num_turns: int = 3
    start: str = "hello"

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=f"{split} {index}", answer=None)

    def environment(self, example: Example) -> Environment | None:
        return Echo(str(example.prompt), start=self.start, num_turns=self.num_turns)


class Chatter(Echo):
    """Rewards letters in an untrained policy's text. Some turns are a mishap, by the sample's seed."""

    def __init__(self, prompt: str, *, num_turns: int, mishaps: Mapping[str, float]) -> None:
        super().__init__(prompt, start="", num_turns=num_turns)
        self.mishaps = mishaps

    async def reset(self) -> list[Message]:
        messages = await super().reset()
        self.rng = random.Random(self.seed)
        self.left = self.rng.randint(1, self.num_turns)
        return messages

    async def step(self, reply: Reply) -> Step:
        self.left -= 1
        drawn = self.rng.random()
        for name, probability in self.mishaps.items():
            drawn -= probability
            if drawn < 0:
                return await self.mishap(name) or Step(messages=[said(name)])
        reward = sum(char.isalpha() for char in reply.text) / (1 + len(reply.text))
        return Step(messages=[said(str(self.left))], reward=reward, done=self.left == 0)


@dataclass(frozen=True, kw_only=True)
class ChatterTask(Task):
    """`Chatter` environments of up to `num_turns` turns; `mishaps`: name -> probability in each turn."""

    num_turns: int = 4
    mishaps: dict[str, float] = field(default_factory=dict)

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=f"{split} {index}", answer=None)

    def environment(self, example: Example) -> Environment | None:
        return Chatter(str(example.prompt), num_turns=self.num_turns, mishaps=self.mishaps)


@dataclass(frozen=True, kw_only=True)
class ScoredEchoTask(EchoTask):
    """With a reward for the whole conversation; without an environment if `num_turns` is 0."""

    def environment(self, example: Example) -> Environment | None:
        return super().environment(example) if self.num_turns else None

    def reward(self, example: Example, completion: Completion) -> float:
        return 10.0


class SlowTool(Environment):
    """Thinks for half a second about each of two replies."""

    async def reset(self) -> list[Message]:
        self.num_steps = 0
        return [said("1+2")]

    async def step(self, reply: Reply) -> Step:
        await asyncio.sleep(0.5)
        self.num_steps += 1
        return Step(messages=[said("3")], reward=0.5, done=self.num_steps == 2)


@dataclass(frozen=True, kw_only=True)
class SlowToolTask(Task):
    """`SlowTool` environments."""

    def example(self, split: Split, index: int) -> Example:
        return Example(prompt=f"{split} {index}", answer=None)

    def environment(self, example: Example) -> Environment | None:
        return SlowTool()
