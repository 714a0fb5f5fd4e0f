"""Stages `engine` and `sglang`: an engine's log-probs against the trainer's, before and after a push.

Both are the processes of a job: the engine that a rollout server starts, its update strategy, and the
trainer's policy, snapshot and sender. Only the buffer and the rollout server between them are left out. The
engine samples, the trainer computes the log-probs of the same tokens; their difference is the mismatch that
an objective has to tolerate. Then the trainer's weights change, travel to the engine, and both are compared
again. With two GPUs the engine has the second one and weights travel over NCCL, else over gloo.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from areal_like.automatic_settings import compute_dtype
from areal_like.config import Config, from_mapping
from areal_like.hosts import LOOPBACK
from areal_like.trajectory import Trajectory
from areal_like.weights.buckets import Manifest
from areal_like.weights.integrity import BucketSums
from areal_like.weights.untrained import text_config
from areal_like.weights.weight_group import WeightGroup, device_facts
from areal_like.wire.messages.weights import Alive, FormGroup, PushWeights
from launch.doctor.gpu.models import sampled, write_model
from launch.doctor.gpu.stages import Notes, Outcome, Request, Verdict, failed, skipped, within
from rollout_server.policy.client import EngineClient
from rollout_server.policy.engines.process import EmbeddedProcess, EngineProcess
from rollout_server.policy.engines.sglang.process import SglangProcess
from rollout_server.policy.engines.supervisor import make_update_strategy
from rollout_server.policy.generation import Generation, Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.strategy import WeightPush, WeightUpdateStrategy
from trainer.batching.packing import collate
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.process_group import device_of, join_ranks
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.policy import Policy, build_policy
from trainer.weights.backend import choose_backend
from trainer.weights.bucket_sender import BucketSender
from trainer.weights.snapshot import BackgroundGather, BoundaryGather, Snapshot

LIMITS = {"float32": {"sd": 1e-3, "largest": 1e-2}, "bfloat16": {"sd": 0.1, "largest": 1.0}}
"""Standard deviation and largest absolute value of the difference of log-probs of a token."""
_LEAST_MOVED = 4.0
"""Least change of log-probs by the push, in units of the mismatch. A smaller one would prove nothing."""
_CONTEXT, _NUM_PROMPTS = 512, 8
_TIMEOUT_S = 40.0
"""Time limit of forming the group and of the push."""
_GROUP = "doctor"
_SGLANG_ARGS = "--mem-fraction-static 0.3 --disable-cuda-graph"
_REMEDIES = {
    "before": "send us the file; until then, an objective with a band or a cap tolerates some mismatch",
    "after": "send us the file; the push gives the engine other weights than the trainer has",
}


def check_embedded(request: Request, notes: Notes) -> Verdict:
    """The stage `engine`."""
    config = _config(request, notes, engine="embedded")
    return _check(config, EmbeddedProcess(config, name="engine", **_model_of(config)), notes)


def check_sglang(request: Request, notes: Notes) -> Verdict:
    """The stage `sglang`."""
    if not request.sglang:
        return skipped("no --sglang PYTHON was given")
    config = _config(request, notes, engine="sglang")
    process = SglangProcess(
        config, name="sglang-0", max_positions=_CONTEXT, vocab_size=_vocab_size(config), **_model_of(config)
    )
    return _check(config, process, notes)


def _config(request: Request, notes: Notes, *, engine: str) -> Config:
    """The job's settings, with a new model."""
    notes.at("writing a model")
    num_gpus = torch.cuda.device_count() if request.device == "cuda" else 0
    config = settings_of(request, engine=engine, num_gpus=num_gpus)
    write_model(Path(config.model.path), is_small=num_gpus == 0, dtype=getattr(torch, compute_dtype(config)))
    return config


