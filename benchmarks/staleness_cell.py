"""One cell of the staleness benchmark: the sorting task learned from samples of a prescribed age, in one thread of one process.

Nothing here is timed by a clock: who is how old is decided by a *plan* before the first step, so a cell is a pure function of its
settings (on one machine). Not the weights wait but the samples: whatever a later step will learn from version v is sampled when v is
made, in one batch, and kept. That costs the same at every age, and it is what a replay queue does. The engine, the objective, the
optimizer and the task are those of the real system; only the daemons between them are left out.

Ages, in optimizer steps (a group's age in step t is t less the version that sampled it whole; never older than version 0):

    fixed     every group is exactly `lag` old
    mixed     every group's age is drawn by itself, uniformly from 0..lag: a queue that hands out in random order what is at most `lag` old
    periodic  the engine syncs every I steps, so the age is t mod I: what OAPL prescribes. I = 2 lag + 1 in place of fixed and lag + 1 in
              place of mixed, which makes the mean age that of the other methods (under mixed also the largest, and the distribution)

The ages of mixed depend on the seed alone, and a sample's random numbers on seed, prompt and place in its group: every method sees the same
prompts at the same ages with the same luck, until its weights differ.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from areal_like.config import Config, TrainerConfig
from areal_like.trajectory import NOT_SAMPLED, Trajectory
from rollout_server.engine.core import EngineCore, EngineOptions
from rollout_server.engine.models.loading import load
from rollout_server.engine.scheduler import SamplingParams, Sequence
from rollout_server.episodes.prompt_renderer import PromptRenderer
from rollout_server.tasks.base import Example, Split, make_task
from tests.support.full_state import gather_full_state
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy, build_policy
from trainer.models.tiny import build_tiny_model
from trainer.step.runner import StepRunner

CONTEXT_TOKENS = 24
CURVE_PROMPTS = 128
"""Held-out prompts, one sample each, of every point of the curve."""
GREEDY_PROMPTS = 512
"""Held-out prompts of the final greedy score."""
CURVE_POINTS = 40
"""So that the last tenth of a run is four of them."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Settings that decide a cell's result."""

    method: str
    """Its label in tables."""
    objective: dict[str, Any]
    """The `objective` section of a configuration."""
    normalizer: str = "token_mean"
    """`trainer.normalizer`, the one of the method's paper."""
    periodic: bool = False
    """Synchronise periodically instead."""
    mode: str
    """`fixed` | `mixed`"""
    lag: int
    """Of every group (fixed), or the largest (mixed)."""
    lr: float
    """AdamW learning rate after warm-up."""
    seed: int
    """Of the warm start, prompts, ages and draws."""
    num_steps: int = 400
    """Optimizer steps."""
    groups_per_step: int = 8
    """Prompts a step."""
    group_size: int = 8
    """Samples a prompt."""
    warm_start_steps: int = 600
    """Supervised steps of the model that it begins with."""

    def __post_init__(self) -> None:
        assert self.mode in ("fixed", "mixed") and self.lag >= 0

    @property
    def interval(self) -> int:
        """Steps between syncs, where they are periodic."""
        return 2 * self.lag + 1 if self.mode == "fixed" else self.lag + 1

    def version_of(self, *, step: int, group: int) -> int:
        """Which version samples the `group`-th group of a step."""
        if self.periodic:
            return step - step % self.interval
        if self.mode == "fixed":
            return max(0, step - self.lag)
        return max(0, step - random.Random(f"{self.seed}/age/{step}/{group}").randint(0, self.lag))

    def plan(self) -> dict[int, list[tuple[int, int]]]:
        """version -> the (step, group) that it samples."""
        plan: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for step in range(self.num_steps):
            for group in range(self.groups_per_step):
                plan[self.version_of(step=step, group=group)].append((step, group))
        return plan

    def config(self) -> Config:
        """What a job with these settings would be configured with."""
        trainer = TrainerConfig(
            num_steps=self.num_steps,
            groups_per_step=self.groups_per_step,
            lr=self.lr,
            # One that falls to zero would heal at the end what staleness has done: lags are in steps, and what hurts is their length.
            lr_schedule="constant",
            normalizer=self.normalizer,
            logprob_chunk_tokens=4096,
        )
        return Config(seed=self.seed, objective=self.objective, trainer=trainer)


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What a cell came to. Rewards are of held-out prompts under the weights of the moment, whatever the age of what they learn from."""

    reward: float
    """Mean of samples at temperature 1 over the last tenth of the run."""
    best: float
    """Largest mean of four neighbours of the curve: far above `reward`, the run has collapsed."""
    greedy: float
    """Of the final weights."""
    ess_ratio: float
    """Mean over the run of the effective share of a step's sequences under their importance weights."""
    means: dict[str, float]
    """Means over the run of other metrics of the step."""
    curve: list[tuple[int, float]]
    """(completed steps, reward of samples at temperature 1)."""
    wall_s: float = field(compare=False)
    """Seconds, on a machine that may have been busy with other things."""
    cpu_s: float = field(compare=False)
    """Seconds of processor time."""


