"""The journal of a session of an external agent: what another server needs to continue it.

    claimed (entry 0) | turn | posted | deleted | ended          one entry for each, in this order of events

A client gets the response to a request only after the request's entry is durable at the buffer (`append`). So
whatever a client knows is in the journal, and a turn that was being sampled when its server died is sampled
again. A turn is recorded as the engine sampled it: tokens, log-probs, and the version of the weights of each
token. Nothing is rendered or tokenized again; the KV cache is computed by the prefill of the next request.

Each byte is written once: an entry refers to the turn that it extends, and has only the new messages and
tokens. Tools and instructions of the Responses API are written when they change. A text is there once, as
part of the reply; the raw text is decoded from the tokens again.

    OPEN -> append() -> refused: `lease`           -> MOVED  another server continues the session
                        refused: `full`, `gap`,
                        or it cannot be written    -> OFF    the session ends with its server

Left out: heartbeats, and whether a client has read a turn. A restored turn counts as read, because a client
that has not read it repeats its request, and gets the recorded turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.chat.openai import RequestOptions
from areal_like.chat.responses import ItemReference, ResponsesRequest
from areal_like.errors import ArealError, SessionMovedError
from areal_like.trajectory import FinishReason
from areal_like.wire.messages.producer import AppendSession, ForgetSession
from areal_like.wire.pump import log_at_powers_of_2
from areal_like.wire.routes import Routes
from rollout_server.conversation.conversation import Conversation
from rollout_server.conversation.messages import canonical_messages
from rollout_server.conversation.turns import SampledTurn, Turn
from rollout_server.environments.base import Message, Reply, ToolCall
from rollout_server.sessions.kept_responses import SHARED

log = logging.getLogger(__name__)

FORMAT = 1
_LEASE, _FULL = "lease", "full"
_CLAIMED = "claimed"
"""Kind of the first entry; without it there are no others."""


class UnusableJournalError(ArealError):
    """A journal cannot be read: its sample begins again."""


class JournalStore(Protocol):
    """Where journals are kept: the buffers."""

    async def append_session(self, entry: AppendSession) -> str:
        """Returns when the entry is durable; returns why it was refused, or an empty string."""

    async def forget_session(self, forgotten: ForgetSession) -> str:
        """Returns when the journal is gone; returns why it was refused, or an empty string."""


class JournalState(StrEnum):
    """Whether a session can be continued by another server."""

    OPEN = "open"
    """It can."""
    OFF = "off"
    """It cannot: its journal became too large, or an entry could not be written."""
    MOVED = "moved"
    """Another server has its lease."""


@dataclass(kw_only=True)
class JournalCounts:
    """Totals of one server."""

    num_entries: int = 0
    num_bytes: int = 0
    num_off: int = 0
    """Journals that were given up."""
    num_restored: int = 0
    """Sessions that were continued from their journals."""


class SessionJournal:
    """The journal of one session; entries are written one after the other. Belongs to one event loop."""

    def __init__(
        self,
        store: JournalStore,
        *,
        lease_id: int,
        ticket_id: int,
        sample_index: int,
        session: str,
        max_bytes: int,
        counts: JournalCounts,
    ) -> None:
        """`max_bytes`: limit on all entries."""
        self._store = store
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._lease_id, self._ticket_id, self._sample_index = lease_id, ticket_id, sample_index
        self.session = session
        self.counts = counts
        self.state = JournalState.OPEN
        self.num_entries = 0
        self._numbers: dict[Turn, int] = {}
        """Position of each turn among the turns in the journal."""
        self._shared: Mapping[str, Any] = {}
        """`SHARED` of the last kept response."""
        self._lock = asyncio.Lock()

    @property
    def can_continue(self) -> bool:
        """True if another server could continue the session, or does."""
        return self.state is not JournalState.OFF and self.num_entries > 0

    async def claimed(self, **fields: Any) -> None:
        """The session was offered to an agent; a new offer replaces an earlier one. See `append`."""
        await self._append(_CLAIMED, {"format": FORMAT, **fields})

    async def turn(self, sampled: SampledTurn, conversation: Conversation, **fields: Any) -> None:
        """A turn was sampled. `fields`: those of `RecordedTurn`. See `append`."""
        async with self._lock:
            if self.state is JournalState.OPEN and self.num_entries:
                await self._write("turn", self._packed_turn(sampled, conversation, **fields))
                assert sampled.turn is not None
                self._numbers[sampled.turn] = len(self._numbers)
        self.check()

    async def posted(self, **fields: Any) -> None:
        """Rewards, metrics or a label were posted. See `append`."""
        await self._append("posted", fields)

    async def deleted(self, response_id: str) -> None:
        """A kept response was deleted. See `append`."""
        await self._append("deleted", {"id": response_id})

    async def ended(self, *, budget: FinishReason | None) -> None:
        """The agent has ended the session. See `append`."""
        await self._append("ended", {"budget": "" if budget is None else budget.name})

    async def forget(self) -> None:
        """The session is not to be continued; a new one may begin."""
        async with self._lock:
            # While it is off, the buffer may have an entry whose acknowledgement did not come.
            may_exist = self.num_entries > 0 or self.state is JournalState.OFF
            if may_exist and self.state is not JournalState.MOVED:
                await self._forget()
            self.num_entries = self._num_bytes = 0
            self._numbers, self._shared = {}, {}

    def check(self) -> None:
        """Raises SessionMovedError if another server continues the session."""
        if self.state is JournalState.MOVED:
            raise SessionMovedError(f"the session {self.session} continues at another server: ask again")

    def continues(
        self, turns: Sequence[Turn], *, num_entries: int, num_bytes: int, shared: Mapping[str, Any]
    ) -> None:
        """Continues a journal that has been read."""
        self._num_bytes = num_bytes
        self._numbers = {turn: number for number, turn in enumerate(turns)}
        self.num_entries, self._shared = num_entries, shared
        self.counts.num_restored += 1

    async def _append(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Returns when the entry is durable. Raises SessionMovedError if the server has lost the lease."""
        async with self._lock:
            if self.state is JournalState.OPEN and (self.num_entries or kind == _CLAIMED):
                await self._write(kind, fields)
        self.check()

    async def _write(self, kind: str, fields: Mapping[str, Any]) -> None:
        try:
            data, refused = msgpack.packb([kind, fields], unicode_errors="surrogatepass"), ""
        except OverflowError as error:  # a client's integer of more than 64 bits
            data, refused = b"", str(error)
        if self._num_bytes + len(data) > self._max_bytes:
            refused = _FULL
        try:
            if refused:
                await self._forget()
            else:
                refused = await self._store.append_session(
                    AppendSession(
                        lease_id=self._lease_id,
                        ticket_id=self._ticket_id,
                        sample_index=self._sample_index,
                        session=self.session,
                        number=self.num_entries,
                        data=np.frombuffer(data, np.uint8),
                    )
                )
        except BaseException:
            # The buffer may have the entry: another one must not be taken for its repetition.
            self.state = JournalState.OFF
            raise
        if not refused:
            self.num_entries += 1
            self._num_bytes += len(data)
            self.counts.num_entries += 1
            self.counts.num_bytes += len(data)
        elif refused == _LEASE:
            self.state = JournalState.MOVED
        else:
            self.state = JournalState.OFF
            self.counts.num_off += 1
            log_at_powers_of_2(
                self.counts.num_off,
                "the session %s would not survive this server (%s; %d so far)",
                self.session,
                f"{refused}: see sessions.journal_bytes and buffer.journals_bytes"
                if refused == _FULL
                else refused,
            )

    async def _forget(self) -> None:
        await self._store.forget_session(
            ForgetSession(lease_id=self._lease_id, ticket_id=self._ticket_id, sample_index=self._sample_index)
        )

    def _packed_turn(
        self,
        sampled: SampledTurn,
        conversation: Conversation,
        *,
        call_id: str,
        digest: bytes,
        response: ResponsesRequest | None,
        created_s: int,
        num_requests: int,
        used_s: float,
    ) -> dict[str, Any]:
        turn, reply = sampled.turn, sampled.reply
        assert turn is not None
        parent = turn.parent
        # The last message is the reply, which is there already.
        messages = turn.messages[:-1]
        known = [] if parent is None else parent.messages
        num_known = len(known) if messages[: len(known)] == known else 0
        return {
            "call": call_id,
            "digest": digest,
            "parent": -1 if parent is None else self._numbers[parent],
            "context": turn.context.astype("<i4").tobytes(),
            "sampled": turn.sampled.astype("<i4").tobytes(),
            "logprobs": turn.logprobs.astype("<f4").tobytes(),
            "versions": _runs(turn.versions),
            "routes": None if turn.routes is None else turn.routes.to_bytes(),
            "known": num_known,
            "messages": messages[num_known:],
            "state": sampled.state,
            "text": reply.text,
            "reasoning": reply.reasoning,
            "calls": [[call.id, call.name, call.arguments] for call in reply.tool_calls],
            "finish": reply.finish_reason.name,
            "requests": num_requests,
            "used_s": used_s,
            "generation_s": conversation.generation_s,
            "created_s": created_s,
            "response": None if response is None else self._packed_response(response),
        }

    def _packed_response(self, request: ResponsesRequest) -> dict[str, Any]:
        shared = {name: request.echo[name] for name in SHARED}
        is_same, self._shared = shared == self._shared, shared
        referred = (one for one in request.messages if isinstance(one, ItemReference))
        return {
            "model": request.options.model,
            "previous": request.previous_response_id,
            "referred": [one.response_id for one in referred],
            "logprobs": request.logprobs,
            "echo": {name: value for name, value in request.echo.items() if name not in SHARED},
            "shared": None if is_same else shared,
        }