def settings_of(request: Request, *, engine: str, num_gpus: int) -> Config:
    """Trainer on GPU 0 and engine on GPU 1, or both on the same device."""
    is_small = num_gpus == 0
    sglang = {"python": request.sglang, "args": "" if is_small else _SGLANG_ARGS}
    return from_mapping(
        {
            "runs_dir": request.scratch,
            "name": engine,
            "model": {
                "path": str(Path(request.scratch) / f"{engine}-model"),
                "dtype": "float32" if is_small else "bfloat16",
            },
            "rollout": {
                "engine": engine,
                "engine_device": "cpu" if is_small else f"cuda:{min(1, num_gpus - 1)}",
                "max_running": 16,
                "start_timeout_s": 120.0,
                **({"sglang": sglang} if engine == "sglang" else {}),
            },
            "trainer": {"device": "cpu" if is_small else "cuda:0"},
        }
    )


def _model_of(config: Config) -> dict[str, Any]:
    return {"model": config.model.path, "context_tokens": _CONTEXT - 16}


def _vocab_size(config: Config) -> int:
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(config.model.path, trust_remote_code=False)
    return int(text_config(found).vocab_size)


def _check(config: Config, process: EngineProcess, notes: Notes) -> Verdict:
    device = device_of(config)
    join_ranks(config, device)
    ranks = Ranks(device=device)
    policy = build_policy(config, config.model.path, ranks)
    return asyncio.run(_compare(_Comparison(config, policy, ranks, notes), process))


@dataclass(frozen=True)
class _Comparison:
    config: Config
    policy: Policy
    ranks: Ranks
    notes: Notes

    async def sample(
        self, client: EngineClient, *, version: int
    ) -> tuple[list[Trajectory], NDArray[np.float64]]:
        """(samples of the engine; its log-probs minus the trainer's, one for each sampled token)"""
        rng = np.random.default_rng(version)
        vocab = int(text_config(self.policy.model.config).vocab_size)
        prompts = [rng.integers(3, vocab, rng.integers(8, 64)) for _ in range(_NUM_PROMPTS)]
        sampling = Sampling(max_new_tokens=64, ignore_eos=True)
        found: list[Generation] = await asyncio.gather(
            *(client.generate(prompt.tolist(), sampling=sampling) for prompt in prompts)
        )
        versions = {int(each) for one in found for each in one.versions}
        assert versions == {version}, f"the engine reports versions {versions}, not {version}"
        samples = [
            sampled(prompt, one.output_ids, logprobs=one.logprobs)
            for prompt, one in zip(prompts, found, strict=True)
        ]
        engine = np.concatenate([one.logprobs for one in found]).astype(np.float64)
        return samples, engine - self.logprobs(samples)

    @torch.no_grad()
    def logprobs(self, samples: list[Trajectory]) -> NDArray[np.float64]:
        """The trainer's log-prob of each sampled token."""
        made = [TrainingSample(trajectory=each, advantage=0.0, group=0) for each in samples]
        shares = self.policy.shares_prefixes
        logp_S = self.policy(collate(made, device=self.ranks.device, shares_prefixes=shares)).logprobs_S
        computed: NDArray[np.float64] = logp_S.double().cpu().numpy()
        return computed

    def judged(self, difference: NDArray[np.float64], *, when: str) -> Verdict:
        """Compares a mismatch with the limits of the dtype."""
        found = {"sd": float(difference.std()), "largest": float(np.abs(difference).max())}
        self.notes.measured(
            **{f"mismatch_{name}_{when}": value for name, value in found.items()},
            **{f"mismatch_mean_{when}": float(difference.mean())},
        )
        limits = LIMITS[compute_dtype(self.config)]
        return within(found, limits, remedy=_REMEDIES[when])

    @torch.no_grad()
    def change_weights(self) -> None:
        """Adds a tenth of each tensor's spread."""
        for parameter in self.policy.parameters():
            rows = local(parameter)
            rows.add_(torch.randn_like(rows) * (0.1 * rows.std()))

    def snapshot(self) -> Snapshot:
        gather = BackgroundGather if self.ranks.device.type == "cpu" else BoundaryGather
        taken = gather(
            self.policy,
            self.ranks,
            bucket_bytes=self.config.weights.bucket_bytes_on(self.ranks.device.type),
            dtype=compute_dtype(self.config),
        ).take_snapshot()
        assert taken is not None and taken.acquire()
        return taken


