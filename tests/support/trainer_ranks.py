"""Ranks of a real trainer over gloo, run by `run_ranks`: `CHECK STORE WORLD_SIZE OUT_DIR ...`."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from areal_like.config import DistillConfig, KlConfig, LoraConfig
from areal_like.errors import ArealError
from areal_like.runtime.process import die_with_parent
from areal_like.trajectory import Trajectory
from tests.support.full_state import gather_full_state
from tests.support.trainer_helpers import flattened, joined, random_groups, without_measured
from tests.support.waiting import HANG_LIMIT_S
from trainer.advantages import ADVANTAGES, Advantage, Gae, Prime
from trainer.advantages.critic import Critic
from trainer.advantages.implicit_rewards import ImplicitRewards
from trainer.advantages.reward_shaping import SHAPINGS
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import IncompleteStepError, Ranks
from trainer.distributed.sharding import MODEL_PREFIX, gather, local, shards_of
from trainer.metrics import speed
from trainer.metrics.named_means import KINDS
from trainer.metrics.speed import Clock
from trainer.models.policy import BaseReference, Policy
from trainer.models.value_model import ValueModel
from trainer.objectives import Need, build_objective
from trainer.objectives.normalizers import Normalizer
from trainer.optimizer import ShardedAdamW
from trainer.step.proximal import ProximalPolicy
from trainer.step.runner import StepRunner
from trainer.step.teachers import Teachers

SHARES = {"even": [0, 1, 0, 1, 0, 1, 0, 1], "uneven": [0, 0, 0, 1, 0, 0, 0, 0], "one-sided": [0] * 8}
"""The rank that gets each of eight groups."""
BUDGET_TOKENS = 40
DTYPES = {"float64": torch.float64, "float32": torch.float32}
LATE_S = 300.0
"""More than a step takes on any machine."""


def make_runner(
    path: str,
    ranks: Ranks,
    *,
    dtype: torch.dtype = torch.float64,
    beta1: float = 0.9,
    budget_tokens: int = BUDGET_TOKENS,
    checkpointing: bool = False,
    normalize: bool = False,
    max_grad_norm: float = 0.0,
    advantage: Advantage | None = None,
    settings: dict[str, Any] | None = None,
    peak_tflops: float = 0.0,
    balances: bool = False,
    beyond: str = "",
    normalizer: str = "token_mean",
    entropy_coef: float = 0.0,
    lora: LoraConfig | None = None,
    has_weights: bool = True,
    router_replay: bool = False,
) -> StepRunner:
    """A runner over a test model: sequence TIS and token mean, unless `settings` (sections) override them.
    With `objective=distill` and no section `distill` the teacher is the same model with larger weights.

    `beyond`: `staleness.beyond` of a job with `buffer.overdue=close`; empty: of another job. `lora`: with an
    adapter, for policy and critic. `has_weights`: False leaves it to the caller to load a checkpoint.
    """
    sections = settings or {}
    advantage_settings = dict(sections.get("advantage", {"name": "grpo"}))
    shapings = SHAPINGS.build_list(advantage_settings.pop("shaping", None), job={"max_tokens": 12})
    kl = KlConfig(**sections["kl"]) if "kl" in sections else None
    built = {"gradient_checkpointing": checkpointing, "master_dtype": dtype, "lora_settings": lora}
    policy = Policy.load(path, ranks, chunk_tokens=16, router_replay=router_replay, **built)
    if not has_weights:
        for param in policy.parameters():
            if param.requires_grad:
                local(param.detach()).fill_(math.nan)
    estimator = advantage or ADVANTAGES.build(advantage_settings)
    critic = None
    if isinstance(estimator, Gae):
        model = ValueModel.load(path, ranks, **built)
        adam = ShardedAdamW(model, ranks, lr=1e-2, betas=(beta1, 0.9), max_grad_norm=max_grad_norm)
        critic = Critic(model, adam, ranks, settings=estimator, budget_tokens=budget_tokens)
    objective_settings = {"name": "tis", "level": "sequence", "cap": 2.0, "normalize": normalize}
    used = sections.get("objective", objective_settings)
    default = {"teachers": {"default": path}} if used.get("name") == "distill" else {}
    distill = DistillConfig(**sections.get("distill", default))
    objective = build_objective(
        used,
        kl=kl,
        distill=distill,
        entropy_coef=entropy_coef,
        takes_parts=bool(beyond),
        caps_beyond=beyond == "cap",
    )
    proximal = None
    if objective.proximal:
        own = policy
        if not policy.has_adapter:
            own = Policy.load(path, ranks, master_dtype=dtype, router_replay=router_replay)
        proximal = ProximalPolicy(own, policy, rule=objective.proximal)
        proximal.restart()
    reference: Policy | BaseReference | None = None
    if kl or Need.REF in objective.needs or isinstance(estimator, Prime):
        is_own = policy.has_adapter
        reference = BaseReference(policy) if is_own else Policy.load(path, ranks, master_dtype=dtype)
    teachers = None
    if distill.teachers:
        models = {
            each: Policy.load(each, ranks, master_dtype=dtype, frozen=True)
            for each in distill.models.values()
        }
        teachers = Teachers(distill, ranks, models=models, vocab_size=policy.model.config.vocab_size)
        if "distill" not in sections:
            for param in models[path].parameters():
                local(param.detach()).mul_(1.5)
    prm = None
    if isinstance(estimator, Prime):
        assert reference is not None
        prm_policy = Policy.load(path, ranks, chunk_tokens=16, **built)
        adam = ShardedAdamW(prm_policy, ranks, lr=1e-2, betas=(beta1, 0.9), max_grad_norm=max_grad_norm)
        prm = ImplicitRewards(
            prm_policy, adam, reference, ranks, settings=estimator, budget_tokens=budget_tokens
        )
    return StepRunner(
        policy,
        ShardedAdamW(policy, ranks, lr=1e-2, betas=(beta1, 0.9), max_grad_norm=max_grad_norm),
        ranks,
        objective=objective,
        advantage=estimator,
        normalizer=Normalizer(name=normalizer, max_tokens=10),
        budget_tokens=budget_tokens,
        reference=reference,
        shapings=shapings,
        kl=kl if kl and kl.place == "reward" else None,
        critic=critic,
        prm=prm,
        proximal=proximal,
        teachers=teachers,
        peak_tflops=peak_tflops,
        balances=balances,
        beyond=beyond,
    )


def last_gradient(runner: StepRunner | Critic | ImplicitRewards) -> dict[str, Tensor]:
    """The gradient of the last step: with beta1 = 0, Adam's first moment. Unsharded, on rank 0."""
    model = runner.policy if isinstance(runner, StepRunner) else runner.model
    shards = shards_of(model, runner.optimizer.shards)
    moments = [runner.optimizer.moments(MODEL_PREFIX + shard.name)["exp_avg"] for shard in shards]
    return dict(gather([replace(s, rows=rows) for s, rows in zip(shards, moments, strict=True)]))


