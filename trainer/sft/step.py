"""One step of supervised training, and the held-out loss.

    sequences -> micro-batches -> [forward -> sum of -log p -> backward]* -> divide -> clip -> AdamW

The loss of a step is the mean of -log p over all learned tokens of the step: sums over micro-batches and
ranks are divided once by the global number of learned tokens. So it depends neither on the cuts nor on the
number of ranks, and a long completion weighs more than a short one, as in TRL's SFTTrainer.

Shape suffix: S learned tokens of a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from areal_like.chat.token_row import TokenRow
from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.packing import PackedBatch, Packer, in_lockstep
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.metrics.speed import StepSpeed
from trainer.metrics.step_totals import shared_share
from trainer.models.lora import use_dropout
from trainer.models.policy import Policy
from trainer.optimizer import ShardedAdamW

_NLL, _ENTROPY, _LEARNED, _TOKENS, _ROWS, _SEQUENCES, _MICROBATCHES, _FLOPS = range(8)


class SupervisedStep:
    """Runs steps on one rank's share of the sequences. Its methods are collective."""

    def __init__(
        self,
        policy: Policy,
        optimizer: ShardedAdamW,
        ranks: Ranks,
        *,
        budget_tokens: int,
        peak_tflops: float = 0.0,
        dropout_seed: int | None = None,
    ) -> None:
        """`policy` is sharded and has temperature 1. `budget_tokens`: most tokens of a micro-batch.

        `peak_tflops`: peak of one rank's device, for MFU; 0: looked up by its name. `dropout_seed`: of the
        dropout of the policy's adapter in training; None: no dropout.
        """
        self._dropout_seed = dropout_seed
        assert policy.temperature == 1.0
        self.policy = policy
        self.optimizer = optimizer
        self._ranks = ranks
        self._budget_tokens = budget_tokens
        self._speed = StepSpeed(policy, ranks, peak_tflops=peak_tflops)

    def train(self, sequences: Iterable[TokenRow], *, step: int) -> dict[str, float]:
        """Runs one optimizer step after `step` completed steps; returns its metrics, equal on all ranks
        except for times.

        Metrics: loss, grad_norm, lr, entropy (mean over learned tokens, in nats), num_tokens, tokens_trained
        (learned), shared_share, num_sequences, num_microbatches, wait_s (for the sequences), compute_s,
        reduce_s, update_s, step_s, and those of `StepSpeed`. Without a learned token on any rank no update is
        made.
        """
        timer = self._speed.begin(step)
        sums = self._sums()
        with self._dropout(step):
            for microbatch, live in self._microbatches(timer.timed("wait_s", sequences)):
                with timer.span("compute_s"):
                    logp_S, entropy_S, _ = self.policy(microbatch)
                    nll = -logp_S.sum()
                    # Multiplied by zero on a rank without work: the backward keeps FSDP2's collectives in
                    # step.
                    (nll if live else nll * 0.0).backward()
                    if live:
                        self._count(sums, logp_S, entropy_S, microbatch)
                        sums[_FLOPS] += self._speed.flops_of(microbatch)
        with timer.span("reduce_s"):
            totals = self._ranks.sum(sums.cpu()).tolist()
        num_learned = max(totals[_LEARNED], 1.0)
        lr = self.optimizer.learning_rate(step)
        with timer.span("update_s"):
            grad_norm = self.optimizer.step(divisor=num_learned, lr=lr)
        metrics = {
            "loss": totals[_NLL] / num_learned,
            "grad_norm": grad_norm,
            "lr": lr,
            "entropy": totals[_ENTROPY] / num_learned,
            "num_tokens": round(totals[_TOKENS]),
            "shared_share": shared_share(num_tokens=totals[_TOKENS], num_rows=totals[_ROWS]),
            "tokens_trained": round(totals[_LEARNED]),
            "num_sequences": round(totals[_SEQUENCES]),
            "num_microbatches": round(totals[_MICROBATCHES]),
        }
        return metrics | self._speed.metrics(timer, num_tokens=totals[_TOKENS], flops=totals[_FLOPS])

    @torch.no_grad()
    def loss(self, sequences: Iterable[TokenRow]) -> float:
        """Returns the mean of -log p over the learned tokens of all ranks' sequences, without an update.

        Raises ZeroDivisionError if there is no such token.
        """
        sums = self._sums()
        for microbatch, live in self._microbatches(sequences):
            logp_S, entropy_S, _ = self.policy(microbatch)
            if live:
                self._count(sums, logp_S, entropy_S, microbatch)
        totals = self._ranks.sum(sums.cpu()).tolist()
        return float(totals[_NLL] / totals[_LEARNED])

    @contextlib.contextmanager
    def _dropout(self, step: int) -> Iterator[None]:
        """Dropout is on within the block. Its draws depend on seed, step and rank alone, so a resumed run
        draws what it would have drawn."""
        if self._dropout_seed is None:
            yield
            return
        device, model = self._ranks.device, self.policy.model
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            place = step * self._ranks.world_size + self._ranks.rank
            torch.manual_seed(int(np.random.SeedSequence([self._dropout_seed, place]).generate_state(1)[0]))
            use_dropout(model, True)
            try:
                yield
            finally:
                use_dropout(model, False)

    def _sums(self) -> Tensor:
        # On the device until the end of the step: reading a number during the step would stall a GPU.
        return torch.zeros(_FLOPS + 1, dtype=torch.float64, device=self._ranks.device)

    @staticmethod
    @torch.no_grad()
    def _count(sums: Tensor, logp_S: Tensor, entropy_S: Tensor, batch: PackedBatch) -> None:
        sums[_NLL] -= logp_S.double().sum()
        sums[_ENTROPY] += entropy_S.double().sum()
        for at, number in (
            (_LEARNED, len(logp_S)),
            (_TOKENS, batch.num_tokens),
            (_ROWS, batch.num_rows),
            (_SEQUENCES, batch.num_sequences),
        ):
            sums[at] += number
        sums[_MICROBATCHES] += 1

    def _microbatches(self, sequences: Iterable[TokenRow]) -> Iterator[tuple[PackedBatch, bool]]:
        shares = self.policy.shares_prefixes
        packer = Packer(budget_tokens=self._budget_tokens, shares_prefixes=shares)
        samples = ([training_sample(sequence)] for sequence in sequences)
        return in_lockstep(packer.microbatches(samples), self._ranks, shares_prefixes=shares)


def training_sample(row: TokenRow) -> TrainingSample:
    """A row in the form of the trainer's batches; fields that only sampled tokens have are zero."""
    mask = np.asarray(row.loss_mask, dtype=np.uint8)
    trajectory = Trajectory(
        tokens=np.asarray(row.tokens, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.zeros(len(mask), dtype=np.float32),
        versions=mask.astype(np.int32) - 1,
        reward=0.0,
        finish_reason=FinishReason.STOP,
    )
    return TrainingSample(trajectory=trajectory, advantage=0.0, group=0)
