"""The reward `model`: a reward model's score of prompt and completion.

If no scorer can be reached after all retries, the reward fails (`buffer.on_failure.reward`), as with a judge:
it is never 0. Each sample records which model scored it, as the metric `scorer/<identity>`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from areal_like.errors import ConfigError, RewardError, first_line
from areal_like.runtime.imports import torch_hidden
from rollout_server.rewards.library.cache import NO_CACHE, ReplyCache, cache_of, key_of
from rollout_server.rewards.library.model.formats import UNKNOWN, ClassifyFormat, Format, Prompt, ScoreFormat
from rollout_server.rewards.library.model.scorers import JobScorers, Scorers
from rollout_server.rewards.library.service import (
    Counts,
    ServiceClient,
    ServiceReward,
    check_bounds,
    check_url,
)
from rollout_server.rewards.scores import SCORER
from rollout_server.tasks.base import Completion, Example

_LONGEST_PAUSE_S = 5.0
_MAX_URLS = 64


@dataclass(frozen=True, kw_only=True)
class ModelReward(ServiceReward):
    """`model`, or `{name: model, url: "http://127.0.0.1:30000", api: classify, tokenizer: DIR}`."""

    url: Any = ""
    """URL of a score server, or a list of URLs of servers of the same model; empty: the job's own
    (`scorer.path`)."""
    api: Literal["score", "classify"] = "score"
    """`score`: our score server, which makes the tokens. `classify`: SGLang's format."""
    tokenizer: str = ""
    """Directory with the reward model's tokenizer and config.json; only for `api: classify`."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template; only for `api: classify` (else `scorer.chat_template_kwargs`)."""
    chat: bool = False
    """True: a text prompt is scored as a user's message, in the chat template of the reward model."""
    transform: Literal["none", "sigmoid", "clip"] = "none"
    """What the reward is: the score, its logistic function (0 to 1), or the score limited to `low` and
    `high`."""
    low: float = -10.0
    """Smallest reward, with `transform: clip`."""
    high: float = 10.0
    """Largest reward, with `transform: clip`."""
    api_key_file: str = ""
    """File of mode 600 with the key that is sent as `Authorization: Bearer`; empty: no key, or for the job's
    own servers that of its keys."""
    timeout_s: float = 60.0
    """Time limit of one request, in seconds. The reward as a whole has `rollout.reward_timeout_s`."""
    max_retries: int = 100
    """How often a failed request is sent again. The time of the reward limits it, too."""
    first_pause_s: float = 0.5
    """Pause before the first retry, in seconds, unless the server sends `Retry-After`; each further pause is
    twice as long, at most 5 s."""
    max_concurrent: int = 64
    """Concurrent requests of each reward worker (`rollout.reward_concurrency` also limits them)."""
    max_reply_bytes: int = 1 << 16
    """Longest response, in bytes."""
    cache: str = NO_CACHE
    """File with scores; empty: `scores.sqlite` in the cache directory; `none`: no cache."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for url in self._urls:
            check_url(url, form="http://host:port")
        if self.api == "classify" and not (self._urls and self.tokenizer):
            raise ConfigError(
                "task.reward model with api=classify needs `url`, and `tokenizer`: a directory with the "
                "reward model's tokenizer"
            )
        if self.api == "score" and (self.tokenizer or self.chat_template_kwargs):
            raise ConfigError(
                "task.reward.tokenizer and chat_template_kwargs are only for api=classify: a score server "
                "has its own; leave them out"
            )
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise ConfigError("task.reward.chat_template_kwargs: want a mapping")
        if not self.low < self.high or not math.isfinite(self.high - self.low):
            raise ConfigError(f"task.reward.high={self.high:g}: must be above low={self.low:g}")
        check_bounds(self)

    @property
    def own_name(self) -> str:
        return "model"

    def check(self) -> None:
        """Raises ConfigError if the job has no scorer, or a file cannot be read. A scorer that cannot be
        reached yet is not an error."""
        self._key  # noqa: B018, raises ConfigError
        if self.api == "classify":
            self._format  # noqa: B018, raises ConfigError
        if self._urls:
            return
        job = JobScorers.in_environment()
        if job is None:
            raise ConfigError(
                "task.reward model: set scorer.path to the directory of a reward model, or task.reward.url "
                "to the URL of a score server"
            )
        job.token()
        job.trust()

    async def _graded(
        self, example: Example, completion: Completion, counts: Counts
    ) -> tuple[float, dict[str, float]]:
        """Returns the transformed score. Metrics: `score` (not transformed), `scorer/<identity>` (1)."""
        prompt = _prompt_of(example, completion, chat=self.chat)
        score, identity = await self._scored(prompt, str(completion), counts)
        return self._transformed(score), {"score": score, f"{SCORER}{identity}": 1.0}

    async def _scored(self, prompt: Prompt, completion: str, counts: Counts) -> tuple[float, str]:
        """Returns the score, and the identity of the model that gave it."""
        text, identity = {"prompt": prompt, "completion": completion}, self._last_identity[0]
        cache = self._cache
        if cache is not None and identity not in ("", UNKNOWN):
            cached = await asyncio.to_thread(cache.get, key_of(identity, text))
            with contextlib.suppress(TypeError, ValueError):  # not cached, or the file was modified
                score = float(cached)  # type: ignore[arg-type]
                counts.cache_hits += 1
                return score, identity
        asking, service = self._format, self._client
        body = asking.write(prompt, completion, timeout_s=self.timeout_s)
        response = await service.ask(lambda: body, asking.read, counts)
        identity = await asking.identity(response, service, had_failures=counts.retries > 0)
        self._last_identity[0] = identity
        if cache is not None and identity != UNKNOWN:  # it may be any model's
            await asyncio.to_thread(cache.put, key_of(identity, text), repr(response.score))
        return response.score, identity

    def _transformed(self, score: float) -> float:
        if self.transform == "sigmoid":
            return 0.5 * (1 + math.tanh(0.5 * score))
        return min(max(score, self.low), self.high) if self.transform == "clip" else score

    @property
    def _urls(self) -> list[str]:
        urls = [self.url] if isinstance(self.url, str) else self.url
        is_list = isinstance(urls, Sequence) and all(isinstance(url, str) for url in urls)
        if not is_list or not 0 < len(urls) <= _MAX_URLS:
            raise ConfigError(f"task.reward.url={self.url!r}: want a URL, or a list of 1 to {_MAX_URLS}")
        return [url.rstrip("/") for url in urls] if self.url else []

    @functools.cached_property
    def _format(self) -> Format:
        if self.api == "score":
            return ScoreFormat()
        # Imported here: it takes a second, and only this format needs it.
        with torch_hidden():
            from transformers import AutoTokenizer

        path = Path(self.tokenizer).expanduser()
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            config = json.loads((path / "config.json").read_bytes())
            config |= config.get("text_config") or {}
        except Exception as error:  # for a broken file, tokenizers raises plain exceptions
            raise ConfigError(
                f"task.reward.tokenizer={self.tokenizer}: want the directory of the reward model, with its "
                f"tokenizer and config.json ({first_line(error)})"
            ) from None
        pad, size = config.get("pad_token_id"), config.get("vocab_size")
        return ClassifyFormat(
            tokenizer,
            pad_token_id=pad if isinstance(pad, int) else None,
            vocab_size=size if isinstance(size, int) else 0,
            template_kwargs=self.chat_template_kwargs,
        )

    @functools.cached_property
    def _client(self) -> ServiceClient:
        urls, key, job = self._urls, self._key, None
        if urls:
            place = Scorers(lambda: urls, path=self._format.path, shown=" ".join(urls))
        else:
            job = JobScorers.in_environment()
            if job is None:
                raise RewardError("this process has no job with score servers: set task.reward.url")
            place = Scorers(job.urls, path=self._format.path, shown="of the job")
        return ServiceClient(
            name="scorer",
            place=place,
            api_key=job.token if job is not None and not key else lambda: key,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
            first_pause_s=self.first_pause_s,
            longest_pause_s=_LONGEST_PAUSE_S,
            max_concurrent=self.max_concurrent,
            max_reply_bytes=self.max_reply_bytes,
            trust=None if job is None else job.trust(),
        )

    @functools.cached_property
    def _last_identity(self) -> list[str]:
        """The identity in the last response; empty before the first."""
        return [""]

    @functools.cached_property
    def _cache(self) -> ReplyCache | None:
        return cache_of(self.cache, default="scores.sqlite")


def _prompt_of(example: Example, completion: Completion, *, chat: bool) -> Prompt:
    """Returns what the last turn answers: the example's prompt, or the conversation before that turn."""
    if len(completion.turn_lengths) > 1:
        return list(completion.messages[:-1])
    if isinstance(example.prompt, str):
        return [{"role": "user", "content": example.prompt}] if chat else example.prompt
    return list(example.prompt)