def gradients(ranks: Ranks, out_dir: Path, *paths: str) -> None:
    """Runs one step per dtype (one model each) and split of eight groups; writes gradient and metrics."""
    groups = random_groups(8)
    for (dtype_name, dtype), path in zip(DTYPES.items(), paths, strict=True):
        for share, owners in SHARES.items():
            for normalize in (False, True):
                runner = make_runner(
                    path, ranks, dtype=dtype, beta1=0.0, checkpointing=share == "uneven", normalize=normalize
                )
                mine = [group for group, owner in zip(groups, owners, strict=True) if owner == ranks.rank]
                metrics = runner.run(mine, step=0)
                _assert_same_names(metrics, ranks)
                gradient = last_gradient(runner)
                if ranks.rank == 0:
                    name = f"{dtype_name}-{share}-{'normalized' if normalize else 'plain'}"
                    save_file(
                        {k: v.contiguous() for k, v in gradient.items()}, out_dir / f"{name}.safetensors"
                    )
                    (out_dir / f"{name}.json").write_text(json.dumps(metrics))


def _assert_same_names(metrics: dict[str, Any], ranks: Ranks) -> None:
    """Every rank has the same means under names that only some of them have seen."""
    text = json.dumps([metrics[kind] for kind in KINDS]).encode()
    of_all = ranks.gather(torch.frombuffer(bytearray(text), dtype=torch.uint8)).numpy().tobytes()
    assert of_all == text * ranks.world_size


def steps(ranks: Ranks, out_dir: Path, path: str, cases: str) -> None:
    """Runs one float64 step per settings and split of eight groups (of two); writes the gradient."""
    groups = random_groups(8, prompt=6)
    for index, settings in enumerate(json.loads(cases)):
        for share in ("even", "one-sided", "balanced"):
            balances = share == "balanced"
            owners = SHARES["one-sided" if balances else share]
            runner = make_runner(path, ranks, beta1=0.0, settings=settings, balances=balances)
            mine = [group for group, owner in zip(groups, owners, strict=True) if owner == ranks.rank]
            metrics = runner.run(mine, step=7)
            assert not balances or 0.5 < metrics["balance"] <= 1
            gradient = last_gradient(runner)
            if ranks.rank == 0:
                save_file(
                    {k: v.contiguous() for k, v in gradient.items()}, out_dir / f"{index}-{share}.safetensors"
                )


