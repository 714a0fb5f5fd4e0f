"""Ranks in context groups, which compute a micro-batch together, and in replicas, each with all weights: the
result is that of one rank."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.automatic_settings import resolved
from areal_like.config.loading import from_mapping
from areal_like.context_parallel import context_obstacle
from areal_like.errors import ConfigError
from areal_like.paths import RunPaths
from tests.support.families import TEXT, write_family
from tests.support.moe_model import write_moe_model
from tests.support.offline import metrics_of
from tests.support.preference_rows import sum_pairs
from tests.support.sft_model import addition_rows, write_rows, write_sft_model
from tests.support.shaped_ranks import case_runner, gradient_of, offline_kinds, run_steps, weights_of
from tests.support.trainer_helpers import VOCAB, run_ranks, write_model
from trainer.batching.context_part import ContextPart
from trainer.batching.shared_prefixes import InputSequence, SharedRows
from trainer.distributed.ranks import Ranks, share_of
from trainer.models.tiny import character_tokenizer
from trainer.offline.run import OfflineRun
from trainer.step.recipe import StepRecipe

Case = dict[str, Any]

TOKEN: Case = {"settings": {"objective": {"name": "ppo"}}, "entropy_coef": 0.1}
SEQUENCE: Case = {"settings": {"objective": {"name": "tis", "level": "sequence", "cap": 2.0}}}
GEOMETRIC: Case = {"settings": {"objective": {"name": "gspo"}}, "checkpointing": True}
WHOLE_GROUP: Case = {
    "settings": {"objective": {"name": "vcpo", "norms": "proxy"}},
    "budget_tokens": 200,
}
CRITIC: Case = {"settings": {"objective": {"name": "ppo"}, "advantage": {"name": "gae"}}}
KINDS = {"token": TOKEN, "sequence": SEQUENCE, "geometric": GEOMETRIC, "group": WHOLE_GROUP, "critic": CRITIC}
WHOLE_STEP: dict[str, Case] = {
    "batch": {"settings": {"objective": {"name": "m2po"}}},
    "reference": {
        "settings": {
            "objective": {"name": "reinforce"},
            "kl": {"coef": 0.3, "estimator": "k3", "place": "reward"},
        }
    },
    "proximal": {
        "settings": {"objective": {"name": "decoupled_ppo", "prox": "snapshot", "interval": 2}},
        "normalizer": "seq_mean_token_mean",
    },
    "norms": {"settings": {"objective": {"name": "vcpo", "norms": "exact"}}},
    "norms of the step": {"settings": {"objective": {"name": "vcpo", "norms": "exact", "baseline": "batch"}}},
    "masks": {
        "settings": {
            "objective": {"name": "tis", "masks": [{"name": "trust_region", "max_kl": 9.0, "mean_kl": 3.0}]}
        }
    },
}


def with_models(folder: Path) -> dict[str, Case]:
    """Methods that have further models: teachers of labels, and a reward model of tokens."""
    names = {"even": "first", "default": "second"}
    teachers = {
        label: write_model(folder / name, "gpt2", seed=seed)
        for seed, (label, name) in enumerate(names.items(), start=1)
    }
    prime = {"objective": {"name": "ppo"}, "advantage": {"name": "prime"}}
    return {
        "prime": {"settings": prime},
        **{
            loss: {
                "settings": {
                    "objective": {"name": "distill"},
                    "distill": {"teachers": teachers, "coef": 0.5, "loss": loss},
                }
            }
            for loss in ("sampled", "full")
        },
    }


UNUSUAL: dict[str, Case] = {
    "win rates": {"settings": {"objective": {"name": "sppo"}}, "normalizer": "seq_mean_token_sum"},
    "rewards of steps": {"settings": {"objective": {"name": "ppo"}, "advantage": {"name": "grpo_process"}}},
    "budget of the KL": {
        "settings": {
            "objective": {"name": "reinforce"},
            "kl": {"coef": 0.3, "budget": 1e-3, "gain": 0.5, "place": "loss"},
        }
    },
    "parts of groups": {**TOKEN, "beyond": "mask", "budget_tokens": 30},
}
"""Two steps of each: the second one has the coefficient, and the running statistics, of the first."""
BOTH = {"world_size": 4, "size": 2, "replicas": 2}
"""Two replicas of two ranks, which are a context group."""


BY_CUT = {"balance", "num_microbatches", "shared_share", "baseline"}
"""Metrics that depend on the cuts into micro-batches (`baseline` counts dummies of ranks without work)."""


def compare(
    got: Mapping[str, Tensor],
    metrics: list[dict[str, float]],
    want: Mapping[str, Tensor],
    want_metrics: list[dict[str, float]],
    *,
    error: float = 1e-9,
) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert float((got[name] - tensor).norm()) <= error * float(tensor.norm()), name
    for of_step, want_of_step in zip(metrics, want_metrics, strict=True):
        names = (of_step.keys() | want_of_step.keys()) - BY_CUT
        if abs(of_step.get("prm_reward_mean", 1.0)) < error:
            # Before the first update all rewards are zero up to rounding, whose sign predicts the outcomes.
            names -= {"prm_accuracy"}
        for name in names:
            value, wanted = of_step[name], want_of_step[name]
            both_undefined = math.isnan(value) and math.isnan(wanted)
            assert both_undefined or math.isclose(value, wanted, rel_tol=error, abs_tol=error), name


def run_in_shape(
    check: str, folder: Path, *args: str, world_size: int, size: int = 1, replicas: int = 1
) -> None:
    """Runs a check of the support module in context groups of `size` and as `replicas`."""
    shape = json.dumps({"context_parallel": size, "replicas": replicas})
    module = "tests.support.shaped_ranks"
    run_ranks(check, str(folder), shape, *args, world_size=world_size, module=module)


def check_cases(folder: Path, ranks: Ranks, cases: list[Case], **shape: int) -> None:
    """Ranks in this shape (arguments of `run_in_shape`) give what one rank gives: the weights after some
    steps in float64, or the loss and the gradient of one step in float32."""
    run_in_shape("cases", folder, json.dumps(cases), **shape)
    for index, case in enumerate(cases):
        runner = case_runner(ranks, {**case, "balances": False})
        want = run_steps(runner, ranks, case)
        metrics = json.loads((folder / f"{index}.json").read_text())
        found = load_file(folder / f"{index}.safetensors")
        if case.get("num_steps") == 1:
            for name in ("loss", "grad_norm", "entropy"):
                assert metrics[0][name] == pytest.approx(want[0][name], rel=1e-5, abs=1e-7), (case, name)
            gradient = gradient_of(runner)
            assert gradient.keys() == found.keys()
            total = math.hypot(*(float(each.norm()) for each in gradient.values()))
            for name, each in gradient.items():
                assert float((found[name] - each).norm()) <= 1e-4 * float(each.norm()) + 1e-7 * total, name
        else:
            compare(found, metrics, weights_of(runner), want)


@pytest.mark.long
def test_two_ranks_of_a_context_are_one(tmp_path: Path, ranks: Ranks, path: str) -> None:
    """One objective of each kind, with segments, shared prefixes, and a sample that is too long to pack."""
    further = with_models(tmp_path)
    cases = [{"path": path, **case} for case in (*KINDS.values(), further["full"], further["prime"])]
    for family in ("qwen3", "mistral"):  # grouped queries; windows
        model = write_model(tmp_path / family, family, dtype=torch.float32)
        cases.append({"path": model, "dtype": "float32", "num_steps": 1, **SEQUENCE})
    cases += [{"path": path, "num_steps": 2, **case} for case in UNUSUAL.values()]
    check_cases(tmp_path, ranks, cases, world_size=2, size=2)


def test_two_replicas_of_a_context_are_one(tmp_path: Path, ranks: Ranks, path: str) -> None:
    check_cases(tmp_path, ranks, [{"path": path, "num_steps": 2, **CRITIC}], **BOTH)


TWENTY_STEPS = {
    "a context of 2": {"world_size": 2, "size": 2},
    "a context of 4": {"world_size": 4, "size": 4},
    "2 replicas": {"world_size": 2, "replicas": 2},
    "2 replicas of 2 ranks": {"world_size": 4, "replicas": 2},
    "a context with ranks of 2 replicas": {"world_size": 2, "size": 2, "replicas": 2},
    "2 replicas with contexts of 2": BOTH,
}


@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, marks=pytest.mark.chaos, id=name) for name, shape in TWENTY_STEPS.items()],
)
def test_twenty_steps_are_those_of_one_rank(
    tmp_path: Path, ranks: Ranks, path: str, shape: dict[str, int]
) -> None:
    """In float64 after twenty steps, and in float32 the loss and the gradient of the first."""
    cases = [{"path": path, "budget_tokens": 96, "num_steps": 20, **case} for case in KINDS.values()]
    model = write_model(tmp_path / "float32", dtype=torch.float32)
    once: Case = {"path": model, "dtype": "float32", "num_steps": 1}
    cases += [{**once, **case} for case in KINDS.values()]
    check_cases(tmp_path, ranks, cases, **shape)


@pytest.mark.chaos
def test_four_ranks_of_a_context_are_one(tmp_path: Path, ranks: Ranks, path: str) -> None:
    every = (*KINDS.values(), *WHOLE_STEP.values(), *with_models(tmp_path).values())
    cases = [{"path": path, **case} for case in every]
    check_cases(tmp_path, ranks, cases, world_size=4, size=4)


@pytest.mark.long
def test_two_replicas_of_two_ranks_are_one(tmp_path: Path, ranks: Ranks, path: str) -> None:
    """With norms of single samples, which write gradients themselves, and what no context group can do."""
    norms = [
        {"settings": {"objective": {"name": "vcpo", "norms": "ghost", "baseline": baseline}}}
        for baseline in ("group", "batch")
    ]
    every = (*norms, WHOLE_STEP["norms of the step"], WHOLE_STEP["proximal"])
    cases = [{"budget_tokens": 200, "num_steps": 2, "path": path, **case} for case in every]
    check_cases(tmp_path, ranks, cases, world_size=4, replicas=2)


@pytest.mark.chaos
@pytest.mark.parametrize("replicas", [1, 2])
def test_two_data_ranks_with_contexts_are_one(tmp_path: Path, ranks: Ranks, path: str, replicas: int) -> None:
    every = (*KINDS.values(), *WHOLE_STEP.values(), *with_models(tmp_path).values())
    cases = [{"path": path, "balances": replicas == 2, **case} for case in every]
    if replicas == 2:
        cases += [{"path": path, "num_steps": 2, **case} for case in UNUSUAL.values()]
    check_cases(tmp_path, ranks, cases, world_size=4, size=2, replicas=replicas)


OFFLINE = {
    "of_texts": ("sft", {"train": "texts"}),
    "of_scores": ("reward_model", {"train": "pairs", "center_coef": 0.1}),
    **{name: ("preferences", {"train": "pairs", "method": name}) for name in ("dpo", "ipo", "simpo", "orpo")},
    "kto": ("preferences", {"train": "labels", "method": "kto"}),
}
"""Name of a run -> (section, its settings)."""
PREFERENCES = ("ipo", "simpo", "orpo")
OTHERS = ("of_texts", "of_scores", "dpo", "kto")


@pytest.mark.parametrize(
    ("shape", "names", "num_rows"),
    [
        pytest.param({"world_size": 2, "size": 2}, PREFERENCES, 5, marks=pytest.mark.long, id="preferences"),
        pytest.param({"world_size": 2, "size": 2}, OTHERS, 13, marks=pytest.mark.chaos, id="context"),
        pytest.param(BOTH, OTHERS, 13, marks=pytest.mark.chaos, id="context and replicas"),
    ],
)
def test_offline_training_in_a_shape(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: dict[str, int],
    names: tuple[str, ...],
    num_rows: int,
) -> None:
    """Supervised training, a reward model and preferences have the losses and gradient norms of one rank."""
    other = AutoModelForCausalLM.from_pretrained(write_sft_model(tmp_path / "model"))
    with torch.no_grad():  # with the model itself, the first margins would be rounding
        for param in other.parameters():
            param.mul_(1.1)
    reference = str(tmp_path / "reference")
    other.save_pretrained(reference)
    rows = {
        "pairs": sum_pairs(num_rows, seed=1),
        "labels": sum_pairs(num_rows, seed=1, kind="label"),
        "texts": addition_rows("text", num_rows, seed=1),
    }
    files = {name: str(write_rows(tmp_path / f"{name}.jsonl", each)) for name, each in rows.items()}
    sections: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names:
        key, own = OFFLINE[name]
        sections[name] = key, {**own, "batch_rows": 5, "num_epochs": 1, "eval_interval": 1}
        sections[name][1].update(dict.fromkeys(("train", "eval"), files[own["train"]]))
        if name in ("dpo", "ipo", "kto"):
            sections[name][1]["reference"] = reference
    trainer = {"lr": 3e-3, "warmup_steps": 0, "tokens_per_microbatch": 80}
    job = {"model": {"path": str(tmp_path / "model")}}
    of_ranks = {
        **trainer,
        "world_size": shape["world_size"],
        "context_parallel": shape["size"],
        "replicas": shape.get("replicas", 1),
    }
    jobs = {name: (key, {**job, "trainer": of_ranks, key: each}) for name, (key, each) in sections.items()}
    # Two caches, so that the log-probs of the reference are computed by the ranks too.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache_of_ranks"))
    (tmp_path / "ranks").mkdir()
    run_in_shape("offline", tmp_path / "ranks", json.dumps(jobs), **shape)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, (key, each) in sections.items():
        config = from_mapping(
            {**job, "name": name, "runs_dir": str(tmp_path / "alone"), "trainer": trainer, key: each}
        )
        ranks = Ranks.alone()
        try:
            OfflineRun(offline_kinds()[key], config, ranks, stopping=threading.Event(), started_s=0.0).run()
        finally:
            dist.destroy_process_group()
        want = metrics_of(RunPaths.of(config))
        got = metrics_of(RunPaths(tmp_path / "ranks" / name))
        assert len(want) == len(got) == math.ceil(num_rows / 5)
        for of_step, want_of_step in zip(got, want, strict=True):
            assert of_step.keys() == want_of_step.keys() and {"grad_norm", "eval_loss"} <= of_step.keys()
            for metric in of_step.keys() - BY_CUT:
                expected = pytest.approx(want_of_step[metric], rel=1e-4, abs=1e-5)
                assert of_step[metric] == expected, (name, metric)


@pytest.mark.chaos
@pytest.mark.parametrize(
    "shape", [{"world_size": 2, "size": 2}, BOTH], ids=["context", "context and replicas"]
)
def test_families_in_a_shape(tmp_path: Path, ranks: Ranks, shape: dict[str, int]) -> None:
    """Latent attention, experts with routes, windows in some layers, and an adapter with its reference."""
    once: Case = {"dtype": "float32", "num_steps": 1}
    models = {name: write_family(name, tmp_path / name) for name in ("deepseek_v3", "qwen3_moe", "gemma3")}
    cases = [{"path": model, **once, **TOKEN} for model in models.values()]
    experts = write_moe_model(tmp_path / "experts", vocab_size=VOCAB)
    cases.append({"path": experts, **once, **SEQUENCE, "router_replay": True})
    llama = write_model(tmp_path / "llama", dtype=torch.float32)
    kl = {"settings": {**TOKEN["settings"], "kl": {"coef": 0.3, "place": "loss"}}}
    cases.append({"path": llama, **once, **kl, "lora": {"rank": 4, "alpha": 8.0}})
    check_cases(tmp_path, ranks, cases, **shape)


@pytest.mark.chaos
@pytest.mark.parametrize("size", [2, 4])
def test_linear_attention_in_a_context(tmp_path: Path, ranks: Ranks, size: int) -> None:
    """Channels of the convolution and heads of the recurrence are divided; each sequence has its state."""
    cases: list[Case] = []
    for family in ("qwen3_5_text", "qwen3_next"):
        heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_key_value_heads": 4}
        config = AutoConfig.for_model(family, **(TEXT[family] | heads))
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn_like(param) * 0.05)
        model.save_pretrained(tmp_path / family)
        character_tokenizer().save_pretrained(tmp_path / family)
        once: Case = {"path": str(tmp_path / family), "dtype": "float32", "num_steps": 1}
        cases += [{**once, **TOKEN}, {**once, **GEOMETRIC}]
    check_cases(tmp_path, ranks, cases, world_size=size, size=size)


@pytest.mark.parametrize(
    ("saved", "others"),
    [
        pytest.param((4, 2, 1), [(4, 4, 1), (1, 1, 1)], marks=pytest.mark.chaos, id="a context"),
        pytest.param(
            (4, 2, 2),
            [(2, 1, 1), (2, 2, 2), (4, 1, 2)],
            marks=pytest.mark.long,
            id="a context and replicas",
        ),
    ],
)
def test_checkpoints_resume_at_other_shapes(
    tmp_path: Path, path: str, saved: tuple[int, int, int], others: list[tuple[int, int, int]]
) -> None:
    """(ranks, ranks of a context, replicas): bit for bit at the shape that saved, exact at others."""

    def run(check: str, shape: tuple[int, int, int], *words: str) -> None:
        world_size, size, replicas = shape
        run_in_shape(
            check,
            tmp_path,
            json.dumps(case),
            "2",
            *words,
            world_size=world_size,
            size=size,
            replicas=replicas,
        )

    case = {"path": path, **CRITIC}
    run("saves", saved)
    folder = tmp_path / "checkpoints" / "step_000002" / "rows"
    assert len(list(folder.glob("policy-*"))) == saved[0] // saved[2], "one replica has written"
    want = load_file(tmp_path / "straight.safetensors")
    want_metrics = json.loads((tmp_path / "straight.json").read_text())
    for shape in (saved, *others):
        name = "-".join(map(str, shape))
        run("resumes", shape, name)
        got = load_file(tmp_path / f"{name}.safetensors")
        if shape == saved:
            assert all(torch.equal(tensor, want[key]) for key, tensor in got.items())
        compare(got, json.loads((tmp_path / f"{name}.json").read_text()), want, want_metrics)


def test_replicas_that_differ_are_found(tmp_path: Path, path: str) -> None:
    """Before a gradient of them is used, and before they are pushed or saved."""
    write_model(tmp_path / "other", "gpt2", seed=1)
    run_in_shape("unequal", tmp_path, json.dumps({"path": path, **TOKEN}), world_size=2, replicas=2)


@pytest.mark.long
def test_a_replica_that_is_lost_ends_the_step(tmp_path: Path, path: str) -> None:
    """No rank makes an update without its gradients, also those that do not exchange rows with it."""
    with pytest.raises(AssertionError):  # the killed rank's exit code
        run_in_shape(
            "loses_a_replica", tmp_path, json.dumps({"path": path, **TOKEN}), world_size=4, replicas=2
        )
    assert sorted(file.name for file in tmp_path.glob("survivor-*")) == [f"survivor-{n}" for n in range(3)]


@given(st.integers(0, 40), st.integers(1, 6), st.integers(1, 4))
def test_every_group_has_one_data_rank(num: int, num_data: int, size: int) -> None:
    world_size = num_data * size
    shares = [
        share_of(num, rank=rank, world_size=world_size, context_parallel=size) for rank in range(world_size)
    ]
    assert sorted(number for share in shares for number in share) == list(range(num))
    assert all(not share for rank, share in enumerate(shares) if rank % size)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(1, 5), st.booleans())
def test_parts_cover_a_microbatch(lengths: list[int], num_ranks: int, shares: bool) -> None:
    """Each row and each sampled token belongs to one rank, which reads the row before the token."""
    tokens = [np.arange(length, dtype=np.int32) for length in lengths]
    shared = SharedRows.of([InputSequence(tokens=each) for each in tokens]) if shares else None
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    sampled_S = np.setdiff1d(np.arange(total), starts)
    parts = [
        ContextPart.of(sampled_S, num_tokens=total, shared=shared, num_ranks=num_ranks, rank=rank)
        for rank in range(num_ranks)
    ]
    num_rows = total if shared is None else len(shared.token_U)
    assert len({len(part.row_R) for part in parts}) == 1
    covered = torch.stack([part.row_R for part in parts]).T.flatten()[:num_rows]
    assert covered.tolist() == list(range(num_rows))
    flat = torch.full((num_ranks, parts[0].most_sampled), -1)
    for rank, part in enumerate(parts):
        flat[rank, : len(part.target_C)] = part.target_C
        rows = part.row_R[part.read_C].tolist()
        row_T = np.arange(total) if shared is None else shared.row_T
        assert rows == row_T[part.target_C.numpy() - 1].tolist()
    assert flat.flatten()[parts[0].place_S].tolist() == sampled_S.tolist()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 2}, "does not divide the 2 KV heads"),
        ({"num_attention_heads": 6}, "does not divide the 6 KV heads"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 1},
            "does not divide the 1 KV heads",
        ),
        ({"num_attention_heads": 8, "linear_num_value_heads": 6}, "6 value heads"),
        (
            {
                **{"num_attention_heads": 8, "linear_num_value_heads": 4},
                **{"linear_num_key_heads": 1, "linear_key_head_dim": 3},
            },
            "2 x 3 channels",
        ),
        ({"num_attention_heads": 8, "rope_scaling": {"type": "longrope"}}, "kind longrope"),
        ({"num_attention_heads": 8, "rope_parameters": {"rope_type": "dynamic"}}, "kind dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "kind longrope"),
        ({"num_attention_heads": 8, "num_key_value_heads": 1, "kv_lora_rank": 16}, ""),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "rope_scaling": None}, ""),
        ({"n_head": 4}, ""),
    ],
)
def test_models_that_a_context_cannot_divide(facts: dict[str, Any], message: str) -> None:
    obstacle = context_obstacle(facts, 4)
    assert message in obstacle and bool(obstacle) == bool(message)
    assert not obstacle or ("trainer.context_parallel=4" in obstacle and "model.path" in obstacle)


def test_jobs_that_a_shape_cannot_run_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", "qwen2")  # one KV head
    job = {"model": {"path": path}, "trainer": {"world_size": 2, "context_parallel": 2}}
    with pytest.raises(ConfigError, match=r"trainer.context_parallel=2 .* 1 KV heads .*model.path"):
        resolved(from_mapping(job))
    with pytest.raises(ConfigError, match=r"trainer.context_parallel=2 .*trainer.world_size=3"):
        from_mapping({"trainer": {"world_size": 3, "context_parallel": 2}})
    with pytest.raises(ConfigError, match=r"trainer.replicas=2 .*trainer.world_size=3"):
        from_mapping({"trainer": {"world_size": 3, "replicas": 2}})
    with pytest.raises(ConfigError, match=r"groups_per_step .* trainer.context_parallel"):
        from_mapping({"trainer": {"world_size": 8, "context_parallel": 2, "groups_per_step": 3}})
    wide = from_mapping({"trainer": {"world_size": 8, "context_parallel": 4, "groups_per_step": 2}})
    assert wide.trainer.context_parallel == 4
    vcpo = from_mapping({**job, "objective": {"name": "vcpo", "norms": "ghost"}})
    with pytest.raises(ConfigError, match=r"trainer.context_parallel=2: .*objective.norms"):
        StepRecipe.of(vcpo)


def test_a_model_is_checked_where_it_is_sharded(tmp_path: Path, ranks: Ranks) -> None:
    class Pair:
        size = 2

    ranks.context = Pair()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"trainer.context_parallel=2 does not divide the 1 KV heads"):
        case_runner(ranks, {"path": write_model(tmp_path / "model", "qwen2")})
