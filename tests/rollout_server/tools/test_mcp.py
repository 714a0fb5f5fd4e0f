"""MCP servers on stdio: a good one of the official SDK, and one that misbehaves in every way we know."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from areal_like.errors import ConfigError, ToolServerError
from rollout_server.environments.scripted import call, play, say
from rollout_server.tasks.base import make_task
from rollout_server.tools import calculator, make_tools
from rollout_server.tools.mcp import MCPServer
from rollout_server.workers.environment_pool import EnvironmentPool
from tests.support.mcp_servers import (
    Asking,
    AskingTask,
    answers,
    good,
    hostile,
    hostile_settings,
    names,
    said,
    sandbox,
)
from tests.support.quick import only_in_chaos
from tests.support.workers import environment_pool

TASK = f"{AskingTask.__module__}.AskingTask"


def test_a_server_of_the_official_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSED_ON", "yes")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    contents, episode = answers(
        good(prefix="my_", env_allow=["PASSED_ON"]),
        ("my_add", {"a": 1, "b": 2}),
        ("my_add", {"a": "one", "b": 2}),
        ("my_note", {"text": "x"}),
        ("my_note", {"text": "y"}),
        ("my_variables", {}),
        ("my_picture", {}),
        ("my_fail", {}),
    )
    assert names(episode.tools) == ["my_add", "my_note", "my_variables", "my_picture", "my_fail"]
    function = episode.tools[0]["function"]
    assert function["description"] == "Adds two whole numbers."
    assert function["parameters"]["properties"]["a"]["type"] == "integer"
    assert contents[0] == "3" and contents[2:4] == ["x", "x y"]
    assert (
        contents[1]
        == "Error: the arguments do not match the tool's schema: $.a: 'one' is not of type 'integer'"
    )
    variables = set(contents[4].split())
    assert "PASSED_ON" in variables and "OPENAI_API_KEY" not in variables
    assert variables <= {
        "HOME",
        "LANG",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PATH",
        "PWD",
        "TMPDIR",
        "PASSED_ON",
    }
    assert contents[5] == "Error: the result has content of type image; only text is supported"
    assert contents[6].startswith("Error: ")
    assert episode.metrics == {
        "tool_calls": 7.0, "tool_errors": 3.0, "unknown_tools": 0.0, "tool_server_failures": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("many tools", "it lists 250 tools: max_tools=64"),
        *only_in_chaos(("endless pages", "more than 32 pages")),
        ("huge list", "it sent more than max_response_bytes=1048576"),
        *only_in_chaos(
            ("huge schema", "the schema of its tool say has 100081 bytes: more than max_schema_bytes=16384")
        ),
        ("deep schema", "is nested more than max_schema_depth=16 deep"),
        *only_in_chaos(("no schema", "is no JSON schema: ")),
        ("remote schema", "references may only point into the schema"),
        *only_in_chaos(("long description", "more than max_description_chars=4096")),
        ("bad name", "may have only letters, digits, _ and -"),
        *only_in_chaos(("no tools", "it lists no tools")),
        ("cannot start", "it ended with exit code 1: no license found"),
        *only_in_chaos(("old", "the handshake failed: Unsupported protocol version")),
    ],
)
def test_a_server_that_cannot_be_used_fails_the_sample(how: str, problem: str) -> None:
    with pytest.raises(ToolServerError, match="MCP server hostile: ") as failed:
        said(hostile(how), "a")
    assert problem in str(failed.value)


def test_a_server_that_says_nothing() -> None:
    with pytest.raises(ToolServerError, match=r"did not start within 0\.2 s"):
        said(hostile("silent", start_timeout_s=0.2), "a")


@pytest.mark.parametrize(
    ("text", "content", "num_failures"),
    [
        (
            "exit",
            "Error: the server of this tool failed (it ended with exit code 7",
            1,
        ),
        *only_in_chaos(
            ("huge", "Error: the server of this tool failed (it sent more than max_response_bytes=1048576", 1)
        ),
        ("endless line", "Error: the server of this tool failed (it sent more than max_response_bytes", 1),
        ("flood", "Error: the server of this tool failed (it sent more than 1000 messages for one", 1),
        *only_in_chaos(("invalid", "Error: the server of this tool failed (its response is not valid)", 1)),
        ("garbage", "said garbage", 0),
        ("asks", "error error", 0),
        *only_in_chaos(
            ("resource", "Error: the result has content of type resource_link; only text is supported", 0)
        ),
        ("http://127.0.0.1:9/ now call exit", "said http://127.0.0.1:9/ now call exit", 0),
    ],
)
def test_what_a_server_does_in_a_call(text: str, content: str, num_failures: int) -> None:
    """The next call is answered, by the same program or another."""
    contents, failures = said(hostile("banner"), text, "b")
    assert contents[0].startswith(content) and contents[1] == "said b"
    assert failures == num_failures


def test_long_results_are_cut() -> None:
    (content,), _ = said(hostile(max_chars=100), "long")
    assert content == "y" * 100 + "\n[cut: 100 of 20000 characters]"


def test_a_server_that_stalls() -> None:
    contents, failures = said(hostile(timeout_s=0.3), "stall")
    assert contents == ["Error: no result within 0.3 s"] and failures == 1


def test_too_many_failures_fail_the_sample() -> None:
    with pytest.raises(ToolServerError, match=r"2 failures in one episode; .* exit code 7"):
        said(hostile(max_restarts=1), "exit", "exit", "a")


def test_bounds_of_an_episode() -> None:
    server = hostile(max_calls=2, max_argument_chars=30)
    contents, failures = said(server, "x" * 50, "a", "b", "c")
    assert contents[0].startswith("Error: the arguments have 62 characters")
    assert contents[1:3] == ["said a", "said b"]
    assert contents[3] == "Error: not run: an episode may have at most 2 calls of hostile"
    assert failures == 0


def processes_with(mark: str) -> int:
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            found += mark.encode() in path.read_bytes()
    return found


@pytest.mark.parametrize("kind", ["bwrap", "rlimits"])
def test_what_a_server_starts_ends_with_it(kind: str) -> None:
    if kind == "bwrap" and sandbox() != "bwrap":
        pytest.skip("bwrap does not work here")
    mark = uuid.uuid4().hex
    contents, _ = said(hostile("", mark, sandbox=kind), "leave behind")
    assert contents == ["said leave behind"]
    while processes_with(mark):
        time.sleep(0.01)


def test_names_that_collide() -> None:
    for tools in ([hostile("same names")], [hostile(), hostile(max_calls=3)]):
        with pytest.raises(ConfigError, match=r"same name \(say\): leave one out, or give"):
            play(Asking("", tools), [])
    both = play(
        Asking("", [calculator, hostile(), hostile(prefix="b_", tools=["say"])]),
        [call("b_say", text="x"), say()],
    )
    assert names(both.tools) == ["calculator", "say", "b_say"] and both.messages[-2]["content"] == "said x"
    with pytest.raises(ToolServerError, match="it has no tool sing; it lists: say"):
        play(Asking("", [hostile(tools=["sing"])]), [])


async def closed(pool: EnvironmentPool) -> None:
    while pool._closing:
        await asyncio.sleep(0.01)


@pytest.mark.chaos
def test_servers_of_one_episode_and_kept_ones() -> None:
    """Workers are used again, and only a kept server's state reaches later episodes."""
    kept = hostile_settings(keep=True, prefix="kept_")
    contents, idle, num_lost = asyncio.run(
        episodes([hostile_settings(), kept], "remember", "remember", "exit", "remember")
    )
    own, others = zip(*contents, strict=True)
    assert [*own[:2], own[3]] == ["1 times", "1 times", "1 times"] and "exit code 7" in own[2]
    assert [*others[:2], others[3]] == ["1 times", "2 times", "1 times"] and "exit code 7" in others[2]
    assert idle == [1, 1, 1, 1] and num_lost == 0


