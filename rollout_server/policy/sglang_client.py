"""The client for SGLang engines: EngineClient with some differences, and the calls that only SGLang has.

- A token id outside the vocabulary kills the whole SGLang server, so such ids are refused before anything is
sent.
- `/health` generates a token and hangs while the engine is paused, so readiness is read from `/ready`.
- SGLang reports no cumulative load, so the client counts generated tokens and busy time itself.
- Each request has a cache salt, so that a sample never starts with a prefix computed under other weights.
- Each request states how often its tokens are streamed, because an engine at a URL may run with the default.
- With several senders of weights the engine joins one group for each, because each of SGLang's groups has one
  source.
- With `weights.lora=adapter` each request names the adapter that samples it from its first token to its last.
  The engine has one weight version for all requests, so the client gives the tokens the adapter's version.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from areal_like.errors import ConfigError, EngineError, NoSuchRouteError, PromptRefusedError
from areal_like.wire.messages.weights import FormGroup, group_name_of
from rollout_server.policy.client import EngineClient, EngineInfo
from rollout_server.policy.generation import Generation, Sampling
from rollout_server.policy.http import CONNECT_TIMEOUT_S
from rollout_server.policy.routes import RoutesReader

STREAM_INTERVAL = 1 << 20
"""Tokens between two chunks of a sequence after its first one. A chunk repeats all tokens before it, so the
bytes of a long completion grow with the square of its length unless the interval is long."""
_RETRACTIONS_EVERY_S = 2.0
_RETRACTED = re.compile(rb"^sglang:num_retracted_requests_total\{[^\n]*\} (\S+)$", re.M)

_PROGRESS_KEYS = (
    "num_running_reqs",
    "num_waiting_reqs",
    "num_used_tokens",
    "num_total_tokens",
    "total_prefill_uncached_tokens",
)


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter of the engine."""

    name: str
    """Its name there; empty: the base model without an adapter."""
    version: int