MEANS = ("log_w_std", "kl_k3", "entropy", "grad_norm", "clipped_fraction", "lr_scale")
"""Metrics of the step of which a result keeps the mean."""


def build_model(out_dir: Path, *, seed: int, warm_start_steps: int) -> None:
    """The default job's recipe at two thirds of its width and depth; smaller, it takes longer to learn the format (10 ms a step)."""
    build_tiny_model(
        out_dir, seed=seed, warm_start_steps=warm_start_steps, swap_prob=0.5, hidden_size=64, num_layers=2
    )


class Sampler:
    """An engine, a task and the reward of what the one answers to the other."""

    def __init__(self, model_path: str, config: Config) -> None:
        model, weights = load(
            model_path, dtype=torch.float32, device=torch.device("cpu"), context_length=CONTEXT_TOKENS
        )
        options = EngineOptions(max_running=128, context_length=CONTEXT_TOKENS)
        self._core = EngineCore(model, weights, options, version="0")
        self._task = make_task(config.task, seed=config.seed)
        self._renderer = PromptRenderer(model_path)
        self._max_new_tokens = config.sampling.max_new_tokens
        self._held_out = self._asked("eval", range(GREEDY_PROMPTS))
        self._train_luck = config.seed << 40
        self._held_out_luck = self._train_luck + (1 << 39)

    def activate(self, policy: Policy, *, version: int) -> None:
        """Goes over to the policy's weights."""
        if self._core.version != str(version):
            spare, state = self._core.take_spare(), gather_full_state(policy)
            with torch.inference_mode():
                for name, tensor in state:
                    spare.named[name].copy_(tensor)
            self._core.swap(spare, version=str(version), recompute=True)

    def groups(self, indices: Iterable[int], *, size: int) -> list[list[Trajectory]]:
        """`size` samples at temperature 1 of each of these training prompts."""
        indices = list(indices)
        asked = self._asked("train", indices)
        luck = [self._train_luck + index for index in indices]
        answers = self._answers([prompt for _, prompt in asked], luck=luck, size=size, temperature=1.0)
        return [
            [self._trajectory(example, s) for s in group]
            for (example, _), group in zip(asked, answers, strict=True)
        ]

    def score(self, *, num_prompts: int, temperature: float) -> float:
        """Mean reward of held-out prompts, always the same ones, one sample each, with other random numbers under each version."""
        asked = self._held_out[:num_prompts]
        first = self._held_out_luck + int(self._core.version) * GREEDY_PROMPTS
        luck = range(first, first + num_prompts)
        answers = self._answers([prompt for _, prompt in asked], luck=luck, size=1, temperature=temperature)
        return statistics.mean(
            self._reward(example, s) for (example, _), (s,) in zip(asked, answers, strict=True)
        )

    def _asked(self, split: Split, indices: Iterable[int]) -> list[tuple[Example, tuple[int, ...]]]:
        examples = [self._task.example(split, index) for index in indices]
        return [(example, tuple(self._renderer.encode(example).tolist())) for example in examples]

    def _answers(
        self, prompts: Iterable[tuple[int, ...]], *, luck: Iterable[int], size: int, temperature: float
    ) -> list[list[Sequence]]:
        """`luck`: a seed for each prompt."""
        stops = tuple(self._renderer.stop_token_ids)
        groups = []
        for place, (prompt, seed) in enumerate(zip(prompts, luck, strict=True)):
            params = SamplingParams(
                max_new_tokens=self._max_new_tokens,
                temperature=temperature,
                stop_token_ids=stops,
                sampling_seed=seed,
            )
            groups.append(
                [Sequence(seq_id=f"{place}.{i}", prompt=prompt, params=params) for i in range(size)]
            )
            for index, sequence in enumerate(groups[-1]):
                self._core.submit(sequence, index=index)
        while self._core.all_sequences:
            self._core.step()
        return groups

    def _reward(self, example: Example, sequence: Sequence) -> float:
        reward = self._task.reward(
            example, self._renderer.decode(np.array(sequence.output_ids, dtype=np.int32))
        )
        assert isinstance(reward, float)
        return reward

    def _trajectory(self, example: Example, sequence: Sequence) -> Trajectory:
        assert sequence.finish is not None
        tokens = np.array([*sequence.prompt, *sequence.output_ids], dtype=np.int32)
        mask = np.ones(len(tokens), dtype=np.uint8)
        mask[: len(sequence.prompt)] = 0
        logprobs = np.zeros(len(tokens), dtype=np.float32)
        logprobs[mask == 1] = np.minimum(sequence.output_logprobs, 0)
        return Trajectory(
            tokens=tokens,
            loss_mask=mask,
            logprobs=logprobs,
            versions=np.where(mask == 1, int(self._core.version), NOT_SAMPLED).astype(np.int32),
            reward=self._reward(example, sequence),
            finish_reason=sequence.finish.reason,
        )


