"""OpenEnv servers: a stub of their protocol that can do anything. tests/openenv has the real thing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from aiohttp import WSMsgType, web

from areal_like.errors import ConfigError, EpisodeError, ToolError
from rollout_server.environments.base import Message, Step
from rollout_server.environments.scripted import call, say
from rollout_server.tasks.base import Task, make_task
from rollout_server.tasks.openenv.forms import action_form, observation_text, result_text
from tests.support.moved_clock import advance, run
from tests.support.ports import held_port
from tests.support.served_app import served

TEXT = {"type": "string"}
ACTION = {
    "type": "object",
    "properties": {"metadata": {"type": "object"}, "guess": TEXT},
    "required": ["guess"],
}
TOOL_ACTION = {"type": "object", "properties": {"type": {"const": "call_tool", "type": "string"}}}
Socket = web.WebSocketResponse
Response = str | bytes | dict[str, Any] | Callable[[Socket], Awaitable[None]]


@pytest.fixture(autouse=True)
def nothing_is_left_open() -> Iterator[None]:
    """A connection that a test has left open fails this test, and not a later one."""
    yield
    gc.collect()


def observation(reward: Any = None, done: Any = False, **fields: Any) -> dict[str, Any]:
    return {"type": "observation", "data": {"observation": fields, "reward": reward, "done": done}}


def error(code: str, message: str = "no", **data: Any) -> dict[str, Any]:
    return {"type": "error", "data": {"message": message, "code": code, **data}}


class Stub:
    """A server. Responses to steps come in order, from one list for all sessions."""

    def __init__(self, *steps: Response, start: Response | None = None, action: Any = ACTION) -> None:
        self.steps = list(steps)
        self.start: Response = observation(hint="Guess.") if start is None else start
        self.action = action
        self.seen: list[dict[str, Any]] = []
        """Messages of the client."""
        self.num_full = 0
        """Sessions that are refused before one is accepted."""
        self.schema: Callable[[], web.Response] = lambda: web.json_response({"action": self.action})
        self.before_socket: Callable[[], web.Response | None] = lambda: None
        self.received = asyncio.Event()
        """Set by each message of the client."""
        self.pongs = asyncio.Event()
        self.headers: list[str | None] = []

    @contextlib.asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/schema", self._schema)
        app.router.add_get("/ws", self._session)
        async with served(app) as url:
            yield url

    async def _schema(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers.get("Authorization"))
        return self.schema()

    async def _session(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(request.headers.get("Authorization"))
        if (refusal := self.before_socket()) is not None:
            return refusal
        opened = Socket(autoping=False)
        await opened.prepare(request)
        if self.num_full:
            self.num_full -= 1
            await opened.send_json(error("CAPACITY_REACHED"))
            await opened.close()
            return opened
        async for message in opened:
            if message.type == WSMsgType.PONG:
                self.pongs.set()
                continue
            self.seen.append(json.loads(message.data))
            self.received.set()
            if self.seen[-1]["type"] == "close":
                break
            with contextlib.suppress(ConnectionError):
                is_reset = self.seen[-1]["type"] == "reset"
                await self._respond(opened, self.start if is_reset else self.steps.pop(0))
        return opened

    @staticmethod
    async def _respond(opened: Socket, response: Response) -> None:
        if callable(response):
            await response(opened)
        elif isinstance(response, bytes):
            await opened.send_bytes(response)
        else:
            await opened.send_str(response if isinstance(response, str) else json.dumps(response))


def task_of(url: str = "http://127.0.0.1:9", **settings: Any) -> Task:
    return make_task({"name": "openenv", "url": url, **settings}, seed=0)


async def episode(url: str, *replies: Any, **settings: Any) -> tuple[list[Message], list[Step], list[Any]]:
    """First messages, steps and tools."""
    task = task_of(url, **settings)
    environment = task.environment(task.example("train", 0))
    assert environment is not None
    environment.check()
    try:
        first = await environment.reset()
        tools = list(environment.tools)
        written = [say(reply) if isinstance(reply, str) else reply for reply in replies]
        return first, [await environment.step(reply) for reply in written], tools
    finally:
        await environment.close()


def played(stub: Callable[[], Stub], *replies: Any, **settings: Any) -> tuple[list[str], list[Step], Stub]:
    """The contents of the first messages, the steps, and the server. `stub` makes it, in the loop."""

    async def body() -> tuple[list[str], list[Step], Stub]:
        server = stub()
        async with server.served() as url:
            first, steps, _ = await episode(url, *replies, **settings)
        return [message["content"] for message in first], steps, server

    return run(body())


def content(step: Step) -> str:
    (message,) = step.messages
    return str(message["content"])


def test_an_episode() -> None:
    seed = task_of().example("train", 0).answer
    first, (wrong, right), server = played(
        lambda: Stub(observation(hint="Higher.", left=2), observation(True, True, hint="Right.", left=None)),
        " 5 ",
        "7",
        system_prompt="Be brief.",
        params={"size": 9},
    )
    assert first == ["Be brief.", "Guess."]
    assert (content(wrong), wrong.reward, wrong.done) == ("hint: Higher.\nleft: 2", 0.0, False)
    assert (right.reward, right.done, right.metrics) == (1.0, True, {"invalid_actions": 0.0})
    assert server.seen == [
        {"type": "reset", "data": {"size": 9, "seed": seed}},
        {"type": "step", "data": {"guess": "5"}},
        {"type": "step", "data": {"guess": "7"}},
        {"type": "close"},
    ]


def test_a_refused_action_is_a_mistake_of_the_policy() -> None:
    errors = [{"loc": ["guess"], "msg": "String should have at most 8 characters", "input": "x" * 9}]
    refused = error("VALIDATION_ERROR", "Invalid message", errors=errors)
    _, (odd, even), _ = played(lambda: Stub(refused, observation(0.5, hint="Go on.")), "x" * 9, "5")
    assert content(
        odd
    ) == "This is not a valid action: guess: String should have at most 8 characters" and odd.metrics == {
        "invalid_actions": 1.0
    }
    assert (content(even), even.reward) == ("Go on.", 0.5)


async def hang_up(opened: Socket) -> None:
    await opened.close(code=1011)


async def ping_without_end(opened: Socket) -> None:
    for _ in range(2000):
        await opened.ping(b"x")


async def answer_twice(opened: Socket) -> None:
    for _ in range(2):
        await opened.send_json(observation(hint="Higher."))
    await opened.ping(b"x")


def raw(reward: str = "null", done: str = "false", fields: str = "{}") -> str:
    return (
        f'{{"type": "observation", "data": {{"observation": {fields}, "reward": {reward}, "done": {done}}}}}'
    )


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        ("<html>", "it sent no valid JSON"),
        ("[" * 100_000, "it sent no valid JSON"),
        (raw(reward="9" * 5000), "it sent no valid JSON"),
        (raw(reward="NaN"), "it sent no valid JSON"),
        (raw(reward="1e999"), "the reward inf is no number of at most 1e\\+09"),
        (raw(reward="-1e10"), "the reward -10000000000.0 is no number"),
        (raw(reward='"1"'), "the reward '1' is no number"),
        (raw(done="null"), "it sent no observation, or no done"),
        (raw(fields="[]"), "it sent no observation, or no done"),
        ("[1]", "it sent JSON that is no object"),
        ('{"type": "observation", "data": 3}', "it sent a message without data"),
        ('{"type": "news", "data": {}}', "it sent a message of type 'news'"),
        (raw(fields=json.dumps({"hint": "x" * (1 << 20)})), "it sent more than max_response_bytes=1048576"),
        (b"\x00", "it sent what is no text message"),
        (error("EXECUTION_ERROR", "list\nindex"), r"it reports an error \(EXECUTION_ERROR\): list index"),
        (hang_up, r"it closed the connection \(code 1011\)"),
        (ping_without_end, "it sent more than 1000 pings for one request"),
    ],
)
def test_what_a_server_sends_fails_only_the_sample(response: Response, problem: str) -> None:
    with pytest.raises(EpisodeError, match=f"OpenEnv server at http://127.0.0.1:[0-9]+: {problem}"):
        played(lambda: Stub(response), "5")


def test_messages_that_nothing_had_asked_for() -> None:
    async def body() -> None:
        stub = Stub(answer_twice, observation(hint="Lower."))
        async with stub.served() as url:
            task = task_of(url)
            environment = task.environment(task.example("train", 0))
            assert environment is not None
            await environment.reset()
            await environment.step(say("5"))
            await stub.pongs.wait()  # the ping came after both
            with pytest.raises(EpisodeError, match="it sent a message that nothing had asked for"):
                await environment.step(say("6"))
            await environment.close()

    run(body())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": lambda: web.Response(status=500)}, "GET /schema: HTTP status 500"),
        ({"schema": lambda: web.Response(text="<html>")}, "it sent no valid JSON"),
        ({"schema": lambda: web.json_response([])}, "it sent JSON that is no object"),
        ({"schema": lambda: web.Response(body=b"x" * (2 << 20))}, "more than max_response_bytes=1048576"),
        (
            {"schema": lambda: web.Response(body=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"})},
            "it sent no valid JSON",
        ),
        ({"schema": lambda: web.json_response({})}, "its schema of actions describes no object"),
        ({"before_socket": lambda: web.Response(status=404)}, "WSServerHandshakeError: 404"),
        ({"before_socket": lambda: web.Response(text="hello")}, "WSServerHandshakeError: 200"),
        ({"start": error("EXECUTION_ERROR", "no dice")}, r"reports an error \(EXECUTION_ERROR\): no dice"),
        ({"start": error("VALIDATION_ERROR", "bad size")}, "it refuses the reset: bad size"),
        ({"start": observation(done=True)}, "the episode was over at its start"),
        ({"start": hang_up}, "it closed the connection"),
        ({"action": TOOL_ACTION, "steps": [error("VALIDATION_ERROR")]}, "it does not list its tools: no"),
        ({"action": TOOL_ACTION, "steps": [observation(tools=[])]}, "it lists 0 tools"),
        (
            {"action": TOOL_ACTION, "steps": [observation(tools=[{"name": "a b"}])]},
            "the name of its tool 'a b'",
        ),
        (
            {"action": TOOL_ACTION, "steps": [observation(tools=[{"name": "a", "description": "x" * 5000}])]},
            "the description of its tool a is no text of at most 4096 characters",
        ),
        (
            {"action": TOOL_ACTION, "steps": [observation(tools=[{"name": "a", "input_schema": [1]}])]},
            'the schema of its tool a has no "type": "object"',
        ),
    ],
)
def test_how_an_episode_cannot_start(change: dict[str, Any], problem: str) -> None:
    def stub() -> Stub:
        made = Stub()
        vars(made).update(change)
        return made

    with pytest.raises(EpisodeError, match=f"OpenEnv server at http://127.0.0.1:[0-9]+: .*{problem}"):
        played(stub)


@pytest.mark.parametrize("where", ["schema", "before_socket"])
def test_redirects_are_not_followed(where: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.setblocking(False)
        headers = {"Location": f"http://127.0.0.1:{elsewhere.getsockname()[1]}/"}

        def stub() -> Stub:
            made = Stub()
            setattr(made, where, lambda: web.Response(status=307, headers=headers))
            return made

        with pytest.raises(EpisodeError, match="it responded with a redirect, which is not followed"):
            played(stub)
        with pytest.raises(BlockingIOError):  # nothing has connected
            elsewhere.accept()


def test_nobody_listens() -> None:
    with held_port() as port, pytest.raises(EpisodeError, match="ClientConnectorError: Cannot connect"):
        run(episode(f"http://127.0.0.1:{port}"))


async def say_nothing(_: Socket) -> None:
    pass


@pytest.mark.parametrize(
    ("is_step", "problem"),
    [
        (False, "no episode has started within task.timeout_s=20"),
        (True, "no response to an action within task.timeout_s=20"),
    ],
)
def test_a_server_that_stalls(is_step: bool, problem: str) -> None:
    async def body() -> None:
        stub = Stub(say_nothing, start=None if is_step else say_nothing)
        async with stub.served() as url:
            playing = asyncio.create_task(episode(url, "5", "6"))
            while len(stub.seen) <= is_step:
                stub.received.clear()
                await stub.received.wait()
            advance(20)
            with pytest.raises(EpisodeError, match=problem):
                await playing

    run(body())


def test_a_late_response_is_not_that_to_the_next_action() -> None:
    async def body() -> None:
        stub = Stub(say_nothing, observation(hint="Late."))
        async with stub.served() as url:
            task = task_of(url)
            environment = task.environment(task.example("train", 0))
            assert environment is not None
            await environment.reset()
            stub.received.clear()
            step = asyncio.create_task(environment.step(say("5")))
            await stub.received.wait()
            advance(20)
            with pytest.raises(EpisodeError, match="no response to an action"):
                await step
            with pytest.raises(EpisodeError, match="it did not respond to step in time"):
                await environment.step(say("6"))
            await environment.close()

    run(body())


def test_waits_for_a_session_that_is_free() -> None:
    def stub() -> Stub:
        made = Stub(observation(1.0, True))
        made.num_full = 2
        return made

    first, (last,), _ = played(stub, "5")
    assert first == ["Guess."] and last.reward == 1.0


def test_no_session_becomes_free() -> None:
    async def body() -> None:
        stub = Stub()
        stub.num_full = 1 << 30
        async with stub.served() as url:
            playing = asyncio.create_task(episode(url))
            while stub.num_full > (1 << 30) - 2:  # a second try shows that the first was understood
                await asyncio.sleep(0.01)
            advance(20)
            with pytest.raises(
                EpisodeError, match=r"within task\.timeout_s=20: all of its sessions are in use"
            ):
                await playing

    run(body())


def test_pings_are_answered_while_the_policy_writes() -> None:
    async def greet(opened: Socket) -> None:
        await opened.send_json(observation(hint="Guess."))
        await opened.ping(b"x")

    async def body() -> None:
        stub = Stub(start=greet)
        async with stub.served() as url:
            task = task_of(url)
            environment = task.environment(task.example("train", 0))
            assert environment is not None
            await environment.reset()
            await stub.pongs.wait()
            await environment.close()

    run(body())


def test_key_and_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "ws_proxy", "WS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("KEY_OF_THE_TEST", "secret")
    _, _, server = played(Stub, key_variable="KEY_OF_THE_TEST")
    assert server.headers == ["Bearer secret"] * 2
    assert played(Stub)[2].headers == [None, None]


def tools_stub(*responses: Response) -> Callable[[], Stub]:
    tools = [
        {"name": "add", "description": "Adds.", "input_schema": {"type": "object", "properties": {"a": {}}}},
        {"name": "look", "input_schema": {}},
    ]
    return lambda: Stub(observation(tools=tools), *responses, start=observation(), action=TOOL_ACTION)


def result(text: str, reward: Any = None, done: bool = False, **fields: Any) -> dict[str, Any]:
    found = {"content": [{"type": "text", "text": text}], "is_error": False}
    return observation(reward, done, tool_name="add", **{"result": found, "error": None, **fields})


def test_tools_of_the_server_are_the_policys() -> None:
    failed = result("", error={"error_type": "execution_error", "message": "no luck"})
    replies = [
        say(calls=[("add", {"a": 1}), ("look", {}), ("nothing", {}), ("add", "{")]),
        say(calls=[("add", {"a": 2}), ("add", {"a": 3})]),
    ]
    first, (four, two), server = played(tools_stub(result("3", 0.25), failed, result("5", 2, True)), *replies)
    assert first == ["(no observation)"]
    texts = [message["content"] for message in four.messages]
    assert texts[:2] == ["3", "Error: no luck"]
    assert texts[2].startswith('Error: there is no tool "nothing". Tools: add, look')
    assert texts[3].startswith("Error: the arguments are not a JSON object")
    assert (four.reward, four.done, four.metrics["tool_errors"]) == (0.25, False, 3.0)
    assert (two.reward, two.done) == (2.0, True)
    assert [message["content"] for message in two.messages] == ["5", "Error: not run: the episode is over"]
    sent = [message["data"] for message in server.seen if message["type"] == "step"]
    assert sent[:2] == [
        {"type": "list_tools"},
        {"type": "call_tool", "tool_name": "add", "arguments": {"a": 1}},
    ]


def test_a_reply_without_a_call_ends_the_episode() -> None:
    _, (last,), _ = played(tools_stub(), "I am done.", tools=["add"])
    assert (last.reward, last.done) == (0.0, True)


def test_a_call_that_the_server_refuses() -> None:
    _, (step,), _ = played(tools_stub(error("VALIDATION_ERROR", "arguments: not these")), call("add", a=1))
    assert content(step) == "Error: arguments: not these"


def test_a_server_that_is_lost_in_a_call() -> None:
    with pytest.raises(EpisodeError, match="it closed the connection"):
        played(tools_stub(hang_up), call("add", a=1))


def test_a_call_beyond_the_limit_of_a_reply() -> None:
    async def body() -> None:
        stub = tools_stub(say_nothing)()
        async with stub.served() as url:
            playing = asyncio.create_task(episode(url, call("add", a=1), timeout_s=100))
            while len(stub.seen) < 3:
                stub.received.clear()
                await stub.received.wait()
            advance(25)
            with pytest.raises(EpisodeError, match="it did not respond to step in time"):
                await playing

    run(body())


def properties(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "$defs": {"Way": {"enum": ["up"], "type": "string"}}}


@pytest.mark.parametrize(
    ("schema", "settings", "text", "action"),
    [
        (ACTION, {}, "5", {"guess": "5"}),
        (properties(way={"$ref": "#/$defs/Way"}, speed={"type": "integer"}), {}, "up", {"way": "up"}),
        (properties(note={"anyOf": [TEXT, {"type": "null"}]}), {}, "x", {"note": "x"}),
        (properties(a=TEXT, b=TEXT), {"field": "b"}, "x", {"b": "x"}),
        (properties(a=TEXT, b=TEXT), {"others": {"a": "go"}}, "x", {"a": "go", "b": "x"}),
        (properties(cell={"type": "integer"}), {}, "-3", {"cell": -3}),
        (properties(angle={"type": "number"}), {}, "0.5", {"angle": 0.5}),
        (properties(angle={"type": "number"}), {}, "2", {"angle": 2}),
    ],
)
def test_the_field_of_an_action(schema: Any, settings: Any, text: str, action: Any) -> None:
    form = action_form(schema, **{"field": "", "others": {}, **settings})
    assert form is not None and form.action_of(text) == action


@pytest.mark.parametrize(
    ("kind", "text"), [("integer", "1.5"), ("integer", "9" * 30), ("number", "nan"), ("number", "up")]
)
def test_a_reply_that_is_no_number(kind: str, text: str) -> None:
    _, (step,), _ = played(lambda: Stub(action=properties(cell={"type": kind})), text)
    assert content(step).startswith("This is not a valid action: reply with one ")
    assert step.metrics == {"invalid_actions": 1.0}


@pytest.mark.parametrize(
    ("observed", "fields", "text"),
    [
        ({"hint": "Go.", "done": True, "reward": 1, "metadata": {"x": 1}}, (), "Go."),
        ({"board": [[1, 2]], "left": 0, "note": None, "more": ""}, (), "board: [[1, 2]]\nleft: 0"),
        ({"board": [[1, 2]], "hint": "Go."}, ("hint",), "Go."),
        ({"hint": "Go.", "left": 3}, ("left", "hint"), "left: 3\nhint: Go."),
        ({}, (), "(no observation)"),
        ({"hint": "a\ud800"}, (), "a?"),
        ({"hint": "x" * 50}, (), "x" * 20 + "\n[cut: 20 of 50 characters]"),
    ],
)
def test_the_text_of_an_observation(observed: Any, fields: Any, text: str) -> None:
    assert observation_text(observed, fields=fields, max_chars=20 if "x" in text else 100) == text


def test_the_text_of_a_result() -> None:
    def of(result: Any) -> str:
        return result_text({"tool_name": "add", "result": result}, fields=(), max_chars=100)

    assert of({"content": [], "structured_content": {"a": 1}}) == '{"a": 1}'
    assert of("plain") == "plain" and of([1]) == "[1]"
    assert result_text({"board": "x", "more": "y"}, fields=("board",), max_chars=100) == "x"
    assert result_text({"tool_name": "add", "result": "5"}, fields=("board",), max_chars=100) == "5"
    for odd in ({"content": [{"type": "image"}]}, {"content": [], "is_error": True}):
        with pytest.raises(ToolError, match=r"content of type image|the tool failed"):
            of(odd)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"url": ""}, "set task.url"),
        ({"url": "ftp://x"}, "want http://host:port/path"),
        ({"url": "http://me:secret@x"}, "without a user name or password"),
        ({"url": "http://x/?a=1"}, "task.url has a query"),
        ({"url": "http://x", "key_variable": "KEY"}, "a key is sent only over https"),
        ({"tools": "add"}, "task.tools='add': want a list of names"),
        ({"timeout_s": 0.0}, "task.timeout_s=0.0: must be above 0"),
        ({"max_response_bytes": 5}, "task.max_response_bytes=5: must be at least 1024"),
        ({"params": {"seed": 3}}, "task.params: the seed"),
        ({"reply_field": "x"}, "reply_field"),
    ],
)
def test_wrong_settings(settings: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        task_of(**{"url": "http://127.0.0.1:9", **settings})


@pytest.mark.parametrize(
    ("action", "settings", "problem"),
    [
        (ACTION, {"action_field": "move"}, "an action has no field move; its fields: guess"),
        (ACTION, {"action": {"speed": 3}}, "an action has no field speed"),
        (ACTION, {"tools": ["add"]}, "its actions are no calls of tools"),
        (ACTION, {"observation_fields": ["board"]}, "has none of board; its fields: hint"),
        (properties(a=TEXT, b=TEXT), {}, "an action has 2 fields with text: name the one"),
        (properties(a={"type": "array"}), {}, "a is no text and no number"),
        ({**properties(a=TEXT, n={}), "required": ["a", "n"]}, {}, "an action needs n, too: set task.action"),
        (
            TOOL_ACTION,
            {"action_field": "type"},
            "its actions are calls of tools: leave out task.action_field",
        ),
        (TOOL_ACTION, {"tools": ["mul"]}, "there is no tool mul; its tools: add"),
    ],
)
def test_settings_that_do_not_fit_the_server(action: Any, settings: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"task openenv: http://127.0.0.1:[0-9]+: .*{problem}"):
        played(lambda: Stub(observation(tools=[{"name": "add"}]), action=action), **settings)


def test_a_missing_key_is_found_at_the_start() -> None:
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY is not set"):
        run(episode("http://127.0.0.1:9", key_variable="NO_SUCH_KEY"))