class SglangClient(EngineClient):
    """Asynchronous client of one SGLang (0.5.23 and compatible versions)."""

    def __init__(
        self,
        base_url: str,
        *,
        vocab_size: int,
        nccl_version: str = "",
        routes: RoutesReader | None = None,
        **options: Any,
    ) -> None:
        """`vocab_size`: rows of the model's embedding; `options`: those of EngineClient.

        `nccl_version`: the engine's NCCL version, which SGLang does not report; empty: unknown. `routes`:
        reads the routes of generations; None: they are not requested.
        """
        super().__init__(base_url, stream_interval=STREAM_INTERVAL, **options)
        self._vocab_size = vocab_size
        self._nccl_version = nccl_version
        self.routes = routes
        self._num_running = 0
        self._num_tokens = 0
        self._created_s = self._since_s = asyncio.get_running_loop().time()
        self._busy_s = 0.0
        self._salts = (f"{uuid.uuid4().hex}.{number}" for number in itertools.count())
        self.cache_salt = next(self._salts)
        self.caches_prefixes = True
        self._num_senders = 1
        """Groups of the session that the engine has joined."""
        self._num_retractions, self._retractions_due_s = 0, 0.0
        self.adapter: NamedAdapter | None = None
        """Samples the requests from now on; None: the engine's weights change as a whole."""
        self._requests: defaultdict[str, list[str]] = defaultdict(list)
        """Name of an adapter -> ids of the requests that it samples now."""
        self.on_idle: Callable[[str], None] = lambda name: None
        """Called with the name of an adapter that was replaced and samples no request any more."""

    def renew_cache_salt(self) -> None:
        """Makes later samples share no prefix with earlier ones. Call while the engine is paused, before its
        weights change."""
        self.cache_salt = next(self._salts)

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        sampling: Sampling,
        **options: Any,
    ) -> Generation:
        """Samples one continuation, as EngineClient.generate does. Refuses ids outside the vocabulary, in the
        prompt and as stop tokens."""
        self._check_ids(input_ids, PromptRefusedError, name="input_ids")
        self._check_ids(sampling.stop_token_ids, EngineError, name="stop_token_ids")
        adapter = self.adapter
        rid = options.pop("rid", None) or uuid.uuid4().hex
        self._count_running(+1)
        try:
            with self._sampling_with(adapter, rid):
                generation = await super().generate(input_ids, sampling=sampling, rid=rid, **options)
        finally:
            self._count_running(-1)
        self._num_tokens += len(generation.output_ids)
        if adapter is not None:
            generation = replace(generation, versions=np.full_like(generation.versions, adapter.version))
        return generation

    # Adapters

    def use_adapter(self, adapter: NamedAdapter) -> None:
        """Samples all later requests with this adapter; earlier ones finish with theirs."""
        earlier, self.adapter = self.adapter, adapter
        self.lora_path = adapter.name
        self.renew_cache_salt()
        if earlier is not None and not self.is_in_use(earlier.name):
            self.on_idle(earlier.name)

    def is_in_use(self, name: str) -> bool:
        """True if this adapter samples a request, or will sample the next one."""
        return bool(self._requests[name]) or (self.adapter is not None and self.adapter.name == name)

    @contextlib.contextmanager
    def _sampling_with(self, adapter: NamedAdapter | None, rid: str) -> Iterator[None]:
        """Context of a request that an adapter samples. `rid`: empty if it cannot be aborted."""
        if adapter is None:
            yield
            return
        rids = self._requests[adapter.name]
        rids.append(rid)
        try:
            yield
        finally:
            rids.remove(rid)
            if not self.is_in_use(adapter.name):
                self.on_idle(adapter.name)

    async def abort_adapter(self, name: str) -> None:
        """Aborts the requests that an adapter samples; their `generate` returns the partial tokens."""
        for rid in filter(None, list(self._requests[name])):
            await self.abort(rid)

    async def load_adapter(self, name: str, path: str, *, timeout_s: float) -> None:
        """Loads a PEFT folder that the engine can read; it decodes meanwhile. Raises EngineError."""
        body = {"lora_name": name, "lora_path": path}
        await self._http.call("POST", "/load_lora_adapter", body, timeout_s=timeout_s)

    async def unload_adapter(self, name: str, *, timeout_s: float) -> None:
        """Unloads an adapter that samples no request. Raises EngineError."""
        await self._http.call("POST", "/unload_lora_adapter", {"lora_name": name}, timeout_s=timeout_s)

    async def weight_version(self) -> int:
        """Returns the version that samples the next request. Raises EngineError if the engine does not
        respond."""
        if self.adapter is None:
            return await super().weight_version()
        await self.model_info()
        return self.adapter.version

    async def score(self, tokens: Sequence[int], *, first: int) -> tuple[list[float], int]:
        """Returns log-probs of the tokens from `first` on, and their version. Refuses ids outside the
        vocabulary."""
        self._check_ids(tokens, EngineError, name="tokens")
        adapter = self.adapter
        with self._sampling_with(adapter, ""):
            logprobs, version = await super().score(tokens, first=first)
        return logprobs, version if adapter is None else adapter.version

    async def init_weights_group(self, form: FormGroup) -> None:
        """Joins the groups of all senders, one after the other and everywhere in the same order: SGLang's own
        requests name one group each, whose rank 0 is the source of its broadcasts."""
        self._num_senders = form.num_senders
        for number in range(form.num_senders):
            await super().init_weights_group(form.of_sender(number))

    async def destroy_weights_group(self, *, group_name: str) -> None:
        """Leaves the groups of all senders. Raises EngineError if the engine is not in one of them."""
        first_error: EngineError | None = None
        for number in range(self._num_senders):
            try:
                await super().destroy_weights_group(group_name=group_name_of(group_name, sender=number))
            except EngineError as error:
                first_error = first_error or error
        if first_error is not None:
            raise first_error

    def group_of_bucket(self, group_name: str, index: int) -> str:
        """Name of the group over which a bucket of a push comes, by its index."""
        return group_name_of(group_name, sender=index % self._num_senders)

    async def set_weight_version(self, version: int) -> None:
        """Sets the version of the loaded weights, which is recorded with all tokens sampled later."""
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._http.call("POST", "/update_weight_version", body)

    async def weights_checksum(self, *, timeout_s: float) -> str:
        """Returns a digest of all parameters over all ranks of the engine; works while paused.

        The digests of the ranks are sorted: with attention divided by requests (`enable_dp_attention`) they
        are in the order in which the parts of the engine have replied, also in SGLang's digest of them.
        """
        body = {"action": "checksum"}
        response = await self._http.call("POST", "/weights_checker", body, timeout_s=timeout_s)
        if not (ranks := response.get("ranks")):
            return str(response["per_engine_checksum"])
        of_ranks = sorted(str(rank["per_gpu_checksum"]) for rank in ranks)
        return hashlib.sha256(" ".join(of_ranks).encode()).hexdigest()

    async def synchronize(self, *, timeout_s: float) -> None:
        """Waits until the GPUs have finished their queued work, by requesting a checksum of no tensors.

        SGLang responds to a pause before its last batch is computed, and over NCCL to a bucket before it has
        arrived.
        """
        body = {"action": "checksum", "skip_tensor_list": [""]}  # the empty string is in every name
        await self._http.call("POST", "/weights_checker", body, timeout_s=timeout_s)

    async def fetch_info(self) -> None:
        """Fills `info`, and determines if the engine has a prefix cache.

        SGLang loads weights in place and does not report its NCCL version.
        """
        facts = await self.server_info()
        info = EngineInfo.from_server_info(facts)
        self.info = replace(info, loads_in_place=True, nccl_version=info.nccl_version or self._nccl_version)
        self.caches_prefixes = not facts.get("disable_radix_cache")

    def _check_ids(self, ids: Sequence[int], error: type[EngineError], *, name: str) -> None:
        outside = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            raise error(f"{name}: token id {outside} is outside the vocabulary of {self._vocab_size}")

    async def health(self) -> bool:
        """True if the engine has started and accepts requests; False while it is paused.

        Raises ConfigError for an SGLang that is too old to say so.
        """
        try:
            try:
                await self._http.call("GET", "/ready", timeout_s=CONNECT_TIMEOUT_S)
            except NoSuchRouteError:
                version = str((await self.server_info()).get("version") or "")[:40]
                raise ConfigError(
                    f"SGLang {version} at {self._http.base_url} has no /ready, so it is too old: "
                    "install sglang 0.5.23 or a later version"
                ) from None
        except EngineError:
            return False
        return True

    async def load(self) -> dict[str, float]:
        """Returns sequences as reported by the engine; tokens and seconds as counted by this client."""
        response = await self._http.call("GET", "/v1/loads")
        self._count_running(0)
        # Not `timestamp`, which also changes while the scheduler is stalled. A sequence is streamed as one
        # chunk, so its tokens are visible only here: as KV entries in use, and as decode steps
        # (`decode_moments`).
        try:
            queues = response["loads"]
            self.progress = tuple(
                float(queue.get(key) or 0) for queue in queues for key in _PROGRESS_KEYS
            ) + tuple(float((queue.get("decode_moments") or [0])[0]) for queue in queues)
            reported = {
                "running": sum(queue["num_running_reqs"] for queue in queues),
                "waiting": sum(queue["num_waiting_reqs"] for queue in queues),
                "kv_usage": max((float(queue.get("token_usage", 0.0)) for queue in queues), default=0.0),
            }
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:  # of a proxy, perhaps
            raise EngineError(f"malformed load of the engine ({type(error).__name__}: {error})") from None
        return reported | {
            "retractions": await self._retractions(),
            "prompt_tokens": self._batcher.num_prompt_tokens,
            "cached_prompt_tokens": self._batcher.num_cached_tokens,
            "generated_tokens": self._num_tokens,
            "busy_s": self._busy_s,
            "idle_s": self._since_s - self._created_s - self._busy_s,
        }

    async def _retractions(self) -> int:
        """Returns how many sequences the engine has retracted for lack of KV memory. Only its metrics page
        reports that: `num_retractions` of a completion also counts those of a weight update, and comes at its
        end."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._retractions_due_s:
            self._retractions_due_s = now_s + _RETRACTIONS_EVERY_S
            with contextlib.suppress(EngineError, ValueError):  # an engine at a URL may run without metrics
                counts = _RETRACTED.findall(await self.metrics())
                self._num_retractions = int(sum(map(float, counts)))
        return self._num_retractions

    def _count_running(self, change: int) -> None:
        """Adds the time since the last call to the busy time if requests were running."""
        now_s = asyncio.get_running_loop().time()
        if self._num_running:
            self._busy_s += now_s - self._since_s
        self._since_s = now_s
        self._num_running += change
