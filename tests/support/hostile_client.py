"""A client of a session that does with its messages whatever it likes, and what must be recorded of it."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from hypothesis import strategies as st

from areal_like.trajectory import FinishReason, Trajectory
from rollout_server.environments.base import Message
from rollout_server.policy.generation import Generation
from rollout_server.sessions.open_session import OpenSession
from tests.support.scripted_policy import VOCAB, Say, ScriptedPolicy, segments, tool_call

TEXTS = st.text(alphabet="ab7 \n{}<", max_size=6) | st.sampled_from(
    ["abc", "<|end|>", "<think>", "x<|im_end|>", "</think>a", "<tool_call>{}</tool_call>"]
)
ACTIONS = (
    "user", "tool", "both", "branch", "edit", "alter", "forget", "drop", "swap", "double", "compact", "twice",
)  # fmt: skip
"""What becomes of the conversation so far; "twice" is a new message, for two requests at the same time."""
REWRITES = st.tuples(st.sampled_from(ACTIONS), TEXTS, st.integers(0, 7))
WAYS = (
    "chat", "stream", "short", "stop", "tools", "twice", "lost", "lost and repeated", "repeated", "push",
    "tokens", "fewer tokens", "other token", "generate", "text", "all at once",
)  # fmt: skip
"""How a request is made."""


def steps(texts: Sequence[str], seed: int) -> list[tuple[tuple[str, str, int], str]]:
    """A rewrite and a way for the request of each text; hypothesis would choose some far more often."""
    draw = random.Random(seed)
    ways = draw.sample(WAYS, len(texts))
    return [
        ((draw.choice(("user", *ACTIONS)), text, draw.randrange(8)), way)
        for text, way in zip(texts, ways, strict=True)
    ]


TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
_SPELLINGS = ("abc", "ab c", "7\n", "<think>ab</think>c", "x" * 40, tool_call("add", a=1), "<tool_call>{")

Turn = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and sampled tokens."""


def rewritten(history: list[Message], action: str, text: str, number: int) -> list[Message]:
    """The conversation so far, continued or rewritten; a user's message is first and last."""
    index = number % len(history) if history else 0
    history = [*history]
    if action == "branch":
        history = history[: index + 1]
    elif action == "edit" and history:
        history[index] = {**history[index], "content": text}
    elif action == "alter" and history:  # by a character
        content = str(history[index].get("content") or "")
        history[index] = {**history[index], "content": content[:number] + "a" + content[number + 1 :]}
    elif action == "forget":  # as clients do that know no reasoning
        history = [{k: v for k, v in one.items() if k != "reasoning_content"} for one in history]
    elif action == "drop":
        del history[index : index + 1]
    elif action == "swap" and history:
        history[0], history[index] = history[index], history[0]
    elif action == "double":
        history[index:index] = history[index : index + 1]
    elif action == "compact":
        history = [{"role": "user", "content": f"before: {text}"}]
    if not history or history[0]["role"] != "user":
        history = [{"role": "user", "content": "go"}, *history]
    calls = history[-1].get("tool_calls") or []
    new: list[Message] = [{"role": "user", "content": text}]
    if action in ("tool", "both"):
        answers = [{"role": "tool", "tool_call_id": call["id"], "content": text} for call in calls]
        answers = answers or [{"role": "tool", "content": text}]
        new = answers + (new if action == "both" else [])
    return [*history, *new]


class Script:
    """Random turns: sampled by the engine, random tokens, or texts in random spellings; some are aborted."""

    def __init__(self, seed: int, tokenizer: Any) -> None:
        self._random = random.Random(seed)
        self._tokenizer = tokenizer
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def __call__(self, prompt: list[int], text: str) -> Say:
        """See scripted_policy.Script."""
        draw = self._random
        if draw.random() < 0.5:
            ids = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(1, 12)))
        else:
            said = draw.choice(_SPELLINGS)
            ids = tuple(self._tokenizer(said, add_special_tokens=False)["input_ids"])
            if draw.random() < 0.5:  # one token a character, where the tokenizer joins some
                ids = tuple(self._tokenizer.convert_tokens_to_ids(list(said)))
        return Say(
            token_ids=ids,
            is_sampled=draw.random() < 0.4,
            hold=self.may_answer,
            abort_after=draw.choice([None, None, draw.randrange(len(ids) + 1)]),
        )


