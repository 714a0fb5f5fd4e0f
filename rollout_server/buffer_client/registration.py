"""What a server tells the buffer about itself when it registers."""

from __future__ import annotations

from collections.abc import Mapping

from areal_like.automatic_settings import compute_dtype
from areal_like.runtime.daemon import Runtime
from areal_like.wire.fingerprint import dataset_fingerprint, shared_settings
from areal_like.wire.messages.hello import Hello, Role
from rollout_server.tasks.base import Task


def registration(
    runtime: Runtime,
    task: Task,
    *,
    eval_sets: Mapping[str, int],
    fingerprints: tuple[str, str],
    weights_address: str,
    weights_version: int,
) -> Hello:
    """`eval_sets`: number of held-out prompts of each evaluation set. `fingerprints`: of model and tokenizer.
    `weights_address`: where the server takes weight pushes."""
    config = runtime.config
    model, tokenizer = fingerprints
    return Hello(
        role=Role.ROLLOUT,
        name=runtime.name,
        process=runtime.process,
        job=config.name,
        model=model,
        tokenizer=tokenizer,
        dataset=dataset_fingerprint(config),
        settings=shared_settings(config, Role.ROLLOUT),
        http_address=f"{config.daemon.http_host}:{runtime.http_port}",
        weights_address=weights_address,
        weights_version=weights_version,
        dtype=compute_dtype(config),
        device=config.rollout.engine_device,
        num_train_prompts=task.num_train,
        eval_sets=dict(eval_sets),
    )
