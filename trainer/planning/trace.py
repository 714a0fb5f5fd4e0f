"""Traces a rank's optimizer step on fake tensors: its memory and FLOPs, without weights, GPU or time.

The model, its sharding, the packed batch, the chunked head, the backward and the optimizer are those of a
real job, under torch's FakeTensorMode and a process group that transfers nothing. The second of two
micro-batches is traced, when Adam's moments and the gradients of the first exist: it has the peak of every
step but the first.

Fake CPU tensors stand for those of a GPU. There are two differences. Attention keeps the same tensors on both
(the output, and one float32 number for each head and position), but on a GPU it needs a workspace, or keeps
the scores in float32: both are added to the peak. FSDP2's copies on other streams may live a little longer on
a GPU.

Left out: the loss on the sampled tokens' log-probs (some dozens of bytes for each token), and objectives that
replace autograd's accumulation (VCPO with per-sequence norms), which are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from areal_like.config import Config
from areal_like.errors import ConfigError
from trainer.advantages.gae import Gae
from trainer.batching.attention_layout import RectangleLayout
from trainer.batching.packing import PackedBatch
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import DTYPES, PackedModel
from trainer.models.policy import Policy
from trainer.models.value_model import ValueModel
from trainer.objectives import Need
from trainer.optimizer import ShardedAdamW
from trainer.planning.gpus import Placement
from trainer.planning.lengths import Lengths, worst_lengths
from trainer.planning.shapes import ModelShape
from trainer.planning.tensor_memory import ACTIVATIONS, ATTENTION, TensorMemory
from trainer.step.recipe import StepRecipe

BYTES = {"float32": 4, "bfloat16": 2}
"""`model.dtype` -> bytes of a number."""
MASTERS = "weights (float32 masters)"
MOMENTS = "Adam's moments"
GRADIENTS = "gradients"
REFERENCE = "reference model"
PROXIMAL = "proximal policy (float32)"
CRITIC = "critic: weights, moments, gradients"
SCORES = "attention scores (float32)"
WORKSPACE = "workspace of attention's backward"


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """The traced step of one rank."""

    world_size: int
    num_params: int
    largest_param_bytes: int
    """Size of the largest parameter, float32."""
    num_tokens: int
    """Tokens of the traced micro-batch."""
    peak_bytes: dict[str, int]
    """Bytes by purpose, at the time of the largest total."""
    resident_bytes: dict[str, int]
    """Bytes by purpose, between two steps."""
    linear_flops: dict[str, float]
    """FLOPs of the micro-batch outside attention, by phase: `policy`, `reference`, `proximal`, `critic`.
    Includes recomputation."""
    attention_flops: dict[str, float]
    """FLOPs of attention by phase, for each squared token of a sequence: times the sum of squared lengths."""

    @property
    def peak(self) -> int:
        """Bytes of the largest total."""
        return sum(self.peak_bytes.values())

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

    @property
    def num_samples(self) -> int:
        """Samples of one step."""
        return self.config.trainer.groups_per_step * self.config.sampling.group_size

    @property
    def param_bytes(self) -> int:
        """Bytes of one parameter in `model.dtype`."""
        return BYTES[str(self.config.model.dtype)]

    @property
    def weights_bytes(self) -> float:
        """Bytes of all weights in `model.dtype`."""
        return float(self.trace.num_params * self.param_bytes)

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU in `model.dtype`."""
        return self.placement.gpu.flops(str(self.config.model.dtype))


def trace_step(config: Config, shape: ModelShape, lengths: Lengths) -> StepTrace:
    """Traces rank 0 of `trainer.world_size` ranks. `config`: resolved, as `with_local_model` returns it.

    It must be the only user of the default process group. Raises ConfigError for an objective that the trace
    does not cover, and for a model that cannot be trained.
    """
    recipe = StepRecipe.of(config)
    if recipe.objective.late_coefficients:
        raise ConfigError(
            "plan cannot trace objective.norms=ghost or exact, which keep the inputs and gradients of every "
            "layer: set objective.norms=proxy, which `auto` chooses above a billion parameters"
        )
    packed = worst_lengths(lengths, budget_tokens=config.trainer.tokens_per_microbatch)
    with _fake_group(config.trainer.world_size):
        try:
            return _Trace(config, shape, recipe, packed, max_response=lengths.max_response).run()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"plan cannot trace {shape.source}: its shapes depend on values of tensors, as in some "
                f"mixtures of experts ({error.func})"
            ) from None


