"""A conversation of several turns, as a tree of the token sequences that the policy has seen and sampled.

    say(messages): messages -> longest known prefix -> bridge | full render -> sample -> Reply
    to_trajectory(): each path from a root to a leaf is a segment

Sampled tokens are kept exactly as the engine sampled them. A turn extends an earlier one only if its prompt
starts with all tokens up to the end of the earlier turn. That is so if the messages start with those of the
earlier turn and the renderer can bridge to the new ones, or if a full render happens to start with the same
tokens. Any other list of messages (edited, reordered, shortened) starts a new segment. So whatever the
messages are, the log-prob of each sampled token was computed given exactly the tokens that precede it in its
segment.

Two branches have the same token ids up to the point where they diverge. A sampled token before that point is
trained on in the first segment that contains it, and is context in the others.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import EpisodeBudgetError, EpisodeError, PromptRefusedError
from areal_like.trajectory import FinishReason
from rollout_server.conversation.messages import (
    canonical_messages,
    canonical_tools,
    comparable,
    is_same,
    packed_bytes,
    prefix_digests,
    with_ids_of,
)
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.turns import SampledTurn, Turn, Turns
from rollout_server.environments.base import Message, Reply, ToolCall
from rollout_server.policy.generation import Generation
from rollout_server.rendering.base import ChatRenderer, ToolSchema

LARGE_BYTES = 1 << 16
"""Smaller work takes a few hundredths of a second and runs directly in the event loop."""
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="large-prompts")
Result = TypeVar("Result")


class LargeWork:
    """Runs work on large prompts (parsing, rendering, tokenizing) in a thread: a megabyte takes a second.

    One thread serves all conversations of the process, so the work delays neither heartbeats nor other
    samples. Each conversation has at most one item of work in the thread at a time, so conversations take
    turns no matter how much work one of them has. Belongs to one event loop.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def run(self, work: Callable[[], Result], *, size: int) -> Result:
        """Returns or raises what `work` does. `size`: approximate number of bytes that it processes."""
        if size < LARGE_BYTES:
            return work()
        async with self._lock:
            return await asyncio.get_running_loop().run_in_executor(_THREAD, work)


