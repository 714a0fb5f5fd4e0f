"""The responses of one session that later requests may refer to (`previous_response_id`). Pure.

Only messages are kept, and they are those of the conversation's turns. So a response costs little until its
conversation differs from all others: a message that several responses share counts once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from rollout_server.conversation.messages import packed_bytes
from rollout_server.environments.base import Message


class KeptResponses:
    """The newest responses, up to a number of bytes. Belongs to one event loop."""

    def __init__(self, *, max_bytes: int) -> None:
        """`max_bytes`: limit on the size of all messages; the responses used longest ago are forgotten."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Packed size of the messages."""
        self._kept: OrderedDict[str, Sequence[Message]] = OrderedDict()
        """In the order of their last use."""
        self._uses: dict[int, tuple[int, int]] = {}
        """Number of uses of a message, and its size, by the `id()` of the message."""

    def keep(self, id: str, messages: Sequence[Message]) -> None:
        """Keeps a response, unless it is kept already.

        `id`: without prefix. `messages`: the conversation without the instructions of the request, ending
        with the reply; they are not copied.
        """
        if id in self._kept:
            return
        self._kept[id] = messages
        for message in messages:
            num_uses, size = self._uses.get(_address(message), (0, 0))
            if not num_uses:
                size = packed_bytes([message], [])
                self.num_bytes += size
            self._uses[_address(message)] = num_uses + 1, size
        while self.num_bytes > self.max_bytes:
            self._forget_oldest()

    def find(self, id: str) -> Sequence[Message] | None:
        """Returns the messages of a response; None if it is not kept."""
        if id in self._kept:
            self._kept.move_to_end(id)
        return self._kept.get(id)

    def _forget_oldest(self) -> None:
        _, messages = self._kept.popitem(last=False)
        for message in messages:
            num_uses, size = self._uses.pop(_address(message))
            if num_uses > 1:
                self._uses[_address(message)] = num_uses - 1, size
            else:
                self.num_bytes -= size


def _address(message: Message) -> int:
    return id(message)
