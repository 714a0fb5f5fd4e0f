"""A policy that says what a script tells it to, behind the real engine.

The script decides which tokens are sampled; the engine computes their log-probs and tells the version of its
weights. So everything that is recorded is real, and can be compared with transformers.

    with running_engine(save_chat_model(path)) as engine:
        async with engine.client() as client, serving_plane() as plane:
            session = plane.script(client, ["hello", tool_call("add", a=1), Say(text="bye", abort_after=1)])
            ...  # requests to plane.base_url(session)
            trajectory = finished(session)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import secrets
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from areal_like.errors import EngineError, EngineTimeoutError
from areal_like.http.server import HttpConfig, HttpServer
from areal_like.trajectory import FinishReason, Trajectory
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.turns import SampleRewards
from rollout_server.engine.http.generate_request import MAX_SCORED
from rollout_server.policy.client import EngineClient
from rollout_server.policy.generation import Generation, Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.rendering.base import ChatRenderer
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.app import session_app
from rollout_server.sessions.open_session import OpenSession
from rollout_server.tasks.base import Example
from tests.support.chat_models import APPENDING, jinja_renderer
from tests.support.waiting import HANG_LIMIT_S

VOCAB = 128
CONTEXT = 2048
MODEL = "policy"
_IDS = itertools.count(1)


@dataclass(frozen=True, kw_only=True)
class Say:
    """One turn of the policy. A stop token follows, unless one is among its tokens."""

    text: str = ""
    token_ids: tuple[int, ...] | None = None
    """In place of a text: the tokenizer might choose other ones for it."""
    is_sampled: bool = False
    """The engine samples instead, unless the request has stop texts."""
    after_s: float = 0.0
    """The engine takes this long."""
    hold: asyncio.Event | None = None
    """The engine waits for it."""
    abort_after: int | None = None
    """The engine aborts the request with this many tokens; the request that goes on gets the others."""
    on_abort: Callable[[], Awaitable[None]] | None = None
    """Runs before the aborted request returns, such as a push of weights."""
    error: str = ""
    """The engine fails with it."""


Script = Sequence["str | Say"] | Callable[[list[int], str], "str | Say"]
"""The turns in their order, or what follows a prompt (its ids, and its text with special tokens)."""


def tool_call(name: str, **arguments: Any) -> str:
    """A call in the format that the templates of `chat_models` and Qwen3 have."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


class ScriptedPolicy:
    """Samples what the script says."""

    cache_salt = ""

    def __init__(self, engine: EngineClient, script: Script, tokenizer: Any) -> None:
        self.generations: list[tuple[list[int], Generation]] = []
        """Prompts and what was sampled for them, in the order in which the requests were answered."""
        self.num_requests = 0
        self._engine = engine
        self._script = script if callable(script) else iter(script)
        self._tokenizer = tokenizer
        self._rest: dict[tuple[int, ...], list[Say]] = defaultdict(list)
        """What aborted requests have left to say, by the tokens so far."""

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        sampling: Sampling,
        rid: str | None = None,
        timeout_s: float = math.inf,
        **options: Any,
    ) -> Generation:
        """As EngineClient.generate."""
        self.num_requests += 1
        prompt = list(input_ids)
        say = self._next(prompt)
        if say.after_s > timeout_s:
            await asyncio.sleep(timeout_s)
            raise EngineTimeoutError("no token in time")
        await asyncio.sleep(say.after_s)
        if say.hold is not None:
            await say.hold.wait()
        if say.error:
            raise EngineError(say.error)
        if say.is_sampled and not sampling.stop:
            sampled = await self._engine.generate(prompt, sampling=sampling, rid=rid)
            self.generations.append((prompt, sampled))
            return sampled
        tokens, reason = self._cut(prompt, say, sampling)
        logprobs, version = await self._score(prompt, tokens)
        generation = Generation(
            output_ids=np.array(tokens, np.int32),
            logprobs=np.array(logprobs, np.float32),
            versions=np.full(len(tokens), version, np.int32),
            finish_reason=reason,
        )
        self.generations.append((prompt, generation))
        if reason is FinishReason.ABORT:
            rest = replace(say, token_ids=self._ids(say)[len(tokens) :], abort_after=None, on_abort=None)
            self._rest[*prompt, *tokens].append(rest)
            if say.on_abort is not None:
                await say.on_abort()
        return generation

    def _next(self, prompt: list[int]) -> Say:
        if left := self._rest[tuple(prompt)]:
            return left.pop(0)
        if callable(self._script):
            say = self._script(prompt, self._tokenizer.decode(prompt))
        else:
            say = next(self._script, Say(error="the script has ended"))
        return Say(text=say) if isinstance(say, str) else say

    def _ids(self, say: Say) -> tuple[int, ...]:
        if say.token_ids is not None:
            return say.token_ids
        return tuple(self._tokenizer(say.text, add_special_tokens=False)["input_ids"])

    def _cut(self, prompt: list[int], say: Say, sampling: Sampling) -> tuple[list[int], FinishReason]:
        """The tokens of this request, and why they end."""
        before = prompt[len(prompt) - sampling.num_resumed :]
        tokens: list[int] = []
        for token in (*self._ids(say), sampling.stop_token_ids[0]):
            if len(tokens) == say.abort_after:
                return tokens, FinishReason.ABORT
            if len(tokens) == sampling.max_new_tokens:
                return tokens, FinishReason.LENGTH
            tokens.append(token)
            text = self._tokenizer.decode([*before, *tokens]) if sampling.stop else ""
            if token in sampling.stop_token_ids or any(stop in text for stop in sampling.stop):
                break
        return tokens, FinishReason.STOP

    async def _score(self, prompt: list[int], tokens: list[int]) -> tuple[list[float], int]:
        logprobs: list[float] = []
        version = -1
        for first in range(0, len(tokens), MAX_SCORED):
            end = first + MAX_SCORED
            part, version = await self._engine.score([*prompt, *tokens[:end]], first=len(prompt) + first)
            logprobs += part
        return logprobs, version


