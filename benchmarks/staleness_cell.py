"""Runs one cell of the staleness benchmark: learns the sorting task from samples of a prescribed age.

A cell runs in one thread of one process. Ages do not depend on timing: a *plan* sets them before the first
step, so a cell's result depends on its settings alone (on one machine). All samples of version v that any
later step trains on are drawn in one batch when v exists, and kept until that step. The cost is the same at
every age, and a replay queue works in the same way. The engine, the objective, the optimizer and the task are
those of the real system; only the daemons between them are omitted.

Ages are in optimizer steps: a group's age in step t is t minus the version that sampled all of the group.
Versions before 0 do not exist, so the first steps have smaller ages.

    fixed     every group's age is `lag`
    mixed     each group's age is drawn independently and uniformly from 0..lag, as from a queue that returns
              groups of age `lag` or less in random order
    periodic  the engine syncs every I steps, so the age is t mod I, as OAPL prescribes. I is 2 lag + 1 if the
              cell's mode is fixed and lag + 1 if it is mixed, so the mean age equals that of the other
              methods (for mixed, the largest age and the distribution are equal too)

The ages of mixed depend on the seed alone, and a sample's random numbers on the seed, the prompt and the
sample's index in its group. So every method gets the same prompts at the same ages with the same random
numbers, until its weights differ.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from areal_like.config import BufferConfig, Config, TrainerConfig
from areal_like.config.trainer import NormalizerName
from areal_like.trajectory import NOT_SAMPLED, Trajectory
from rollout_server.engine.core import EngineCore
from rollout_server.engine.models.loading import load
from rollout_server.engine.options import EngineOptions
from rollout_server.engine.scheduler import SamplingParams, Sequence
from rollout_server.rendering.prompt_renderer import PromptRenderer
from rollout_server.tasks.base import Completion, Example, Split, make_task
from tests.support.full_state import gather_full_state
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy, build_policy
from trainer.models.tiny import build_tiny_model
from trainer.step.build import build_step_runner

CONTEXT_TOKENS = 24
CURVE_PROMPTS = 128
"""Held-out prompts for each point of the curve, with one sample per prompt."""
GREEDY_PROMPTS = 512
"""Held-out prompts for the final greedy score."""
CURVE_POINTS = 40
"""Points of the curve; the last tenth of a run is four of them."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Settings that decide a cell's result."""

    method: str
    """Label of the method in tables."""
    objective: dict[str, Any]
    """The `objective` section of a configuration."""
    advantage: dict[str, Any] = field(default_factory=dict)
    """The `advantage` section; empty: the default."""
    normalizer: NormalizerName = "token_mean"
    """`trainer.normalizer`, as in the method's paper."""
    periodic: bool = False
    """Ages are periodic instead of fixed or mixed."""
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
    """Prompts per step."""
    group_size: int = 8
    """Samples per prompt."""
    warm_start_steps: int = 600
    """Supervised training steps of the initial model."""

    def __post_init__(self) -> None:
        assert self.mode in ("fixed", "mixed") and self.lag >= 0

    @property
    def interval(self) -> int:
        """Steps between syncs, for periodic ages."""
        return 2 * self.lag + 1 if self.mode == "fixed" else self.lag + 1

    def version_of(self, *, step: int, group: int) -> int:
        """The version that samples the `group`-th group of a step."""
        if self.periodic:
            return step - step % self.interval
        if self.mode == "fixed":
            return max(0, step - self.lag)
        return max(0, step - random.Random(f"{self.seed}/age/{step}/{group}").randint(0, self.lag))

    def plan(self) -> dict[int, list[tuple[int, int]]]:
        """version -> the (step, group) pairs that it samples."""
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
            # A learning rate that decays to zero would hide the effect of staleness towards the end: a lag of
            # a few steps does less harm if the steps are smaller.
            lr_schedule="constant",
            normalizer=self.normalizer,
            logprob_chunk_tokens=4096,
        )
        # Whole groups: a group here is complete, and its baseline is the mean of all of its samples.
        config = Config(
            seed=self.seed,
            objective=self.objective,
            trainer=trainer,
            buffer=BufferConfig(overdue="wait"),
        )
        return replace(config, advantage=self.advantage) if self.advantage else config


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """The result of a cell.

    All rewards are measured on held-out prompts with the current weights.
    """

    reward: float
    """Mean of samples at temperature 1 over the last tenth of the run."""
    best: float
    """Largest mean of four consecutive points of the curve. If it is far above `reward`, the run has
    collapsed."""
    greedy: float
    """Greedy score of the final weights."""
    ess_ratio: float
    """Effective sample size of a step under its importance weights, divided by its number of sequences; mean
    over the run."""
    means: dict[str, float]
    """Means over the run of other metrics of the step."""
    curve: list[tuple[int, float]]
    """(completed steps, reward of samples at temperature 1)."""
    wall_s: float = field(compare=False)
    """Wall time; other load on the machine may have increased it."""
    cpu_s: float = field(compare=False)
    """CPU time."""

    @classmethod
    def read(cls, row: dict[str, Any]) -> CellResult:
        """The result from its JSON object."""
        return cls(**row | {"curve": [(step, reward) for step, reward in row["curve"]]})


