"""Messages and requests of an attacker who knows everything about the job but its secrets."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgpack

from areal_like.config import Config
from areal_like.failures import FailureKind
from areal_like.paths import model_path
from areal_like.wire.codec import WIRE_VERSION, encode
from areal_like.wire.fingerprint import (
    dataset_fingerprint,
    model_fingerprint,
    shared_settings,
    tokenizer_fingerprint,
)
from areal_like.wire.messages.consumer import AllocVersion, CommitStep, CompleteStep, StartTraining
from areal_like.wire.messages.hello import Goodbye, Hello, Role
from areal_like.wire.messages.producer import (
    Lease,
    SampleDone,
    SampleFailed,
    Samples,
    ServerHeartbeat,
    ServerState,
)
from areal_like.wire.messages.weights import FormGroup, PushChecksums, PushWeights
from areal_like.wire.records import Record
from rollout_server.tasks.base import make_task
from tests.chaos.producer import synthetic

HUGE = (1 << 63) - 1


def server_hello(config: Config, name: str, **changes: Any) -> Hello:
    """The hello of a rollout server of this job, with all values right."""
    task = make_task(config.task, seed=config.seed)
    fields: dict[str, Any] = {
        "role": Role.ROLLOUT,
        "name": name,
        "process": secrets.token_hex(16),
        "job": config.name,
        "model": model_fingerprint(model_path(config)),
        "tokenizer": tokenizer_fingerprint(model_path(config)),
        "dataset": dataset_fingerprint(config),
        "settings": shared_settings(config, Role.ROLLOUT),
        "http_address": "",
        "num_train_prompts": task.num_train,
        "eval_sets": {"eval": task.num_eval},
    }
    return Hello(**(fields | changes))


def rank_hello(config: Config, name: str = "trainer-0", **changes: Any) -> Hello:
    """The hello of a rank of this job's trainer."""
    fields = {"role": Role.TRAINER, "settings": shared_settings(config, Role.TRAINER)}
    return server_hello(config, name, **(fields | changes))


def with_long_name(hello: Hello, *, num_chars: int) -> list[bytes]:
    """The frames of a hello whose name is longer than `encode` allows."""
    body = asdict(hello) | {"role": hello.role.value, "name": "x" * num_chars}
    return [msgpack.packb([WIRE_VERSION, "Hello", 1, body])]


def heartbeat(*, free: int, version: int, leases: tuple[int, ...] = ()) -> ServerHeartbeat:
    """The heartbeat of a server that takes `free` samples."""
    return ServerHeartbeat(
        state=ServerState.SERVING,
        free_samples=free,
        holding_samples=0,
        weights_version=version,
        leases=[*leases],
    )


def forged_samples(*, ticket_id: int = 1, lease_id: int = 1) -> Samples:
    """Samples of nobody's engine, with a high reward."""
    records = [
        Record.of(ticket_id, index, synthetic(ticket_id + 6, index, num_tokens=8, version=0))
        for index in range(4)
    ]
    return Samples(samples=[SampleDone(lease_id=lease_id, record=record) for record in records])


def absurd_samples(lease: Lease, *, version: int) -> Samples:
    """All samples of a lease, with rewards that no reward gives."""
    samples = [
        dataclasses.replace(
            synthetic(lease.ticket_id, index, num_tokens=7, version=version),
            reward=1e20,
            is_greedy=index in lease.greedy_indices,
        )
        for index in lease.sample_indices
    ]
    records = [
        Record.of(lease.ticket_id, index, sample)
        for index, sample in zip(lease.sample_indices, samples, strict=True)
    ]
    return Samples(samples=[SampleDone(lease_id=lease.lease_id, record=record) for record in records])


def failure(*, lease_id: int = 1, ticket_id: int = 1, index: int = 0, kind: FailureKind) -> SampleFailed:
    """A sample that could not be made."""
    return SampleFailed(
        lease_id=lease_id,
        ticket_id=ticket_id,
        sample_index=index,
        kind=kind,
        num_tokens=0,
        error="forged",
    )


def forged_push(master_port: int) -> list[list[bytes]]:
    """10: what a trainer sends to a server to change its weights."""
    return frames_of(
        FormGroup(
            epoch=1,
            group_name="forged",
            master_address="127.0.0.1",
            master_port=master_port,
            rank=1,
            world_size=2,
            backend="gloo",
            timeout_s=5.0,
            secret="",
        ),
        PushWeights(
            epoch=1,
            group_name="forged",
            version=HUGE,
            step=1,
            update_mode="recompute",
            manifest={"tensors": []},
            integrity="none",
            timeout_s=5.0,
        ),
        PushChecksums(version=HUGE, checksums=[], digests=[]),
    )


def large_messages(count: int) -> Iterator[list[bytes]]:
    """Messages of 4 MB: a header that never ends, and a frame of zeros behind a good header."""
    header = msgpack.packb([WIRE_VERSION, "Samples", 0])[:-1] + b"\x00\xdd\x00\x40\x00\x00"
    long_header = [header.ljust(4 << 20, b"\x90")]
    return itertools.islice(
        itertools.cycle([long_header, [encode(forged_samples())[0], bytes(4 << 20)]]), count
    )


def frames_of(*messages: Any) -> list[list[bytes]]:
    return [encode(message, rid=number) for number, message in enumerate(messages, start=1)]


def guesses(config: Config) -> list[list[bytes]]:
    """2: hellos that each have one wrong value."""
    right = server_hello(config, "rollout-5")
    fields = ("job", "model", "tokenizer", "dataset", "settings")
    return frames_of(*(server_hello(config, right.name, **{field: "guess"}) for field in fields))


def as_trainer(config: Config) -> list[list[bytes]]:
    """4, 7: hellos of trainers, and what a trainer may do."""
    return frames_of(
        rank_hello(config, "trainer-77", rank=77),
        rank_hello(config, incarnation=HUGE),
        StartTraining(step=0),
        AllocVersion(step=1),
        CompleteStep(step=0),
        CommitStep(step=0),
    )


def as_server(config: Config) -> list[list[bytes]]:
    """3, 5, 6, 8: hellos of servers, forged samples and failures."""
    failures = [failure(lease_id=n, ticket_id=n, kind=FailureKind.REWARD) for n in range(20)]
    return frames_of(
        server_hello(config, "rollout-5", weights_address="tcp://127.0.0.1:9"),
        server_hello(config, "rollout-0", incarnation=HUGE),
        forged_samples(),
        *failures,
        Goodbye(),
    )


def long_names(config: Config) -> list[list[bytes]]:
    """9."""
    return [with_long_name(server_hello(config, "x"), num_chars=3_000_000)] * 10


def engine_requests(directory: Path) -> dict[str, bytes]:
    """11 to 14: paths and bodies."""
    return {
        "/update_weights_from_disk": f'{{"model_path": "{directory}"}}'.encode(),
        "/pause_generation": b"{}",
        "/init_weights_update_group": b'{"master_address": "10.0.0.1", "master_port": 9, "rank_offset": 1, '
        b'"world_size": 2, "group_name": "g", "backend": "gloo"}',
        "/generate": b'{"input_ids": [1, 2], "sampling_params": {"max_new_tokens": 4}}',
        "/destroy_weights_update_group": b"{}",
        "/flush_cache": b"{}",
    }
