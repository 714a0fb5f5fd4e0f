"""The client of an inference engine: SGLang's HTTP API, used for both the embedded engine and a real SGLang.

Weight versions come from the engine's own reports (`weight_versions` spans); the client never assumes one. An
engine that dies closes its connections, so every call that waits for it fails at once. There are no retries
here: the code that holds a generation's lease decides about a retry.
"""

from __future__ import annotations

import math
import ssl
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from areal_like.errors import EngineError
from areal_like.weights.adapters import AdapterHeader
from areal_like.weights.buckets import Bucket
from areal_like.weights.integrity import BucketSums
from areal_like.wire.messages.weights import FormGroup
from rollout_server.policy.batcher import GenerateBatcher
from rollout_server.policy.generation import Generation, Sampling, parse_scores, parse_weight_version
from rollout_server.policy.http import CONNECT_TIMEOUT_S, EngineHttp
from rollout_server.policy.routes import RoutesReader


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Properties of an engine that a weight group depends on; defaults where the engine omits them."""

    num_ranks: int = 1
    """Tensor-parallel ranks of the engine; each is one rank of the weight group."""
    device: str = "cpu"
    device_uuid: str = ""
    nccl_version: str = ""
    authenticates_store: bool = False
    """True if the engine accepts the key of a weight group's rendezvous; SGLang does not."""
    loads_in_place: bool = False
    """True if the engine does not decode while it receives weights (SGLang)."""

    @classmethod
    def from_server_info(cls, server_info: Mapping[str, Any]) -> EngineInfo:
        """Builds it from `/server_info` of either engine."""
        return cls(
            num_ranks=int(server_info.get("tp_size") or 1),
            device=str(server_info.get("device") or "cpu"),
            device_uuid=str(server_info.get("device_uuid") or ""),
            nccl_version=str(server_info.get("nccl_version") or ""),
            authenticates_store=server_info.get("authenticates_store") is True,
        )


