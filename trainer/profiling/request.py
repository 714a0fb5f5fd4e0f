"""The request of `areal-like profile` to one rank, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from areal_like.errors import UserError

MAX_STEPS = 50
"""Steps of one profile: each is a file of some megabytes to some hundred."""


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """Steps that one rank records."""

    id: str
    """The caller's name of the profile, 8 to 32 hexadecimal digits."""
    num_steps: int
    num_ranks: int = 1
    """Ranks that got this request: they begin with the same step, the first that finds all of them asked."""
    with_shapes: bool = False
    with_memory: bool = False

    @property
    def vote(self) -> int:
        """Above 0, and equal on the ranks that got this request."""
        return 1 + int(self.id[:15], 16)

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> ProfileRequest:
        """From the body of the request. Raises UserError."""
        request_id, num_steps, num_ranks = body.get("id"), body.get("steps"), body.get("ranks", 1)
        if not isinstance(request_id, str) or not re.fullmatch(r"[0-9a-f]{8,32}", request_id):
            raise UserError("profile: id must be 8 to 32 hexadecimal digits")
        if type(num_steps) is not int or not 1 <= num_steps <= MAX_STEPS:
            raise UserError(f"profile: steps must be 1 to {MAX_STEPS}, not {str(num_steps)[:40]!r}")
        if type(num_ranks) is not int or not 1 <= num_ranks < 1 << 31:
            raise UserError("profile: ranks must be the number of ranks that are asked")
        flags = {name: body.get(name, False) for name in ("shapes", "memory")}
        if wrong := [name for name, value in flags.items() if not isinstance(value, bool)]:
            raise UserError(f"profile: {wrong[0]} must be true or false")
        return cls(
            id=request_id,
            num_steps=num_steps,
            num_ranks=num_ranks,
            with_shapes=flags["shapes"],
            with_memory=flags["memory"],
        )