def run_cell(cell: Cell, model_path: str) -> CellResult:
    """Trains one cell from the model that `build_model` wrote for it. Leaves this process with one thread."""
    torch.set_num_threads(1)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    config, ranks, plan = cell.config(), Ranks.alone(), cell.plan()
    policy = build_policy(config, model_path, ranks)
    runner = StepRunner.of(config, policy, ranks)
    sampler = Sampler(model_path, config)
    queue: dict[int, dict[int, list[Trajectory]]] = defaultdict(dict)
    every = max(1, cell.num_steps // CURVE_POINTS)
    curve: list[tuple[int, float]] = []
    rows: list[dict[str, float]] = []
    for version in range(cell.num_steps + 1):
        wanted, at_point = plan.get(version, []), version % every == 0
        if wanted or at_point:
            sampler.activate(policy, version=version)
        sampled = sampler.groups(
            [step * cell.groups_per_step + group for step, group in wanted], size=cell.group_size
        )
        for (step, group), trajectories in zip(wanted, sampled, strict=True):
            queue[step][group] = trajectories
        if at_point:
            curve.append((version, round(sampler.score(num_prompts=CURVE_PROMPTS, temperature=1.0), 4)))
        if version < cell.num_steps:
            groups = queue.pop(version)
            rows.append(runner.run([groups[i] for i in range(cell.groups_per_step)], step=version))
    assert not queue, "every planned sample is trained on"
    sampler.activate(policy, version=cell.num_steps)
    rewards = [reward for _, reward in curve]
    tail = max(1, len(rewards) // 10)
    live = [row for row in rows if "kl_k3" in row]
    return CellResult(
        reward=statistics.mean(rewards[-tail:]),
        best=max(statistics.mean(rewards[i : i + tail]) for i in range(len(rewards) - tail + 1)),
        greedy=sampler.score(num_prompts=GREEDY_PROMPTS, temperature=0.0),
        ess_ratio=_mean(live, "ess_ratio"),
        means={name: _mean(live, name) for name in MEANS},
        curve=curve,
        wall_s=round(time.perf_counter() - wall_s, 1),
        cpu_s=round(time.process_time() - cpu_s, 1),
    )


def _mean(rows: list[dict[str, float]], name: str) -> float:
    """To four digits. Steps without a single group to run (equal rewards everywhere) have no such metric and are left out."""
    return float(f"{statistics.fmean(row[name] for row in rows):.4g}") if rows else 0.0