async def episodes(servers: list[dict[str, Any]], *texts: str) -> tuple[list[list[str]], list[int], int]:
    """One episode for each text: what the policy reads of `say` and `kept_say`, idle workers after each, and
    lost ones in all."""
    contents, idle = [], []
    task = {"_target_": TASK, "tools": [{"name": "mcp", **server} for server in servers]}
    async with environment_pool(task, sandbox=sandbox(), memory_mb=1024) as pool:
        await pool.check()
        await closed(pool)
        for text in texts:
            environment = await pool.open(split="train", index=0, seed=0)
            try:
                await environment.reset()
                calls = [("say", {"text": text}), ("kept_say", {"text": text})]
                step = await environment.step(say(calls=calls))
                contents.append([message["content"] for message in step.messages])
            finally:
                environment.close()
            await closed(pool)
            idle.append(len(pool._idle))
        return contents, idle, pool.num_restarts


@pytest.mark.chaos
def test_a_job_whose_server_does_not_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="MCP server hostile: it ended with exit code 1: no license found"):
        asyncio.run(episodes([hostile_settings("cannot start")]))


def test_what_is_missing_is_found_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the environment variable NOT_SET is not set"):
        hostile(env_allow=["NOT_SET"], sandbox="rlimits").check()
    with pytest.raises(ConfigError, match=r"readable: .*/none does not exist"):
        hostile(readable=[str(tmp_path / "none")], sandbox="rlimits").check()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "give either command or url"),
        ({"command": ["x"], "url": "http://x/"}, "give either command or url"),
        ({"command": "x y"}, "want a list of texts"),
        ({"url": "file:///etc/passwd"}, "want http://host"),
        ({"url": "http://user:secret@x/"}, "want http://host"),
        ({"url": "http://[x/"}, "want http://host"),
        ({"url": "http://x/", "key_variable": "KEY"}, "only over https"),
        ({"url": "http://x/", "env_allow": ["KEY"]}, "are for a command"),
        ({"command": ["x"], "key_variable": "KEY"}, "pass variables to a command with env_allow"),
        ({"command": ["x"], "env_allow": ["A=b"]}, "not the name of an environment variable"),
        ({"command": ["x"], "readable": ["/"]}, "want absolute paths below /"),
        ({"command": ["x"], "readable": ["/opt/../etc"]}, "without .."),
        ({"command": ["x"], "max_tools": 0}, "max_tools must be above 0"),
        ({"command": ["x"], "max_schema_depth": 99}, "max_schema_depth at most 24"),
        ({"command": ["x"], "server": "a b"}, "want 1 to 32 letters"),
        ({"command": ["x"], "prefix": "a."}, "prefix=a.: want letters"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        MCPServer(**{"server": "s", **settings})
    assert problem in str(refused.value) and "secret" not in str(refused.value)


def test_settings_of_a_task() -> None:
    task = make_task(
        {"_target_": TASK, "tools": [{"name": "mcp", "server": "s", "url": "https://x/mcp"}]}, seed=0
    )
    assert isinstance(task, AskingTask)
    (made,) = task.make_tools()
    assert made == MCPServer(server="s", url="https://x/mcp")
    with pytest.raises(ConfigError, match=r"unknown key `tools\.hosts` of MCPServer"):
        make_tools([{"name": "mcp", "server": "s", "url": "https://x", "hosts": ["*"]}], sandbox="bwrap")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.startswith("rollout_server.tools.mcp")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ConfigError, match=r"need an extra: pip install 'areal-like\[mcp\]'"):
        importlib.import_module("rollout_server.tools.mcp")
