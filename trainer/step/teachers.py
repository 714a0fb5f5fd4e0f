"""The teachers of distillation: frozen models, and log-probs that the records already have.

    sample -> its label -> distill.teachers -> a model here, or a server, whose log-probs are in its record

A teacher here is loaded, sharded and packed like a reference model (`kl.reference`), and its forward comes
before the policy's in each micro-batch. With several, each computes only the samples of its own labels: a
micro-batch is taken apart, so all of them together compute each token once. All ranks run each of them once
for a micro-batch, if need be on a dummy, because the gathering of FSDP2's shards is collective.

Memory of each rank: its rows of each model in `model.dtype`, without gradients and moments.

In a context group (`Ranks.context`) the ranks compute each of these forwards together. With
`distill.loss=full` a teacher then runs on all samples of a micro-batch that has one of its own, so that each
rank has the distributions of the tokens for which it computes those of the policy.

Shape suffixes: S sampled tokens of a micro-batch, C those whose logits this rank computes, V vocabulary of
the policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from areal_like.config import Config, DistillConfig
from areal_like.errors import ConfigError
from areal_like.trajectory import TEACHER_LOGPROBS
from areal_like.vocabulary import check_vocabulary
from areal_like.weights.untrained import text_config
from trainer.batching.device_copies import copied
from trainer.batching.packing import DUMMY, PackedBatch, collate, is_target, num_targets
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import build_skeleton
from trainer.models.policy import Distributions, Policy, build_policy


class Teachers:
    """Called once for each micro-batch, on all ranks."""

    def __init__(
        self, settings: DistillConfig, ranks: Ranks, *, models: Mapping[str, Policy], vocab_size: int
    ) -> None:
        """`models`: directory or name -> sharded, frozen model, for each in `settings.models`. `vocab_size`:
        rows of the policy's head."""
        assert models.keys() == {*settings.models.values()}
        self.models = models
        self._settings = settings
        self._ranks = ranks
        self._vocab_size = vocab_size

    @classmethod
    def of(cls, config: Config, ranks: Ranks, *, student: str) -> Teachers:
        """Loads the models of `distill.teachers`. `student`: directory or name of the policy's initial model.

        Raises ConfigError for a model that cannot be a teacher of it, or that cannot be loaded.
        """
        check_teachers(config, student=student)
        models: dict[str, Policy] = {}
        for label, path in config.distill.models.items():
            if path not in models:
                with _named(label, path):
                    models[path] = build_policy(config, local_path(path), ranks, frozen=True)
        vocab_size = _vocab_size(build_skeleton(student, dtype=torch.float32))
        return cls(config.distill, ranks, models=models, vocab_size=vocab_size)

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> Tensor:
        """[S] log-prob of each sampled token under its sample's teacher, float32 or wider; NaN where it has
        none. Collective."""

        def logprobs(model: Policy, part: PackedBatch) -> Tensor:
            found: Tensor = model(part).logprobs_S
            return found

        return self._computed(batch, logprobs, lambda: self._recorded(batch), takes_parts=True)

    @torch.no_grad()
    def distributions(self, batch: PackedBatch) -> tuple[Tensor, Distributions]:
        """([S] the same, those of the whole vocabulary; where there is no teacher, 0). Collective.

        In a context group a rank computes and keeps the vocabulary of its sampled tokens (C) alone.
        """
        target_C, vocab = batch.target_C, self._vocab_size

        def empty() -> Tensor:
            return torch.full((len(target_C), vocab), torch.nan, device=batch.tokens_T.device)

        def all_logprobs(model: Policy, part: PackedBatch) -> Tensor:
            return model.all_logprobs(part)[:, :vocab]  # the teacher may have further rows, of no token

        takes_parts = batch.context is None
        teacher_CV = self._computed(batch, all_logprobs, empty, takes_parts=takes_parts)
        teacher_C = teacher_CV.gather(1, batch.tokens_T[target_C][:, None]).squeeze(1)
        model = next(iter(self.models.values()))
        (teacher_S,) = model.of_all(batch, [teacher_C])
        return teacher_S, Distributions(teacher_CV.nan_to_num_(nan=0.0))

    def _computed(
        self,
        batch: PackedBatch,
        compute: Callable[[Policy, PackedBatch], Tensor],
        without: Callable[[], Tensor],
        *,
        takes_parts: bool,
    ) -> Tensor:
        """The result of each sample's own model for the micro-batch's sampled tokens.

        `without` makes that of tokens without a model here; it is not called if one model has all samples,
        because the result may be large. `takes_parts`: a model computes its own samples alone; False: the
        whole micro-batch, where results belong to a rank's part of its rows (`target_C`).
        """
        result: Tensor | None = None
        places, device = self._settings.models, batch.tokens_T.device
        path_of = [places.get(self._settings.teacher_of(s.trajectory.label), "") for s in batch.samples]
        for path, model in self.models.items():
            mine = [each == path for each in path_of]
            if all(mine):
                result = compute(model, batch)
            elif any(mine) and not takes_parts:
                found = compute(model, batch)
                result = (without() if result is None else result).to(found.dtype)
                (mine_T,) = copied([np.repeat(mine, batch.sample_lengths)], device)
                mine_C = mine_T[batch.target_C].view(-1, *[1] * (found.ndim - 1))
                torch.where(mine_C, found, result, out=result)  # in place: the result may be large
            elif any(mine) or self._ranks.world_size > 1:
                chosen = [sample for sample, is_used in zip(batch.samples, mine, strict=True) if is_used]
                part = collate(
                    chosen or [DUMMY],
                    device=self._ranks.device,
                    shares_prefixes=model.shares_prefixes,
                    context=self._ranks.context if chosen else None,
                )
                found = compute(model, part)
                if chosen:
                    result = (without() if result is None else result).to(found.dtype)
                    counts = [num_targets(sample.trajectory) for sample in batch.samples]
                    (own,) = copied([np.flatnonzero(np.repeat(mine, counts))], device)
                    result.index_copy_(0, own, found)
        return without() if result is None else result

    def _recorded(self, batch: PackedBatch) -> Tensor:
        """[S] float32 log-probs in the samples' records, which teachers at servers computed; else NaN."""
        servers = self._settings.servers
        if not servers:
            return torch.full(batch.sampled_S.shape, torch.nan, device=batch.tokens_T.device)
        parts = [
            s.trajectory.arrays[TEACHER_LOGPROBS][is_target(s.trajectory)]
            if TEACHER_LOGPROBS in s.trajectory.arrays
            and self._settings.teacher_of(s.trajectory.label) in servers
            else np.full(num_targets(s.trajectory), np.nan)
            for s in batch.samples
        ]
        (recorded_S,) = copied([np.concatenate(parts, dtype=np.float32)], batch.tokens_T.device)
        return recorded_S


