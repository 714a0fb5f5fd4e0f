"""A conversation that a framework sends back in its own form stays one segment, over HTTP."""

from __future__ import annotations

import http.client
import json
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest

from rollout_server.conversation.turns import SampleRewards
from tests.support.resent_turns import ADD, FIND, RESENT, REWRITTEN, SAID, TOOLS, Message
from tests.support.session_server import SessionServer


def ask(server: SessionServer, path: str, body: dict[str, Any]) -> Any:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
        connection.request("POST", path, json.dumps(body))
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return answer


def num_segments(server: SessionServer, resent: list[tuple[Message, ...]]) -> int:
    """Plays the conversation; every prompt that continues the segment begins with what was sampled."""
    session = server.add()
    server.policy.texts = list(SAID)
    path = f"/sessions/{session.id}/v1/chat/completions"
    messages: list[Message] = [{"role": "user", "content": "1+2?"}]
    answers = []
    for new in (*resent, ()):
        answers.append(ask(server, path, {"messages": messages, "tools": TOOLS})["choices"][0])
        messages = [*messages, *new]
    assert [one["finish_reason"] for one in answers] == ["tool_calls", "tool_calls", "tool_calls", "stop"]
    assert answers[0]["message"]["content"] == "I add."
    arguments = [one["message"]["tool_calls"][0]["function"]["arguments"] for one in answers[:3]]
    assert arguments == [ADD, FIND, "{}"], "the data is about these"
    trajectory = server.call(lambda: session.conversation.to_trajectory(SampleRewards()))
    if not trajectory.segments:
        for before, after in pairwise(server.policy.prompts):
            assert after[: len(before)] == before
        texts = [server.policy.renderer.decode(prompt) for prompt in server.policy.prompts]
        assert all(said in text for said, text in zip(SAID, texts[1:], strict=False))
    return len(trajectory.segments) or 1


@pytest.mark.parametrize("framework", RESENT)
def test_tool_turns_are_one_segment(server: SessionServer, framework: str) -> None:
    assert num_segments(server, RESENT[framework]) == 1


@pytest.mark.parametrize("framework", REWRITTEN)
def test_a_rewritten_history_begins_segments(server: SessionServer, framework: str) -> None:
    assert num_segments(server, REWRITTEN[framework]) == 4


@pytest.mark.parametrize(
    ("said", "tools"),
    [
        (SAID[0].partition("</think>")[2], []),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', TOOLS),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', TOOLS),
        ("<tool_call>add 1 2</tool_call>", TOOLS),
        (f'{SAID[2]}<tool_call>{{"name": "add", "argum', TOOLS),
    ],
    ids=["no tools", "a list", "no name", "no JSON", "cut off"],
)
def test_markup_that_is_no_call_is_text(server: SessionServer, said: str, tools: list[Any]) -> None:
    """And the conversation goes on from it in one segment."""
    session = server.add()
    server.policy.texts = [said, "ok"]
    path = f"/sessions/{session.id}/v1/chat/completions"
    messages: list[Message] = [{"role": "user", "content": "1+2?"}]
    choice = ask(server, path, {"messages": messages, "tools": tools})["choices"][0]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == (said, "stop") and "tool_calls" not in message
    messages += [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": "Again"}]
    ask(server, path, {"messages": messages, "tools": tools})
    trajectory = server.call(lambda: session.conversation.to_trajectory(SampleRewards()))
    assert trajectory.segments == () and trajectory.num_turns == 2
