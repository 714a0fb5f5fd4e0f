"""/sessions/ID/group/...: requests for all sessions of one prompt that an agent has claimed together.

Any of them stands for the group, and its key is the group's, because one response gave the agent all keys. A
session that was claimed alone is a group of one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from areal_like.http.bodies import ParamError, parse_bounded_object
from rollout_server.sessions.book import SessionBook
from rollout_server.sessions.http.call_response import session_of
from rollout_server.sessions.http.rewards import parse_group_rewards
from rollout_server.sessions.open_session import OpenSession, SessionState


@dataclass(frozen=True, kw_only=True)
class GroupRoutes:
    """The endpoints of a group, which may be repeated. They raise UserError and SessionGoneError."""

    book: SessionBook

    async def reward(self, request: Request) -> Response:
        """Sets the rewards of all sessions that are not over: of all or of none."""
        body = parse_bounded_object(await request.body())
        session = session_of(request, self.book)
        session.check_open()
        rewards = parse_group_rewards(body, ids={one.id for one in session.members})
        members = _open(session)
        missing = [one.id for one in members if one.id not in rewards]
        if missing:
            raise ParamError(
                f"{', '.join(missing):.500}: no reward is given, and this session of the group is not over; "
                "reward all of them",
                param="ranking" if body.get("rewards") is None else "rewards",
            )
        await asyncio.gather(*(one.post_reward(value=rewards[one.id]) for one in members))
        session.hear()
        given = {one.id: rewards[one.id] for one in members}
        over = [one.id for one in session.members if one.id not in given]
        return JSONResponse({"group": session.group, "rewards": given, "over": over})

    async def heartbeat(self, request: Request) -> Response:
        """Records that the agent is working without the model."""
        parse_bounded_object(await request.body())
        session = session_of(request, self.book)
        session.hear()
        return JSONResponse({"group": session.group, "open": [one.id for one in _open(session)]})

    async def end(self, request: Request) -> Response:
        """Ends all sessions; `problems` says why some of them are no samples, also those that were over
        before. A repetition gets the response to the first request."""
        parse_bounded_object(await request.body())
        answer = self.book.end_answer(request.path_params["id"])
        if answer is None or "problems" not in answer:
            session = session_of(request, self.book)
            session.check_open()
            problems = {one.id: one.problem for one in session.members if one.problem}
            answer = {"group": session.group, "ended": True, "problems": problems}
            await asyncio.gather(*(one.end_recorded(answer) for one in _open(session)))
        return JSONResponse(answer)


def _open(session: OpenSession) -> list[OpenSession]:
    return [one for one in session.members if one.state is SessionState.OPEN]