@dataclass(kw_only=True)
class HostileClient:
    """One client of one session. It knows all that was sent to it, and nothing else."""

    http: httpx.AsyncClient
    session: OpenSession
    policy: ScriptedPolicy
    script: Script
    push: Callable[[], Coroutine[Any, Any, None]]
    read: dict[str, Turn] = field(default_factory=dict)
    """The answers that it has read, by their ids."""
    history: list[Message] = field(default_factory=list)
    num_refused: int = 0
    num_lost: int = 0

    async def act(self, rewrite: tuple[str, str, int], way: str) -> None:
        """One request, or several."""
        action, text, number = rewrite
        messages = rewritten(self.history, action, text, number)
        body: dict[str, Any] = {"messages": messages}
        if way == "tools":
            body["tools"] = [TOOL] * (1 + number % 2)
        elif way == "short":
            body["max_tokens"] = 1 + number
        elif way == "stop":
            body["stop"] = ["a", "b7"]
        elif way == "stream":
            body["stream"] = True
        path = "chat/completions"
        if (ways := way.removeprefix("lost and ")) in ("tokens", "fewer tokens", "other token", "generate"):
            path, body = self._token_request(ways, text, number)
        elif way == "text":
            path, body = "completions", {"prompt": text + "abc", "max_tokens": 1 + number}
        body["return_token_ids"] = True
        if way in ("lost", "lost and repeated", "push"):
            await self._interrupted(path, body, way, is_counted=number % 2 == 0)
        elif way == "all at once":
            other = {**body, "messages": rewritten(self.history, "user", f"{text}!", number)}
            await asyncio.gather(*(self._ask(path, one) for one in (body, other, body)))
        else:
            if action == "twice" or way == "twice":
                await asyncio.gather(self._ask(path, body), self._ask(path, body))
            answer = await self._ask(path, body)
            if way == "repeated" and answer is not None:
                again = await self._ask(path, body, num_repetitions=1)
                assert again is not None and again["id"] == answer["id"]

    async def _interrupted(self, path: str, body: dict[str, Any], way: str, *, is_counted: bool) -> None:
        """The engine answers late: after the client has gone, or after a push of weights."""
        self.script.may_answer.clear()
        num_requests = self.policy.num_requests
        asking = asyncio.create_task(self._ask(path, body))
        while not asking.done() and self.policy.num_requests == num_requests:
            await asyncio.sleep(0.002)
        try:
            if asking.done():  # refused
                return
            if way == "push":
                if is_counted:  # while the engine samples
                    self.script.may_answer.set()
                await self.push()
                return
            asking.cancel()
            await asyncio.wait([asking])
            while any(call.num_readers for call in self.session._calls._by_id.values()):
                await asyncio.sleep(0.002)
            self.num_lost += 1
        finally:
            self.script.may_answer.set()
            if not asking.cancelled():
                await asking
        while self.session.num_pending:
            await asyncio.sleep(0.002)
        if way == "lost and repeated":
            num_requests = self.policy.num_requests
            await self._ask(path, body, num_repetitions=int(is_counted))
            assert self.policy.num_requests == num_requests, "the repetition was sampled, too"

    def _token_request(self, way: str, text: str, number: int) -> tuple[str, dict[str, Any]]:
        """Continues the tokens of an answer, or some that are almost those."""
        turns = [*self.read.values()]
        prompt, sampled = turns[-1 - number % len(turns)] if turns else ((5, 6), (7,))
        ids = [*prompt, *sampled]
        if way == "fewer tokens":
            ids = ids[: max(1, len(ids) - number)]
        elif way == "other token":
            ids[-1 - number % len(ids)] = (ids[-1 - number % len(ids)] + 1) % VOCAB
        ids += [40 + number] * (len(text) % 3)
        if way == "generate":
            return "../inference/v1/generate", {"token_ids": ids, "sampling_params": {"max_tokens": 8}}
        return "completions", {"prompt": ids}

    async def _ask(
        self, path: str, body: dict[str, Any], *, num_repetitions: int = 0
    ) -> dict[str, Any] | None:
        """The answer; None if the request was refused."""
        headers = {"x-stainless-retry-count": str(num_repetitions)}
        response = await self.http.post(path, content=json.dumps(body), headers=headers)
        if response.status_code != 200:
            # A prompt without room, and messages that the template cannot render.
            assert response.status_code == 400, response.text
            self.num_refused += 1
            return None
        answer = _joined(response.text) if body.get("stream") else response.json()
        choice = answer["choices"][0]
        if path.endswith("generate"):
            answer |= {"id": answer["request_id"], "prompt_token_ids": body["token_ids"]}
        prompt = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
        turn = (tuple(prompt), tuple(choice["token_ids"]))
        assert self.read.setdefault(answer["id"], turn) == turn
        if "message" in choice:
            self.history = [*body["messages"], choice["message"]]
        return dict(answer)


