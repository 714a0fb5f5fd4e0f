"""The one client of an inference engine: SGLang's HTTP API, spoken alike to the embedded engine and to a real SGLang.

Requests that start in the same turn of the event loop travel as one streaming batch request, because at some hundreds of samples a
second on two cores HTTP itself would be the bottleneck. Every generate() still resolves by itself, when its own sequence ends.
Versions are what the engine attests (`weight_versions` spans), never what the client believes. An engine that dies
closes its connections, so everything that waits on it fails at once. What was left out: retries. Whether a lost
generation is submitted again is decided by who knows its lease.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray

from areal_like.errors import EngineError
from areal_like.trajectory import FinishReason
from areal_like.weights.buckets import Bucket

logger = logging.getLogger(__name__)

MAX_BATCH = 256
"""Sequences in one HTTP request: bounds the body, and what one broken connection takes with it."""
MAX_LINE_BYTES = 64 << 20
KEEPALIVE_S = 2.0
MAX_ERROR_CHARS = 500


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one sequence is drawn. Defaults are the policy's own distribution; the filters are for evaluation only, since with them the
    log-prob is not a probability of the policy."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling one of these ends the sequence; it is the last token of the output."""
    ignore_eos: bool = False
    """Do not stop at the model's own end-of-sequence tokens. SGLang then does not stop at `stop_token_ids` either."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off."""
    min_p: float = 0.0
    sampling_seed: int | None = None
    """Honoured by the embedded engine; SGLang ignores it unless it was started with deterministic inference."""

    def to_dict(self) -> dict[str, Any]:
        """SGLang's `sampling_params`, without what is at its default."""
        params: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}
        if self.stop_token_ids:
            params["stop_token_ids"] = list(self.stop_token_ids)
        for name, default in (
            ("ignore_eos", False),
            ("top_p", 1.0),
            ("top_k", -1),
            ("min_p", 0.0),
            ("sampling_seed", None),
        ):
            if getattr(self, name) != default:
                params[name] = getattr(self, name)
        return params


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """What the engine sampled for one request, whole or interrupted. All arrays have the same length T, which may be 0."""

    output_ids: NDArray[np.int32]
    """[T] sampled tokens, a stop token included."""
    logprobs: NDArray[np.float32]
    """[T] log-prob of each under temperature-scaled logits, as the engine recorded it."""
    versions: NDArray[np.int32]
    """[T] version of the weights that sampled each token, as the engine attests."""
    finish_reason: FinishReason
    matched: int | None = None
    """The stop token, where `finish_reason` is STOP."""
    message: str = ""
    """The engine's reason, where `finish_reason` is ABORT."""


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What a weight group has to know of an engine; the defaults are an engine's that does not say."""

    num_ranks: int = 1
    """Its tensor-parallel ranks, each a place in a group."""
    device: str = "cpu"
    device_uuid: str = ""
    nccl_version: str = ""

    @classmethod
    def of(cls, server_info: Mapping[str, Any]) -> EngineFacts:
        """From `/server_info` of either engine."""
        return cls(
            num_ranks=int(server_info.get("tp_size") or 1),
            device=str(server_info.get("device") or "cpu"),
            device_uuid=str(server_info.get("device_uuid") or ""),
            nccl_version=str(server_info.get("nccl_version") or ""),
        )


@dataclass(eq=False)
class _Pending:
    """One generate() on its way."""

    rid: str
    input_ids: Sequence[int]
    sampling: Mapping[str, Any]
    future: asyncio.Future[Generation]


