"""Memory for the bodies of requests that wait at a router. Pure.

A router cannot check keys, so a stranger's body has to be read before a server refuses it. Requests whose key
a server has accepted before have a share of their own, which strangers cannot use up; so has each session.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False, kw_only=True)
class BodyPlaces:
    """Places for bodies, in bytes."""

    max_bytes: int = 512 << 20
    """Of all requests with keys that are known."""
    max_bytes_of_others: int = 64 << 20
    """Of all other requests."""
    max_requests: int = 64
    """Of one session, with its key."""
    num_bytes: int = field(default=0, init=False)
    num_bytes_of_others: int = field(default=0, init=False)
    _num_requests: dict[str, int] = field(default_factory=dict, init=False)

    def problem(self, id: str, num_bytes: int, *, is_known: bool) -> str:
        """Why a request must not be read now; empty if it may, and then it has a place until `leave`."""
        if is_known:
            num_requests = self._num_requests.get(id, 0)
            if num_requests >= self.max_requests:
                return f"{self.max_requests} requests of this session are in progress: wait for one of them"
            if self.num_bytes + num_bytes > self.max_bytes:
                return "the router has no memory left for this request: send it again"
            self._num_requests[id] = num_requests + 1
            self.num_bytes += num_bytes
        elif self.num_bytes_of_others + num_bytes > self.max_bytes_of_others:
            return "many clients send requests of sessions that the router does not know yet: send it again"
        else:
            self.num_bytes_of_others += num_bytes
        return ""

    def leave(self, id: str, num_bytes: int, *, is_known: bool) -> None:
        """The request is over. Arguments as for `problem`."""
        if not is_known:
            self.num_bytes_of_others -= num_bytes
            return
        self.num_bytes -= num_bytes
        self._num_requests[id] -= 1
        if not self._num_requests[id]:
            del self._num_requests[id]