@dataclass(frozen=True, kw_only=True)
class RecordedTurn:
    """A turn of a journal."""

    sampled: SampledTurn
    call_id: str
    """Id of the call of the client's request."""
    digest: bytes
    """Of the request, by which its repetition is recognized."""
    response: ResponsesRequest | None
    """The request, if its response is kept."""
    created_s: int
    """Unix time."""


@dataclass(kw_only=True)
class RecordedSession:
    """What a journal says about its session."""

    session: str
    claim: Mapping[str, Any]
    """Fields of `SessionJournal.claimed`."""
    turns: list[RecordedTurn] = field(default_factory=list)
    posted: list[Mapping[str, Any]] = field(default_factory=list)
    """Arguments of `OpenSession.set_reward`."""
    deleted: list[str] = field(default_factory=list)
    """Ids of kept responses."""
    ended: Mapping[str, Any] | None = None
    num_entries: int = 0
    num_bytes: int = 0
    shared: Mapping[str, Any] = field(default_factory=dict)
    num_requests: int = 0
    used_s: float = 0.0
    generation_s: float = 0.0


def read_journal(
    session: str, entries: Sequence[bytes | NDArray[np.uint8]], *, conversation: Conversation
) -> RecordedSession:
    """Returns the session of a journal, and adds its turns to the new conversation.

    Raises UnusableJournalError.
    """
    try:
        return _read(session, entries, conversation)
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, msgpack.UnpackException) as error:
        problem = f"{type(error).__name__}: {error}"
        raise UnusableJournalError(f"the journal of session {session} cannot be read: {problem}") from error


