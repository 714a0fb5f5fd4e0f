"""Measures the cost of a weight push: its rate relative to a bare broadcast, and how long training waits.

Pushes are measured in large buckets and tensor by tensor. They use the project's code from end to end: a
snapshot of the weights, control messages, broadcast, checksums on both sides, a real engine that stores into
its shadow weights, verifies and swaps. The bare broadcast sends the same buckets with `dist.broadcast` into
one buffer that is already allocated. The measurements alternate, and medians are reported. Training's stall
is measured on two ranks: taking a snapshot (a step waits for that), and gathering, flattening and
checksumming all weights at once (a step would have to wait for that without snapshots). The same two ranks
measure how long an engine that loads in place (SGLang) is paused for the broadcast: from the request to the
end of the last broadcast, with buckets gathered meanwhile and with every bucket gathered before.
`benchmarks.update_modes` measures the cost of an update to generation. `--integrity sha256` measures pushes
with digests, `--integrity none sha256` both.

    python -m benchmarks.weight_sync [--sizes 10MB 100MB 500MB 2GB] [--rounds 5] [--integrity none]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from areal_like.config import WeightsConfig, from_mapping
from areal_like.weights.buckets import checksum, cut_buckets, flatten, spec_of
from areal_like.wire.messages.consumer import ServerEntry
from benchmarks.report import ROOT, table, write
from rollout_server.policy.engines.process import EmbeddedProcess
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.receiver import WeightReceiver
from rollout_server.weights.shadow import ShadowWeightUpdate
from tests.support.full_state import gather_full_state
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.weights.broadcaster import Broadcaster, PushOutcome
from trainer.weights.snapshot import BackgroundGather, Snapshot

SIZES = {"10MB": (256, 688, 3), "100MB": (512, 1376, 8), "500MB": (1024, 2752, 10), "2GB": (2048, 5504, 10)}
"""Bytes in float32 (approximate) -> hidden size, intermediate size and layers of a Llama model."""
BUCKET_BYTES = 64 << 20
VOCAB = 1000
_STALL_COLUMNS = {
    "freeze_s": "training waits, frozen s",
    "gather_s": "gathered at once s",
    "unstaged_standstill_s": "engine waits, unstaged s",
    "staged_standstill_s": "engine waits, staged s",
    "staging_s": "staging s",
}
"""Field of a result -> heading."""


def write_model(path: Path, size: str) -> Path:
    """Writes a model of one of SIZES. All its weights are equal, which does not affect a push."""
    hidden, inner, layers = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, vocab_size=VOCAB,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    save_file(
        {name: torch.full(param.shape, 0.01) for name, param in model.named_parameters()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    return path


# The receiving end, a separate process


async def receive(model: Path, *, in_place: bool, host: str = "127.0.0.1", dtype: str = "auto") -> None:
    """Runs an engine and its weight receiver until stdin closes.

    `in_place`: it reports that it does not decode while it receives, so that pushes to it are staged. `host`:
    address that the receiver binds. `dtype`: `model.dtype`.
    """
    config = from_mapping(
        {
            "runs_dir": str(model.parent),
            "name": "run",
            "model": {"path": str(model), "dtype": dtype},
            "rollout": {"max_running": 1, "start_timeout_s": 900.0},
        }
    )
    engine = EmbeddedProcess(
        config, name="in-place" if in_place else "receiver", model=str(model), context_tokens=64
    )
    receiver = WeightReceiver(
        host=host,
        max_message_bytes=1 << 24,
        strategy=ShadowWeightUpdate(gate=GenerationGate(), on_untrusted=lambda _: None),
        on_version=lambda _: None,
        on_untrusted=lambda _: None,
    )
    client = await engine.start(version=0)
    client.info = replace(client.info, loads_in_place=in_place)
    receiver.set_engine(client)
    print(receiver.port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await receiver.close()
    await client.close()
    await engine.stop()


def bare(store: str, sizes: list[int], rank: int) -> Callable[[], float]:
    """Returns a function that broadcasts buckets of these sizes once and returns the seconds it took.

    Call the function on both ranks at the same time.
    """
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    whole = torch.ones(max(sizes), dtype=torch.uint8)
    barrier = torch.zeros(1)

    def once() -> float:
        dist.broadcast(barrier, 0)
        dist.all_reduce(barrier)
        started_s = time.perf_counter()
        for size in sizes:
            dist.broadcast(whole[:size], 0)
        dist.all_reduce(barrier)
        return time.perf_counter() - started_s

    return once


def bare_receiver(store: str, sizes: list[int]) -> None:
    """Rank 1 of `bare`: one broadcast for each line on stdin."""
    once = bare(store, sizes, rank=1)
    for _ in sys.stdin:
        once()


@contextlib.contextmanager
def child(*arguments: str, module: str = "benchmarks.weight_sync") -> Iterator[subprocess.Popen[str]]:
    """Runs this file, or another module, in another process."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.communicate(timeout=60)


