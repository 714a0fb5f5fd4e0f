"""Measures the cost of a weight update per update mode and engine: seconds, tokens, log-prob error.

The same work (sequences of mixed lengths, so that some are always near their end) is done without updates and
with several. The difference in time divided by the number of updates is the cost of one update: the pause,
the recomputed KV, the resubmitted sequences, and on this machine also the CPU time that sending and loading
take from decoding. Pushes use the project's code from broadcaster to receiver. Each version moves every
weight by the default learning rate, up or down at random, like a step of Adam. Errors are the log-prob
differences, for tokens sampled after an update within their sequence, from transformers with the weights of
the recorded version.

    python -m benchmarks.update_modes [--engines embedded sglang] [--repeats 3]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from areal_like.config import Config, from_mapping
from areal_like.trajectory import Trajectory
from areal_like.wire.messages.consumer import ServerEntry
from benchmarks.report import table, write
from rollout_server.conversation.policy_client import PolicyClient
from rollout_server.conversation.turns import SampleRewards, Turns
from rollout_server.policy.client import EngineClient
from rollout_server.policy.engines.process import EmbeddedProcess, EngineProcess
from rollout_server.policy.engines.sglang.process import SglangProcess
from rollout_server.policy.engines.supervisor import make_update_strategy
from rollout_server.policy.generation import Sampling
from rollout_server.policy.generation_gate import GenerationGate
from rollout_server.weights.receiver import WeightReceiver
from tests.support.snapshots import Held
from trainer.models.tiny import build_tiny_model
from trainer.weights.broadcaster import Broadcaster

MODES = ("recompute", "keep", "abort_resume", "drain")
NUM_RUNNING, NUM_SEQUENCES, PROMPT_TOKENS = 32, 128, 8
LENGTHS = np.random.default_rng(0).integers(100, 301, NUM_SEQUENCES)
"""Sampled tokens of each sequence."""
NUM_UPDATES = 4
NUM_CHECKED = 12
"""Sequences per mode whose log-probs are recomputed."""
STEP_SIZE = 8e-5
BUCKET_BYTES = 64 << 20


@dataclass(eq=False)
class Server:
    """A rollout server's engine, generation gate and weight receiver, without its buffer."""

    client: EngineClient
    gate: GenerationGate
    receiver: WeightReceiver
    model: Path

    async def work(self, mode: str, *, first_version: int) -> tuple[float, list[Trajectory], list[float]]:
        """Samples all sequences, with NUM_UPDATES evenly spread pushes unless `mode` is empty.

        Returns seconds, trajectories, and the stall of each push.
        """
        slots = asyncio.Semaphore(NUM_RUNNING)
        num_done, stalls = 0, []
        progress = asyncio.Condition()
        versions = range(first_version, first_version + NUM_UPDATES) if mode else range(0)
        snapshots = {
            version: Held(weights_of(self.model, version), bucket_bytes=BUCKET_BYTES) for version in versions
        }

        async def one(index: int) -> Trajectory:
            nonlocal num_done
            sampling = Sampling(max_new_tokens=int(LENGTHS[index]), ignore_eos=True)
            prompt = np.random.default_rng(index).integers(3, 100, PROMPT_TOKENS).astype(np.int32)
            rid = f"{mode}{first_version}.{index}"
            turns = Turns(PolicyClient(self.client, sampling=sampling, rid=rid, gate=self.gate))
            async with slots:
                await turns.sample(prompt)
            async with progress:
                num_done += 1
                progress.notify_all()
            return turns.to_trajectory(SampleRewards())

        async def update() -> None:
            config = from_mapping({"weights": {"update_mode": mode, "bucket_bytes": BUCKET_BYTES}})
            broadcaster = Broadcaster(config.weights, device="cpu")
            address = f"tcp://127.0.0.1:{self.receiver.port}"
            entry = ServerEntry(
                name="rollout-0",
                incarnation=1,
                weights_address=address,
                device="cpu",
                state="serving",
                weights_version=first_version - 1,
            )
            for i, (version, snapshot) in enumerate(snapshots.items()):
                due = round((i + 0.5) * NUM_SEQUENCES / NUM_UPDATES)
                async with progress:
                    await progress.wait_for(lambda due=due: num_done >= due)  # type: ignore[misc]
                outcome = await broadcaster.push(snapshot, version=version, step=version, servers=[entry])
                if outcome.failed:
                    raise RuntimeError(f"{mode}: {outcome.failed}")
                stalls.append(outcome.activated["rollout-0"].stall_seconds)
            await broadcaster.close()

        started_s = time.monotonic()
        updating = asyncio.create_task(update()) if mode else None
        trajectories = await asyncio.gather(*(one(i) for i in range(NUM_SEQUENCES)))
        seconds = time.monotonic() - started_s
        if updating is not None:
            await updating
        return seconds, trajectories, stalls


def weights_of(model: Path, version: int) -> dict[str, torch.Tensor]:
    """The weights of a version: the previous version's plus or minus STEP_SIZE, at random for each weight."""
    parameters = dict(AutoModelForCausalLM.from_pretrained(model).named_parameters())
    for step in range(1, version + 1):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.data += STEP_SIZE * torch.randn(parameter.shape, generator=generator).sign()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@torch.inference_mode()
