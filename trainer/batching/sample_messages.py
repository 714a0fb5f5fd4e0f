"""Training samples as msgpack values, for their way from rank to rank: the fields that a micro-batch needs.

They go to another rank when a step is balanced (`balancer.py`), and to the other ranks of a context group
with each micro-batch.
"""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.errors import ArealError
from areal_like.trajectory import TEACHER_LOGPROBS, FinishReason, Trajectory
from areal_like.wire.routes import Routes
from trainer.batching.training_sample import MicroBatch, TrainingSample
from trainer.distributed.context import ContextGroup

_TOKEN_ARRAYS = {"tokens": "<i4", "loss_mask": "u1", "logprobs": "<f4", "versions": "<i4"}
_ADDED = {"advantage": "<f8", "lag": "<i8", "beyond": "?"}
"""Values of a `TrainingSample`: an array with an entry for each token, one number for all, or None."""


def spread_microbatch(microbatch: MicroBatch | None, context: ContextGroup) -> MicroBatch:
    """The micro-batch of the group's first rank, on every rank of the group; the others pass None. Collective
    in the group. Raises ArealError if it cannot be read."""
    message = None if microbatch is None else msgpack.packb([encoded(sample) for sample in microbatch])
    data = context.spread(message)
    if microbatch is not None:
        return microbatch
    try:
        return tuple(decoded(fields) for fields in msgpack.unpackb(data))
    except (ValueError, TypeError, KeyError) as error:
        raise ArealError(f"a micro-batch of this context group cannot be read: {error!r}") from error


def encoded(sample: TrainingSample) -> dict[str, Any]:
    """The sample as values that msgpack can pack."""
    trajectory = sample.trajectory
    values = {name: getattr(sample, name) for name in _ADDED}
    teacher = trajectory.arrays.get(TEACHER_LOGPROBS)
    return {
        **{name: _bytes(getattr(trajectory, name), dtype) for name, dtype in _TOKEN_ARRAYS.items()},
        **{name: None if value is None else _bytes(value, _ADDED[name]) for name, value in values.items()},
        "reward": float(trajectory.reward),
        "finish_reason": trajectory.finish_reason.value,
        "segments": _bytes(trajectory.segments, "<i4"),
        "group": sample.group,
        "num_masked": sample.num_masked,
        "is_continued": sample.is_continued,
        "routes": None if trajectory.routes is None else trajectory.routes.to_bytes(),
        "label": trajectory.label,
        "teacher": None if teacher is None else _bytes(teacher, "<f4"),
    }


def decoded(fields: dict[str, Any]) -> TrainingSample:
    """The inverse of `encoded`. Raises ValueError, TypeError or KeyError for other values."""
    arrays: dict[str, Any] = {name: _array(fields[name], dtype) for name, dtype in _TOKEN_ARRAYS.items()}
    num_tokens, teacher = len(arrays["tokens"]), fields["teacher"]
    added: dict[str, Any] = {}
    for name, dtype in _ADDED.items():
        if fields[name] is not None:
            array = _array(fields[name], dtype)
            if len(array) not in (1, num_tokens):
                raise ValueError(f"{len(array)} numbers for {num_tokens} tokens")
            added[name] = array if len(array) == num_tokens else array.item()
    return TrainingSample(
        trajectory=Trajectory(
            **arrays,
            reward=fields["reward"],
            finish_reason=FinishReason(fields["finish_reason"]),
            segments=tuple(_array(fields["segments"], "<i4").tolist()),
            routes=None if fields["routes"] is None else Routes.from_bytes(fields["routes"]),
            label=fields["label"],
            arrays={} if teacher is None else {TEACHER_LOGPROBS: _array(teacher, "<f4")},
        ),
        group=int(fields["group"]),
        num_masked=int(fields["num_masked"]),
        is_continued=bool(fields["is_continued"]),
        **added,
    )


def _bytes(value: Any, dtype: str) -> bytes:
    return np.ascontiguousarray(value, dtype=dtype).tobytes()


def _array(data: bytes, dtype: str) -> NDArray[Any]:
    return np.frombuffer(data, dtype=dtype).copy()  # a tensor needs memory that may be written