class Conversation(Turns):
    """The turns of one sample that are prompted by messages. Several calls of `say` may run concurrently."""

    def __init__(
        self, renderer: ChatRenderer, policy: PolicyClient, *, context_tokens: int, max_tokens: int
    ) -> None:
        """`context_tokens`: length limit of a segment. `max_tokens`: limit on all segments together (a prefix
        shared by several branches counts once for each)."""
        super().__init__(policy)
        self.renderer = renderer
        self.large_work = LargeWork()
        self._context_tokens = context_tokens
        self.max_tokens = max_tokens
        self._states: defaultdict[bytes, list[Turn]] = defaultdict(list)
        """Turns by the digest of the tools and of the messages up to and including the turn."""
        self.num_tool_calls = 0
        """Number of calls in all replies."""

    async def say(
        self, messages: Sequence[Message], *, tools: Sequence[ToolSchema] = (), stop: Sequence[str] = ()
    ) -> Reply:
        """Samples the policy's next turn after `messages`, the whole conversation so far.

        An assistant message that equals an earlier `Reply.message`, with or without its reasoning, is
        recognized as that reply. `stop`: texts that end this turn. A reply that hit a limit reports it as its
        finish reason, and the episode should end; a reply that timed out may have no tokens.

        Raises EpisodeBudgetError if there is no room for another turn (PromptRefusedError if it would be the
        first), EpisodeError if the messages cannot be rendered, and the errors of PolicyClient.sample.
        """
        return (await self.sample_turn(messages, tools=tools, stop=stop, keeps_malformed=True)).reply

    async def sample_turn(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[ToolSchema] = (),
        stop: Sequence[str] = (),
        max_new_tokens: int | None = None,
        keeps_malformed: bool = False,
    ) -> SampledTurn:
        """Samples a turn as `say` does; also returns its tokens.

        `max_new_tokens`: limit of this turn, if below the job's.

        `keeps_malformed`: tool calls that cannot be parsed, or whose tool was not offered, stay among the
        reply's calls, so that an environment can tell the policy what is wrong. Otherwise such a reply is
        returned as plain text, as a client of OpenAI's API expects.
        """
        known, schemas = canonical_messages(messages), self._schemas(tools)
        known, parent, prompt = await self._prompt(known, schemas)
        return await self._sample(
            prompt,
            parent,
            known=known,
            tools=schemas,
            stop=stop,
            max_new_tokens=max_new_tokens,
            keeps_malformed=keeps_malformed,
        )

    async def num_prompt_tokens(
        self, messages: Sequence[Message], *, tools: Sequence[ToolSchema] = ()
    ) -> int:
        """Returns the length of the prompt that `sample_turn` would send. Raises EpisodeError like it."""
        _, _, prompt = await self._prompt(canonical_messages(messages), self._schemas(tools))
        return len(prompt)

    async def continue_tokens(
        self, prompt_ids: Sequence[int], *, stop: Sequence[str] = (), max_new_tokens: int | None = None
    ) -> SampledTurn:
        """Samples a turn after a prompt that the client rendered itself.

        The turn extends the earlier turn that is the longest prefix of the prompt, if there is one.
        """
        prompt = self._checked(prompt_ids)
        return await self._sample(
            prompt,
            self._longest_prefix(prompt),
            known=None,
            tools=[],
            stop=stop,
            max_new_tokens=max_new_tokens,
        )

    def forget(self, turn: Turn) -> None:
        """Drops a turn that no client has read; its messages are no longer recognized."""
        super().forget(turn)
        if turn not in self._turns:
            for known in self._states.values():
                if turn in known:
                    known.remove(turn)

    async def _sample(
        self,
        prompt: NDArray[np.int32],
        parent: Turn | None,
        *,
        known: list[Message] | None,
        tools: list[ToolSchema],
        stop: Sequence[str],
        max_new_tokens: int | None,
        keeps_malformed: bool = False,
    ) -> SampledTurn:
        """`known`: the messages of the prompt; None if the prompt was given as tokens."""
        limit = self._room(parent, len(prompt))
        if max_new_tokens is not None and max_new_tokens < limit[0]:
            limit = max_new_tokens, FinishReason.LENGTH
        generation, turn = await self.sample(
            prompt,
            parent,
            limit=limit,
            stop=stop,
            stop_token_ids=self.renderer.stop_token_ids,
            keeps_prefix=True,
        )
        reply = self._reply(
            prompt.tolist(), generation, self.finish_reason, tools=tools, keeps_malformed=keeps_malformed
        )
        state = b""
        if turn is not None and known is not None:
            turn.messages.extend([*known, *canonical_messages([reply.message])])
            state = prefix_digests(comparable(turn.messages), tools)[-1]
            self._states[state].append(turn)
        return SampledTurn(
            reply=reply,
            prompt_ids=prompt,
            token_ids=generation.output_ids,
            logprobs=generation.logprobs,
            turn=turn,
            state=state,
        )

    def restore_turn(self, sampled: SampledTurn) -> None:
        """Adds a turn that another server has sampled for this conversation, with its tokens, log-probs and
        versions as they were recorded. Call it in the order of sampling."""
        assert sampled.turn is not None
        self.restore(sampled.turn)
        if sampled.state:
            self._states[sampled.state].append(sampled.turn)
        self.num_tool_calls += len(sampled.reply.tool_calls)
        self.finish_reason = sampled.reply.finish_reason

    def decode(self, token_id: int) -> str:
        """Returns one token as text; part of a multi-byte character becomes a replacement character."""
        return self.renderer.decode([token_id])

    def _schemas(self, tools: Sequence[ToolSchema]) -> list[ToolSchema]:
        schemas = canonical_tools(tools)
        if schemas and not self.renderer.supports_tools:
            raise EpisodeError(
                "the environment has tools, but the model's chat template does not render them: "
                "use a model with a chat template for tools, or set model.renderer"
            )
        return schemas

    async def _prompt(
        self, messages: list[Message], tools: list[ToolSchema]
    ) -> tuple[list[Message], Turn | None, NDArray[np.int32]]:
        """Returns the messages as rendered, the turn whose tokens the prompt starts with, and the prompt."""
        size = packed_bytes(messages, tools)
        turn = self._longest_known(messages, tools)
        if turn is not None:
            split = len(turn.messages)
            new = with_ids_of(turn.messages, messages[:split], messages[split:])
            # The client may have dropped the reasoning, but the template may need it.
            messages = [*turn.messages, *new]
            tokens = turn.tokens
            split = turn.end - len(turn.sampled)
            before, sampled = tokens[:split].tolist(), tokens[split:].tolist()
            bridge = partial(self.renderer.bridge, before, sampled, turn.messages, new, tools=tools)
            tail = await self.large_work.run(bridge, size=size)
            if tail is not None:
                return messages, turn, np.concatenate([tokens, self._checked(tail)])
        render = partial(self.renderer.render, messages, tools=tools)
        prompt = self._checked(await self.large_work.run(render, size=size))
        return messages, self._longest_prefix(prompt), prompt

    def _longest_known(self, messages: list[Message], tools: list[ToolSchema]) -> Turn | None:
        """Returns the turn with the longest list of messages that `messages` starts with."""
        forms = comparable(messages)
        digests = prefix_digests(forms, tools)
        for num_messages in range(len(messages), 0, -1):
            for turn in reversed(self._states.get(digests[num_messages - 1], ())):
                if is_same(forms[:num_messages], comparable(turn.messages)):
                    return turn
        return None

    def _longest_prefix(self, prompt: NDArray[np.int32]) -> Turn | None:
        """Returns the turn with the most tokens that are a proper prefix of the prompt."""
        found: set[Turn | None] = {None}
        longest: Turn | None = None
        for turn in self._turns:
            first = turn.parent.end if turn.parent is not None else 0
            if turn.parent not in found or turn.end >= len(prompt):
                continue
            if np.array_equal(prompt[first : turn.end], np.concatenate([turn.context, turn.sampled])):
                found.add(turn)
                longest = turn if longest is None or turn.end > longest.end else longest
        return longest

    def _checked(self, tokens: Sequence[int]) -> NDArray[np.int32]:
        """Returns the tokens as an array. Raises EpisodeError for unknown ids, which would crash SGLang."""
        checked = np.asarray(tokens, dtype=np.int32)
        if not len(checked) or int(checked.min()) < 0 or int(checked.max()) >= self.renderer.vocab_size:
            raise EpisodeError(
                f"the prompt has {len(checked)} tokens with ids {checked.min(initial=0)} to "
                f"{checked.max(initial=0)}; the model's vocabulary has {self.renderer.vocab_size}"
            )
        return checked

    def _room(self, parent: Turn | None, start: int) -> tuple[int, FinishReason]:
        """Returns how many tokens the turn after a prompt of `start` tokens may have, and the finish reason
        if it reaches that number."""
        rooms = {
            FinishReason.LENGTH: self._policy.max_new_tokens,
            FinishReason.CONTEXT: self._context_tokens - start,
            FinishReason.TOKENS: self.max_tokens - self._num_tokens_of_others(parent) - start,
        }
        reason = min(rooms, key=lambda one: rooms[one])
        if rooms[reason] >= 1:
            return rooms[reason], reason
        problem = (
            f"a prompt of {start} tokens leaves no room for a completion: a sequence may have "
            f"{self._context_tokens} tokens (rollout.max_context), and the episode has "
            f"{rooms[FinishReason.TOKENS] + start} of {self.max_tokens} left (episode.max_tokens)"
        )
        if not self._turns:
            raise PromptRefusedError(problem)
        raise EpisodeBudgetError(problem, reason=reason)

    def _num_tokens_of_others(self, parent: Turn | None) -> int:
        """Returns the number of tokens in all segments but the one that extends `parent`."""
        extended = {turn.parent for turn in self._turns} | {one for one, _ in self._running} | {parent}
        ended = sum(turn.end for turn in self._turns if turn not in extended)
        return ended + sum(most_tokens for _, most_tokens in self._running)

    def _reply(
        self,
        prompt_ids: list[int],
        generation: Generation,
        finish_reason: FinishReason,
        *,
        tools: list[ToolSchema],
        keeps_malformed: bool,
    ) -> Reply:
        completion_ids = generation.output_ids.tolist()
        parsed = self.renderer.parse(completion_ids, prompt_ids=prompt_ids, tools=tools)
        if (
            parsed.tool_calls
            and not keeps_malformed
            and not (tools and all(map(_is_whole, parsed.tool_calls)))
        ):
            parsed = self.renderer.parse_text(completion_ids, prompt_ids=prompt_ids)
        calls = []
        for call in parsed.tool_calls:
            calls.append(
                ToolCall(
                    # Nine letters and digits, because some templates require that.
                    id=call.id or f"call{self.num_tool_calls:05d}",
                    name=_encodable(call.name),
                    arguments=_encodable(call.arguments),
                )
            )
            self.num_tool_calls += 1
        return Reply(
            text=parsed.text,
            raw_text=self.renderer.decode(completion_ids),
            reasoning=parsed.reasoning,
            tool_calls=tuple(calls),
            finish_reason=finish_reason,
            num_tokens=len(completion_ids),
        )


def _encodable(text: str) -> str:
    """The text with `?` for each half of a surrogate pair, which a policy may write as an escape of JSON."""
    return text.encode(errors="replace").decode()


def _is_whole(call: ToolCall) -> bool:
    """True if a call has a name and its arguments are a JSON object."""
    try:
        return bool(call.name) and isinstance(json.loads(call.arguments), dict)
    except (ValueError, RecursionError):
        return False
