"""LoRA adapters for SGLang: received by this server, written as PEFT folders, and loaded from there.

    receive every bucket -> verify sums -> folder vN -> /load_lora_adapter -> requests name vN
    the last request that names vM has ended -> /unload_lora_adapter -> folder vM removed

SGLang cannot receive an adapter over a weight group, and its `/load_lora_adapter_from_tensors` unpickles what
it gets. So this server is the member of the group, which also lets it verify digests before anything is
loaded. The folder is in the run's directory on this machine, and only this server chooses its path.

A request of SGLang has one adapter from its first token to its last, and the engine decodes while it loads
another. So a push never pauses the engine:

    drain                     running requests finish under the adapter that they have
    recompute, abort_resume   running requests are interrupted, and resubmitted under the new adapter
    keep                      refused: KV of one adapter cannot be used under another

At most `num_slots` adapters are loaded. If all of them are in use when another arrives, the requests of the
oldest are interrupted, and resubmitted under the newest.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from areal_like.errors import EngineError, WeightSyncError
from areal_like.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from areal_like.runtime.threads import in_thread
from areal_like.weights.adapters import AdapterHeader, adapter_shapes, linear_layers
from areal_like.weights.buckets import check_names
from areal_like.weights.integrity import BucketSums, difference
from areal_like.wire.messages.weights import FormGroup
from rollout_server.engine.models.base import Weights
from rollout_server.engine.weights.bucket_receiver import AdapterFacts, BucketReceiver
from rollout_server.engine.weights.groups import JoinedGroups
from rollout_server.policy.client import EngineClient, EngineInfo
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.policy.sglang_client import NamedAdapter, SglangClient
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from rollout_server.weights.strategy import WeightPush, until_empty

log = logging.getLogger(__name__)

_UNLOAD_TIMEOUT_S = 30.0
_NEVER_LOADED = "does not exist"
"""In SGLang's error about an unknown adapter."""
_ABORT_AGAIN_S = 0.1
_CPU = torch.device("cpu")