# The sending end


def entry_of(port: int, *, host: str = "127.0.0.1") -> ServerEntry:
    """The directory's entry of a receiver."""
    return ServerEntry(
        name=f"receiver-{port}",
        incarnation=1,
        weights_address=f"tcp://{host}:{port}",
        device="cpu",
        state="serving",
        weights_version=0,
    )


async def push_once(
    snapshot: Snapshot, broadcaster: Broadcaster, *, port: int, version: int, host: str = "127.0.0.1"
) -> PushOutcome:
    """Pushes a snapshot to one receiver."""
    assert snapshot.acquire()
    outcome = await broadcaster.push(
        snapshot, version=version, step=version, servers=[entry_of(port, host=host)]
    )
    snapshot.release()
    if outcome.failed or not outcome.activated:
        raise RuntimeError(f"not activated: {outcome.failed}")
    return outcome


async def pushes(
    model: Path, size: str, *, rounds: int, folder: Path, integrity: Literal["none", "sha256"]
) -> dict[str, Any]:
    """Measures pushes and bare broadcasts of one size."""
    store = str(folder / f"store-{size}-{integrity}")
    policy = Policy.load(str(model), Ranks.alone())
    snapshotters = {
        "bucketed": BackgroundGather(policy, Ranks.alone(), bucket_bytes=BUCKET_BYTES, dtype="float32"),
        "per_tensor": BackgroundGather(policy, Ranks.alone(), bucket_bytes=1, dtype="float32"),
    }
    sizes = [bucket.num_bytes for bucket in snapshotters["bucketed"].buckets]
    dist.destroy_process_group()
    seconds: dict[str, list[float]] = {"bare": [], "bucketed": [], "per_tensor": []}
    with (
        child("--receiver", str(model)) as receiver,
        child("--bare", store, json.dumps(sizes)) as peer,
    ):
        assert receiver.stdout is not None and peer.stdin is not None
        port = int(await asyncio.to_thread(receiver.stdout.readline))
        once = bare(store, sizes, rank=0)
        broadcaster = Broadcaster(WeightsConfig(push_deadline_s=120, integrity=integrity), device="cpu")
        version = 0

        async def push(how: str) -> float:
            nonlocal version
            version += 1
            # A new snapshot for each push, because a snapshot caches its sums.
            snapshot = snapshotters[how].take_snapshot()
            assert snapshot is not None
            started_s = time.perf_counter()
            await push_once(snapshot, broadcaster, port=port, version=version)
            return time.perf_counter() - started_s

        for round_ in range(rounds + 1):
            peer.stdin.write("\n")
            peer.stdin.flush()
            measured = {"bare": await asyncio.to_thread(once)} | {
                how: await push(how) for how in snapshotters
            }
            # The first round forms the group and touches memory for the first time, so it does not count.
            for how in seconds if round_ else ():
                seconds[how].append(measured[how])
        await broadcaster.close()
        dist.destroy_process_group()
    medians = {how: statistics.median(values) for how, values in seconds.items()}
    return {
        "size": size,
        "integrity": integrity,
        "num_bytes": sum(sizes),
        "num_tensors": sum(len(bucket.tensors) for bucket in snapshotters["bucketed"].buckets),
        "num_buckets": len(sizes),
        "seconds": {how: round(value, 4) for how, value in medians.items()},
        "all_seconds": {how: [round(value, 4) for value in values] for how, values in seconds.items()},
        "bare_gb_per_s": round(sum(sizes) / medians["bare"] / 1e9, 3),
        "share_bucketed": round(medians["bare"] / medians["bucketed"], 3),
        "share_per_tensor": round(medians["bare"] / medians["per_tensor"], 3),
    }


