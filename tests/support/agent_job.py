"""A job for agents from outside: buffer and rollout server as processes, and the test as the trainer.

What the policy says is the test's choice; the rest is the product: claims, sessions, prompts,
segments, records, the ledger of the buffer, and what a trainer gets.

    with running_agent_job(tmp_path) as job:
        job.policy.texts = ["hello"]
        ...  # an agent claims a session at job.url, asks, posts a reward and ends
        trajectory = job.fetch(session.group)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from areal_like.config import Config
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import Fetch, Group
from rollout_server.rendering.jinja import JinjaRenderer
from tests.support.buffer_harness import running_buffer, training
from tests.support.chat_models import APPENDING, chat_tokenizer, jinja_renderer
from tests.support.rollout_harness import ServerProcess, serving
from tests.support.saying_engine import saying_engine
from tests.support.scripted_policy import save_chat_model
from tests.support.session_server import SayingPolicy
from tests.support.waiting import HANG_LIMIT_S

CONTEXT = 32768
"""Frameworks have system prompts of ten thousand characters, and each is a token here."""
NUM_SAMPLES = 256
"""The most samples of one job: all of its first step."""
_SERIES = re.compile(r'^areal_(session_refusals|sessions_ended)_total\{\w+="(\w+)"\} (\S+)$', re.M)
Result = TypeVar("Result")


@dataclass(kw_only=True)
class AgentJob:
    """A job that waits for agents."""

    url: str
    """Of the rollout server, for claims."""
    policy: SayingPolicy
    metrics_url: str
    """Of the rollout server."""
    fetch_position: Callable[[int], Group]
    """Waits for the group at a position of the step."""
    config: Config
    server: ServerProcess
    """rollout-0."""
    router_url: str = ""
    """Of the router, for claims; empty: there is none."""
    num_fetched: int = 0

    @property
    def renderer(self) -> JinjaRenderer:
        return self.policy.renderer

    def fetch(self, group: int) -> Trajectory:
        """The next sample that the buffer has recorded, which is that of this group, as a trainer gets it."""
        fetched = self.fetch_position(self.num_fetched)
        self.num_fetched += 1
        assert fetched.ticket_id == group
        (trajectory,) = fetched.trajectories
        return trajectory

    def refusals(self) -> dict[int, int]:
        """How many requests were refused in the sessions of the samples fetched so far, by HTTP status."""
        deadline_s = time.monotonic() + HANG_LIMIT_S
        while True:
            with urllib.request.urlopen(self.metrics_url) as response:
                page = response.read().decode()
            counts = {(name, value): int(float(count)) for name, value, count in _SERIES.findall(page)}
            # The page follows a heartbeat later, with all series at once.
            if counts.get(("sessions_ended", "ended"), -1) >= self.num_fetched:
                return {
                    int(value): count
                    for (name, value), count in counts.items()
                    if name == "session_refusals" and count
                }
            assert time.monotonic() < deadline_s, counts
            time.sleep(0.05)


@contextlib.contextmanager
def running_agent_job(
    directory: Path, *, max_episodes: int = 0, has_router: bool = False
) -> Iterator[AgentJob]:
    """A job in this directory, ready for claims; its processes are killed at the end. `max_episodes`: the
    most samples of one server; 0: the default."""
    model = save_chat_model(directory / "model", context=CONTEXT)
    chat_tokenizer(APPENDING).save_pretrained(model)
    policy = SayingPolicy(jinja_renderer(APPENDING))
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(_BackgroundLoop()).run
        resources = contextlib.AsyncExitStack()
        stack.callback(lambda: run(resources.aclose()))
        engine = run(resources.enter_async_context(saying_engine(policy)))
        buffer = stack.enter_context(
            running_buffer(directory, **_settings(model, engine=engine, max_episodes=max_episodes))
        )
        config = buffer.peers_config
        server = stack.enter_context(serving(config))
        trainer = run(resources.enter_async_context(training(buffer)))
        file = server.paths.endpoints / "rollout-0.json"
        url = sessions_url(server, "rollout-0")
        endpoint = json.loads(file.read_text())
        router_url = ""
        if has_router:
            router = ServerProcess(config, name="router-0", module="rollout_server.router")
            stack.callback(router.close)
            router_url = sessions_url(router, "router-0")
        yield AgentJob(
            url=url,
            router_url=router_url,
            config=config,
            server=server,
            policy=policy,
            metrics_url=f"http://{endpoint['http']}/metrics",
            fetch_position=lambda position: run(trainer.call(Fetch(step=0, position=position))),
        )


def sessions_url(server: ServerProcess, name: str) -> str:
    """Waits for the address of the sessions of a server, or of a router."""
    file = server.paths.endpoints / f"{name}.json"
    server.wait_until(
        lambda: (
            file.exists()
            and (found := json.loads(file.read_text()))["pid"] == server.process.pid
            and "sessions" in found
        ),
        what="the address of sessions",
    )
    return str(json.loads(file.read_text())["sessions"])


def _settings(model: Path, *, engine: str, max_episodes: int) -> dict[str, Any]:
    return {
        "model": {"path": str(model)},
        "task": {"name": "external"},
        "max_staleness": 0,
        "buffer": {"lease_timeout_s": 30.0, "discovery": "run_dir"},
        "sampling": {"group_size": 1, "max_new_tokens": 2048},
        "trainer": {"num_steps": 1, "groups_per_step": NUM_SAMPLES, "tokens_per_microbatch": CONTEXT},
        "episode": {"max_turns": 64, "max_tokens": 16 * CONTEXT},
        "rollout": {
            "engine": "sglang",
            "sglang": {"url": engine},
            "max_context": CONTEXT,
            "max_running": 4,
            "queue_samples": 4,
            **({"max_episodes": max_episodes} if max_episodes else {}),
        },
    }


class _BackgroundLoop:
    """An event loop in a thread."""

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
