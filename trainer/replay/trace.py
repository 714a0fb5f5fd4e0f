"""Trains the steps of a run again up to a given one, and writes that step's results for each token.

    python -m trainer.replay.trace --recording RUN --step K --out DIR [--own-lr] --config FILE key=value ...

    newest checkpoint that is not after step K, or the initial weights -> steps up to K -> DIR

`name` and `runs_dir` of the configuration choose the checkpoints; nothing is written there. DIR gets
`tokens.npz` (arrays over the samples of step K in recorded order, and over their trained tokens) and
`step.json`. One rank trains all, so the order of the samples and of sums does not depend on the run's.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from areal_like.automatic_settings import compute_dtype, resolved
from areal_like.config import Config
from areal_like.errors import ArealError, ConfigError
from areal_like.paths import RunPaths, find_checkpoints, model_path, write_json
from areal_like.runtime.command_line import Options, load_config
from areal_like.runtime.process import die_with_parent, keep_files_private
from trainer.batching.packing import PackedBatch
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.process_group import device_of, joined_ranks
from trainer.distributed.ranks import Ranks
from trainer.distributed.sharding import gather, shards_of
from trainer.models.policy import Policy, build_policy
from trainer.replay.recording import Recording
from trainer.replay.run import train_recorded_step
from trainer.step.build import build_step_runner


class TokenTrace:
    """The micro-batches of one step, token by token. `attach` it to the policy before the step."""

    def __init__(self) -> None:
        self._batches: list[dict[str, Tensor]] = []

    def attach(self, policy: Policy) -> None:
        """Records every forward pass with gradient from now on."""
        policy.register_forward_hook(lambda _, inputs, output: self._record(inputs[0], output.logprobs_S))

    def _record(self, batch: PackedBatch, logp_S: Tensor) -> None:
        if not logp_S.requires_grad:
            return
        at = batch.sampled_S
        found = {
            "group_N": batch.groups_N,
            "length_N": batch.sum_N(torch.ones_like(at)),
            "logp_S": logp_S,
            "advantage_S": batch.advantages_T[at],
            "weight_S": torch.zeros_like(logp_S),
        }
        found = {name: values.detach().cpu().double() for name, values in found.items()}
        self._batches.append(found)

        def add_weight(gradient_S: Tensor) -> None:
            found["weight_S"] += gradient_S.detach().cpu()

        # The derivative of the loss by each token's log-prob.
        logp_S.register_hook(add_weight)  # type: ignore[no-untyped-call]

    def arrays(self) -> dict[str, Any]:
        """All micro-batches end to end, as float64."""
        names = ("group_N", "length_N", "logp_S", "advantage_S", "weight_S")
        return {
            name: np.concatenate([np.zeros(0), *(found[name].numpy() for found in self._batches)])
            for name in names
        }


def trace_step(
    config: Config,
    recording: Recording,
    ranks: Ranks,
    *,
    step: int,
    learning_rates: Sequence[tuple[int, float]],
    out: Path,
) -> None:
    """Trains up to and including `step` and writes its results. Raises ConfigError."""
    paths = RunPaths.of(config)
    checkpoints = Checkpoints(paths.checkpoints, keep=1, tokenizer_path="", dtype=compute_dtype(config))
    with contextlib.closing(checkpoints):
        first = max((done for done in find_checkpoints(paths.checkpoints) if done <= step), default=0)
        counts = recording.num_groups()
        absent = [s for s in range(first, step + 1) if counts[s] < config.trainer.groups_per_step]
        if absent:
            raise ConfigError(f"the ledger does not have all groups of step {absent[0]}")
        source = model_path(config)
        policy = build_policy(config, source, ranks)
        runner = build_step_runner(config, policy, ranks, initial=source)
        if first:
            runner.restore(checkpoints.load(first, ranks=ranks, **runner.saved))
    tokens = TokenTrace()
    before = None
    for number in range(first, step + 1):
        if number == step:
            before = _digest(policy)
            tokens.attach(policy)
        metrics = train_recorded_step(
            config, recording, runner, ranks, step=number, learning_rates=learning_rates
        )
    np.savez(out / "tokens.npz", **tokens.arrays())
    write_json(
        out / "step.json",
        {
            "step": step,
            "first_step": first,
            "loss": metrics["loss"],
            "grad_norm": metrics["grad_norm"],
            "parameters_before": before,
            "parameters_after": _digest(policy),
        },
    )


def _digest(policy: Policy) -> str:
    """SHA-256 of the parameters, including their names."""
    digest = hashlib.sha256()
    for name, tensor in gather(shards_of(policy)):
        digest.update(name.encode())
        digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main(argv: Sequence[str]) -> int:
    """Returns 0, or 2 with one message on stderr."""
    die_with_parent()
    keep_files_private()
    options = Options()
    options.add_argument("--recording", type=Path, required=True)
    options.add_argument("--step", type=int, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--own-lr", action="store_true")
    try:
        values, rest = options.parse_known_args(list(argv))
        config = resolved(load_config(rest))
        torch.set_num_threads(config.trainer.least_threads)
        with (
            joined_ranks(config, device_of(config)) as ranks,
            contextlib.closing(Recording(values.recording)) as recording,
        ):
            rates = [] if values.own_lr else recording.learning_rates()
            trace_step(config, recording, ranks, step=values.step, learning_rates=rates, out=values.out)
    except ArealError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
