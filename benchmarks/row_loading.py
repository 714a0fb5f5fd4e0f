"""Measures the host memory and the time that a rank needs to load a model, by rows and as a whole.

Every rank is a process. It builds the model once without weights, so that imports do not count, and then
loads it: by rows as the trainer does, or whole with transformers' `from_pretrained`. Reported are the
increase of resident memory (at its peak and afterwards, mapped files included; the largest of the ranks) and
the seconds of the slowest rank, with the files in the page cache. `smollm2` is saved in bfloat16 first, as
models are published: if the file has the requested dtype, `from_pretrained` memory-maps a tensor and does not
read it.

    python -m benchmarks.row_loading [--models smollm2 DIRECTORY ...] [--ranks 1 4] [--no-write]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from areal_like.config import Config, ModelConfig
from areal_like.paths import BUILT_MODELS
from benchmarks.report import ROOT, table, write
from tests.support.memory import peak, reset_peak
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.models.safetensors_rows import SafetensorsRows
from trainer.prepare_model import prepare_model

MIB = 1 << 20


def load(model: str, how: str, store: str, rank: int, world_size: int) -> None:
    """One rank: loads, and writes its measurements to stdout as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=300),
    )
    ranks = Ranks()
    Policy.build(model)
    ranks.meet()
    before = reset_peak()
    started_s = time.perf_counter()
    if how == "rows":
        loaded: Any = Policy.load(model, ranks)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seconds = time.perf_counter() - started_s
    highest, after = peak(), reset_peak()
    ranks.meet()
    result = {"peak_bytes": highest - before, "held_bytes": after - before, "seconds": seconds}
    print(json.dumps(result | {"num_parameters": sum(p.numel() for p in loaded.parameters())}), flush=True)
    dist.destroy_process_group()


def measure(model: str, how: str, *, world_size: int, folder: Path) -> dict[str, Any]:
    """Starts the ranks; returns the largest of their measurements."""
    store = str(folder / f"store-{how}-{world_size}")
    command = [sys.executable, "-m", "benchmarks.row_loading", "--rank", model, how, store]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(f"{model}, {how}: a rank failed")
    results = [json.loads(output) for output in outputs]
    return {name: max(result[name] for result in results) for name in results[0]}


def in_bfloat16(model: Path, folder: Path) -> str:
    """Copies configuration and weights, cast to bfloat16; returns the folder."""
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return str(folder)


def largest_tensor(model: str) -> int:
    """Bytes of the model's largest tensor in float32."""
    source = SafetensorsRows.of_model(model)
    return max(4 * torch.Size(source.shape(name)).numel() for name in source.names)


def main() -> None:
    """Measures, writes the result, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", nargs="+", default=["smollm2"], help="smollm2, tiny, or directories")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        model, how, store, rank, world_size = options.rank
        load(model, how, store, int(rank), int(world_size))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(options.models):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            model = name
            if name in BUILT_MODELS:
                built = prepare_model(Config(model=ModelConfig(path=name)), out_dir=folder / "model")
                model = in_bfloat16(Path(built), folder / "bfloat16")
            for world_size in options.ranks:
                for how in ("whole", "rows"):
                    result = measure(model, how, world_size=world_size, folder=folder)
                    share = 4 * result["num_parameters"] // (1 if how == "whole" else world_size)
                    rows.append(
                        {"model": name, "ranks": world_size, "how": how, "share_bytes": share}
                        | {"largest_tensor_bytes": largest_tensor(model)}
                        | result
                        | {"seconds": round(result["seconds"], 3)}
                    )
    if not options.no_write:
        command = " ".join(["python -m benchmarks.row_loading --models", *options.models])
        write("row_loading", {"command": command, "loads": rows})
    labels = ("model", "ranks", "how")
    sizes = ("share_bytes", "largest_tensor_bytes", "peak_bytes", "held_bytes")
    print(
        table(
            ("model", "ranks", "load", "share MiB", "largest tensor MiB", "peak MiB", "held MiB", "s"),
            [
                (*(r[key] for key in labels), *(round(r[key] / MIB) for key in sizes), r["seconds"])
                for r in rows
            ],
        )
    )


if __name__ == "__main__":
    main()