def stall(store: str, rank: int, model: str, rounds: int, *, ports: list[int]) -> None:
    """Runs one of two ranks: times taking a snapshot, gathering all weights at once, and pushes.

    `ports`: those of a receiver that gets buckets while others are gathered, and of one whose pushes are
    staged.
    """
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    ranks = Ranks()
    policy = Policy.load(model, ranks)
    snapshotter = BackgroundGather(policy, ranks, bucket_bytes=BUCKET_BYTES, dtype="float32")
    frozen_s, gathered_s = [], []
    pushed: dict[int, list[PushOutcome]] = {port: [] for port in ports}
    with asyncio.Runner() as runner:
        broadcasters = {port: Broadcaster(WeightsConfig(push_deadline_s=120), device="cpu") for port in ports}
        for version in range(1, rounds + 2):
            for port in ports:
                snapshot = snapshotter.take_snapshot()
                dist.barrier()
                if snapshot is not None:
                    push = push_once(snapshot, broadcasters[port], port=port, version=version)
                    pushed[port].append(runner.run(push))
                dist.barrier()
        for broadcaster in broadcasters.values():
            runner.run(broadcaster.close())
    for _ in range(rounds + 1):
        dist.barrier()
        started_s = time.perf_counter()
        snapshotter.take_snapshot()
        frozen_s.append(time.perf_counter() - started_s)
        dist.barrier()
        started_s = time.perf_counter()
        tensors = dict(gather_full_state(policy))
        for bucket in cut_buckets(
            [spec_of(name, tensor) for name, tensor in tensors.items()], bucket_bytes=BUCKET_BYTES
        ):
            checksum(flatten(bucket, tensors))
        dist.barrier()
        gathered_s.append(time.perf_counter() - started_s)
    snapshotter.close()
    if rank == 0:
        unstaged, staged = (pushed[port] for port in ports)
        seconds = {
            "freeze_s": frozen_s,
            "gather_s": gathered_s,
            "unstaged_standstill_s": [outcome.broadcast_s for outcome in unstaged],
            "staged_standstill_s": [outcome.broadcast_s for outcome in staged],
            "staging_s": [outcome.staging_s for outcome in staged],
        }
        # The first round does not count, as above.
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        print(json.dumps(medians), flush=True)
    dist.destroy_process_group()


def stalls(model: Path, size: str, *, rounds: int, folder: Path) -> dict[str, Any]:
    """Measures on two ranks how long training waits, and how long an engine is paused."""
    store = str(folder / f"stall-{size}")
    with child("--receiver", str(model)) as receiver, child("--receiver-in-place", str(model)) as in_place:
        assert receiver.stdout is not None and in_place.stdout is not None
        ports = [int(receiver.stdout.readline()), int(in_place.stdout.readline())]
        arguments = (str(model), str(rounds), json.dumps(ports))
        with child("--stall", store, "0", *arguments) as first, child("--stall", store, "1", *arguments):
            assert first.stdout is not None
            medians: dict[str, float] = json.loads(first.stdout.readline())
    return {"size": size} | {name: round(value, 4) for name, value in medians.items()}


def main() -> None:
    """Measures, writes the result, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--integrity", nargs="+", choices=("none", "sha256"), default=["none"])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    synced, stalled = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for size in options.sizes:
            model = write_model(folder / size, size)
            if size != "2GB":  # two ranks and two receivers would need more than 24 GB of memory
                stalled.append(stalls(model, size, rounds=options.rounds, folder=folder))
            for integrity in options.integrity:
                measuring = pushes(model, size, rounds=options.rounds, folder=folder, integrity=integrity)
                synced.append(asyncio.run(measuring))
            (model / "model.safetensors").unlink()
    if not options.no_write:
        write(
            "weight_sync",
            {
                "command": f"python -m benchmarks.weight_sync --rounds {options.rounds} "
                f"--integrity {' '.join(options.integrity)}",
                "pushes": synced,
                "stalls": stalled,
            },
        )
    hows = ("bare", "bucketed", "per_tensor")
    counts = ("size", "integrity", "num_tensors", "num_buckets", "bare_gb_per_s")
    shares = ("share_bucketed", "share_per_tensor")
    rows = [
        (*(r[key] for key in counts), *(r["seconds"][how] for how in hows), *(r[key] for key in shares))
        for r in synced
    ]
    header = (
        "size",
        "integrity",
        "tensors",
        "buckets",
        "bare GB/s",
        "bare s",
        "push s",
        "tensor by tensor s",
        "push share",
        "tensor by tensor share",
    )
    print(table(header, rows))
    print(
        table(
            ("size", *_STALL_COLUMNS.values()),
            [(r["size"], *(r[key] for key in _STALL_COLUMNS)) for r in stalled],
        )
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--receiver", model]:
            asyncio.run(receive(Path(model), in_place=False))
        case ["--receiver-in-place", model]:
            asyncio.run(receive(Path(model), in_place=True))
        case ["--bare", store, sizes]:
            torch.set_num_threads(1)
            bare_receiver(store, json.loads(sizes))
        case ["--stall", store, rank, model, rounds, ports]:
            torch.set_num_threads(1)
            stall(store, int(rank), model, int(rounds), ports=json.loads(ports))
        case _:
            main()
