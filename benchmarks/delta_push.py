"""Measures pushes of what changed (`weights.delta=auto`) against pushes of all bytes.

SmolLM2-135M-Instruct (`areal-like fetch smollm2`) takes steps of AdamW on float32 masters with the rate,
betas and clipping of the real-model guide. The gradient of a step is that of a policy gradient on eight sums
with eight answers each, of which half are right. Pushes carry bfloat16. The share of the numbers that change
in a push, and its bytes, are counted after each step. Adam's first updates are the largest, because its
moments are empty.

Seconds are those of whole pushes of the last two steps in turn: control messages, comparison, broadcast,
checksums on both sides, a real engine in bfloat16 that verifies and swaps. Each link is between two network
namespaces, limited with `tc` (needs root, `ip` and `tc`); 0 is loopback. `compare s` and `apply s` are CPU
seconds of one thread at the sender and in the engine.

    python -m benchmarks.delta_push [--steps 16] [--rounds 5] [--mbit 0 10000 1000]
    python -m benchmarks.delta_push --rounds 0          # bytes only
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal_like.config import WeightsConfig
from areal_like.errors import ConfigError
from areal_like.weights.buckets import cut_buckets, flatten, spec_of
from areal_like.weights.deltas import HEADER_BYTES, Form, apply, encode, word_bytes
from benchmarks.report import ROOT, table, write
from benchmarks.senders import ENGINE, RANK_0, Network, inside
from benchmarks.weight_sync import child, push_once, receive
from tests.support.snapshots import Held
from trainer.models.smollm2 import convert_smollm2
from trainer.weights.broadcaster import Broadcaster

BUCKET_BYTES = 64 << 20
LR, BETAS, MAX_NORM = 1.2e-5, (0.9, 0.95), 1.0
LOOPBACK = "127.0.0.1"
FOLDER = ROOT / "runs" / "delta_push"
Tensors = dict[str, Tensor]


# Bytes


def policy_loss(model: Any, tokenizer: Any, rng: random.Random) -> Tensor:
    """Loss of a policy gradient on sums, with advantages 1 and -1."""
    rows, advantages = [], []
    for _ in range(8):
        a, b = rng.randint(10, 99), rng.randint(10, 99)
        prompt = tokenizer(f"What is {a} + {b}?\n")["input_ids"]
        for answer in range(8):
            wrong = rng.choice((-10, -2, -1, 1, 2, 10)) * (answer % 2)
            completion = tokenizer(f"{a + b + wrong}<|im_end|>")["input_ids"]
            rows.append((prompt, completion))
            advantages.append(-1.0 if wrong else 1.0)
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), length)
    for row, (prompt, completion) in enumerate(rows):
        tokens[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        mask[row, len(prompt) : len(prompt) + len(completion)] = 1.0
    logp = model(input_ids=tokens).logits[:, :-1].float().log_softmax(-1)
    chosen = logp.gather(-1, tokens[:, 1:, None]).squeeze(-1) * mask[:, 1:]
    return -(chosen.sum(1) * torch.tensor(advantages)).sum() / mask.sum()


def pushed(model: Any) -> Tensors:
    """The weights in bfloat16; a tied head travels once."""
    return {name: param.detach().to(torch.bfloat16) for name, param in model.named_parameters()}


def compare(before: Tensors, after: Tensors) -> dict[str, Any]:
    """Bytes of a push of `after` to engines that have `before`, and what both sides compute for them."""
    specs = [spec_of(name, tensor) for name, tensor in after.items()]
    found, seconds = [], {"compare_s": 0.0, "apply_s": 0.0}
    for bucket in (buckets := cut_buckets(specs, bucket_bytes=BUCKET_BYTES)):
        old, new = flatten(bucket, before), flatten(bucket, after)
        # Time of this thread alone, so that other processes of the machine do not count.
        started_s = time.thread_time()
        encoded = encode(old, new, word_bytes=word_bytes(bucket))
        compared_s = time.thread_time()
        apply(encoded.header, encoded.payload, old)
        seconds["compare_s"] += compared_s - started_s
        seconds["apply_s"] += time.thread_time() - compared_s
        assert torch.equal(old, new)
        found.append(encoded)
    num_words = sum(each.header.num_words for each in found)
    return {
        "changed": round(sum(each.num_changed for each in found) / num_words, 4),
        "sent_bytes": sum(HEADER_BYTES + each.header.payload_bytes for each in found),
        "num_bytes": sum(bucket.num_bytes for bucket in buckets),
        "forms": {form.name: sum(each.header.form is form for each in found) for form in Form},
        **{name: round(value, 3) for name, value in seconds.items()},
    }


def train(path: Path, *, num_steps: int) -> list[dict[str, Any]]:
    """Trains, compares the pushes of every two steps, and writes the last two."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    rng, steps, before = random.Random(0), [], pushed(model)
    for step in range(1, num_steps + 1):
        policy_loss(model, tokenizer, rng).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        adam.step()
        adam.zero_grad()
        after = pushed(model)
        steps.append({"step": step} | compare(before, after))
        print(steps[-1], file=sys.stderr, flush=True)
        if step == num_steps:
            save_file(before, FOLDER / "before.safetensors", {"format": "pt"})
            save_file(after, FOLDER / "after.safetensors", {"format": "pt"})
        before = after
    return steps


