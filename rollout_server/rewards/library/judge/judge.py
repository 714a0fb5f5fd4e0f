"""The reward `judge`: a language model grades the completion, by a rubric or a checklist.

If a judge cannot be reached, or gives no verdict after all retries, the reward fails
(`buffer.on_failure.reward`). It is never 0, because the policy would learn from the judge's outage. Not
supported: several votes.

A reward sees one completion. An agent that has claimed a whole group can have its samples compared
(`Judge.compare`), and posts the scores as their rewards.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_like.errors import ConfigError
from rollout_server.rewards.library.cache import ReplyCache, cache_of
from rollout_server.rewards.library.judge.client import JudgeClient
from rollout_server.rewards.library.judge.grading import (
    Criterion,
    attempts_of,
    check_rubric,
    criteria_of,
    has_places,
    messages_for_checklist,
    messages_for_comparison,
    messages_for_score,
    score_in,
    scores_in,
    verdicts_in,
)
from rollout_server.rewards.library.service import (
    Counts,
    OnePlace,
    ServiceClient,
    ServiceReward,
    check_bounds,
    check_url,
)
from rollout_server.tasks.base import Completion, Example

_PATH = "/chat/completions"


@dataclass(frozen=True, kw_only=True)
class Judge(ServiceReward):
    """`{name: judge, url: "http://127.0.0.1:30000/v1", rubric: "Is it polite and correct?"}`."""

    url: str
    """URL of the service, up to `/v1`; `/chat/completions` is appended."""
    model: str = "default"
    """Name of the model, as the service knows it."""
    rubric: str = ""
    """Criteria for the grade. `{prompt}`, `{completion}` and `{answer}` are replaced; without them, all three
    are appended. May be empty only with a checklist."""
    checklist: Sequence[Any] = ()
    """Criteria to be answered with yes or no, each a text or `{text: ..., weight: 2}`; the reward is the
    weighted share of yes. Empty: the judge gives a score."""
    lowest: float = 0.0
    """Worst score, which maps to reward 0."""
    highest: float = 10.0
    """Best score, which maps to reward 1."""
    api_key_file: str = ""
    """File of mode 600 with the key that is sent as `Authorization: Bearer`; empty: no key."""
    temperature: float = 0.0
    """Sampling temperature of the judge."""
    max_tokens: int = 512
    """Longest reply of the judge, in tokens."""
    seed: int = 0
    """Sampling seed of the judge; after a reply without a verdict, the request is repeated with the next
    seed."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each request (`response_format`, `chat_template_kwargs`); null removes a field."""
    timeout_s: float = 60.0
    """Time limit of one request, in seconds. The reward as a whole has `rollout.reward_timeout_s`."""
    max_retries: int = 4
    """How often a failed request is sent again."""
    first_pause_s: float = 0.5
    """Pause before the first retry, in seconds, unless the service sends `Retry-After`; each further pause is
    twice as long, at most 30 s."""
    max_concurrent: int = 32
    """Concurrent requests of each reward worker (`rollout.reward_concurrency` also limits them)."""
    max_reply_bytes: int = 1 << 20
    """Longest response of the service, in bytes."""
    cache: str = ""
    """File with cached replies; empty: `judge.sqlite` in the cache directory; `none`: no cache. A judge whose
    weights change (the job's own engine) needs `none`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_url(self.url, form="http://host:port/v1")
        if isinstance(self.checklist, str) or not isinstance(self.checklist, Sequence):
            raise ConfigError(f"task.reward.checklist={self.checklist!r}: want a list of criteria")
        if not isinstance(self.extra_body, Mapping):
            raise ConfigError(f"task.reward.extra_body={self.extra_body!r}: want a mapping")
        self._criteria  # noqa: B018, raises ConfigError
        if not self.rubric.strip() and not self.checklist:
            raise ConfigError("task.reward judge: give a `rubric`, or a `checklist` of criteria")
        check_rubric(self.rubric)
        if not self.lowest < self.highest:
            raise ConfigError(f"task.reward.highest={self.highest:g}: must be above lowest={self.lowest:g}")
        check_bounds(self)

    def check(self) -> None:
        """Raises ConfigError if the key file cannot be read. A judge that cannot be reached yet is not an
        error."""
        self._key  # noqa: B018, raises ConfigError

    async def _graded(
        self, example: Example, completion: Completion, counts: Counts
    ) -> tuple[float, dict[str, float]]:
        """Returns a score from 0 to 1."""
        client = self._client
        if not self._criteria:
            messages = messages_for_score(
                self.rubric, example, completion, lowest=self.lowest, highest=self.highest
            )
            read: Callable[[str], float] = functools.partial(
                score_in, lowest=self.lowest, highest=self.highest
            )
            return await client.ask(self._body(messages), read, counts), {}
        messages = messages_for_checklist(self.rubric, self._criteria, example, completion)
        read_list = functools.partial(verdicts_in, num=len(self._criteria))
        verdicts = await client.ask(self._body(messages), read_list, counts)
        total = sum(one.weight for one in self._criteria)
        reached = sum(one.weight for one, is_met in zip(self._criteria, verdicts, strict=True) if is_met)
        met = {f"criterion_{number}": float(is_met) for number, is_met in enumerate(verdicts, 1)}
        return reached / total, met

    async def compare(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
        """Scores the samples of one prompt relative to one another, in one request, by the rubric.

        `conversations`: messages in OpenAI's format; the judge reads once what all of them begin with. Equal
        samples are shown once and get equal scores. Returns one score from 0 to 1 for each; 0.5 if they are
        all equal. A judge compares more reliably than it grades (RULER, OpenPipe 2025). Raises RewardError
        after the last retry, ConfigError for a rubric with placeholders. `close` the judge in the same event
        loop.
        """
        if not self.rubric.strip() or has_places(self.rubric):
            raise ConfigError("judge.compare needs a `rubric` without {prompt}, {completion} and {answer}")
        task, attempts = attempts_of(conversations)
        # In an order that says nothing about them, because judges prefer some places.
        shown = sorted(set(attempts), key=lambda text: hashlib.sha256(text.encode(errors="replace")).digest())
        if len(shown) < 2:
            return [0.5] * len(attempts)
        lowest, highest = self.lowest, self.highest
        messages = messages_for_comparison(self.rubric, task, shown, lowest=lowest, highest=highest)
        read = functools.partial(scores_in, num=len(shown), lowest=lowest, highest=highest)
        scores = dict(zip(shown, await self._client.ask(self._body(messages), read, Counts()), strict=True))
        return [scores[text] for text in attempts]

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            **self.extra_body,
        }
        return {key: value for key, value in body.items() if value is not None}

    @functools.cached_property
    def _client(self) -> JudgeClient:
        key = self._key
        service = ServiceClient(
            name="judge",
            place=OnePlace(self._endpoint),
            api_key=lambda: key,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
            first_pause_s=self.first_pause_s,
            max_concurrent=self.max_concurrent,
            max_reply_bytes=self.max_reply_bytes,
        )
        return JudgeClient(url=self._endpoint, service=service, cache=self._cache)

    @property
    def _endpoint(self) -> str:
        url = self.url.rstrip("/")
        return url if url.endswith(_PATH) else f"{url}{_PATH}"

    @functools.cached_property
    def _criteria(self) -> tuple[Criterion, ...]:
        return criteria_of(self.checklist)

    @functools.cached_property
    def _cache(self) -> ReplyCache | None:
        return cache_of(self.cache, default="judge.sqlite")