def check_teachers(config: Config, *, student: str) -> None:
    """Raises ConfigError if a model of `distill.teachers` cannot be a teacher of the model in `student`."""
    for label, path in config.distill.models.items():
        check_teacher(config, path, label=label, student=student)


def check_teacher(config: Config, path: str, *, label: str, student: str) -> None:
    """Raises ConfigError if the model in `path` cannot be a teacher of the model in `student`: it cannot be
    loaded, has another vocabulary, or a context that the policy's samples may exceed.

    Reads no weights.
    """
    with _named(label, path):
        skeletons = [build_skeleton(each, dtype=torch.float32) for each in (student, local_path(path))]
        check_vocabulary(local_path(path), student)
        Policy.build(local_path(path)).check_initial_weights()
    if config.distill.loss == "full":
        check_rows(f"distill.teachers.{label}", skeletons[1], num_rows=_vocab_size(skeletons[0]))
    own, most = (
        int(getattr(text_config(model.config), "max_position_embeddings", None) or 1 << 30)
        for model in skeletons
    )
    longest = min(own, config.rollout.max_context or config.trainer.tokens_per_microbatch)
    if most < longest:
        raise ConfigError(
            f"distill.teachers.{label}={path}: its context has {most} tokens, and a sample may have "
            f"{longest}: set rollout.max_context to at most {most}, or name another teacher"
        )


def check_rows(key: str, teacher: Any, *, num_rows: int) -> None:
    """Raises ConfigError if the head of a teacher's model has fewer rows than the policy's (`num_rows`)."""
    if (its := _vocab_size(teacher)) < num_rows:
        raise ConfigError(
            f"{key}: the teacher's head has {its} rows, and the policy's {num_rows}: distill.loss=full needs "
            "a log-prob for each: set distill.loss=sampled"
        )


def _vocab_size(model: Any) -> int:
    """Rows of a model's head."""
    return int(text_config(model.config).vocab_size)


def local_path(path: str) -> str:
    """A directory as `from_pretrained` takes it."""
    return str(Path(path).expanduser()) if path.startswith("~") else path


@contextlib.contextmanager
def _named(label: str, path: str) -> Iterator[None]:
    """A ConfigError of the block names the teacher."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"distill.teachers.{label}={path}: {error}") from error