MEANS = ("log_w_std", "kl_k3", "entropy", "grad_norm", "clipped_fraction", "lr_scale")
"""Step metrics whose means a result keeps."""


def build_model(out_dir: Path, *, seed: int, warm_start_steps: int) -> None:
    """Builds the default job's model at two thirds of its width and depth (10 ms per step).

    A smaller model takes longer to learn the format.
    """
    build_tiny_model(
        out_dir, seed=seed, warm_start_steps=warm_start_steps, swap_prob=0.5, hidden_size=64, num_layers=2
    )


class Sampler:
    """Samples from an engine on a task, with rewards."""

    def __init__(self, model_path: str, config: Config, *, context_tokens: int = CONTEXT_TOKENS) -> None:
        """`context_tokens`: longest sequence, prompt and completion."""
        model, weights = load(
            model_path, dtype=torch.float32, device=torch.device("cpu"), context_length=context_tokens
        )
        options = EngineOptions(max_running_requests=128, context_length=context_tokens)
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
        """Draws `size` samples at temperature 1 for each of these training prompts."""
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
        """Samples `size` sequences per prompt; `seeds`: one seed per prompt."""
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
                [
                    Sequence(seq_id=f"{number}.{i}", prompt=prompt, params=params, sample_index=i)
                    for i in range(size)
                ]
            )
            for sequence in groups[-1]:
                self._core.submit(sequence)
        while self._core.all_sequences:
            self._core.step()
        return groups

    def _reward(self, example: Example, sequence: Sequence) -> float:
        text = self._renderer.decode(np.array(sequence.output_ids, dtype=np.int32))
        reward = self._task.reward(example, Completion(text))
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


def train(
    plan: Mapping[int, list[tuple[int, int]]],
    config: Config,
    sampler: Sampler,
    model_path: str,
    *,
    group_size: int,
    at_point: Callable[[int], bool],
    score: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Trains on samples of planned ages; returns the metrics of each step.

    `plan`: version -> the (step, group) pairs that it samples. `score(version)` is called with the sampler at
    that version, before step `version`, for 0 to num_steps where `at_point(version)` is true.
    """
    num_steps, num_groups = config.trainer.num_steps, config.trainer.groups_per_step
    ranks = Ranks.alone()
    policy = build_policy(config, model_path, ranks)
    runner = build_step_runner(config, policy, ranks, initial=model_path)
    queue: dict[int, dict[int, list[Trajectory]]] = defaultdict(dict)
    rows: list[dict[str, Any]] = []
    for version in range(num_steps + 1):
        wanted = plan.get(version, [])
        if wanted or at_point(version) or version == num_steps:
            sampler.activate(policy, version=version)
        sampled = sampler.groups([step * num_groups + group for step, group in wanted], size=group_size)
        for (step, group), trajectories in zip(wanted, sampled, strict=True):
            queue[step][group] = trajectories
        if at_point(version):
            score(version)
        if version < num_steps:
            groups = queue.pop(version)
            rows.append(runner.run([groups[i] for i in range(num_groups)], step=version))
    assert not queue, "planned samples were never trained on"
    return rows


def run_cell(cell: Cell, model_path: str) -> CellResult:
    """Trains one cell from the model that `build_model` wrote. Sets this process's torch threads to one."""
    torch.set_num_threads(1)
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    config = cell.config()
    sampler = Sampler(model_path, config)
    every = max(1, cell.num_steps // CURVE_POINTS)
    curve: list[tuple[int, float]] = []

    def score(version: int) -> None:
        curve.append((version, round(sampler.score(num_prompts=CURVE_PROMPTS, temperature=1.0), 4)))

    rows = train(
        cell.plan(),
        config,
        sampler,
        model_path,
        group_size=cell.group_size,
        at_point=lambda version: version % every == 0,
        score=score,
    )
    rewards = [reward for _, reward in curve]
    tail = max(1, len(rewards) // 10)
    # Steps that trained no group (in each group all rewards were equal) lack these metrics.
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
    """The mean over `rows`, rounded to four digits; 0 without rows."""
    return float(f"{statistics.fmean(row[name] for row in rows):.4g}") if rows else 0.0
