"""One cell of the staleness benchmark: learns the sorting task from samples of a prescribed age.

It runs in one thread of one process.

Ages do not depend on timing. A *plan* sets them before the first step, so a cell's result depends on its
settings alone (on one machine). All samples of version v that any later step trains on are drawn in one batch
when v is made, and kept until that step. That costs the same at every age, and it is how a replay queue
works. The engine, the objective, the optimizer and the task are those of the real system; only the daemons
between them are left out.

Ages, in optimizer steps (a group's age in step t is t less the version that sampled it whole, which is at
least 0):

    fixed     every group's age is `lag`
    mixed     each group's age is drawn on its own, uniformly from 0..lag: a queue that hands out, in random
              order, what is at most `lag` old
    periodic  the engine syncs every I steps, so the age is t mod I, as OAPL prescribes. I is 2 lag + 1 in
              place of fixed and lag + 1 in place of mixed, so the mean age is that of the other methods (with
              mixed, the largest age and the distribution too)

The ages of mixed depend on the seed alone, and a sample's random numbers on seed, prompt and its index in its
group. So every method gets the same prompts at the same ages with the same random numbers, until its weights
differ.
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
from trainer.step.build import build_step_runner

CONTEXT_TOKENS = 24
CURVE_PROMPTS = 128
"""Held-out prompts, one sample each, of every point of the curve."""
GREEDY_PROMPTS = 512
"""Held-out prompts of the final greedy score."""
CURVE_POINTS = 40
"""Points of the curve; the last tenth of a run is four of them."""


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
    """Ages are periodic, in place of fixed or mixed."""
    mode: str
    """`fixed` | `mixed`"""
    lag: int
    """Age of every group (fixed), or the largest age (mixed)."""
    lr: float
    """AdamW learning rate after warm-up."""
    seed: int
    """Seed of the warm start, prompts, ages and samples."""
    num_steps: int = 400
    """Optimizer steps."""
    groups_per_step: int = 8
    """Prompts a step."""
    group_size: int = 8
    """Samples a prompt."""
    warm_start_steps: int = 600
    """Supervised steps that the initial model was trained for."""

    def __post_init__(self) -> None:
        assert self.mode in ("fixed", "mixed") and self.lag >= 0

    @property
    def interval(self) -> int:
        """Steps between syncs, where they are periodic."""
        return 2 * self.lag + 1 if self.mode == "fixed" else self.lag + 1

    def version_of(self, *, step: int, group: int) -> int:
        """The version that samples the `group`-th group of a step."""
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
        """The configuration of a job with these settings."""
        trainer = TrainerConfig(
            num_steps=self.num_steps,
            groups_per_step=self.groups_per_step,
            lr=self.lr,
            # A schedule that falls to zero would undo the effect of staleness towards the end: lags are in
            # steps, and their harm depends on the length of a step.
            lr_schedule="constant",
            normalizer=self.normalizer,
            logprob_chunk_tokens=4096,
        )
        return Config(seed=self.seed, objective=self.objective, trainer=trainer)


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """The result of a cell.

    Rewards are of held-out prompts under the current weights, whatever the training data's age.
    """

    reward: float
    """Mean of samples at temperature 1 over the last tenth of the run."""
    best: float
    """Largest mean of four neighbouring points of the curve. If it is far above `reward`, the run has
    collapsed."""
    greedy: float
    """Greedy score of the final weights."""
    ess_ratio: float
    """Mean over the run of the effective sample size of a step under its importance weights, over its
    sequences."""
    means: dict[str, float]
    """Means over the run of other metrics of the step."""
    curve: list[tuple[int, float]]
    """(completed steps, reward of samples at temperature 1)."""
    wall_s: float = field(compare=False)
    """Wall time, on a machine that may have been busy."""
    cpu_s: float = field(compare=False)
    """CPU time."""


MEANS = ("log_w_std", "kl_k3", "entropy", "grad_norm", "clipped_fraction", "lr_scale")
"""Step metrics whose means a result keeps."""


def build_model(out_dir: Path, *, seed: int, warm_start_steps: int) -> None:
    """Builds the default job's model at two thirds of its width and depth (10 ms a step).

    A smaller one takes longer to learn the format.
    """
    build_tiny_model(
        out_dir, seed=seed, warm_start_steps=warm_start_steps, swap_prob=0.5, hidden_size=64, num_layers=2
    )


class Sampler:
    """Samples from an engine on a task, with rewards."""

    def __init__(self, model_path: str, config: Config) -> None:
        model, weights = load(
            model_path, dtype=torch.float32, device=torch.device("cpu"), context_length=CONTEXT_TOKENS
        )
        options = EngineOptions(max_running=128, context_length=CONTEXT_TOKENS)
        self._core = EngineCore(model, weights, options, version="0")
        self._task = make_task(config.task, seed=config.seed)
        self._renderer = PromptRenderer(model_path)
        self._max_new_tokens = config.sampling.max_new_tokens
        self._held_out = self._prompts("eval", range(GREEDY_PROMPTS))
        self._train_seed = config.seed << 40
        self._held_out_seed = self._train_seed + (1 << 39)

    def activate(self, policy: Policy, *, version: int) -> None:
        """Activates the policy's weights in the engine."""
        if self._core.version != str(version):
            shadow, state = self._core.take_shadow_weights(), gather_full_state(policy)
            with torch.inference_mode():
                for name, tensor in state:
                    shadow.named[name].copy_(tensor)
            self._core.swap_weights(shadow, version=str(version), recompute=True)

    def groups(self, indices: Iterable[int], *, size: int) -> list[list[Trajectory]]:
        """`size` samples, at temperature 1, of each of these training prompts."""
        indices = list(indices)
        prompts = self._prompts("train", indices)
        seeds = [self._train_seed + index for index in indices]
        groups = self._sample([prompt for _, prompt in prompts], seeds=seeds, size=size, temperature=1.0)
        return [
            [self._trajectory(example, s) for s in group]
            for (example, _), group in zip(prompts, groups, strict=True)
        ]

    def score(self, *, num_prompts: int, temperature: float) -> float:
        """Mean reward of the first `num_prompts` held-out prompts, one sample each.

        The random numbers differ between versions.
        """
        prompts = self._held_out[:num_prompts]
        first = self._held_out_seed + int(self._core.version) * GREEDY_PROMPTS
        seeds = range(first, first + num_prompts)
        groups = self._sample([prompt for _, prompt in prompts], seeds=seeds, size=1, temperature=temperature)
        return statistics.mean(
            self._reward(example, s) for (example, _), (s,) in zip(prompts, groups, strict=True)
        )

    def _prompts(self, split: Split, indices: Iterable[int]) -> list[tuple[Example, tuple[int, ...]]]:
        examples = [self._task.example(split, index) for index in indices]
        return [(example, tuple(self._renderer.encode(example).tolist())) for example in examples]

    def _sample(
        self, prompts: Iterable[tuple[int, ...]], *, seeds: Iterable[int], size: int, temperature: float
    ) -> list[list[Sequence]]:
        """Samples `size` sequences a prompt; `seeds`: one for each prompt."""
        stops = tuple(self._renderer.stop_token_ids)
        groups = []
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            params = SamplingParams(
                max_new_tokens=self._max_new_tokens,
                temperature=temperature,
                stop_token_ids=stops,
                sampling_seed=seed,
            )
            groups.append(
                [Sequence(seq_id=f"{number}.{i}", prompt=prompt, params=params) for i in range(size)]
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
    """Trains one cell from the model that `build_model` wrote. Sets this process's torch threads to one."""
    torch.set_num_threads(1)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    config, ranks, plan = cell.config(), Ranks.alone(), cell.plan()
    policy = build_policy(config, model_path, ranks)
    runner = build_step_runner(config, policy, ranks)
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
    assert not queue, "planned samples were never trained on"
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
    """The mean to four digits.

    Steps that trained no group (equal rewards in all) lack the metric and are left out.
    """
    return float(f"{statistics.fmean(row[name] for row in rows):.4g}") if rows else 0.0
