"""Environments of an OpenEnv server: `task: {name: openenv, url: "http://127.0.0.1:8000"}`.

    task.py       the settings, and the environment of one sample
    session.py    its session with the server, by OpenEnv's protocol
    forms.py      actions, observations, tools

Nothing of OpenEnv has to be installed here. The reply of the policy is one field of the action; if the
server's actions are calls of tools, its tools are those of the policy, and a reply without a call ends the
episode. An error, a stall or nonsense of the server fails only its sample; an action that the server refuses
is a mistake of the policy, which reads why.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from urllib.parse import urlsplit

from areal_like.errors import ConfigError, ToolError
from rollout_server.environments.base import Environment, Message, Reply, Step
from rollout_server.tasks.base import Example
from rollout_server.tasks.games import GameTask
from rollout_server.tasks.openenv.forms import (
    ActionForm,
    ListedTool,
    UnusableError,
    action_form,
    listed_tools,
    observation_text,
    result_text,
)
from rollout_server.tasks.openenv.session import (
    InvalidActionError,
    NoSessionLeftError,
    Observed,
    Server,
    Session,
    schemas_of,
)
from rollout_server.tools.address import problem_of_address
from rollout_server.tools.environment import ToolEnvironment
from rollout_server.tools.tool import ServerTool

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class OpenEnvTask(GameTask):
    """Episodes of the environment of one server."""

    url: str = ""
    """Address of the server, http or https. Nothing else is connected to."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the environment's reset, besides the seed."""
    action_field: str = ""
    """Field of the action that has the policy's reply: a text or a number. Empty: the only one with text, or
    the only one."""
    action: Mapping[str, Any] = field(default_factory=dict)
    """Values of other fields of every action."""
    observation_fields: Sequence[str] = ()
    """Fields of the observation that the policy reads; empty: all but done, reward and metadata."""
    tools: Sequence[str] = ()
    """Names of the server's tools that the policy may call; empty: all."""
    key_variable: str = ""
    """Environment variable that has the server's key, sent as `Authorization: Bearer`; empty: no key."""
    timeout_s: float = 20.0
    """Time limit of the start of an episode, with the wait for a free session, and of each action, in
    seconds: below `episode.step_timeout_s`."""
    max_response_bytes: int = 1 << 20
    """Size of a message of the server, in bytes; a larger one fails the sample."""
    max_chars: int = 8192
    """Length of an observation, in characters; the rest is cut with a note."""

    least: ClassVar[Mapping[str, int]] = {**GameTask.least, "max_response_bytes": 1024, "max_chars": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.url:
            raise ConfigError("task openenv: set task.url, the address of the server")
        if problem := problem_of_address(self.url, key_variable=self.key_variable):
            raise ConfigError(f"task openenv: {problem}")
        if urlsplit(self.url).query:
            raise ConfigError("task openenv: task.url has a query: want http://host:port")
        for name in ("observation_fields", "tools"):
            values = getattr(self, name)
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise ConfigError(f"task.{name}={values!r}: want a list of names")
        if not self.timeout_s > 0:
            raise ConfigError(f"task.timeout_s={self.timeout_s}: must be above 0")
        if "seed" in self.params:
            raise ConfigError("task.params: the seed of an episode is that of its example")

    def environment(self, example: Example) -> Environment:
        return OpenEnvEnvironment(self, seed=example.answer)

    def server(self) -> Server:
        """Raises ConfigError if the key is not set."""
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        if self.key_variable and not key:
            raise ConfigError(f"task openenv: the environment variable {self.key_variable} is not set")
        return Server(url=self.url.rstrip("/"), key=key, max_bytes=self.max_response_bytes)


class OpenEnvEnvironment(ToolEnvironment):
    """One episode. It has tools, or a form of actions."""

    def __init__(self, task: OpenEnvTask, *, seed: int) -> None:
        super().__init__("")
        self._task = task
        self._example_seed = seed
        self._server = task.server()
        self._session: Session | None = None
        self._form: ActionForm | None = None
        self._reward = 0.0
        """Of the calls of the reply that is worked on."""
        self._is_done = False

    async def reset(self) -> list[Message]:
        waited = ""
        try:
            async with asyncio.timeout(self._task.timeout_s):
                with self._explained():
                    self._form = await self._read_form()
                    pause_s = _FIRST_PAUSE_S
                    while (first := await self._start()) is None:
                        waited = (
                            ": all of its sessions are in use. Raise its max_concurrent_envs, or lower "
                            "rollout.max_episodes"
                        )
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except TimeoutError:
            limit = f"task.timeout_s={self._task.timeout_s:g}"
            raise self._server.failed(f"no episode has started within {limit}{waited}") from None
        with self._explained():
            return self._task.first_messages(self._first_text(first))

    async def step(self, reply: Reply) -> Step:
        """Performs the reply as an action, or its calls. Metric: `invalid_actions`, or those of
        ToolEnvironment."""
        assert self._session is not None
        if self._form is not None:
            return await self._act(self._form, reply.text.strip())
        self._reward = 0.0
        step = await super().step(reply)
        self._session.check()  # a call may have reached the limit of its reply
        return replace(step, reward=step.reward + self._reward, done=step.done or self._is_done)

    async def final(self, reply: Reply) -> float:
        return 0.0

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _read_form(self) -> ActionForm | None:
        task = self._task
        schemas = await schemas_of(self._server)
        form = action_form(schemas.get("action"), field=task.action_field, others=task.action)
        if form is not None and task.tools:
            raise ConfigError("its actions are no calls of tools: leave out task.tools")
        return form

    async def _start(self) -> Observed | None:
        """Starts a session and an episode in it; returns None if the server has no session left."""
        self._session = session = await Session.connect(self._server)
        try:
            if self._form is None:
                listed = await session.step({"type": "list_tools"})
                tools = listed_tools(listed.fields, chosen=self._task.tools)
                self._offer([self._tool(tool) for tool in tools])
            return await session.reset({**self._task.params, "seed": self._example_seed})
        except InvalidActionError as error:
            raise self._server.failed(f"it does not list its tools: {error}") from None
        except NoSessionLeftError:
            self._session = None
            await session.close()
            return None

    def _first_text(self, first: Observed) -> str:
        fields = self._task.observation_fields
        if fields and not set(fields) & set(first.fields):
            has = ", ".join(map(str, first.fields)) or "none"
            raise ConfigError(
                f"task.observation_fields: the first observation has none of {', '.join(fields)}; "
                f"its fields: {has:.300}"
            )
        if first.done:
            raise self._server.failed("the episode was over at its start")
        return self._shown(first)

    async def _act(self, form: ActionForm, text: str) -> Step:
        assert self._session is not None
        try:
            observed = await self._perform(form.action_of(text))
        except (ToolError, InvalidActionError) as error:
            problem = f"This is not a valid action: {error}"
            return Step(messages=[{"role": "user", "content": problem}], metrics={"invalid_actions": 1.0})
        return Step(
            messages=[{"role": "user", "content": self._shown(observed)}],
            reward=observed.reward,
            done=observed.done,
            metrics={"invalid_actions": 0.0},
        )

    def _tool(self, listed: ListedTool) -> ServerTool:
        async def call(**arguments: Any) -> str:
            if self._is_done:
                raise ToolError("not run: the episode is over")
            try:
                observed = await self._perform(
                    {"type": "call_tool", "tool_name": listed.name, "arguments": arguments}
                )
            except InvalidActionError as error:
                raise ToolError(str(error)) from None
            self._reward += observed.reward
            self._is_done = observed.done
            with self._explained():
                return result_text(
                    observed.fields,
                    fields=self._task.observation_fields,
                    max_chars=self._task.max_chars,
                )

        return ServerTool(
            name=listed.name,
            description=listed.description,
            function=call,
            timeout_s=2 * self._task.timeout_s,  # _perform has the limit
            max_chars=self._task.max_chars + 100,  # it is cut already
            input_schema=listed.input_schema,
        )

    async def _perform(self, action: Mapping[str, Any]) -> Observed:
        assert self._session is not None
        try:
            async with asyncio.timeout(self._task.timeout_s):
                return await self._session.step(action)
        except TimeoutError:
            raise self._server.failed(
                f"no response to an action within task.timeout_s={self._task.timeout_s:g}"
            ) from None

    def _shown(self, observed: Observed) -> str:
        with self._explained():
            return observation_text(
                observed.fields, fields=self._task.observation_fields, max_chars=self._task.max_chars
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Adds the server to errors about what it sent."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(f"task openenv: {self._server.url}: {error}") from None
        except UnusableError as error:
            raise self._server.failed(str(error)) from None