# Seconds


async def push_in_turn(host: str, engine: str, port: int, rounds: int) -> dict[str, Any]:
    """Pushes the last two steps in turn: all bytes, then what changed."""
    config = WeightsConfig(host=host, push_deadline_s=600.0)
    kept = [
        Held(load_file(FOLDER / f"{name}.safetensors"), bucket_bytes=BUCKET_BYTES, dtype="bfloat16")
        for name in ("before", "after")
    ]
    version, seconds, sent = 0, dict[str, list[float]](off=[], auto=[]), dict[str, int]()
    for delta in seconds:
        broadcaster = Broadcaster(config, device="cpu")
        for number in range(rounds + 2):
            version += 1
            other, snapshot = kept[(version - 1) % 2], kept[version % 2]
            snapshot.number = version
            snapshot._pushed_before = other if delta == "auto" and number else None
            started_s = time.perf_counter()
            outcome = await push_once(snapshot, broadcaster, port=port, version=version, host=engine)
            # The first push forms the group, and the second touches buffers for the first time.
            if number > 1:
                seconds[delta].append(round(time.perf_counter() - started_s, 4))
                sent[delta] = outcome.traffic.whole_bytes + outcome.traffic.delta_bytes
        await broadcaster.close()
    return {"seconds": seconds, "sent_bytes": sent}


@contextlib.contextmanager
def both_ends(mbit: float, model: Path, rounds: int) -> Iterator[IO[str]]:
    """Starts the engine and the trainer's end; gives what the latter prints. 0 `mbit`: on loopback."""
    module = "benchmarks.delta_push"
    with contextlib.ExitStack() as stack:
        if not mbit:
            receiver = stack.enter_context(child("--receiver", str(model), LOOPBACK, module=module))
            assert receiver.stdout is not None
            words = ("--push", LOOPBACK, LOOPBACK, receiver.stdout.readline().strip(), str(rounds))
            sender = stack.enter_context(child(*words, module=module))
        else:
            network = stack.enter_context(Network(mbit=mbit, engine_mbit=mbit))
            receiver = stack.enter_context(
                inside(network, "engine", "--receiver", str(model), ENGINE, module=module)
            )
            assert receiver.stdout is not None
            words = ("--push", RANK_0, ENGINE, receiver.stdout.readline().strip(), str(rounds))
            sender = stack.enter_context(inside(network, "rank0", *words, module=module))
        assert sender.stdout is not None
        yield sender.stdout


def main() -> None:
    """Measures, writes the result, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mbit", type=float, nargs="+", default=[0.0, 10000.0, 1000.0])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = FOLDER / "model"
    if not (model / "config.json").exists():
        try:
            convert_smollm2(model)
        except ConfigError as error:
            parser.exit(2, f"benchmarks.delta_push: {error}\n")
    steps = train(model, num_steps=options.steps)
    links = []
    for mbit in options.mbit if options.rounds else ():
        with both_ends(mbit, model, options.rounds) as printed:
            found = json.loads(printed.readline())
        medians = {delta: statistics.median(values) for delta, values in found["seconds"].items()}
        links.append({"mbit": mbit, "medians": medians, **found})
    if not options.no_write:
        command = f"python -m benchmarks.delta_push --steps {options.steps} --rounds {options.rounds}"
        command += " --mbit " + " ".join(f"{mbit:g}" for mbit in options.mbit)
        write("delta_push", {"command": command, "lr": LR, "steps": steps, "links": links})
    print(
        table(
            ("step", "changed %", "sent MB", "of MB", "compare s", "apply s"),
            [
                (
                    each["step"],
                    round(100 * each["changed"], 1),
                    round(each["sent_bytes"] / 1e6, 1),
                    round(each["num_bytes"] / 1e6, 1),
                    each["compare_s"],
                    each["apply_s"],
                )
                for each in steps
            ],
        )
    )
    rows = [(f"{each['mbit']:g}", each["medians"]["off"], each["medians"]["auto"]) for each in links]
    print(table(("Mbit/s", "all bytes s", "what changed s"), rows))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--receiver", model, host]:
            asyncio.run(receive(Path(model), in_place=False, host=host, dtype="bfloat16"))
        case ["--push", host, engine, port, rounds]:
            torch.set_num_threads(1)
            print(json.dumps(asyncio.run(push_in_turn(host, engine, int(port), int(rounds)))), flush=True)
        case _:
            main()
