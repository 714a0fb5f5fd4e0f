"""Traces a rank's optimizer step on fake tensors: its memory and FLOPs, without weights, GPU or time.

The model, its adapter, its sharding, the packed batch, the chunked head, the backward and the optimizer are
those of a real job, under torch's FakeTensorMode and a process group that transfers nothing. The second of
two micro-batches is traced, when Adam's moments and the gradients of the first exist: it has the peak of
every step but the first. With LoRA the merging of two pushes is traced too.

Fake CPU tensors stand for those of a GPU. There are two differences. Attention keeps the same tensors on both
(the output, and one float32 number for each head and position), but on a GPU it needs a workspace, or keeps
the scores in float32: both are added to the peak. FSDP2's copies on other streams may live a little longer on
a GPU. The kernels of linear attention have stand-ins (`linear_attention.py`), unless
`trainer.attention=rectangles` does without them.

Left out: the loss on the sampled tokens' log-probs (some dozens of bytes for each token), and objectives that
replace autograd's accumulation (VCPO with per-sequence norms), which are refused.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.autograd.graph import saved_tensors_hooks
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from areal_like.automatic_settings import recomputation, router_dtype, uses_fp32_head
from areal_like.config import Config, LoraConfig
from areal_like.errors import ConfigError
from areal_like.expert_layers import ExpertLayers
from areal_like.weights.hf_layout import hf_tensors, is_adapter
from trainer.advantages.gae import Gae
from trainer.advantages.prime import Prime
from trainer.batching.attention_layout import RectangleLayout
from trainer.batching.context_part import ContextPart
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import local
from trainer.models.packed_model import DTYPES, PackedModel, decoder_layers
from trainer.models.policy import ENTROPY_NUMBERS_ON_GPU, BaseReference, Distributions, Policy, TokenLogProbs
from trainer.models.recomputation import InputsOnHost
from trainer.models.value_model import ValueModel
from trainer.objectives import Need
from trainer.optimizer import ShardedAdamW
from trainer.planning.gpus import Placement
from trainer.planning.layers import FEW, Traced, extended, has_equal_layers, with_layers
from trainer.planning.lengths import Lengths, worst_lengths
from trainer.planning.linear_attention import use_stand_ins
from trainer.planning.shapes import ModelShape, find_shape
from trainer.planning.tensor_memory import (
    ACTIVATIONS,
    ATTENTION,
    INPUTS_ON_HOST,
    MOMENTS_ON_HOST,
    ON_HOST,
    TensorMemory,
)
from trainer.step.proximal import ProximalPolicy
from trainer.step.recipe import StepRecipe
from trainer.step.teachers import check_rows
from trainer.weights.push_source import MergedWeights

BYTES = {"float32": 4, "bfloat16": 2}
"""`model.dtype` -> bytes of a number."""
POLICY = "policy"
FORWARDS = (POLICY, "reference", "proximal", "teacher", "critic", "prm")
"""Phases whose FLOPs are the time of a step."""
BASE = "base model (frozen)"
MASTERS = "weights (float32 masters)"
ADAPTERS = "adapter (float32 masters)"
PUSH = "merging for pushes (float32)"
MOMENTS = "Adam's moments"
GRADIENTS = "gradients"
REFERENCE = "reference model"
PROXIMAL = "proximal policy (float32)"
TEACHERS = "teachers (distill.teachers)"
CRITIC = "critic: weights, moments, gradients"
PRM = "reward model: weights, moments, gradients"
SCORES = "attention scores (float32)"
WORKSPACE = "workspace of attention's backward"
PARAMETERS, TRAINED, ADAPTER, LARGEST = "parameters", "trained", "adapter", "largest tensor"


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """The traced step of one rank."""

    world_size: int
    num_params: int
    """Parameters of the model, without an adapter."""
    num_trained: int
    """Parameters that are trained: all, or those of the adapter."""
    num_adapter: int
    """Parameters of the adapter; 0: none."""
    largest_tensor_bytes: int
    """Size of the largest tensor of a push, float32; the experts of a parameter are tensors of their own."""
    num_tokens: int
    """Tokens of the traced micro-batch."""
    peak_bytes: dict[str, int]
    """Bytes by purpose, at the time of the largest total."""
    resident_bytes: dict[str, int]
    """Bytes by purpose, between two steps."""
    on_host_bytes: dict[str, int]
    """Bytes of this rank on the host, at their most: layers' inputs (`trainer.offload_activations`), and
    Adam's moments (`trainer.offload_optimizer`)."""
    linear_flops: dict[str, float]
    """FLOPs of the micro-batch outside attention, by phase: `policy`, `reference`, `proximal`, `teacher`,
    `critic`, `prm`. Includes recomputation."""
    attention_flops: dict[str, float]
    """FLOPs of attention by phase, for each squared token of a sequence: times the sum of squared lengths."""
    context_parallel: int = 1
    """Ranks that compute the micro-batch together. FLOPs are those of all of them, memory is that of one."""
    replicas: int = 1
    """Replicas of the model."""

    @property
    def num_shards(self) -> int:
        """Number of ranks of a replica."""
        return self.world_size // self.replicas

    @property
    def num_data(self) -> int:
        """Number of ranks or context groups with micro-batches of their own."""
        return self.world_size // self.context_parallel

    @property
    def peak(self) -> int:
        """Bytes of the largest total."""
        return sum(self.peak_bytes.values())

    @property
    def unevenness(self) -> float:
        """Rows of rank 0, which has the most, over the mean of all ranks: 1 if the ranks divide the first
        dimension of every parameter."""
        own = self.resident_bytes.get(MASTERS) or self.resident_bytes.get(ADAPTERS, 0)
        return own * self.world_size / (4 * self.num_trained)

    @property
    def resident(self) -> int:
        """Bytes between two steps."""
        return sum(self.resident_bytes.values())


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A traced job on its GPUs."""

    config: Config
    """The resolved configuration, with the model's local directory and the planned GPUs."""
    shape: ModelShape
    lengths: Lengths
    placement: Placement
    trace: StepTrace
    experts: ExpertLayers | None
    """With `model.router_replay`."""

    @property
    def num_samples(self) -> int:
        """Samples of one step."""
        return self.config.trainer.groups_per_step * self.config.sampling.group_size

    @property
    def routes_bytes(self) -> float:
        """Bytes of the routes of one step's samples (`model.router_replay`)."""
        per_token = 0 if self.experts is None else self.experts.routes.bytes_per_token
        return per_token * self.num_samples * self.lengths.mean

    @property
    def ledger_steps(self) -> int:
        """Most steps whose samples are in the ledger: since the oldest kept checkpoint, and those ahead."""
        trainer, buffer = self.config.trainer, self.config.buffer
        kept = trainer.keep_checkpoints * trainer.checkpoint_interval + self.config.staleness_cap + 1
        return trainer.num_steps if buffer.retain_trajectories else min(kept, trainer.num_steps)

    @property
    def param_bytes(self) -> int:
        """Bytes of one parameter in `model.dtype`."""
        return BYTES[str(self.config.model.dtype)]

    @property
    def weights_bytes(self) -> float:
        """Bytes of all weights in `model.dtype`."""
        return float(self.trace.num_params * self.param_bytes)

    @property
    def pushed_bytes(self) -> float:
        """Bytes of a push: all weights, or the adapter alone, in `model.dtype`."""
        if self.config.num_adapters:
            return float(self.trace.num_adapter * self.param_bytes)
        return self.weights_bytes

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU in `model.dtype`."""
        return self.placement.gpu.flops(str(self.config.model.dtype))


def trace_step(
    config: Config, shape: ModelShape, lengths: Lengths, *, every_layer: bool = False
) -> StepTrace:
    """Traces rank 0 of `trainer.world_size` ranks. `config`: resolved, as `with_local_model` returns it.

    `every_layer`: traces all layers even if a few of them give the same result. The trace must be the only
    user of the default process group. Raises ConfigError for an objective that it does not cover, and for a
    model that cannot be trained.
    """
    recipe = StepRecipe.of(config)
    if recipe.objective.late_coefficients:
        raise ConfigError(
            "plan cannot trace objective.norms=ghost or exact, which keep the inputs and gradients of every "
            "layer: set objective.norms=proxy, which `auto` chooses above a billion parameters"
        )
    packed = worst_lengths(lengths, budget_tokens=config.trainer.tokens_per_microbatch)

    def trace(some: ModelShape) -> Traced:
        return _Trace(config, some, recipe, packed, max_response=lengths.max_response).run()

    with _fake_group(config.trainer.world_size):
        try:
            few = not every_layer and has_equal_layers(shape)
            traced = _of_few_layers(shape, trace) if few else None
            return _step_trace(config, shape, packed, traced or trace(shape))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"plan cannot trace {shape.source}: its shapes depend on values of tensors, as in some "
                f"mixtures of experts ({error.func})"
            ) from None


def _of_few_layers(shape: ModelShape, trace: Callable[[ModelShape], Traced]) -> Traced | None:
    with tempfile.TemporaryDirectory() as folder:
        few, more = (trace(with_layers(shape, n, Path(folder, str(n)))) for n in (FEW, FEW + 1))
    return extended(few, more, num_layers=shape.num_layers)


def _step_trace(config: Config, shape: ModelShape, lengths: tuple[int, ...], traced: Traced) -> StepTrace:
    rectangles = [(r.num_sequences, r.num_queries) for r in RectangleLayout.of(lengths).rectangles]
    squares = sum(num_seqs * longest**2 for num_seqs, longest in rectangles)
    flops = traced.flops
    phases = [phase for phase in FORWARDS if phase in flops]
    stages = traced.peaks.values()
    on_host = {purpose: max(parts.get(purpose, 0) for parts in stages) for purpose in ON_HOST}
    peak = max(map(_on_device, stages), key=lambda parts: sum(parts.values()))
    is_grouped = shape.num_kv_heads != shape.num_heads
    context = config.trainer.context_parallel
    num_heads = shape.num_heads // context
    on_cuda = config.trainer.device != "cpu"
    if on_cuda and is_grouped and config.model.dtype == "float32":
        # torch has no fused CUDA kernel: scores once before and once after the softmax.
        peak[SCORES] = max(2 * 4 * n * num_heads * length**2 for n, length in rectangles)
    elif on_cuda:
        # torch's flash_api.cpp, mha_bwd: the queries' gradients in float32, and for grouped queries those
        # of keys and values for every query head, in bfloat16.
        bytes_each = 4 + (2 * 2 if is_grouped else 0)
        positions = max(num_seqs * longest for num_seqs, longest in rectangles)
        peak[WORKSPACE] = bytes_each * positions * num_heads * shape.head_dim
    return StepTrace(
        world_size=config.trainer.world_size,
        num_params=traced.sizes[PARAMETERS],
        num_trained=traced.sizes[TRAINED],
        num_adapter=traced.sizes[ADAPTER],
        largest_tensor_bytes=4 * traced.sizes[LARGEST],
        num_tokens=sum(lengths),
        peak_bytes={purpose: size for purpose, size in peak.items() if size},
        resident_bytes={purpose: size for purpose, size in _on_device(traced.resident).items() if size},
        on_host_bytes={purpose: size for purpose, size in on_host.items() if size},
        linear_flops={phase: float(context * flops[phase]) for phase in phases},
        attention_flops={phase: context * flops[phase + ATTENTION] / squares for phase in phases},
        context_parallel=context,
        replicas=config.trainer.replicas,
    )


def _on_device(parts: Mapping[str, int]) -> dict[str, int]:
    return {purpose: size for purpose, size in parts.items() if purpose not in ON_HOST}


@contextmanager
def _fake_group(world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _FakeRanks(Ranks):
    """Rank 0. Sums over ranks and checksums are read as numbers, which a fake tensor does not have: all sums
    are 1."""

    def sum(self, values: Tensor) -> Tensor:
        return np.ones(values.shape)  # type: ignore[return-value]

    def difference_of_replicas(self, rows: Iterable[Tensor]) -> str:
        return ""


class _Trace:
    def __init__(
        self,
        config: Config,
        shape: ModelShape,
        recipe: StepRecipe,
        lengths: tuple[int, ...],
        *,
        max_response: int,
    ) -> None:
        self._config = config
        self._shape = shape
        self._recipe = recipe
        self._lengths = lengths
        self._max_response = max_response
        self._memory = TensorMemory(vocab_size=shape.vocab_size)
        trainer = config.trainer
        self._ranks = _FakeRanks(context_parallel=trainer.context_parallel, replicas=trainer.replicas)

    def run(self) -> Traced:
        # Built outside the mode: rotary frequencies are real tensors, which `allow_non_fake_inputs` permits.
        config, recipe = self._config, self._recipe
        dtype, reshards = config.model.dtype, config.trainer.reshard_after_forward
        policy = self._build_policy(lora=config.model.lora)
        reference: Policy | BaseReference | None = None
        proximal_model = None
        if recipe.needs_reference:
            is_base = policy.has_adapter and not config.kl.reference
            reference = BaseReference(policy) if is_base else self._build_policy(DTYPES[dtype])
        if recipe.objective.proximal:
            proximal_model = policy if policy.has_adapter else self._build_policy()
        teachers = self._build_teachers() if Need.TEACHER in recipe.objective.needs else []
        second: ValueModel | Policy | None = None
        purpose, phase = CRITIC, "critic"
        if isinstance(recipe.estimator, Gae):
            second = self._build_critic()
        elif isinstance(recipe.estimator, Prime):
            second, purpose, phase = self._build_policy(), PRM, "prm"
            second.with_entropy = False
        found = {POLICY: policy, REFERENCE: reference, PROXIMAL: proximal_model, purpose: second}
        models = {name: model for name, model in found.items() if isinstance(model, PackedModel)}
        for model in {*models.values(), *teachers}:
            if model not in teachers:  # their layers are not the policy's: they are one stage
                self._watch_layers(model)
            has_kernels = config.trainer.device != "cpu" and config.trainer.attention != "rectangles"
            if has_kernels and dtype != "float32":
                use_stand_ins(model)
            for each in model.modules():
                if isinstance(saving := getattr(each, "_gradient_checkpointing_func", None), InputsOnHost):
                    saving.saving = self._inputs_on_host
            for param in model.parameters():
                if not param.requires_grad:  # `shard` does this too, but cannot with fake tensors
                    param.data = param.data.to(DTYPES[str(dtype)])
        with FakeTensorMode(allow_non_fake_inputs=True), self._memory.recording():
            with self._memory.as_(ADAPTERS if policy.has_adapter else MASTERS):
                policy.shard(self._ranks, dtype=dtype, reshard_after_forward=reshards)
            for param in policy.parameters():
                if not param.requires_grad:
                    self._memory.made(local(param)).purpose = BASE
            with self._memory.as_(MOMENTS):
                optimizer = self._optimizer(policy)
            if isinstance(reference, Policy):
                reference.with_entropy = False
                with self._memory.as_(REFERENCE):
                    reference.shard(self._ranks, dtype=dtype, frozen=True)
            for teacher in teachers:
                teacher.with_entropy = False
                with self._memory.as_(TEACHERS):
                    teacher.shard(self._ranks, dtype=dtype, frozen=True)
            proximal = None
            if proximal_model is not None and recipe.objective.proximal:
                with self._memory.as_(PROXIMAL):
                    if proximal_model is not policy:
                        proximal_model.shard(self._ranks, dtype=dtype, reshard_after_forward=reshards)
                    proximal = ProximalPolicy(proximal_model, policy, rule=recipe.objective.proximal)
            if second is not None:
                with self._memory.as_(purpose):
                    second.shard(self._ranks, dtype=dtype, reshard_after_forward=reshards)
                    second_optimizer = self._optimizer(second)
            is_merged = policy.has_adapter and config.weights.lora == "merged"
            pushed = self._merged(policy) if is_merged else None  # keeps what the next push is compared with
            resident = self._memory.now_bytes()
            batch = self._batch()
            if reference is not None:
                with torch.no_grad(), self._memory.as_(ACTIVATIONS, phase="reference"):
                    reference(batch)
            kept: Distributions | None = None
            for teacher in teachers[-1:]:
                with torch.no_grad(), self._memory.as_(ACTIVATIONS, phase="teacher"):
                    if Need.REVERSE_KL in recipe.objective.needs:
                        kept = Distributions(teacher.all_logprobs(batch)[:, : self._shape.vocab_size])
                    else:
                        teacher(batch)
            if proximal is not None:
                with torch.no_grad(), self._memory.as_(ACTIVATIONS, phase="proximal"):
                    proximal(batch)
            self._train_policy(policy, optimizer, batch, kept)
            if second is not None:
                self._train_second(second, second_optimizer, batch, purpose=purpose, phase=phase)
            del pushed
        return self._traced(models, resident)

    def _traced(self, models: Mapping[str, PackedModel], resident: dict[str, int]) -> Traced:
        params = list(models[POLICY].named_parameters())
        adapter = sum(param.numel() for name, param in params if is_adapter(name))
        with _disable_current_modes():  # names of experts are found by the values of real tensors
            largest = max(math.prod(tensor.shape) for tensor in hf_tensors(models[POLICY].model))
        return Traced(
            num_layers=self._shape.num_layers,
            peaks=self._memory.peaks(),
            resident=resident,
            flops=self._memory.flops,
            sizes={
                PARAMETERS: sum(param.numel() for _, param in params) - adapter,
                TRAINED: sum(param.numel() for _, param in params if param.requires_grad),
                ADAPTER: adapter,
                LARGEST: largest,
            },
            model_bytes={
                name: sum(param.numel() * param.itemsize for param in model.parameters())
                for name, model in models.items()
            },
        )

    def _watch_layers(self, model: PackedModel) -> None:
        """Tells the record of memory when a layer's forward or backward begins."""

        def watch(layer: nn.Module, index: int) -> None:
            def before(*_: object) -> None:
                if self._memory.stage.part == "forward":  # else it is recomputed
                    self._memory.begin("forward", layer=index)

            def after(_module: nn.Module, _inputs: object, output: Any) -> None:
                hidden: Any = output if isinstance(output, Tensor) else output[0]
                if hidden.requires_grad:
                    hidden.register_hook(lambda _: self._memory.begin("backward", layer=index))

            layer.register_forward_pre_hook(before)
            layer.register_forward_hook(after)

        for index, layer in enumerate(decoder_layers(model.model)):
            watch(layer, index)

    def _inputs_on_host(self) -> saved_tensors_hooks:
        """Saves tensors as `InputsOnHost` does, and counts the copies as the host's."""

        def to_host(tensor: Tensor) -> Tensor:
            size = tensor.numel() * tensor.itemsize
            with self._memory.as_(INPUTS_ON_HOST):  # torch rounds pinned memory up to a power of two
                whole = torch.empty(1 << (size - 1).bit_length(), dtype=torch.uint8)
            return whole[:size].view(tensor.dtype).view(tensor.shape)

        return saved_tensors_hooks(to_host, torch.clone)

    def _moment_on_host(self, moment: Tensor) -> Tensor:
        with self._memory.as_(MOMENTS_ON_HOST):
            return torch.empty_like(moment)

    def _train_policy(
        self, policy: Policy, optimizer: ShardedAdamW, batch: PackedBatch, teacher: Distributions | None
    ) -> None:
        needs = self._recipe.objective.needs
        policy.with_collision = Need.COLLISION in needs
        policy.with_entropy_gradient = Need.ENTROPY in needs
        self._add_gradients(policy, GRADIENTS)
        with self._memory.as_(ACTIVATIONS, phase="policy"):
            out = policy(batch, teacher)
            loss = out.logprobs_S.sum()
            if teacher is not None:
                loss = loss + out.reverse_kl_S.sum()
            if policy.with_entropy_gradient:
                loss = loss + out.entropy_S.sum()
            self._memory.begin("backward")
            loss.backward()
            del out, loss
            self._memory.begin("update")
            optimizer.step(divisor=1.0, lr=0.0)

    def _train_second(
        self,
        model: ValueModel | Policy,
        optimizer: ShardedAdamW,
        batch: PackedBatch,
        *,
        purpose: str,
        phase: str,
    ) -> None:
        """Trains the critic or the reward model."""
        self._add_gradients(model, purpose)
        with self._memory.as_(ACTIVATIONS, phase=phase):
            output = model(batch)
            loss = (output.logprobs_S if isinstance(output, TokenLogProbs) else output).sum()
            self._memory.begin("backward")
            loss.backward()
            self._memory.begin("update")
            optimizer.step(divisor=1.0, lr=0.0)

    def _merged(self, policy: Policy) -> MergedWeights:
        """The source of the pushes, after two of them: the second one is compared with the first."""
        with self._memory.as_(PUSH, phase="push"):
            with _disable_current_modes():  # names of experts are found by the values of real tensors
                merged = MergedWeights(policy.model, self._ranks, dtype=DTYPES[str(self._config.model.dtype)])
            for _ in range(2):
                merged.begin()
                for tensor in merged.tensors:
                    merged.rows(tensor.param)
                merged.end()
        return merged

    def _add_gradients(self, model: PackedModel, purpose: str) -> None:
        """Adds the gradients of an earlier micro-batch."""
        with self._memory.as_(purpose):
            for param in model.parameters():
                if param.requires_grad:
                    param.grad = torch.zeros_like(param)

    def _optimizer(self, model: PackedModel) -> ShardedAdamW:
        """An optimizer that already has moments, which the first step creates."""
        optimizer = ShardedAdamW.of(
            self._config.trainer,
            model,
            self._ranks,
            lr=self._config.trainer.lr,
            to_host=self._moment_on_host,
        )
        optimizer.step(divisor=1.0, lr=0.0)
        return optimizer

    def _build_policy(
        self, dtype: torch.dtype = torch.float32, *, lora: LoraConfig | None = None, directory: str = ""
    ) -> Policy:
        trainer = self._config.trainer
        policy = Policy.build(
            directory or self._shape.directory,
            temperature=self._config.sampling.temperature,
            chunk_tokens=trainer.logprob_chunk_tokens,
            fp32_head=uses_fp32_head(self._config),
            router_dtype=router_dtype(self._config),
            gradient_checkpointing=recomputation(self._config),
            offload_activations=trainer.offload_activations,
            master_dtype=dtype,
            lora_settings=lora,
        )
        if trainer.device != "cpu":
            policy.entropy_numbers = ENTROPY_NUMBERS_ON_GPU  # fake tensors are a CPU's
        return policy

    def _build_teachers(self) -> list[Policy]:
        """The models of `distill.teachers`, the largest last: each token is computed by one of them."""
        places = {path: f"distill.teachers.{label}" for label, path in self._config.distill.models.items()}
        built = [
            self._build_policy(
                DTYPES[str(self._config.model.dtype)], directory=str(find_shape(path, key=key)[0])
            )
            for path, key in places.items()
        ]
        if self._config.distill.loss == "full":
            for path, teacher in zip(places, built, strict=True):
                check_rows(places[path], teacher.model, num_rows=self._shape.vocab_size)
        return sorted(built, key=lambda model: sum(param.numel() for param in model.parameters()))

    def _build_critic(self) -> ValueModel:
        return ValueModel.build(
            self._shape.directory,
            gradient_checkpointing=recomputation(self._config),
            offload_activations=self._config.trainer.offload_activations,
            lora_settings=replace(self._config.model.lora, path=""),
        )

    def _batch(self) -> PackedBatch:
        lengths = self._lengths
        total, num_seqs = sum(lengths), len(lengths)
        num_sampled = sum(min(length - 1, self._max_response) for length in lengths)

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype)

        with self._memory.as_(ACTIVATIONS):
            return PackedBatch(
                tokens_T=zeros(total, torch.int64),
                positions_T=zeros(total, torch.int64),
                samples_T=zeros(total, torch.int64),
                behavior_logp_T=zeros(total, torch.float32),
                versions_T=zeros(total, torch.int32),
                lags_T=zeros(total, torch.int64),
                advantages_T=zeros(total, torch.float64),
                rewards_N=zeros(num_seqs, torch.float64),
                groups_N=zeros(num_seqs, torch.int64),
                truncated_N=zeros(num_seqs, torch.bool),
                sampled_S=zeros(num_sampled, torch.int64),
                lengths=lengths,
                sample_lengths=lengths,
                context=self._context_part(total, num_sampled),
            )

    def _context_part(self, num_rows: int, num_sampled: int) -> ContextPart | None:
        if (size := self._ranks.context_parallel) == 1:
            return None
        own, sampled = (torch.zeros(-(-num // size), dtype=torch.int64) for num in (num_rows, num_sampled))
        return ContextPart(
            num_rows=num_rows,
            most_sampled=len(sampled),
            row_R=own,
            token_R=own,
            read_C=sampled,
            target_C=sampled,
            place_S=torch.zeros(num_sampled, dtype=torch.int64),
        )
