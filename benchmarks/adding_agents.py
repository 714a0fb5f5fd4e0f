"""The agents of benchmarks/agent_job.py: they add with a calculator, each through one API of the session.

chat, responses   the quick start of the OpenAI Agents SDK (rollout_server/agents/adding.py)
messages          a loop of our own, because the SDK does not speak Anthropic's Messages
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.conversations import ADD, CONVERSATIONS, added
from benchmarks.session_agents import Connection
from rollout_server.agents.adding import add_up
from rollout_server.agents.base import Session
from rollout_server.tasks.adding_agent import AddingAgentTask
from rollout_server.tasks.base import Example

_MAX_TURNS = 10
"""As in the SDK."""


@dataclass(frozen=True, kw_only=True)
class AddingWithTask(AddingAgentTask):
    """The task `adding_agent`, whose agent uses this API."""

    api: str = "chat"

    async def agent(self, example: Example, session: Session) -> float:
        return float(await add_with(self.api, str(example.prompt), session) == example.answer)


async def add_with(api: str, terms: str, session: Session) -> str:
    """The agent's answer for `37+85+12`; empty after a mistake of the policy.

    Raises openai.APIError, RefusedTurnError, OSError or EOFError if the session does not serve a request.
    """
    if api == "messages":
        return await _loop(api, terms, session)
    return await add_up(terms, session, uses_responses=api == "responses")


class RefusedTurnError(Exception):
    """The session refuses a request: there is no room for another turn, or the sample is not wanted."""


async def _loop(api: str, terms: str, session: Session) -> str:
    url = urlsplit(session.base_url)
    assert url.hostname is not None and url.port is not None
    conversation, connection = CONVERSATIONS[api](terms, tools=[ADD]), Connection(url.hostname, url.port)
    try:
        for _ in range(_MAX_TURNS):
            path = f"{url.path}/{conversation.route}"
            status, response = await connection.post(path, conversation.body(), api_key=session.api_key)
            if status != 200:
                raise RefusedTurnError(response["error"]["message"])
            reply = conversation.take(response)
            if not reply.calls:
                return reply.text
            for call in reply.calls:
                conversation.give(call, added(call))
        return ""
    except ValueError:  # a call that has no result
        return ""
    finally:
        connection.close()
