"""The responses of one session that later requests may refer to, read again or delete. Pure.

A response is kept as references to what its session has anyway: the messages of the conversation's turns, and
the sampled turn, from which it is written again. Of its request only the fields that it repeats are kept. So
a response costs little until its conversation differs from all others: a message, a list of tools or a text
of instructions that several responses share counts once.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from areal_like.chat.responses import ItemReference, ResponsesRequest, bare_id
from rollout_server.conversation.messages import packed_bytes
from rollout_server.conversation.turns import SampledTurn
from rollout_server.environments.base import Message

SHARED = ("instructions", "tools")
"""Fields that a response repeats and that rarely change within a session."""
_BYTES_PER_ID = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptResponse:
    """One response."""

    messages: Sequence[Message]
    """The conversation without the instructions of the request, ending with the reply; not copied."""
    turn: SampledTurn
    request: ResponsesRequest
    """Without its messages and parsed tools."""
    created_s: int
    """Unix time."""
    previous: str
    """Id of the response whose conversation it continues; empty: none."""
    referred: tuple[str, ...]
    """Ids of the responses whose replies are among `messages` by reference, each without its conversation."""

    @staticmethod
    def of(turn: SampledTurn, request: ResponsesRequest, *, created_s: int) -> KeptResponse:
        """Returns the response to a request whose turn has sampled tokens."""
        assert turn.turn is not None
        referred = (one.response_id for one in request.messages if isinstance(one, ItemReference))
        options = replace(request.options, stream=False)
        return KeptResponse(
            messages=turn.turn.messages[1 if request.instructions else 0 :],
            turn=turn,
            request=replace(request, options=options, messages=[], tools=[]),
            created_s=created_s,
            previous=bare_id(request.previous_response_id),
            referred=tuple(referred),
        )

    @property
    def parts(self) -> list[Any]:
        """What counts against the limit, once for all responses that have the same object: the messages, the
        fields that requests share, and the response itself for the rest."""
        return [*self.messages, *(self.request.echo[name] for name in SHARED), self]

    @property
    def num_own_bytes(self) -> int:
        """Size of what no other response shares."""
        own = {name: value for name, value in self.request.echo.items() if name not in SHARED}
        return _BYTES_PER_ID * (2 + len(self.referred)) + len(self.request.options.model) + _json_bytes(own)


class KeptResponses:
    """The newest responses, up to a number of bytes. Belongs to one event loop."""

    def __init__(self, *, max_bytes: int) -> None:
        """`max_bytes`: limit on `num_bytes`; the responses used longest ago are forgotten."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Size of the messages, and of the fields that the responses repeat."""
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()
        """In the order of their last use."""
        self._deleted: set[str] = set()
        """A repeated request must not bring a response back. At most one id for each turn of the session."""
        self._uses: dict[int, tuple[int, int]] = {}
        """Number of uses of a part, and its size, by the `id()` of the part."""

    def keep(self, id: str, response: KeptResponse) -> None:
        """Keeps a response, unless it is kept already or was deleted. `id`: without prefix."""
        if id in self._kept or id in self._deleted:
            return
        self._kept[id] = response = self._with_shared_fields(response)
        for part in response.parts:
            num_uses, size = self._uses.get(_address(part), (0, 0))
            if not num_uses:
                size = _size(part)
                self.num_bytes += size
            self._uses[_address(part)] = num_uses + 1, size
        while self.num_bytes > self.max_bytes:
            self._forget(next(iter(self._kept)))

    def find(self, id: str) -> KeptResponse | None:
        """Returns a response; None if it is not kept."""
        if id in self._kept:
            self._kept.move_to_end(id)
        return self._kept.get(id)

    def delete(self, id: str) -> bool:
        """Deletes a response. Returns False if it is not kept."""
        if id not in self._kept:
            return False
        self._forget(id)
        self._deleted.add(id)
        return True

    def replies_in(self, id: str) -> set[str]:
        """Returns the ids of the kept responses whose replies are among the messages of this one, itself
        included."""
        if id not in self._kept:
            return set()
        messages = set(map(_address, self._kept[id].messages))
        found = {one for one, other in self._kept.items() if _address(other.messages[-1]) in messages}
        # With other instructions the messages of a continued conversation are copies.
        while (response := self._kept.get(id)) is not None:
            found.update((id, *response.referred))
            id = response.previous
        return found

    def _with_shared_fields(self, response: KeptResponse) -> KeptResponse:
        """Returns the response with the objects of the one that was used last, where they are equal."""
        if not self._kept:
            return response
        used, echo = next(reversed(self._kept.values())).request.echo, response.request.echo
        same = {name: used[name] for name in SHARED if used[name] == echo[name]}
        return replace(response, request=replace(response.request, echo={**echo, **same}))

    def _forget(self, id: str) -> None:
        for part in self._kept.pop(id).parts:
            num_uses, size = self._uses.pop(_address(part))
            if num_uses > 1:
                self._uses[_address(part)] = num_uses - 1, size
            else:
                self.num_bytes -= size


def _size(part: Any) -> int:
    if isinstance(part, KeptResponse):
        return part.num_own_bytes
    return packed_bytes([part], []) if isinstance(part, dict) else _json_bytes(part)


def _json_bytes(value: Any) -> int:
    return len(json.dumps(value))


def _address(part: Any) -> int:
    return id(part)
