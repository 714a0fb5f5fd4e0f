"""The conversations of the benchmarks' agents are the same one in each API."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise

import pytest

from benchmarks.conversations import ADD, CONVERSATIONS, Call, added, apis_of
from tests.support.session_requests import posted, segments_of
from tests.support.session_server import SessionServer

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'


@pytest.fixture(scope="module")
def server() -> Iterator[SessionServer]:
    with SessionServer().serving() as serving:
        yield serving


def played(server: SessionServer, api: str) -> list[list[int]]:
    """The prompts of a conversation with calls, one without a text, and one more."""
    session = server.add()
    server.policy.prompts, server.policy.texts = [], [f"So.{CALL}{CALL}", "", "3"]
    conversation = CONVERSATIONS[api]("1+2", tools=[ADD])
    for turn, text in enumerate(("So.", "", "3")):
        status, response = posted(server, session, f"v1/{conversation.route}", conversation.body())
        assert status == 200, response
        reply = conversation.take(response)
        assert reply.text == text and len(reply.calls) == (0 if turn else 2)
        if turn == 1:
            conversation.say("Well?")
        for call in reply.calls:
            assert added(call) == "3"
            conversation.give(call, "3")
        server.call(lambda id=reply.id: session.set_reward(1.0, completion_id=id))  # type: ignore[misc]
    assert segments_of(server, session) == 1
    return server.policy.prompts


def test_each_api_has_the_same_prompts(server: SessionServer) -> None:
    chat = played(server, "chat")
    assert played(server, "responses") == played(server, "messages") == chat
    for before, after in pairwise(chat):
        assert after[: len(before)] == before


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sub", {"a": 1, "b": 2}),
        ("add", {"a": 1}),
        ("add", {"a": 1, "b": "2"}),
        ("add", {"a": 1, "b": 2, "c": 3}),
    ],
)
def test_a_wrong_call_has_no_result(name: str, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="has no result"):
        added(Call(id="1", name=name, arguments=arguments))


def test_an_unknown_api_is_named() -> None:
    assert apis_of("responses,chat") == ["responses", "chat"]
    with pytest.raises(argparse.ArgumentTypeError, match="other: the APIs are chat, responses, messages"):
        apis_of("chat,other")