@dataclass(eq=False, kw_only=True)
class SglangAdapterUpdate:
    """A `WeightUpdateStrategy` that never changes the engine's base model."""

    model: str
    """The base model, argument for `from_pretrained`."""
    shapes: CheckpointShapes
    directory: Path
    """Holds the folders of the loaded adapters. Only this server writes there."""
    num_slots: int
    """Adapters that are loaded at the same time."""
    dtype: str
    """Dtype in which the engine computes, by torch's name."""
    gate: GenerationGate
    _loaded: dict[str, Path] = field(default_factory=dict, init=False)
    """Loaded adapters and their folders, oldest first."""
    _unloading: dict[str, asyncio.Task[None]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._groups = JoinedGroups(_CPU)

    async def engine_started(self, client: EngineClient, *, path: str, version: int) -> None:
        """Requests use the base model until the first push."""
        assert isinstance(client, SglangClient)
        self._loaded.clear()
        shutil.rmtree(self.directory, ignore_errors=True)
        # This server receives in place of the engine.
        client.info = EngineInfo(authenticates_store=True)
        client.on_idle = partial(self._unload_soon, client)
        client.use_adapter(NamedAdapter("", version))

    async def restore_after_failed_load(
        self, client: EngineClient, *, path: str, version: int, timeout_s: float
    ) -> None:
        """Does nothing: the base model is never loaded again."""

    async def join_group(self, client: EngineClient, request: FormGroup) -> None:
        """Joins the group itself. Raises WeightSyncError."""
        await self._groups.join(
            master_address=request.master_address,
            master_port=request.master_port,
            rank=request.rank,
            world_size=request.world_size,
            group_name=request.group_name,
            backend=request.backend,
            timeout_s=request.timeout_s,
            secret=request.secret,
            more_senders=[(sender.address, sender.port) for sender in request.more_senders],
        )

    async def leave_group(self, client: EngineClient, group_name: str) -> None:
        """Leaves the group. Raises WeightSyncError if it is not in it."""
        await self._groups.leave(group_name)

    async def push(self, client: EngineClient, push: WeightPush) -> float:
        """Receives, verifies and loads an adapter; returns the seconds in which requests were held."""
        assert isinstance(client, SglangClient)
        mode, header, version = push.request.update_mode, push.manifest.adapter, push.request.version
        if header is None:
            raise WeightSyncError("this server takes adapters only: set weights.lora=adapter everywhere")
        if mode == "keep":
            raise WeightSyncError(
                "SGLang cannot keep the KV of running requests under another adapter: "
                "set weights.update_mode to recompute, abort_resume or drain"
            )
        with push.cancellable():
            tensors = await self._receive(push, header)
        await self._make_room(client)
        name = f"v{version}"
        # Recorded first: if the load fails or times out, the next push unloads what there is.
        folder = self._loaded[name] = self.directory / name
        await in_thread(partial(self._write, folder, tensors, header), name="weights")
        await client.load_adapter(name, str(folder.absolute()), timeout_s=push.left_s())
        if mode == "drain":
            client.use_adapter(NamedAdapter(name, version))
            return 0.0
        return await self._interrupt(client, NamedAdapter(name, version))

    async def _receive(self, push: WeightPush, header: AdapterHeader) -> dict[str, Tensor]:
        """Receives every bucket and compares its sums with the sender's. Raises WeightSyncError."""
        layers = linear_layers(self.shapes.trained(push.manifest.untrained))
        shapes = adapter_shapes(header, layers)
        check_names(push.manifest.tensors, shapes)
        groups, integrity = self._groups.find(push.request.group_name), push.request.integrity
        dtype = getattr(torch, self.dtype)
        named = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
        facts = AdapterFacts.of(named, dtype=dtype, device=_CPU)
        receiver = BucketReceiver(Weights(named=named), facts, [])

        def work() -> BucketSums:
            return receiver.receive(
                groups, push.manifest.buckets, timeout_s=push.left_s(), integrity=integrity
            )

        push.ready()
        received = await self._groups.threads.run(work)
        sent = await push.sent_sums()
        wrong = receiver.error or difference(
            received=received, sent=sent, num_buckets=len(push.manifest.buckets), integrity=integrity
        )
        if wrong:
            raise WeightSyncError(f"version {push.request.version}: {wrong}")
        return named

    def _write(self, folder: Path, tensors: dict[str, Tensor], header: AdapterHeader) -> None:
        """Writes a PEFT folder. Raises WeightSyncError."""
        try:
            folder.mkdir(parents=True, mode=0o700)
            save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})
            config = header.peft_config(model=self.model)
            (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))
        except (OSError, SafetensorError) as error:
            raise WeightSyncError(f"the adapter cannot be written to {folder}: {error}") from None

    async def _interrupt(self, client: SglangClient, adapter: NamedAdapter) -> float:
        """Switches to a loaded adapter with no request at the engine; returns how long requests were held."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        self.gate.hold()
        try:
            await until_empty(self.gate, client, interrupting=True)
            client.use_adapter(adapter)
        finally:
            self.gate.release()
        return loop.time() - started_s

    async def _make_room(self, client: SglangClient) -> None:
        """Unloads adapters so that one more can be loaded. Raises WeightSyncError."""
        for name in list(self._loaded):
            if not client.is_in_use(name):  # also those whose unloading failed
                self._unload_soon(client, name)
        await asyncio.gather(*self._unloading.values())
        if len(self._loaded) < self.num_slots:
            return
        oldest = next(iter(self._loaded))
        log.warning("requests of adapter %s are interrupted: all %d are in use", oldest, self.num_slots)
        while client.is_in_use(oldest):
            await client.abort_adapter(oldest)
            await asyncio.sleep(_ABORT_AGAIN_S)  # a request that was on its way is aborted in the next round
        self._unload_soon(client, oldest)
        await asyncio.gather(*self._unloading.values())
        if oldest in self._loaded:
            raise WeightSyncError(f"SGLang does not unload adapter {oldest}")

    def _unload_soon(self, client: SglangClient, name: str) -> None:
        """Starts to unload an adapter that no request uses."""
        if name in self._loaded and name not in self._unloading:
            task = asyncio.create_task(self._unload(client, name), name=f"unload-{name}")
            self._unloading[name] = task

    async def _unload(self, client: SglangClient, name: str) -> None:
        try:
            await client.unload_adapter(name, timeout_s=_UNLOAD_TIMEOUT_S)
        except EngineError as error:
            if _NEVER_LOADED not in str(error):
                log.info("adapter %s stays loaded: %s", name, error)
                return
        finally:
            del self._unloading[name]
        if (folder := self._loaded.pop(name, None)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