def logprob_errors(model: Path, trajectories: list[Trajectory]) -> np.ndarray:
    """|engine - transformers| of every token sampled after the first update of its sequence."""
    errors = []
    policy = AutoModelForCausalLM.from_pretrained(model)
    mixed = [t for t in trajectories if t.oldest_version != t.newest_version][:NUM_CHECKED]
    for version in sorted({int(v) for t in mixed for v in t.versions[t.loss_mask == 1]}):
        policy.load_state_dict(weights_of(model, version), strict=False)
        for trajectory in mixed:
            chosen = (trajectory.versions == version) & (trajectory.versions > trajectory.oldest_version)
            if chosen.any():
                tokens_T = torch.from_numpy(trajectory.tokens.astype(np.int64))
                logprobs_TV = torch.log_softmax(policy(tokens_T[None]).logits[0].float(), -1)
                wanted_T = logprobs_TV[:-1].gather(1, tokens_T[1:, None])[:, 0].numpy()
                errors.append(np.abs(trajectory.logprobs[1:] - wanted_T)[chosen[1:]])
    return np.concatenate(errors) if errors else np.zeros(0)


@asynccontextmanager
async def serving(config: Config, model: Path) -> AsyncIterator[Server]:
    """Runs a server with the engine that the configuration chooses."""

    def fail(reason: str) -> None:
        raise RuntimeError(reason)

    is_sglang = config.rollout.engine == "sglang"
    context_tokens = PROMPT_TOKENS + int(LENGTHS.max())
    engine: EngineProcess
    if is_sglang:
        engine = SglangProcess(
            config,
            name="rollout-0",
            model=str(model),
            context_tokens=context_tokens,
            max_positions=1 << 30,
            vocab_size=100,
        )
    else:
        engine = EmbeddedProcess(config, name="rollout-0", model=str(model), context_tokens=context_tokens)
    gate = GenerationGate()
    strategy = make_update_strategy(
        config,
        name="rollout-0",
        model=str(model),
        gate=gate,
        on_quarantine=lambda reason, _: fail(reason),
        on_untrusted=fail,
    )
    client = await engine.start(version=0)
    await strategy.engine_started(client, path=str(model), version=0)
    receiver = WeightReceiver(
        host="127.0.0.1",
        max_message_bytes=1 << 24,
        strategy=strategy,
        on_version=lambda _: None,
        on_untrusted=fail,
    )
    receiver.set_engine(client, version=0)
    try:
        yield Server(client=client, gate=gate, receiver=receiver, model=model)
    finally:
        await receiver.close()
        await client.close()
        await engine.stop()


async def measure(kind: str, directory: Path, model: Path, *, repeats: int) -> dict[str, Any]:
    """Measures one engine without updates and in each mode.

    The engine has the options of `keep` in all modes, so that only the mode differs.
    """
    rollout = {"engine": kind, "max_running": NUM_RUNNING, "start_timeout_s": 600}
    config = from_mapping(
        {"runs_dir": str(directory), "name": kind, "rollout": rollout, "weights": {"update_mode": "keep"}}
    )
    seconds: dict[str, list[float]] = {mode: [] for mode in ("", *MODES)}
    stalls: dict[str, list[float]] = {mode: [] for mode in MODES}
    trajectories: dict[str, list[Trajectory]] = {mode: [] for mode in MODES}
    version = 1
    async with serving(config, model) as server:
        await server.work("", first_version=0)
        for _ in range(repeats):
            for mode in seconds:
                took_s, made, stalled = await server.work(mode, first_version=version)
                seconds[mode].append(took_s)
                if mode:
                    version += NUM_UPDATES
                    stalls[mode] += stalled
                    trajectories[mode] = made
    base_s = statistics.median(seconds[""])
    rate = float(LENGTHS.sum()) / base_s
    modes = {}
    for mode in MODES:
        lost_s = (statistics.median(seconds[mode]) - base_s) / NUM_UPDATES
        errors = logprob_errors(model, trajectories[mode])
        modes[mode] = {
            "seconds": seconds[mode],
            "lost_seconds_per_update": lost_s,
            "lost_tokens_per_update": lost_s * rate,
            "stall_seconds": statistics.median(stalls[mode]),
            "num_tokens_checked": len(errors),
            "mean_logprob_error": float(errors.mean()) if len(errors) else 0.0,
            "max_logprob_error": float(errors.max()) if len(errors) else 0.0,
        }
    return {"tokens_per_s": rate, "seconds_without_updates": seconds[""], "modes": modes}


def main() -> None:
    """Measures, writes benchmarks/results/update_modes.json, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument(
        "--engines", nargs="+", default=["embedded", "sglang"], choices=["embedded", "sglang"]
    )
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    engines = {}
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        build_tiny_model(model, seed=0, warm_start_steps=20, swap_prob=0.5)
        for kind in options.engines:
            engines[kind] = asyncio.run(measure(kind, Path(directory), model, repeats=options.repeats))
    shape = {
        "num_running": NUM_RUNNING, "num_sequences": NUM_SEQUENCES, "num_tokens": int(LENGTHS.sum()),
        "num_updates": NUM_UPDATES, "step_size": STEP_SIZE, "repeats": options.repeats,
    }  # fmt: skip
    print(write("update_modes", {"shape": shape, "engines": engines}))
    rows = [
        [
            kind, f"{result['tokens_per_s']:.0f}", mode, f"{1e3 * figures['stall_seconds']:.0f}",
            f"{1e3 * figures['lost_seconds_per_update']:.0f}", f"{figures['lost_tokens_per_update']:.0f}",
            f"{figures['mean_logprob_error']:.1e}", f"{figures['max_logprob_error']:.1e}",
        ]
        for kind, result in engines.items()
        for mode, figures in result["modes"].items()
    ]  # fmt: skip
    header = [
        "engine",
        "tokens/s",
        "mode",
        "stall, ms",
        "lost per update, ms",
        "tokens lost per update",
        "mean error",
        "largest error",
    ]
    print(table(header, rows))


if __name__ == "__main__":
    main()