def _read(
    session: str, entries: Sequence[bytes | NDArray[np.uint8]], conversation: Conversation
) -> RecordedSession:
    found: RecordedSession | None = None
    for data in entries:
        kind, fields = msgpack.unpackb(bytes(data), unicode_errors="surrogatepass")
        if kind == _CLAIMED:
            if fields["format"] != FORMAT or found is not None:
                raise ValueError(f"format {fields['format']}")
            found = RecordedSession(session=session, claim=fields)
        elif found is None:
            raise ValueError("its first entry is missing")
        elif kind == "turn":
            found.turns.append(_read_turn(fields, found, conversation))
        elif kind == "posted":
            found.posted.append(fields)
        elif kind == "deleted":
            found.deleted.append(fields["id"])
        elif kind == "ended":
            found.ended = fields
        else:
            raise ValueError(f"an entry of kind {kind!r:.40}")
    if found is None:
        raise ValueError("it is empty")
    found.num_entries, found.num_bytes = len(entries), sum(map(len, entries))
    return found


def _read_turn(fields: Mapping[str, Any], found: RecordedSession, conversation: Conversation) -> RecordedTurn:
    number = fields["parent"]
    parent = None if number < 0 else found.turns[number].sampled.turn
    context, sampled = (
        np.frombuffer(fields[name], "<i4").astype(np.int32) for name in ("context", "sampled")
    )
    logprobs = np.frombuffer(fields["logprobs"], "<f4").astype(np.float32)
    versions = np.array([version for version, count in fields["versions"] for _ in range(count)], np.int32)
    if not len(sampled) or not len(sampled) == len(logprobs) == len(versions):
        raise ValueError("a turn has arrays of different lengths")
    reply = Reply(
        text=fields["text"],
        raw_text=conversation.renderer.decode(sampled.tolist()),
        reasoning=fields["reasoning"],
        tool_calls=tuple(ToolCall(id=id, name=name, arguments=text) for id, name, text in fields["calls"]),
        finish_reason=FinishReason[fields["finish"]],
        num_tokens=len(sampled),
    )
    messages: list[Message] = []
    if fields["state"]:
        known = [] if parent is None else parent.messages[: fields["known"]]
        messages = [*known, *fields["messages"], *canonical_messages([reply.message])]
    before = np.empty(0, np.int32) if parent is None else parent.tokens
    turn = Turn(
        parent=parent,
        context=context,
        sampled=sampled,
        logprobs=logprobs,
        versions=versions,
        end=len(before) + len(context) + len(sampled),
        messages=messages,
        routes=None if fields["routes"] is None else Routes.from_bytes(fields["routes"]),
    )
    restored = SampledTurn(
        reply=reply,
        prompt_ids=np.concatenate([before, context]),
        token_ids=sampled,
        logprobs=logprobs,
        turn=turn,
        state=fields["state"],
    )
    conversation.restore_turn(restored)
    found.num_requests, found.used_s = fields["requests"], fields["used_s"]
    found.generation_s = fields["generation_s"]
    return RecordedTurn(
        sampled=restored,
        call_id=fields["call"],
        digest=fields["digest"],
        response=None if fields["response"] is None else _read_response(fields["response"], found),
        created_s=fields["created_s"],
    )


def _read_response(fields: Mapping[str, Any], found: RecordedSession) -> ResponsesRequest:
    found.shared = fields["shared"] or found.shared
    return ResponsesRequest(
        options=RequestOptions(
            model=fields["model"],
            stop=(),
            max_new_tokens=None,
            stream=False,
            include_usage=True,
            return_token_ids=False,
            ignored=(),
        ),
        instructions=found.shared["instructions"] or "",
        messages=[ItemReference(response_id=id, where="") for id in fields["referred"]],
        previous_response_id=fields["previous"],
        tools=[],
        logprobs=fields["logprobs"],
        is_stored=True,
        echo={**fields["echo"], **found.shared},
    )


def _runs(versions: NDArray[np.int32]) -> list[list[int]]:
    """[version, number of tokens] of adjacent tokens with the same version."""
    ends = [*(np.flatnonzero(np.diff(versions)) + 1).tolist(), len(versions)]
    starts = [0, *ends[:-1]]
    return [[int(versions[start]), end - start] for start, end in zip(starts, ends, strict=True)]
