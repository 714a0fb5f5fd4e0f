"""Settings of the trainer's ranks, its optimizer, and the KL penalty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from areal_like.config.common import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    check_device,
    require,
)

NormalizerName = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]
"""Normalizers of the loss (`trainer/objectives/normalizers.py`)."""
Recomputation = Literal[False, True, "selective"]
"""A resolved `trainer.gradient_checkpointing` (`trainer/models/recomputation.py`)."""


@dataclass(frozen=True, kw_only=True)
class KlConfig(Section, key="kl"):
    """A penalty on the distance from a frozen reference model.

    It costs one extra forward pass per step and, except with LoRA, the reference model's memory.
    """

    coef: NonNegativeFloat = 0.0
    """Weight of the penalty; 0: no penalty, and no reference model is loaded."""
    budget: NonNegativeFloat = 0.0
    """Mean KL per sampled token, in nats and by `estimator`, that is held by adapting the weight after each
    step, from `coef` on; 0: the weight does not change."""
    gain: PositiveFloat = 0.1
    """With `budget`: a step changes the weight by at most 20 % of `gain`, which is at most 1."""
    estimator: Literal["k1", "k2", "k3"] = "k2"
    """Per-token estimator of KL(policy || ref), with x = logp - ref_logp: `k1` x, `k2` x^2 / 2, `k3` exp(-x)
    - 1 + x."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: added to the loss of each token. `reward`: subtracted from the reward of each sample before the
    advantages are computed; a step then waits for its last group."""
    reference: str = ""
    """Hugging Face directory or name of the reference model; empty: the initial model of the run, and with
    LoRA `model.path` without an adapter, which is in memory already."""

    def check(self) -> None:
        require(
            not self.budget or self.coef > 0,
            f"kl.budget={self.budget:g} adapts a weight that begins with kl.coef: set kl.coef above 0",
        )
        require(self.gain <= 1, f"kl.gain={self.gain:g}: use a number above 0 and at most 1")
        require(
            self.budget > 0 or self.gain == KlConfig.gain,
            f"kl.gain={self.gain:g} has no effect without a budget: set kl.budget, or leave kl.gain out",
        )
        require(
            not self.budget or (self.place, self.estimator) != ("loss", "k1"),
            f"kl.budget={self.budget:g} with kl.place=loss and kl.estimator=k1: the gradient of that penalty "
            "is zero in expectation, so no weight of it keeps a budget: set kl.estimator=k2 or k3",
        )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Section, key="trainer"):
    """The trainer's ranks and its optimizer."""

    num_steps: PositiveInt = 600
    """Number of optimizer steps of the whole run."""
    world_size: PositiveInt = 1
    """Number of ranks (FSDP2 shards) of the trainer on all of its machines. Under torchrun, torchrun's number
    applies."""
    context_parallel: PositiveInt = 1
    """Number of ranks that compute each micro-batch together (Ulysses), which divides its activations by it:
    each has a part of the tokens, and in attention a part of the heads. It must divide `world_size` and the
    model's KV heads."""
    replicas: PositiveInt = 1
    """Number of replicas of the model (HSDP): the ranks of each, neighbors, shard the weights among them, and
    the replicas exchange only the sum of a step's gradients. It must divide `world_size`. With the ranks of a
    machine as a replica, weights are gathered within the machine."""
    num_hosts: PositiveInt = 1
    """Number of machines of the trainer. Start `python -m trainer` on each of them; it starts the ranks of
    that machine."""
    host_index: int = 0
    """With `num_hosts` above 1: the number of this machine, 0 to num_hosts - 1. Rank 0 is on machine 0."""
    rendezvous: str = ""
    """With `num_hosts` above 1: `HOST:PORT` of the ranks' rendezvous, an address of machine 0 that the other
    machines can reach."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`: the ranks of a machine use its GPUs from N on; `cuda` means `cuda:0`."""
    groups_per_step: PositiveInt = 16
    """Number of groups (prompts) in one optimizer step."""
    tokens_per_microbatch: PositiveInt = 4096
    """Largest number of tokens in one forward and backward; sequences are packed without padding. A shared
    prefix counts in full for one of its sequences, and an eighth for each of the others."""
    balance: Literal["auto", "streaming", "balanced"] = "auto"
    """How a step's sequences are divided over ranks and micro-batches. `streaming`: a rank runs the groups
    that it has fetched, each micro-batch as soon as it is full. `balanced`: by cost, when the step is
    complete. `auto`: balanced with several ranks and max_staleness above 0."""
    lr: NonNegativeFloat = 8e-5
    """AdamW learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 10
    """Steps of linear learning-rate warm-up."""
    lr_schedule: Literal["constant", "linear"] = "linear"
    """Learning rate after warm-up; `linear` falls to zero at num_steps."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradient clipping by the global norm; 0 turns it off."""
    normalizer: NormalizerName = "token_mean"
    """How token losses are averaged over a step: the mean over tokens; the mean over samples of each
    sample's mean or sum; or (`constant`, Dr. GRPO) the sum divided by samples times the limit of sampled
    tokens."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of an entropy bonus in the loss, in 1/nats; 0: none."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Number of rows of logits in memory at the same time, one row per token."""
    gradient_checkpointing: bool | Literal["selective", "auto"] = "auto"
    """Recompute activations in the backward. `true`: all of a layer; `selective`: not attention, and only
    every second matrix product, which is faster and needs more memory; `auto`: `true` on GPUs, else
    `false`."""
    offload_activations: bool = False
    """Keep the layers' inputs in pinned host memory between forward and backward: layers * tokens of a
    micro-batch * hidden size * bytes of a number less on each GPU. Needs recomputed activations."""
    offload_optimizer: bool = False
    """Keep Adam's moments in pinned host memory, 8 bytes for each parameter of a rank, and copy them to its
    device and back in every update: one or two seconds more a step for a rank with 30 GB of them."""
    attention: Literal["auto", "rectangles", "varlen"] = "auto"
    """Attention over packed sequences. `varlen`: torch's CUDA kernel for sequences of different lengths, for
    16-bit dtypes only; `rectangles`: sequences padded to equal lengths, on any device; `auto`: varlen where
    it runs. Linear attention follows it with kernels of its own (flash-linear-attention; `varlen` needs
    causal-conv1d too)."""
    kernels: Literal["auto", "torch"] = "auto"
    """`auto`: FlashAttention 3 (`flash_attn_interface`, compute capability 9.0) and Liger's norms, rotary
    embeddings and SwiGLU where they are installed, on GPUs; `torch`: only torch's own kernels."""
    compile: bool = False
    """True: norms and MLPs of policy and reference model are compiled with torch.compile, which takes time
    at the start, and needs g++ on CPUs. Refused with objectives that read gradients of single sequences
    (VCPO)."""
    reshard_after_forward: bool = True
    """Free the gathered weights of a layer after its forward and gather them again in its backward. With
    `false`, ranks exchange less data, but each needs memory for the whole model in `model.dtype`."""
    checkpoint_interval: PositiveInt = 100
    """Steps between checkpoints; the last step always has one."""
    checkpoint_minutes: NonNegativeFloat = 0.0
    """Minutes after the last checkpoint until another one is written, at the end of a step, in addition to
    those of `checkpoint_interval`. 0: no additional checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of checkpoints kept on disk."""
    keep_rolled_back: NonNegativeInt = 1
    """Number of checkpoints kept of steps that were undone (`step_000300.rolled_back`), those of the last
    rollback first. A resume never reads them; to continue from one after all, rename it while the run is
    stopped."""
    collective_timeout_s: PositiveFloat = 300.0
    """Timeout of the ranks' collectives, in seconds."""
    fetch_timeout_s: PositiveFloat = 300.0
    """Longest time, in seconds, that a rank waits for a group while no rollout server makes progress; after
    it the trainer reports a stall and stops. It starts when `rollout.generate_timeout_s` has passed, because
    a server first replaces an engine that does not respond. While the servers make progress, ranks wait
    without limit."""
    buffer_timeout_s: PositiveFloat = 300.0
    """Longest time without a response of the buffer, in seconds, that the trainer tolerates. If the buffer
    restarts within this time, the run continues without loss."""
    num_threads: int | Literal["auto"] = "auto"
    """CPU threads of one rank. `auto`: one. In training from rows (`areal-like sft` and the like), where no
    engine needs the other cores, the ranks share all cores of the machine, with a model of 20 million
    parameters or more on CPUs."""
    peak_tflops: NonNegativeFloat = 0.0
    """Peak dense bfloat16 rate of one rank's device in TFLOP/s, the denominator of `mfu`. 0: determined by
    the GPU's name; a CPU, a part of a GPU (MIG) or an unknown GPU then has no `mfu`."""

    @property
    def least_threads(self) -> int:
        """CPU threads that a rank always has."""
        return 1 if self.num_threads == "auto" else self.num_threads

    def check(self) -> None:
        require(
            self.num_threads == "auto" or self.num_threads >= 1,
            f"trainer.num_threads must be at least 1 or auto, not {self.num_threads}",
        )
        for key in ("context_parallel", "replicas"):
            require(
                self.world_size % getattr(self, key) == 0,
                f"trainer.{key}={getattr(self, key)} does not divide trainer.world_size={self.world_size}: "
                "change one of them",
            )
        require(
            self.groups_per_step * self.context_parallel >= self.world_size,
            "trainer.groups_per_step must be at least trainer.world_size"
            + (" / trainer.context_parallel" if self.context_parallel > 1 else ""),
        )
        self._check_hosts()
        check_device(self.device, key="trainer.device")
        require(
            self.attention != "varlen" or self.device != "cpu",
            "trainer.attention=varlen needs a GPU, and trainer.device is cpu: set trainer.attention=auto",
        )
        require(
            not self.offload_activations or bool(self.gradient_checkpointing),
            "trainer.offload_activations=true moves the inputs of recomputed layers to the host: set "
            "trainer.gradient_checkpointing to true, selective or auto, or turn it off",
        )
        require(
            not (self.compile and self.gradient_checkpointing == "selective"),
            "trainer.gradient_checkpointing=selective cannot keep products that are compiled "
            "(trainer.compile=true): set gradient_checkpointing to true, or compile to false",
        )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"trainer.betas={list(self.betas)}: use two numbers of at least 0 and below 1",
        )

    def _check_hosts(self) -> None:
        require(
            0 <= self.host_index < self.num_hosts,
            f"trainer.host_index={self.host_index}: use 0 to {self.num_hosts - 1} "
            f"(trainer.num_hosts={self.num_hosts})",
        )
        if self.num_hosts == 1:
            return
        require(
            self.world_size % self.num_hosts == 0,
            f"trainer.world_size={self.world_size} ranks cannot be divided evenly over "
            f"trainer.num_hosts={self.num_hosts} machines: change one of them",
        )
        host, _, port = self.rendezvous.rpartition(":")
        require(
            bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16,
            f"trainer.rendezvous={self.rendezvous!r}: with trainer.num_hosts={self.num_hosts} give the "
            "address of machine 0 and a free port there, e.g. 10.0.0.9:29400",
        )
