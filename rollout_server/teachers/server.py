"""One teacher's server: log-probs of given tokens, by SGLang's native API (`/generate` without new tokens).

The embedded engine has the same API. It scores at most 256 tokens in a request, so longer ranges are cut, and
each cut computes the tokens before it again. The log-probs are those at temperature 1.
"""

from __future__ import annotations

import logging
import re
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from areal_like.errors import ConfigError, EngineError
from areal_like.trajectory import LEAST_LOGPROB
from areal_like.vocabulary import check_vocabulary
from rollout_server.policy.http import EngineHttp
from rollout_server.rendering.prompt_renderer import PromptRenderer

log = logging.getLogger(__name__)

_MOST_SCORED = 256
"""Largest number of tokens that the embedded engine scores in one request."""
_REFUSED = re.compile(r"engine \S+: HTTP 4(?!08|09|25|29)")
"""How the error of `EngineHttp` begins for a request that would be refused again."""
_MOST_LOGPROB = 1e-3
"""Rounding of a server in 16 bits may leave a certain token's log-prob above 0 by less."""


class MalformedScoresError(EngineError):
    """The response to a request for log-probs has none, or those of other tokens."""


class TeacherServer:
    """A client of one server. Belongs to one event loop."""

    def __init__(self, url: str, *, api_key: str, tls: ssl.SSLContext | None, timeout_s: float) -> None:
        """`timeout_s`: time limit of one request."""
        self.url = url
        self._http = EngineHttp(url, api_key=api_key, tls=tls)
        self._timeout_s = timeout_s
        self._most_scored = 0
        """0: no limit."""

    async def close(self) -> None:
        await self._http.close()

    async def logprobs(self, tokens: Sequence[int], *, first: int) -> NDArray[np.float32]:
        """Log-probs float32[len(tokens) - first] of the tokens from index `first` (at least 1) on, each given
        those before it.

        Raises EngineError if the server does not respond, or responds with anything else.
        """
        tokens = [int(token) for token in tokens]
        step = self._most_scored or len(tokens)
        parts = [
            await self._score(tokens[: min(begin + step, len(tokens))], first=begin)
            for begin in range(first, len(tokens), step)
        ]
        return np.concatenate(parts)

    async def check(self, *, longest: int, renderer: PromptRenderer, model: str) -> None:
        """Raises ConfigError for a server that cannot be a teacher of the policy: it returns no log-probs of
        prompts, has a shorter context, or another vocabulary. EngineError: it does not respond.

        `longest`: tokens of the longest sample. `renderer`, `model`: of the policy.
        """
        facts = await self._facts("/server_info")
        self._most_scored = _MOST_SCORED if facts.get("engine") == "embedded" else 0
        context = facts.get("context_length") or facts.get("max_total_num_tokens")
        if type(context) is int and context < longest:
            raise ConfigError(
                f"its context has {context} tokens, and a sample may have {longest}: start it with a longer "
                "one, or lower rollout.max_context"
            )
        try:
            await self._score([0, 1], first=1)
        except EngineError as error:
            if not (_REFUSED.match(str(error)) or isinstance(error, MalformedScoresError)):
                raise
            raise ConfigError(
                f"it returns no log-probs of prompts ({error}): SGLang and the embedded engine do, by "
                "POST /generate with return_logprob and logprob_start_len"
            ) from None
        await self._check_vocabulary(renderer, model)

    async def _check_vocabulary(self, renderer: PromptRenderer, model: str) -> None:
        """Compares the tokenizers if this machine has the server's, else the tokens that it makes of a text.

        No token ids are sent before: one outside the vocabulary would end an SGLang server.
        """
        info = await self._facts("/model_info")
        path = Path(str(info.get("tokenizer_path") or info.get("model_path") or ""))
        if path.is_absolute() and _is_file(path / "tokenizer_config.json"):
            check_vocabulary(str(path), model)
            return
        text, tokens = renderer.text_of_all_parts()
        try:
            entries = await self._entries({"text": text, "logprob_start_len": 0})
        except EngineError as error:
            log.warning("the vocabulary of the teacher at %s cannot be compared: %s", self.url, error)
            return
        if [entry[1] for entry in entries if isinstance(entry, list) and len(entry) > 1] != tokens:
            raise ConfigError(
                "its tokenizer is not the policy's: it makes other tokens of a text with some from all over "
                "the vocabulary"
            )

    async def _facts(self, route: str) -> dict[str, Any]:
        """What the server tells about itself; empty if it has no such route."""
        try:
            facts = await self._http.call("GET", route, timeout_s=self._timeout_s)
        except EngineError as error:
            if not _REFUSED.match(str(error)):
                raise
            facts = None
        return facts if isinstance(facts, dict) else {}

    async def _score(self, tokens: list[int], *, first: int) -> NDArray[np.float32]:
        # The entry of the token before the first scored one comes first, and has no log-prob.
        entries = (await self._entries({"input_ids": tokens, "logprob_start_len": first - 1}))[1:]
        try:
            scores = np.array([float(entry[0]) for entry in entries])
            scored = [int(entry[1]) for entry in entries]
        except (TypeError, ValueError, LookupError, OverflowError) as error:
            raise MalformedScoresError(f"{self.url}: {type(error).__name__}: {error}") from None
        if scored != tokens[first:]:
            raise MalformedScoresError(f"{self.url}: the log-probs are of other tokens than those sent")
        if not ((scores >= LEAST_LOGPROB) & (scores <= _MOST_LOGPROB)).all():
            raise MalformedScoresError(f"{self.url}: it has returned numbers that are no log-probs")
        logprobs: NDArray[np.float32] = np.minimum(scores, 0).astype(np.float32)
        return logprobs

    async def _entries(self, prompt: dict[str, Any]) -> list[Any]:
        """The entries (log-prob, token, text) of the tokens from `logprob_start_len` on."""
        body = prompt | {
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
        }
        response = await self._http.call("POST", "/generate", body, timeout_s=self._timeout_s)
        try:
            entries = response["meta_info"]["input_token_logprobs"]
        except (KeyError, TypeError, IndexError):
            entries = None
        if not isinstance(entries, list):
            raise MalformedScoresError(f"{self.url}: the response has no input_token_logprobs")
        return entries


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a directory that this user may not read, or too long a name
        return False
