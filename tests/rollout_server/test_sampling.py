"""The sampling parameters of a sample: the job's, the evaluation set's, the lease's and the example's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from areal_like.config import EvalSetConfig, from_mapping
from areal_like.wire.messages.producer import Lease, Purpose
from rollout_server.policy.generation import Sampling
from rollout_server.sample.maker import sampling_of
from rollout_server.sources import SampleSource
from rollout_server.tasks.base import Example

CONFIG = from_mapping({"sampling": {"max_new_tokens": 50, "temperature": 0.8, "stop": ["\n\n"]}})
JOB: dict[str, Any] = {"stop": ("\n\n",), "stop_token_ids": (7, 9)}
SET = EvalSetConfig(temperature=0.6, top_p=0.9, top_k=40, min_p=0.1, max_new_tokens=30)


def sampling(*, settings: EvalSetConfig | None = None, index: int = 1, longest: int = 0) -> Sampling:
    source = SampleSource(
        task=cast(Any, None),
        renderer=cast(Any, SimpleNamespace(stop_token_ids=[7, 9])),
        context_tokens=100,
        rewards=cast(Any, None),
        settings=settings,
    )
    lease = Lease(
        lease_id=3,
        ticket_id=4,
        prompt_index=5,
        purpose=Purpose.TRAIN if settings is None else Purpose.EVAL,
        sample_indices=[0, 1, 2],
        greedy_indices=[2] if settings is None else [],
        seed=(1 << 31) - 1,
        eval_set="" if settings is None else "hard",
    )
    example = Example(prompt="", answer=None, max_new_tokens=longest)
    return sampling_of(CONFIG, source, lease, index, example=example)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ({}, Sampling(max_new_tokens=50, temperature=0.8, sampling_seed=0, **JOB)),
        ({"index": 0}, Sampling(max_new_tokens=50, temperature=0.8, sampling_seed=(1 << 31) - 1, **JOB)),
        ({"index": 2}, Sampling(max_new_tokens=50, temperature=0.0, **JOB)),
        ({"longest": 20}, Sampling(max_new_tokens=20, temperature=0.8, sampling_seed=0, **JOB)),
        ({"longest": 80}, Sampling(max_new_tokens=50, temperature=0.8, sampling_seed=0, **JOB)),
        ({"settings": EvalSetConfig()}, Sampling(max_new_tokens=50, temperature=0.0, **JOB)),
        (
            {"settings": SET},
            Sampling(
                max_new_tokens=30, temperature=0.6, top_p=0.9, top_k=40, min_p=0.1, sampling_seed=0, **JOB
            ),
        ),
        ({"settings": SET, "longest": 40}, sampling(settings=SET)),
    ],
)
def test_each_source_overrides_those_before_it(arguments: dict[str, Any], want: Sampling) -> None:
    assert sampling(**arguments) == want