def check_record(trajectory: Trajectory, client: HostileClient) -> int:
    """Everything that is recorded as sampled is what the engine gave for exactly the tokens before it, once;
    and it was read, or goes on in a turn that was. Returns the number of turns."""
    recorded: Counter[Turn] = Counter()
    engine = list(client.policy.generations)
    for part in segments(trajectory):
        tokens = tuple(trajectory.tokens[part].tolist())
        mask = trajectory.loss_mask[part].astype(bool)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
        for first, end in edges.reshape(-1, 2).tolist():
            recorded[tokens[:first], tokens[first:end]] += 1
            logprobs, versions = trajectory.logprobs[part], trajectory.versions[part]
            _take(engine, tokens, logprobs, versions, first=first, end=end)
    read = Counter(turn for turn in client.read.values() if turn[1])
    assert not read - recorded, "a turn that was read is missing"
    for prompt, sampled in recorded - read:
        whole = (*prompt, *sampled)
        assert any(later[: len(whole)] == whole for later, _ in recorded), "nobody has read this turn"
    return sum(recorded.values())


def _take(
    engine: list[tuple[list[int], Generation]],
    tokens: Sequence[int],
    logprobs: Any,
    versions: Any,
    *,
    first: int,
    end: int,
) -> None:
    """Takes the generations of one turn, several if it was aborted, from those that the engine gave."""
    while first < end:
        for index, (prompt, generation) in enumerate(engine):
            last = first + len(generation.output_ids)
            if (
                first < last <= end
                and (last == end or generation.finish_reason is FinishReason.ABORT)
                and tuple(prompt) == tuple(tokens[:first])
                and tuple(generation.output_ids.tolist()) == tuple(tokens[first:last])
                and np.array_equal(generation.logprobs, logprobs[first:last])
                and np.array_equal(generation.versions, versions[first:last])
            ):
                del engine[index]
                first = last
                break
        else:
            raise AssertionError(f"the engine has not sampled the tokens {first} to {end} of this segment")


def _joined(text: str) -> dict[str, Any]:
    """The answer in the events of a stream."""
    events = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert text.endswith("data: [DONE]\n\n")
    message: dict[str, Any] = {"role": "assistant", "content": ""}
    for event in events:
        delta = event["choices"][0]["delta"]
        for name in ("content", "reasoning_content"):
            if delta.get(name):
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            message.setdefault("tool_calls", []).append(call)
    choice = {**events[0]["choices"][0], "message": message}
    return {**events[0], "choices": [choice]}
