"""The message with which a server registers at the buffer."""

from __future__ import annotations

from collections.abc import Mapping

from areal_like.automatic_settings import compute_dtype
from areal_like.runtime.daemon import Runtime
from areal_like.wire.fingerprint import dataset_fingerprint, shared_settings
from areal_like.wire.messages.hello import Hello, Role
from rollout_server.job_tasks import content_of
from rollout_server.tasks.base import Task


def registration(
    runtime: Runtime,
    task: Task,
    *,
    eval_tasks: Mapping[str, Task],
    fingerprints: tuple[str, str],
    weights_address: str,
    weights_version: int,
) -> Hello:
    """Returns the registration. `eval_tasks`: tasks of the evaluation sets. `fingerprints`: of model and
    tokenizer. `weights_address`: where the server accepts weight pushes."""
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
        content=task.fingerprint(),
        eval_content=content_of(eval_tasks),
        settings=shared_settings(config, Role.ROLLOUT),
        http_address=runtime.http_address,
        weights_address=weights_address,
        weights_version=weights_version,
        dtype=compute_dtype(config),
        device=config.rollout.engine_device,
        num_train_prompts=task.num_train,
        source_sizes=[source.size for source in task.sources],
        source_weights=[source.weight for source in task.sources],
        eval_sets={name: task.num_eval for name, task in eval_tasks.items()},
    )