def save_chat_model(path: Path, *, seed: int = 0, context: int = CONTEXT) -> Path:
    """Writes a tiny model with the vocabulary of the tokenizers in `chat_models`.

    It says markers and ends of turns more often than other tokens.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=context, initializer_range=0.15,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    # The first number of every hidden state is large, and the head adds it to the logits of these tokens.
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[100:112, 0] = 0.8
    model.save_pretrained(path)
    return path


@dataclass(kw_only=True)
class Plane:
    """Sessions of one engine, served on loopback."""

    book: SessionBook
    renderer: ChatRenderer
    sessions: list[OpenSession] = field(default_factory=list)

    def open(
        self,
        policy: EngineClient | ScriptedPolicy,
        *,
        max_new_tokens: int = 64,
        context_tokens: int = CONTEXT,
        max_tokens: int = 10 * CONTEXT,
        max_turns: int = 100,
        timeout_s: float = math.inf,
        is_waiting: bool = False,
        example: Example | None = None,
    ) -> OpenSession:
        """A new session in the book, whose turns `policy` samples."""
        number = next(_IDS)
        client = PolicyClient(
            policy,
            sampling=Sampling(max_new_tokens=max_new_tokens, sampling_seed=number),
            rid=f"session{number}",
            gate=GenerationGate(),
            timeout_s=timeout_s,
        )
        session = OpenSession(
            id=f"{number}-0-1",
            api_key=secrets.token_urlsafe(32),
            conversation=Conversation(
                self.renderer, client, context_tokens=context_tokens, max_tokens=max_tokens
            ),
            max_turns=max_turns,
            group=number,
            sample=0,
            split="train",
            index=0,
            is_waiting=is_waiting,
            example=example,
        )
        self.book.add(session)
        self.sessions.append(session)
        return session

    def script(self, engine: EngineClient, script: Script, **options: Any) -> OpenSession:
        """A new session whose turns are those of the script."""
        return self.open(ScriptedPolicy(engine, script, self.renderer.tokenizer), **options)

    def base_url(self, session: OpenSession) -> str:
        """For clients of OpenAI's API."""
        return f"{self.book.url}/sessions/{session.id}/v1"


@contextlib.asynccontextmanager
async def serving_plane(
    make_app: Callable[[SessionBook], Any] | None = None, renderer: ChatRenderer | None = None
) -> AsyncIterator[Plane]:
    """Serves the app of a new book in this event loop. `make_app`: None for that of sessions. `renderer`:
    None for a template that only appends, and renders tools."""
    book = SessionBook()
    make_app = make_app or _session_app
    plane = Plane(book=book, renderer=renderer or _renderer())
    server = HttpServer(HttpConfig(make_app(book), max_connections=512))
    listening = socket.create_server(("127.0.0.1", 0))
    book.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started:
        assert not serving.done(), "the server did not start"
        await asyncio.sleep(0.005)
    try:
        yield plane
    finally:
        for session in plane.sessions:
            book.remove(session)
        server.should_exit = True
        await serving


def finished(session: OpenSession) -> Trajectory:
    """What is recorded of a session."""
    session.end()
    session.finish()
    return session.conversation.to_trajectory(SampleRewards())


@torch.inference_mode()
def check_logprobs(trajectory: Trajectory, reference: Any, *, version: int | None = None) -> None:
    """In every segment, the log-prob of each sampled token is the one that transformers computes for exactly
    the tokens before it. `version`: looks at the tokens of this version only."""
    for part in segments(trajectory):
        tokens_T = torch.from_numpy(trajectory.tokens[part].astype(np.int64))
        logprobs_TV = torch.log_softmax(reference(input_ids=tokens_T[None]).logits[0].float(), -1)
        want_T = logprobs_TV[:-1].gather(1, tokens_T[1:, None])[:, 0].numpy()
        mask_T = trajectory.loss_mask[part] == 1
        assert not mask_T[0]
        if version is not None:
            mask_T = mask_T & (trajectory.versions[part] == version)
        np.testing.assert_allclose(trajectory.logprobs[part][mask_T], want_T[mask_T[1:]], atol=1e-4, rtol=0)


def segments(trajectory: Trajectory) -> Iterator[slice]:
    """Where the segments lie."""
    first = 0
    for length in trajectory.segments or (trajectory.num_tokens,):
        yield slice(first, first + length)
        first += length


def _session_app(book: SessionBook) -> Any:
    return session_app(book, model=MODEL, max_context=CONTEXT, idle_timeout_s=HANG_LIMIT_S)


def _renderer() -> ChatRenderer:
    renderer = jinja_renderer(APPENDING)
    renderer.vocab_size = VOCAB
    return renderer
