"""A tool that queries a search service over HTTP with JSON responses.

The URL comes from the job, never from the policy, which chooses only the words. Redirects are not followed,
proxies in the environment are ignored, and bytes and time are bounded, so a service that misbehaves causes
only an error. The response is a list of results, or an object that has one under `results_key`; a result is a
text, or an object whose `text_keys` are shown.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from areal_like.errors import ConfigError, ToolError
from rollout_server.tools.named import NamedTool
from rollout_server.tools.tool import Tool


@dataclass(frozen=True, kw_only=True)
class Search(NamedTool):
    """`{name: search, url: "http://127.0.0.1:8000/search"}`."""

    url: str
    """Address of the service: http or https, without the query."""
    method: Literal["GET", "POST"] = "GET"
    """GET sends the query as a parameter of the URL, POST as a JSON object."""
    query_key: str = "q"
    """Name of the parameter, or of the object's field, with the policy's words."""
    results_key: str = "results"
    """Field of the response that has the list of results; unused if the response is a list."""
    text_keys: Sequence[str] = ("title", "text", "url")
    """Fields of a result that the policy reads."""
    max_results: int = 5
    """Maximum number of results shown to the policy."""
    max_result_chars: int = 1000
    """Maximum number of characters of one result."""
    max_bytes: int = 1 << 20
    """Maximum size of a response, in bytes; a longer one is an error."""
    timeout_s: float = 10.0
    """Time limit of one search, in seconds."""
    key_variable: str = ""
    """Environment variable that has the service's key, sent as `Authorization: Bearer`; empty: no key."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"tool search: url={self.url}: want http://host:port/path or https://...")
        if min(self.max_results, self.max_result_chars, self.max_bytes, self.timeout_s) <= 0:
            raise ConfigError(
                "tool search: max_results, max_result_chars, max_bytes and timeout_s must be above 0"
            )
        if isinstance(self.text_keys, str):
            raise ConfigError(f"tool search: text_keys={self.text_keys!r}: want a list")

    def tool(self) -> Tool:

        async def search(query: str) -> str:
            """Searches a collection of texts and returns the best matches.

            Args:
                query: Words to search for.
            """
            results = await self._fetch(query)
            texts = [self._text(result) for result in results[: self.max_results]]
            return "\n".join(f"[{place}] {text}" for place, text in enumerate(texts, 1)) or "no results"

        return Tool.of(
            search,
            timeout_s=self.timeout_s,
            max_chars=self.max_results * (self.max_result_chars + 32),
            check=self._check,
        )

    def _check(self) -> None:
        if self.key_variable and not os.environ.get(self.key_variable):
            raise ConfigError(f"tool search: the environment variable {self.key_variable} is not set")

    async def _fetch(self, query: str) -> list[Any]:
        import aiohttp  # 0.2 s, for jobs that search

        headers = {}
        if self.key_variable:
            headers["Authorization"] = f"Bearer {os.environ.get(self.key_variable, '')}"
        words = {self.query_key: query}
        try:
            async with (
                aiohttp.ClientSession(trust_env=False) as session,
                session.request(
                    self.method,
                    self.url,
                    params=words if self.method == "GET" else None,
                    json=words if self.method == "POST" else None,
                    headers=headers,
                    allow_redirects=False,
                ) as response,
            ):
                if response.status != 200:
                    raise ToolError(f"the search service responded with HTTP status {response.status}")
                body = bytearray()
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > self.max_bytes:
                        raise ToolError(f"the search service sent more than {self.max_bytes} bytes")
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise ToolError(f"the search service cannot be reached ({type(error).__name__})") from error
        return self._results(bytes(body))

    def _results(self, body: bytes) -> list[Any]:
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            raise ToolError("the search service sent no JSON") from None
        results = found.get(self.results_key) if isinstance(found, dict) else found
        if not isinstance(results, list):
            raise ToolError(f"the search service sent no list of results under {self.results_key!r}")
        return results

    def _text(self, result: Any) -> str:
        if isinstance(result, dict):
            found = [str(result[key]) for key in self.text_keys if result.get(key) not in (None, "")]
            text = "\n".join(found) or json.dumps(result, ensure_ascii=False)
        else:
            text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
        return text if len(text) <= self.max_result_chars else f"{text[: self.max_result_chars]}..."
