"""The default agent of an example that has none, in a mixture with agents: one prompt, one completion."""

from __future__ import annotations

import asyncio
import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from areal_like.errors import EpisodeError
from rollout_server.agents.base import Session


async def complete_once(session: Session, messages: list[dict[str, Any]]) -> None:
    """Requests one completion from the model. Raises EpisodeError."""
    await asyncio.to_thread(_post, session, {"model": "policy", "messages": messages})


def _post(session: Session, body: dict[str, Any]) -> None:
    url = urlsplit(f"{session.base_url}/chat/completions")
    assert url.hostname is not None  # the server made this URL
    connection = http.client.HTTPConnection(url.hostname, url.port)
    headers = {"Authorization": f"Bearer {session.api_key}", "Content-Type": "application/json"}
    try:
        connection.request("POST", url.path, json.dumps(body), headers)
        response = connection.getresponse()
        content = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise EpisodeError(f"the model's address does not respond: {error}") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise EpisodeError(f"the model responded with HTTP status {response.status}: {content:.300}")