class EngineClient:
    """Asynchronous client of one engine at `base_url` (http://host:port). All failures are EngineError.

    Use as an async context manager or call `close()`. One client belongs to one event loop.
    """

    def __init__(
        self,
        base_url: str,
        *,
        connect_timeout_s: float = 5.0,
        control_timeout_s: float = 30.0,
        generate_timeout_s: float = 600.0,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self.facts = EngineFacts()
        self._connect_timeout_s = connect_timeout_s
        self._control_timeout_s = control_timeout_s
        self._generate_timeout_s = generate_timeout_s
        self._session: aiohttp.ClientSession | None = None
        self._queued: list[_Pending] = []
        self._streams: set[asyncio.Task[None]] = set()
        self.is_closed = False

    async def __aenter__(self) -> EngineClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every stream (the engine aborts their sequences) and fails whoever still waits, and whoever asks afterwards."""
        self.is_closed = True
        streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        for pending in self._queued:
            _fail(pending, "the client was closed")
        self._queued.clear()
        if self._session is not None:
            await self._session.close()
            self._session = None

    # Generation

    async def generate(
        self, input_ids: Sequence[int], *, sampling: Sampling, rid: str | None = None
    ) -> Generation:
        """Samples one continuation of `input_ids`.

        `rid` names the request for `abort`; it must be unique among those in flight. Returns with finish_reason ABORT
        and the partial tokens if it was aborted, by anyone. Cancelling the caller aborts the request at the engine.
        Raises EngineError if the engine refused it, died, or took longer than `generate_timeout_s`.
        """
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        pending = _Pending(_wire_rid(rid or uuid.uuid4().hex), input_ids, sampling.to_dict(), future)
        if not self._queued:
            asyncio.get_running_loop().call_soon(self._flush)
        self._queued.append(pending)
        try:
            return await future
        except asyncio.CancelledError:
            self._spawn(self._abort_quietly(pending.rid))
            raise

    def _flush(self) -> None:
        queued, self._queued = self._queued, []
        batch: list[_Pending] = []
        rids: set[str] = set()
        for pending in queued:
            if pending.future.done():
                continue
            if pending.rid in rids:
                _fail(pending, f"rid {pending.rid[:-1]} is used twice at the same time")
                continue
            rids.add(pending.rid)
            batch.append(pending)
        for start in range(0, len(batch), MAX_BATCH):
            self._start(batch[start : start + MAX_BATCH])

    def _start(self, batch: list[_Pending]) -> None:
        """Streams a batch in a task of its own."""

        def fail_cancelled(stream: asyncio.Task[None]) -> None:
            # One that is cancelled before its first turn never comes to its `finally`.
            for pending in batch if stream.cancelled() else ():
                _fail(pending, "the client was closed")

        self._spawn(self._stream(batch)).add_done_callback(fail_cancelled)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._streams.add(task)
        task.add_done_callback(self._streams.discard)
        return task

    async def _stream(self, batch: list[_Pending]) -> None:
        body = {
            "rid": [pending.rid for pending in batch],
            "input_ids": [list(map(int, pending.input_ids)) for pending in batch],
            "sampling_params": [pending.sampling for pending in batch],
            "return_logprob": True,
            "stream": True,
        }
        reason = "closed the stream before every sequence had ended"
        timeout = aiohttp.ClientTimeout(total=self._generate_timeout_s, sock_connect=self._connect_timeout_s)
        try:
            async with self._http().post(f"{self.base_url}/generate", json=body, timeout=timeout) as response:
                if response.status == 400 and len(batch) > 1:
                    # One bad request spoils a batch; those that only happened to start with it must not suffer.
                    alone, batch = batch, []
                    for pending in alone:
                        self._start([pending])
                elif response.status != 200:
                    reason = f"refused /generate: {await _error_text(response)}"
                else:
                    async for chunk in _events(response):
                        _resolve(batch, chunk)
        except TimeoutError:
            reason = f"did not finish within generate_timeout_s={self._generate_timeout_s:g}"
        except (aiohttp.ClientError, ConnectionError, ValueError) as error:
            reason = f"was lost: {error or type(error).__name__}"
        finally:
            # Also on cancellation: nobody may wait for a stream that is gone.
            for pending in batch:
                _fail(pending, f"engine {self.base_url} {reason}")

    async def abort(self, rid: str | None = None) -> None:
        """Aborts one request, or all with `rid=None`; their generate() calls return the partial tokens. Unknown rids are no error."""
        await self._call(
            "POST", "/abort_request", {"abort_all": True} if rid is None else {"rid": _wire_rid(rid)}
        )

    async def _abort_quietly(self, wire_rid: str) -> None:
        try:
            await self._call("POST", "/abort_request", {"rid": wire_rid})
        except EngineError as error:
            logger.debug("abort of %s: %s", wire_rid, error)

    async def pause(self, mode: str = "abort") -> None:
        """Stops decoding: `abort` (running requests return their partial tokens), `in_place` (KV kept) or `retract` (KV rebuilt
        when resumed). New requests wait until `resume`."""
        await self._call("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Goes on after `pause`."""
        await self._call("POST", "/continue_generation", {})

    # Weights

    async def init_weights_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_s: float,
    ) -> None:
        """Joins a weight group; returns when all ranks are there. Rank 0 must be connecting at the same time."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
            "timeout_s": timeout_s,
        }
        await self._call(
            "POST", "/init_weights_update_group", body, timeout_s=timeout_s + self._connect_timeout_s
        )

    async def destroy_weights_group(self, *, group_name: str) -> None:
        """Leaves the group. Raises EngineError if the engine is not in it."""
        await self._call("POST", "/destroy_weights_update_group", {"group_name": group_name})

    async def begin_weight_update(self) -> None:
        """Opens an update session; buckets are only accepted inside one. An open session is given up."""
        await self._call("POST", "/begin_weight_update", {})

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
        """Receives one bucket from rank 0, who must be sending at the same time; returns when it is there.

        `weight_version`: for SGLang, with the last bucket only (the embedded engine takes it in `end_weight_update`).
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
        await self._call("POST", "/update_weights_from_distributed", body, timeout_s=timeout_s)

    async def receive_weights(
        self, buckets: Sequence[Bucket], *, group_name: str, timeout_s: float
    ) -> list[int]:
        """Embedded engine only: opens a session and receives all buckets of a push, in order, in one call; returns their checksums.

        `timeout_s`: of the engine, which says what it waited for in vain.
        """
        body = {
            "buckets": [bucket.to_dict() for bucket in buckets],
            "group_name": group_name,
            "timeout_s": timeout_s,
        }
        answer = await self._call(
            "POST", "/receive_weights", body, timeout_s=timeout_s + self._connect_timeout_s
        )
        return [int(checksum) for checksum in answer.get("checksums", ())]

    async def end_weight_update(
        self, *, weight_version: int | None = None, running: str = "recompute", timeout_s: float
    ) -> dict[str, Any]:
        """Verifies what the session received and activates it between two decode steps (embedded engine), or closes it (SGLang).

        `running`: what happens to sequences in flight, `recompute` | `keep`. Returns the engine's answer; the embedded engine's has
        `stall_s`. Raises EngineError if the update was refused: the embedded engine then still has its old weights.
        """
        body: dict[str, Any] = {"running": running}
        if weight_version is not None:
            body["weight_version"] = str(weight_version)
        answer: dict[str, Any] = await self._call("POST", "/end_weight_update", body, timeout_s=timeout_s)
        return answer

    async def update_weights_from_disk(self, path: str, *, weight_version: int, timeout_s: float) -> None:
        """Loads a Hugging Face directory (safetensors) and activates it under `weight_version`."""
        body = {"model_path": path, "weight_version": str(weight_version)}
        await self._call("POST", "/update_weights_from_disk", body, timeout_s=timeout_s)

    async def flush_cache(self) -> None:
        """Forgets cached prefixes."""
        await self._call("GET", "/flush_cache")

    # State

    async def health(self) -> bool:
        """Whether the engine answers and can generate."""
        try:
            await self._call("GET", "/health", timeout_s=self._connect_timeout_s)
        except EngineError:
            return False
        return True

    async def model_info(self) -> dict[str, Any]:
        """`/model_info`: `model_path`, `weight_version`, ..."""
        info: dict[str, Any] = await self._call("GET", "/model_info")
        return info

    async def weight_version(self) -> int:
        """The version that is active now."""
        return _version((await self.model_info()).get("weight_version"))

    async def server_info(self) -> dict[str, Any]:
        """`/server_info`: the engine's options, and the embedded engine's `load`."""
        info: dict[str, Any] = await self._call("GET", "/server_info")
        return info

    async def load(self) -> dict[str, float]:
        """Running and waiting sequences; tokens, busy and idle seconds since the engine's start."""
        load: dict[str, float] = (await self.server_info()).get("load", {})
        return load

    async def learn_facts(self) -> None:
        """Fills `facts`."""
        self.facts = EngineFacts.of(await self.server_info())

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float | None = None
    ) -> Any:
        total_s = self._control_timeout_s if timeout_s is None else timeout_s
        timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=min(total_s, self._connect_timeout_s))
        name = f"engine {self.base_url}{path}"
        if self.is_closed:
            raise EngineError(f"{name}: the client was closed")
        try:
            async with self._http().request(
                method, f"{self.base_url}{path}", json=body, timeout=timeout
            ) as response:
                if response.status != 200:
                    raise EngineError(f"{name}: {await _error_text(response)}")
                text = await response.text()
        except TimeoutError:
            raise EngineError(f"{name}: no answer within {total_s:g} s") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            raise EngineError(f"{name}: {error or type(error).__name__}") from None
        try:
            answer = json.loads(text)
        except ValueError:
            return {}  # SGLang's /health and /flush_cache answer in plain text
        if isinstance(answer, dict) and answer.get("success") is False:
            raise EngineError(f"{name}: {answer.get('message', 'success: false')}")
        return answer

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            # No limit: a waiting stream holds its connection, and aborts and weight calls must never queue behind streams.
            # We drop idle connections before uvicorn's 5 s do: a POST on one that is being closed is lost and not retried.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            )
        return self._session


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """Server-sent events: `data: {json}` lines until `data: [DONE]`. Raises ValueError for anything else."""
    buffered = bytearray()
    async for piece in response.content.iter_any():
        buffered += piece
        if len(buffered) > MAX_LINE_BYTES:
            raise ValueError(f"event longer than {MAX_LINE_BYTES} bytes")
        if b"\n" not in piece:
            continue
        *lines, rest = bytes(buffered).split(b"\n")
        buffered = bytearray(rest)
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError("event is not an object")
            if "error" in event:
                error = event["error"]
                raise ValueError(
                    str(error.get("message", error) if isinstance(error, dict) else error)[:MAX_ERROR_CHARS]
                )
            yield event