class EngineClient:
    """Asynchronous client of one engine at `base_url` (`http://host:port`). All failures are EngineError.

    Use as an async context manager or call `close()`. One client belongs to one event loop.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str = "",
        tls: ssl.SSLContext | None = None,
        stream_interval: int = 0,
    ) -> None:
        """`tls`: how to verify an https engine; None: with the system's certificates. `stream_interval`:
        tokens between two chunks of a sequence; 0: the engine's default."""
        self._http = EngineHttp(base_url, api_key=api_key, tls=tls)
        self._batcher = GenerateBatcher(self._http, stream_interval=stream_interval)
        self.stop_texts = self._batcher.stop_texts
        """Requests with stop texts need its `tokenizer`."""
        self.base_url = self._http.base_url
        self.info = EngineInfo()
        """Filled by `fetch_info`."""
        self.progress: tuple[float, ...] = ()
        """Counts that change with every step of the engine, from the last call of `load`."""
        self._is_paused = False
        self._num_loads = 0
        """Number of calls in progress that load weights."""
        self.caches_prefixes = False
        """True if the engine computes a prompt that several requests share only once."""
        self.cache_salt = ""
        """Identifies the weights that the engine holds, if its prefixes must not outlive them (SGLang). All
        turns of a sample are requested with the salt of its first one."""
        self.base_digest = ""
        """Digest of the active weights if a push may send only what differs from them; else empty."""
        self.lora_path = ""
        """Name of the adapter that requests from now on use (SGLang); empty: none, or the engine chooses."""

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def is_closed(self) -> bool:
        return self._http.is_closed

    async def close(self) -> None:
        """Aborts every request at the engine; pending and later calls raise EngineError."""
        self._http.is_closed = True
        await self._batcher.close()
        await self._http.close()

    # Generation

    async def generate(
        self,
        input_ids: Sequence[int],
        *,
        sampling: Sampling,
        rid: str | None = None,
        timeout_s: float = math.inf,
        cache_salt: str = "",
        on_first_token: Callable[[], None] | None = None,
    ) -> Generation:
        """Samples one continuation of `input_ids`.

        `rid`: id of the request for `abort`, unique among those in flight. If any client aborts it, returns
        the partial tokens with finish_reason ABORT; after `timeout_s`, returns the tokens so far with
        TIMEOUT. Cancelling the caller aborts the request. `cache_salt`: only prefixes computed with the same
        salt are used; empty: the current one. `on_first_token` is called when the prompt is computed and
        other requests can use its prefix; it is not called if only one token is sampled.

        Raises PromptRefusedError if the engine refused the prompt, EngineTimeoutError if there was no token
        in time, and EngineError if it refused for another reason or died.
        """
        return await self._batcher.generate(
            input_ids,
            sampling=sampling,
            rid=rid,
            timeout_s=timeout_s,
            cache_salt=cache_salt or self.cache_salt,
            lora_path=self.lora_path,
            on_first_token=on_first_token,
        )

    @property
    def num_generating(self) -> int:
        """Number of `generate` calls that have not returned."""
        return self._batcher.num_open

    @property
    def is_held(self) -> bool:
        """True while this client has paused the engine or is loading weights into it, so that no request
        advances."""
        return self._is_paused or self._num_loads > 0

    async def score(self, tokens: Sequence[int], *, first: int) -> tuple[list[float], int]:
        """Returns the log-probs, at temperature 1, of the tokens from index `first` (at least 1), and the
        weight version that computed them."""
        body: dict[str, Any] = {
            "input_ids": list(tokens),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": first - 1,
        }
        if self.lora_path:
            body["lora_path"] = self.lora_path
        if self.caches_prefixes:
            body["cache_salt"] = uuid.uuid4().hex  # no cached prefix may be used
        response = await self._http.call("POST", "/generate", body)
        return parse_scores(response, num_scored=len(tokens) - first)

    async def abort(self, rid: str | None = None) -> None:
        """Aborts one request, or all with `rid=None`; their generate() calls return the partial tokens.

        Unknown rids are ignored.
        """
        body = {"abort_all": True} if rid is None else {"rid": self._batcher.wire_rid(rid)}
        await self._http.call("POST", "/abort_request", body)

    async def pause(self, mode: str = "abort") -> None:
        """Stops decoding until `resume`; new requests wait.

        `mode`: `abort` (running requests return their partial tokens), `in_place` (the KV cache is kept) or
        `retract` (the KV cache is rebuilt when resumed).
        """
        self._is_paused = True
        await self._http.call("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Continues decoding after `pause`."""
        await self._http.call("POST", "/continue_generation", {})
        self._is_paused = False

    # Weights

    async def init_weights_group(self, form: FormGroup) -> None:
        """Joins a weight group, or those of all senders, which the trainer must do at the same time; returns
        once all have joined.

        `form.secret`: for an engine with `info.authenticates_store` only.
        """
        body = {
            "master_address": form.master_address,
            "master_port": form.master_port,
            "rank_offset": form.rank,
            "world_size": form.world_size,
            "group_name": form.group_name,
            "backend": form.backend,
            "timeout_s": form.timeout_s,
            **({"secret": form.secret} if form.secret else {}),
        }
        if form.more_senders:
            body["more_senders"] = [[sender.address, sender.port] for sender in form.more_senders]
        timeout_s = form.timeout_s + CONNECT_TIMEOUT_S
        await self._http.call("POST", "/init_weights_update_group", body, timeout_s=timeout_s)

    async def destroy_weights_group(self, *, group_name: str) -> None:
        """Leaves the group. Raises EngineError if the engine is not in it."""
        await self._http.call("POST", "/destroy_weights_update_group", {"group_name": group_name})

    async def begin_weight_update(self) -> None:
        """Opens an update session; the engine accepts buckets only inside a session. Discards an open one."""
        await self._http.call("POST", "/begin_weight_update", {})

    async def update_weights_from_distributed(
        self,
        bucket: Bucket,
        *,
        group_name: str,
        timeout_s: float,
        flattened: bool = True,
        weight_version: int | None = None,
        flush_cache: bool = False,
    ) -> None:
        """Receives one bucket, which rank 0 must be sending at the same time; returns once it is received.

        `weight_version`: for SGLang only, with the last bucket (the embedded engine gets the version in
        `end_weight_update`).
        """
        body = {
            **bucket.to_dict(),
            "group_name": group_name,
            "load_format": "flattened_bucket" if flattened else None,
            "flush_cache": flush_cache,
            "abort_all_requests": False,
        }
        if weight_version is not None:
            body["weight_version"] = str(weight_version)
        await self._load_weights("/update_weights_from_distributed", body, timeout_s=timeout_s)

    async def end_weight_update(
        self, *, weight_version: int | None = None, running: str = "recompute", timeout_s: float
    ) -> dict[str, Any]:
        """Embedded engine: verifies what the session received and activates it between two decode steps.
        SGLang: closes the session.

        `running`: `recompute` or `keep` the KV cache of running sequences, or let them `finish` under their
        adapter. Returns the engine's response, which contains `stall_s` if it is the embedded engine. Raises
        EngineError if the engine refused the update; the embedded engine then still has its old weights.
        """
        body: dict[str, Any] = {"running": running}
        if weight_version is not None:
            body["weight_version"] = str(weight_version)
        response: dict[str, Any] = await self._http.call(
            "POST", "/end_weight_update", body, timeout_s=timeout_s
        )
        self.base_digest = str(response.get("base_digest", ""))
        return response

    async def update_weights_from_disk(self, path: str, *, weight_version: int, timeout_s: float) -> None:
        """Loads a Hugging Face directory (safetensors) and activates it under `weight_version`."""
        body = {"model_path": path, "weight_version": str(weight_version)}
        await self._load_weights("/update_weights_from_disk", body, timeout_s=timeout_s)

    async def flush_cache(self) -> None:
        await self._http.call("GET", "/flush_cache")

    # State

    async def health(self) -> bool:
        """True if the engine responds and can generate."""
        try:
            await self._http.call("GET", "/health", timeout_s=CONNECT_TIMEOUT_S)
        except EngineError:
            return False
        return True

    async def model_info(self) -> dict[str, Any]:
        """`/model_info`: `model_path`, `weight_version`, ..."""
        info: dict[str, Any] = await self._http.call("GET", "/model_info")
        return info

    async def weight_version(self) -> int:
        return parse_weight_version((await self.model_info()).get("weight_version"))

    async def server_info(self) -> dict[str, Any]:
        """`/server_info`: the engine's options, and the embedded engine's `load`."""
        info: dict[str, Any] = await self._http.call("GET", "/server_info")
        return info

    async def load(self) -> dict[str, float]:
        """Returns running and waiting sequences, the fraction of KV memory in use, and tokens, retractions,
        busy and idle seconds since the engine's start."""
        load: dict[str, float] = (await self.server_info()).get("load", {})
        self.progress = tuple(
            float(load.get(key, 0)) for key in ("steps", "prefilled_tokens", "running", "waiting")
        )
        num_rows = load.get("rows", 0)
        return load | {
            "kv_usage": load.get("running", 0) / num_rows if num_rows else 0.0,
            "prompt_tokens": self._batcher.num_prompt_tokens,
            "cached_prompt_tokens": self._batcher.num_cached_tokens,
        }

    async def metrics(self) -> bytes:
        """Returns the engine's metrics page in Prometheus' format."""
        return await self._http.fetch("GET", "/metrics", timeout_s=CONNECT_TIMEOUT_S)

    async def _load_weights(self, path: str, body: dict[str, Any], *, timeout_s: float) -> None:
        self._num_loads += 1
        self.base_digest = ""
        try:
            await self._http.call("POST", path, body, timeout_s=timeout_s)
        finally:
            self._num_loads -= 1

    async def fetch_info(self) -> None:
        facts = await self.server_info()
        self.info = EngineInfo.from_server_info(facts)
        self.routes = RoutesReader.of_embedded(facts.get("routes_shape"))

    @property
    def routes(self) -> RoutesReader | None:
        """Reads the routes of generations; None: the engine returns none."""
        return self._batcher.routes

    @routes.setter
    def routes(self, reader: RoutesReader | None) -> None:
        self._batcher.routes = reader


class EmbeddedClient(EngineClient):
    """Asynchronous client of one embedded engine."""

    async def receive_weights(
        self,
        buckets: Sequence[Bucket],
        *,
        group_name: str,
        timeout_s: float,
        integrity: str = "none",
        adapter: AdapterHeader | None = None,
        base_digest: str = "",
    ) -> BucketSums:
        """Opens a session and receives all buckets of a push, in order, in one call.

        `adapter`: header of the adapter that the buckets hold; None: they hold all weights. `base_digest`: of
        the active weights, if what is sent is what differs from them. Returns the sums of the buckets, with
        digests if `integrity` is `sha256`. The engine enforces `timeout_s`, so that the error is the engine's
        own.
        """
        body = {
            "buckets": [bucket.to_dict() for bucket in buckets],
            "group_name": group_name,
            "timeout_s": timeout_s,
            "integrity": integrity,
            **({} if adapter is None else {"adapter": adapter.to_dict()}),
            **({"base_digest": base_digest} if base_digest else {}),
        }
        self.base_digest = ""
        response = await self._http.call(
            "POST", "/receive_weights", body, timeout_s=timeout_s + CONNECT_TIMEOUT_S
        )
        return BucketSums(
            checksums=[int(checksum) for checksum in response.get("checksums", ())],
            digests=[str(digest) for digest in response.get("digests", ())],
        )