@contextmanager
def _fake_group(world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class _FakeRanks(Ranks):
    """Rank 0. The optimizer reads a sum over ranks as a number, which a fake tensor does not have: it is
    1."""

    def sum(self, values: Tensor) -> Tensor:
        return 1.0  # type: ignore[return-value]


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
        self._ranks = _FakeRanks()

    def run(self) -> StepTrace:
        # Built outside the mode: rotary frequencies are real tensors, which `allow_non_fake_inputs` permits.
        config, recipe = self._config, self._recipe
        dtype, reshards = config.model.dtype, config.trainer.reshard_after_forward
        policy = self._build_policy()
        reference = self._build_policy(DTYPES[dtype]) if recipe.needs_reference else None
        proximal = self._build_policy() if recipe.objective.proximal else None
        critic = self._build_critic() if isinstance(recipe.estimator, Gae) else None
        with FakeTensorMode(allow_non_fake_inputs=True), self._memory.recording():
            with self._memory.as_(MASTERS):
                policy.shard(self._ranks, dtype=dtype, reshard_after_forward=reshards)
            with self._memory.as_(MOMENTS):
                optimizer = self._optimizer(policy)
            if reference is not None:
                reference.with_entropy = False
                with self._memory.as_(REFERENCE):
                    reference.shard(self._ranks, dtype=dtype, frozen=True)
            if proximal is not None:
                proximal.requires_grad_(False).with_entropy = False
                with self._memory.as_(PROXIMAL):
                    proximal.shard(self._ranks, dtype=dtype, reshard_after_forward=reshards)
            if critic is not None:
                with self._memory.as_(CRITIC):
                    critic.shard(self._ranks, dtype=dtype, reshard_after_forward=reshards)
                    critic_optimizer = self._optimizer(critic)
            resident = self._memory.now_bytes()
            batch = self._batch()
            if reference is not None:
                with torch.no_grad(), self._memory.as_(ACTIVATIONS, phase="reference"):
                    reference(batch)
            if proximal is not None:
                with torch.no_grad(), self._memory.as_(ACTIVATIONS, phase="proximal"):
                    proximal(batch)
            self._train_policy(policy, optimizer, batch)
            if critic is not None:
                self._train_critic(critic, critic_optimizer, batch)
        return self._result(policy, resident)

    def _result(self, policy: Policy, resident: dict[str, int]) -> StepTrace:
        rectangles = [(r.num_sequences, r.num_queries) for r in RectangleLayout.of(self._lengths).rectangles]
        squares = sum(num_seqs * longest**2 for num_seqs, longest in rectangles)
        flops = self._memory.flops
        phases = [phase for phase in flops if not phase.endswith(ATTENTION)]
        peak = self._memory.peak_bytes()
        if self._keeps_scores:
            # Once before and once after the softmax.
            peak[SCORES] = max(2 * 4 * n * self._shape.num_heads * length**2 for n, length in rectangles)
        elif self._config.trainer.device != "cpu":
            # torch's flash_api.cpp, mha_bwd: the queries' gradients in float32, and for grouped queries those
            # of keys and values for every query head, in bfloat16.
            bytes_each = 4 + (2 * 2 if self._is_grouped else 0)
            positions = max(num_seqs * longest for num_seqs, longest in rectangles)
            peak[WORKSPACE] = bytes_each * positions * self._shape.num_heads * self._shape.head_dim
        params = list(policy.parameters())
        return StepTrace(
            world_size=self._config.trainer.world_size,
            num_params=sum(param.numel() for param in params),
            largest_param_bytes=max(param.numel() * param.itemsize for param in params),
            num_tokens=sum(self._lengths),
            peak_bytes=peak,
            resident_bytes=resident,
            linear_flops={phase: float(flops[phase]) for phase in phases},
            attention_flops={phase: flops[phase + ATTENTION] / squares for phase in phases},
        )

    @property
    def _keeps_scores(self) -> bool:
        """True if torch has no fused CUDA kernel for the attention: float32 with grouped queries."""
        on_cuda = self._config.trainer.device != "cpu"
        return on_cuda and self._is_grouped and self._config.model.dtype == "float32"

    @property
    def _is_grouped(self) -> bool:
        return self._shape.num_kv_heads != self._shape.num_heads

    def _train_policy(self, policy: Policy, optimizer: ShardedAdamW, batch: PackedBatch) -> None:
        needs = self._recipe.objective.needs
        policy.with_collision = Need.COLLISION in needs
        policy.with_entropy_gradient = Need.ENTROPY in needs
        self._add_gradients(policy, GRADIENTS)
        with self._memory.as_(ACTIVATIONS, phase="policy"):
            out = policy(batch)
            loss = out.logprobs_S.sum()
            if policy.with_entropy_gradient:
                loss = loss + out.entropy_S.sum()
            loss.backward()
            del out, loss
            optimizer.step(divisor=1.0, lr=0.0)

    def _train_critic(self, critic: ValueModel, optimizer: ShardedAdamW, batch: PackedBatch) -> None:
        self._add_gradients(critic, CRITIC)
        with self._memory.as_(ACTIVATIONS, phase="critic"):
            critic(batch).sum().backward()
            optimizer.step(divisor=1.0, lr=0.0)

    def _add_gradients(self, model: PackedModel, purpose: str) -> None:
        """Adds the gradients of an earlier micro-batch."""
        with self._memory.as_(purpose):
            for param in model.parameters():
                param.grad = torch.zeros_like(param)

    def _optimizer(self, model: PackedModel) -> ShardedAdamW:
        """An optimizer that already has moments, which the first step creates."""
        optimizer = ShardedAdamW.of(self._config.trainer, model, self._ranks, lr=self._config.trainer.lr)
        optimizer.step(divisor=1.0, lr=0.0)
        return optimizer

    def _build_policy(self, dtype: torch.dtype = torch.float32) -> Policy:
        trainer = self._config.trainer
        return Policy.build(
            self._shape.directory,
            temperature=self._config.sampling.temperature,
            chunk_tokens=trainer.logprob_chunk_tokens,
            fp32_head=self._config.model.fp32_head,
            gradient_checkpointing=bool(trainer.gradient_checkpointing),
            master_dtype=dtype,
        )

    def _build_critic(self) -> ValueModel:
        checkpointing = bool(self._config.trainer.gradient_checkpointing)
        return ValueModel.build(self._shape.directory, gradient_checkpointing=checkpointing)

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
                segments_T=zeros(total, torch.int64),
                behavior_logp_T=zeros(total, torch.float32),
                versions_T=zeros(total, torch.int32),
                lags_T=zeros(total, torch.int64),
                advantages_T=zeros(total, torch.float64),
                cu_seqlens=zeros(num_seqs + 1, torch.int32),
                rewards_N=zeros(num_seqs, torch.float64),
                groups_N=zeros(num_seqs, torch.int64),
                truncated_N=zeros(num_seqs, torch.bool),
                sampled_S=zeros(num_sampled, torch.int64),
                lengths=lengths,
            )
