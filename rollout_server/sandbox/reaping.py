"""Removing the sandboxes that killed processes left behind: at a server's start, and by `areal-like reap`."""

from __future__ import annotations

import asyncio
import logging

from areal_like.config import Config
from areal_like.errors import ArealError
from areal_like.paths import RunPaths
from rollout_server.sandbox import make_sandbox
from rollout_server.sandbox.owner import Owner, id_of_run

log = logging.getLogger(__name__)

_NONE_LEFT = ("bwrap",)
"""Kinds whose sandboxes end with the process that opened them."""


async def own_sandboxes(config: Config, *, server: str, paths: RunPaths) -> None:
    """Removes what earlier processes of a rollout server left, and makes this one the owner of what follows.

    A sandbox that cannot be removed ends no job: what does not work is found when the task is checked.
    """
    if config.rewards.sandbox in _NONE_LEFT:
        return
    try:
        owner = Owner(run=id_of_run(paths.sandbox_owner), server=server)
        owner.adopt()
        num_reaped = await asyncio.to_thread(make_sandbox(config.rewards.sandbox).reap, owner)
    except (ArealError, OSError) as error:
        log.warning("sandboxes of an earlier process of this server cannot be removed: %s", error)
        return
    if num_reaped:
        log.info("removed %d sandboxes of an earlier process of this server", num_reaped)


def reap_run(config: Config, paths: RunPaths) -> int:
    """Removes all sandboxes of a run whose processes have ended; returns how many. Raises ArealError."""
    if not paths.sandbox_owner.exists():
        return 0
    return make_sandbox(config.rewards.sandbox).reap(Owner(run=id_of_run(paths.sandbox_owner)))
