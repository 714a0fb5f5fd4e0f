"""Moves training samples between ranks, once in a step, after their advantages are known.

Every rank has fetched its own groups. A sample that another rank is to run travels there as one message of
msgpack, with only what a micro-batch needs of it; a sample that stays is not encoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from areal_like.errors import ArealError
from areal_like.trajectory import FinishReason, Trajectory
from trainer.batching.packing import TrainingSample
from trainer.distributed.ranks import Ranks

_TOKEN_ARRAYS = {"tokens": "<i4", "loss_mask": "u1", "logprobs": "<f4", "versions": "<i4"}
_BYTES_PER_TOKEN = 29
"""Bytes of the arrays above, and of an advantage and a lag for each token."""
_BYTES_PER_SAMPLE = 256
"""Most bytes of a sample besides its tokens, and of the list that it is in."""


def exchange(
    leaving: Sequence[Mapping[int, TrainingSample]], arriving: Sequence[Mapping[int, int]], ranks: Ranks
) -> dict[int, TrainingSample]:
    """The samples that the other ranks send to this one, by index. Collective.

    `leaving`: for each rank, the samples that go there, by their index in the step. `arriving`: for each
    rank, the tokens of the samples that come from there, by index. Raises ArealError if others come.
    """
    received = ranks.exchange(
        [
            msgpack.packb([[index, _encoded(sample)] for index, sample in of_rank.items()])
            for of_rank in leaving
        ],
        most_bytes=[
            _BYTES_PER_SAMPLE * (1 + len(of_rank)) + _BYTES_PER_TOKEN * sum(of_rank.values())
            for of_rank in arriving
        ],
    )
    samples: dict[int, TrainingSample] = {}
    for rank, (data, expected) in enumerate(zip(received, arriving, strict=True)):
        try:
            of_rank = {index: _decoded(fields) for index, fields in msgpack.unpackb(data)}
        except (ValueError, TypeError, KeyError) as error:
            raise ArealError(f"rank {rank} sent samples that cannot be read: {error!r}") from error
        if {index: sample.trajectory.num_tokens for index, sample in of_rank.items()} != expected:
            raise ArealError(f"rank {rank} sent other samples than this step's plan says")
        samples |= of_rank
    return samples


def _encoded(sample: TrainingSample) -> dict[str, Any]:
    trajectory = sample.trajectory
    return {
        **{
            name: np.ascontiguousarray(getattr(trajectory, name), dtype=dtype).tobytes()
            for name, dtype in _TOKEN_ARRAYS.items()
        },
        "reward": float(trajectory.reward),
        "finish_reason": trajectory.finish_reason.value,
        "advantage": _number_or_bytes(sample.advantage, "<f8"),
        "lag": _number_or_bytes(sample.lag, "<i8"),
        "group": sample.group,
    }


def _decoded(fields: dict[str, Any]) -> TrainingSample:
    arrays: dict[str, Any] = {name: _array(fields[name], dtype) for name, dtype in _TOKEN_ARRAYS.items()}
    num_tokens = len(arrays["tokens"])
    return TrainingSample(
        trajectory=Trajectory(
            **arrays,
            reward=fields["reward"],
            finish_reason=FinishReason(fields["finish_reason"]),
        ),
        advantage=_number_or_array(fields["advantage"], "<f8", num_tokens),
        lag=_number_or_array(fields["lag"], "<i8", num_tokens),
        group=int(fields["group"]),
    )


def _number_or_bytes(value: Any, dtype: str) -> Any:
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value, dtype=dtype).tobytes()
    return float(value) if dtype == "<f8" else int(value)


def _number_or_array(value: Any, dtype: str, num_tokens: int) -> Any:
    if not isinstance(value, bytes):
        return float(value) if dtype == "<f8" else int(value)
    array = _array(value, dtype)
    if len(array) != num_tokens:
        raise ValueError(f"{len(array)} numbers for {num_tokens} tokens")
    return array


def _array(data: bytes, dtype: str) -> NDArray[Any]:
    return np.frombuffer(data, dtype=dtype).copy()  # a tensor needs memory that may be written