def exchange(ranks: Ranks, out_dir: Path) -> None:
    """Messages of 0, 1 and many bytes reach every rank, and this one."""

    def message(source: int, target: int) -> bytes:
        return bytes([source, target]) * ((0, 1, 100_000)[(source + target) % 3])

    want = [message(source, ranks.rank) for source in range(ranks.world_size)]
    sizes = [len(each) for each in want]
    outgoing = [message(ranks.rank, target) for target in range(ranks.world_size)]
    assert ranks.exchange(outgoing, most_bytes=sizes) == want
    assert ranks.exchange([b""] * ranks.world_size, most_bytes=[0] * ranks.world_size) == [b""] * len(want)
    # Every rank gets from one source the 200,000 bytes of (source + target) % 3 == 2, and refuses them.
    try:
        ranks.exchange(outgoing, most_bytes=[199_999] * ranks.world_size)
    except ArealError as error:
        assert "sends 200000 bytes" in str(error) and "at most 199999" in str(error)
    else:
        raise AssertionError("a message that is too long was accepted")


def balanced(ranks: Ranks, out_dir: Path, path: str) -> None:
    """A balanced step equals the streaming one, is the same each time, and can be abandoned."""
    groups = random_groups(12, prompt=6)
    for group in groups[4:6]:  # conversations with branches
        group[0] = joined(group)
    settings: list[dict[str, Any]] = [
        {},
        {"objective": {"name": "tis"}, "advantage": {"name": "gae"}},
        {"objective": {"name": "vcpo", "norms": "proxy"}},
        {"objective": {"name": "vcpo", "norms": "exact"}},
    ]
    for sections in settings:
        for used in (groups, groups[1:2], groups[:1]):  # of the last, no group has an advantage
            mine = used[ranks.rank :: ranks.world_size]
            results = []
            for balances in (False, True, True):
                runner = make_runner(
                    path, ranks, beta1=0.0, settings=sections, balances=balances, budget_tokens=80
                )
                metrics = flattened(without_measured(runner.run(mine, step=7, num_groups=len(used))))
                results.append((metrics, last_gradient(runner)))
            (want, gradient), (got, first), (again, second) = results
            assert got == again and all(torch.equal(first[name], second[name]) for name in first)
            assert first.keys() == gradient.keys()
            for name, value in gradient.items():
                assert float((first[name] - value).norm()) <= 1e-9 * float(value.norm()) + 1e-15, name
            by_cut = {"balance", "num_microbatches", "shared_share"}
            for name in (want.keys() | got.keys()) - by_cut:
                both_undefined = math.isnan(got[name]) and math.isnan(want[name])
                assert both_undefined or math.isclose(got[name], want[name], rel_tol=1e-9, abs_tol=1e-9), name
            assert ("balance" in got) == (sections.get("objective", {}).get("norms") != "exact")
    _abandon_balanced(ranks, path, groups)


def _abandon_balanced(ranks: Ranks, path: str, groups: list[list[Trajectory]]) -> None:
    """Rank 1 drains before its last groups: no rank runs a micro-batch, and the next step is as ever."""
    runner, want = (make_runner(path, ranks, balances=True) for _ in range(2))
    mine = groups[ranks.rank :: ranks.world_size]
    want.run(mine, step=0)
    forwards: list[int] = []
    hook = runner.policy.register_forward_hook(lambda *_: forwards.append(1))
    draining: list[bool] = []

    def until_drained() -> Iterator[list[Trajectory]]:
        yield mine[0]
        if ranks.rank == 1:
            draining.append(True)
            return
        yield from mine[1:]

    try:
        runner.run(until_drained(), step=0, num_groups=len(groups), is_abandoned=lambda: bool(draining))
        raise AssertionError("the step was not abandoned")
    except IncompleteStepError:
        assert not forwards and runner.optimizer.num_updates == 0
    hook.remove()
    runner.run(mine, step=0)
    _assert_equal(runner, want)