async def _compare(comparison: _Comparison, process: EngineProcess) -> Verdict:
    config, notes = comparison.config, comparison.notes
    notes.at("starting the engine")
    client = await process.start(version=0)
    try:
        reasons: list[str] = []
        strategy = make_update_strategy(
            config,
            name="doctor",
            model=config.model.path,
            gate=GenerationGate(),
            on_quarantine=lambda reason, version: reasons.append(reason),
            on_untrusted=reasons.append,
        )
        await strategy.engine_started(client, path=config.model.path, version=0)
        notes.at("comparing log-probs before the push")
        samples, difference = await comparison.sample(client, version=0)
        before = comparison.judged(difference, when="before")
        if before.outcome is not Outcome.OK:
            return before
        old = comparison.logprobs(samples)
        comparison.change_weights()
        moved = float(np.abs(comparison.logprobs(samples) - old).mean())
        notes.measured(push_moves_logprobs_by=moved)
        assert moved > _LEAST_MOVED * float(np.abs(difference).mean()), "the weights change too little"
        notes.at("pushing weights")
        stall_s = await _push(comparison, client, strategy)
        notes.measured(push_stalls_engine_s=round(stall_s, 4))
        if reasons:
            return failed(f"the push: {reasons[0]}", "send us the file")
        notes.at("comparing log-probs after the push")
        _, difference = await comparison.sample(client, version=1)
        return comparison.judged(difference, when="after")
    finally:
        await client.close()
        await process.stop()


async def _push(comparison: _Comparison, client: EngineClient, strategy: WeightUpdateStrategy) -> float:
    """Sends the trainer's weights as version 1; returns the seconds without decoding."""
    device, world_size = comparison.ranks.device, 1 + client.info.num_ranks
    backend = _backend(comparison, client)
    snapshot = comparison.snapshot()
    num_bytes = sum(bucket.num_bytes for bucket in snapshot.buckets)
    comparison.notes.measured(push_backend=backend, push_mb=round(num_bytes / 1e6, 1))
    secret = secrets.token_hex(32) if client.info.authenticates_store else ""
    group = WeightGroup.create(
        world_size=world_size, group_name=_GROUP, backend=backend, timeout_s=_TIMEOUT_S, secret=secret
    )
    with group:
        form = FormGroup(
            epoch=1,
            group_name=_GROUP,
            master_address=LOOPBACK,
            master_port=group.port,
            rank=1,
            world_size=world_size,
            backend=backend,
            timeout_s=_TIMEOUT_S,
            secret=secret,
        )
        await asyncio.gather(client.init_weights_group(form), asyncio.to_thread(group.connect))
        sender = BucketSender(group, device=device, name="doctor")
        is_ready = threading.Event()
        sending = asyncio.create_task(
            asyncio.to_thread(
                sender.send, snapshot, integrity="none", timeout_s=_TIMEOUT_S, may_begin=is_ready
            )
        )

        async def sent_sums() -> BucketSums:
            return (await asyncio.shield(sending)).sums

        manifest = Manifest(version=1, buckets=snapshot.buckets, untrained=snapshot.untrained)
        request = PushWeights(
            epoch=1,
            group_name=_GROUP,
            version=1,
            step=1,
            update_mode="recompute",
            manifest=manifest.to_dict(),
            integrity="none",
            timeout_s=_TIMEOUT_S,
        )
        stall_s = await strategy.push(
            client,
            WeightPush(
                request=request,
                manifest=manifest,
                left_s=lambda: _TIMEOUT_S,
                cancellable=_nothing,
                ready=is_ready.set,
                sent_sums=sent_sums,
            ),
        )
        await sending
        sender.forget()
        await client.destroy_weights_group(group_name=_GROUP)
        return stall_s


def _backend(comparison: _Comparison, client: EngineClient) -> str:
    """The choice of a job with `weights.backend=auto`; SGLang does not report that it shares a GPU."""
    if torch.cuda.device_count() < 2:
        return "gloo"
    info = client.info
    engine = Alive(
        version=0,
        num_ranks=info.num_ranks,
        device=info.device,
        device_uuid=info.device_uuid,
        nccl_version=info.nccl_version,
        authenticates_store=info.authenticates_store,
    )
    ours = device_facts(comparison.ranks.device)
    return choose_backend("auto", ours=ours, engines=[engine])[0]


@contextlib.contextmanager
def _nothing() -> Iterator[None]:
    yield