def _resolve(batch: list[_Pending], chunk: dict[str, Any]) -> None:
    """Gives the last chunk of a sequence to whoever waits for it; chunks before it are of no interest."""
    try:
        meta = chunk["meta_info"]
        reason = meta["finish_reason"]
        if reason is None:
            return
        future = batch[int(chunk.get("index", 0))].future
        if not future.done():
            future.set_result(_generation(chunk, meta, reason))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"malformed event ({type(error).__name__}: {error})") from None
    except EngineError as error:
        future.set_exception(error)


def _generation(chunk: dict[str, Any], meta: dict[str, Any], reason: dict[str, Any]) -> Generation:
    output_ids = np.asarray(chunk["output_ids"], dtype=np.int32)
    logprobs = np.asarray([entry[0] for entry in meta["output_token_logprobs"]], dtype=np.float32)
    if logprobs.shape != output_ids.shape:
        raise ValueError(f"{len(output_ids)} tokens but {len(logprobs)} log-probs")
    versions = np.full(output_ids.shape, -1, dtype=np.int32)
    for span in meta.get("weight_versions") or [
        {"version": meta.get("weight_version"), "start": 0, "end": len(output_ids)}
    ]:
        versions[int(span["start"]) : int(span["end"])] = _version(span["version"])
    if np.any(versions < 0):
        raise ValueError("weight_versions do not cover the output")
    kind = str(reason["type"])
    matched = reason.get("matched")
    if kind == FinishReason.ABORT.value and int(reason.get("status_code") or 200) >= 400:
        raise EngineError(f"the engine gave up a request: {reason.get('message')}")
    return Generation(
        output_ids=output_ids,
        logprobs=logprobs,
        versions=versions,
        finish_reason=FinishReason(kind),
        matched=matched if isinstance(matched, int) else None,
        message=str(reason.get("message") or ""),
    )


def _wire_rid(rid: str) -> str:
    """SGLang aborts every request whose id *starts with* the given one: with an end mark, `1` is no longer a prefix of `12`."""
    return f"{rid};"


def _version(raw: Any) -> int:
    try:
        return int(raw)
    except (TypeError, ValueError):
        raise EngineError(
            f"the engine's weight version {raw!r} is not a number: start it with --weight-version 0"
        ) from None


def _fail(pending: _Pending, message: str) -> None:
    if not pending.future.done():
        pending.future.set_exception(EngineError(message))


async def _error_text(response: aiohttp.ClientResponse) -> str:
    """The message inside an error answer: SGLang's are {"error": {"message"}}, {"message"} or plain text."""
    text = await response.text()
    try:
        answer = json.loads(text)
        inner = answer.get("error", answer) if isinstance(answer, dict) else answer
        text = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except ValueError:
        pass
    return f"HTTP {response.status}: {text[:MAX_ERROR_CHARS]}"