def _assert_equal(runner: StepRunner, want: StepRunner) -> None:
    for (name, ours), (_, theirs) in zip(
        gather_full_state(runner.policy), gather_full_state(want.policy), strict=True
    ):
        assert torch.equal(ours, theirs), name


def resume(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Loads the checkpoint of step 2, runs step 3 with an even split, saves it."""
    runner = make_runner(path, ranks)
    checkpoints = Checkpoints(out_dir / "checkpoints", keep=9, tokenizer_path=path)
    if ranks.rank > 0:  # a network file system may show this rank an older directory
        older = Checkpoints(out_dir / "older", keep=9, tokenizer_path=path)
        older.path(1).mkdir(parents=True)
    assert (checkpoints if ranks.rank == 0 else older).latest(ranks) == 2
    extra = checkpoints.load(2, runner.policy, runner.optimizer, ranks)
    runner.run(random_groups(4, seed=2)[ranks.rank :: ranks.world_size], step=2)
    checkpoints.save(3, runner.policy, runner.optimizer, ranks, extra={**extra, "ranks": ranks.world_size})
    checkpoints.close()
    ranks.any(True)  # a barrier: rank 0 has written the checkpoint
    assert bool(gather_full_state(runner.policy)) == (ranks.rank == 0)


def outage(_: Ranks, out_dir: Path, path: str) -> None:
    """Rank 1's groups arrive long after the timeout of the default group's collectives."""
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{out_dir}/short-timeout", 2),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=4),
    )
    ranks = Ranks(control_timeout_s=30)
    runner = make_runner(path, ranks)

    def groups() -> Iterator[Any]:
        time.sleep(6.0 * rank)
        yield from random_groups(4)[rank::2]

    assert runner.run(groups(), step=0, num_groups=4)["num_groups"] == 4
    ranks.meet()
    _abandon(ranks, path)


def _abandon(ranks: Ranks, path: str) -> None:
    """Rank 1 abandons a step after two of its micro-batches; rank 0 stops at the same one."""
    want, runner = make_runner(path, ranks), make_runner(path, ranks)
    mine = random_groups(8)[ranks.rank :: 2]
    want.run(mine, step=0)
    forwards: list[int] = []
    hook = runner.policy.register_forward_hook(lambda *_: forwards.append(1))
    try:
        runner.run(mine, step=0, is_abandoned=lambda: ranks.rank == 1 and len(forwards) >= 2)
        raise AssertionError("the step was not abandoned")
    except IncompleteStepError:
        assert len(forwards) == 2 and runner.optimizer.num_updates == 0
    hook.remove()
    runner.run(mine, step=0)
    _assert_equal(runner, want)


class LateClock(Clock):
    """The host's clock, set forward by `late_s`."""

    late_s = 0.0

    def mark(self) -> float:
        return time.perf_counter() + self.late_s


def straggler(ranks: Ranks, out_dir: Path, path: str) -> None:
    """Rank 1's groups arrive LATE_S late, by its clock; writes rank 0's metrics."""
    clock = LateClock()
    speed.clock_of = lambda _: clock
    runner = make_runner(path, ranks)

    def groups() -> Iterator[Any]:
        clock.late_s += LATE_S * ranks.rank
        yield from random_groups(8)[ranks.rank :: 2]

    metrics = runner.run(groups(), step=5)
    if ranks.rank == 0:
        (out_dir / "straggler.json").write_text(json.dumps(metrics))


def main(**checks: Callable[..., None]) -> None:
    """Runs the check named on the command line. Ranks are forks, so that torch is imported only once."""
    check, store, world_size, out_dir, *rest = sys.argv[1:]
    pids = []
    for rank in range(int(world_size)):
        pids.append(os.fork())
        if not pids[-1]:
            try:
                die_with_parent(signum=signal.SIGKILL)
                _run_rank(
                    rank, int(world_size), store, lambda ranks: checks[check](ranks, Path(out_dir), *rest)
                )
                code = 0
            except Exception:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            # In a normal exit torch sometimes aborts: "terminate called without an active exception".
            os._exit(code)
    # Exits at the first rank that failed; the others die with this process.
    sys.exit(any(os.waitpid(pid, 0)[1] for pid in pids))


def _run_rank(rank: int, world_size: int, store: str, check: Callable[[Ranks], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=HANG_LIMIT_S),
    )
    check(Ranks())
    dist.destroy_process_group()


if __name__ == "__main__":
    main(
        gradients=gradients,
        steps=steps,
        balanced=balanced,
        exchange=exchange,
        resume=resume,
        outage=outage,
        straggler=straggler,
    )
