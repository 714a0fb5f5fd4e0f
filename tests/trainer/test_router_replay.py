"""Router replay: the recorded experts are used, with live scores, wherever the policy runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from areal_like.config import LoraConfig
from areal_like.errors import ConfigError
from areal_like.precision import route_in_float32, routers
from areal_like.trajectory import Trajectory
from areal_like.wire.routes import Routes
from tests.areal_like.test_hf_layout import SIZES, on_meta
from tests.support.moe_model import write_moe_model
from tests.support.quick import only_in_chaos
from tests.support.routes import SHAPE, random_routes, routed, routed_groups
from tests.support.trainer_helpers import VOCAB, joined, random_groups, run_ranks, write_model
from tests.support.trainer_ranks import last_gradient, make_runner
from tests.trainer.test_policy import gradients, packed
from tests.trainer.test_shared_prefixes import branched
from trainer.batching.packing import PackedBatch, Packer, collate, is_target, sequences_of
from trainer.batching.positions import Position
from trainer.batching.routes import LIVE, FaultKind, fault_of
from trainer.batching.segments import cut, segments_of
from trainer.batching.training_sample import TrainingSample
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import decoder_layers
from trainer.models.policy import BaseReference, Policy
from trainer.models.router_replay import RouterReplay, RowRoutes

Weights = Callable[[Any, Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_moe_model(tmp_path_factory.mktemp("moe"), vocab_size=VOCAB)


def forced_logprobs(model: Any, trajectory: Trajectory) -> Tensor:
    """[S] of a sequence's targets, by a Qwen3-MoE that runs its routes expert by expert, one token at a time.

    Without routes it takes the largest probabilities.
    """
    routes = trajectory.routes

    def block(layer: int, module: Any) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            outputs = []
            for token, x_D in enumerate(hidden[0]):
                probs_E = torch.softmax(module.gate.weight @ x_D, dim=0)
                if routes is None or token >= routes.num_tokens:
                    chosen = probs_E.argsort(descending=True)[: SHAPE.num_chosen].tolist()
                else:
                    chosen = routes.experts_TLK[token, layer].tolist()
                total = sum(probs_E[expert] for expert in chosen)
                out_D = torch.zeros_like(x_D)
                for expert in chosen:
                    gate, up = (module.experts.gate_up_proj[expert] @ x_D).chunk(2)
                    out_D = out_D + probs_E[expert] / total * (
                        module.experts.down_proj[expert] @ (F.silu(gate) * up)
                    )
                outputs.append(out_D)
            return torch.stack(outputs)[None]

        return forward

    for layer, decoder_layer in enumerate(model.model.layers):
        decoder_layer.mlp.forward = block(layer, decoder_layer.mlp)
    tokens = torch.from_numpy(trajectory.tokens).long()
    logps_TV = torch.log_softmax(model(input_ids=tokens[None], use_cache=False).logits[0], -1)
    target_T = torch.from_numpy(is_target(trajectory))
    return logps_TV[:-1].gather(1, tokens[1:, None])[:, 0][target_T[1:]]


def with_live_routes(path: str, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """With the routes that transformers' own forward of each sequence chooses, by descending probability."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    chosen: list[Tensor] = []
    for router in routers(model):
        router.register_forward_hook(lambda _module, _inputs, output: chosen.append(output[2]))
    made = []
    for trajectory in trajectories:
        chosen.clear()
        with torch.no_grad():
            model(input_ids=torch.from_numpy(trajectory.tokens).long()[None], use_cache=False)
        experts_TLK = torch.stack(chosen, 1)[:-1].numpy()
        made.append(replace(trajectory, routes=Routes.of(experts_TLK, num_experts=SHAPE.num_experts)))
    return made


def groups_of(path: str, *, routes: str) -> list[list[Trajectory]]:
    """Two groups of six samples, some of which share more than their prompt. `routes`: live or random."""
    groups = [
        [replace(t, reward=float(i % 3)) for i, t in enumerate(branched(seed, prompts=(6,), longest=9))]
        for seed in range(2)
    ]
    if routes == "live":
        return [with_live_routes(path, group) for group in groups]
    return routed_groups(groups)


def without_routes(groups: Sequence[Sequence[Trajectory]]) -> list[list[Trajectory]]:
    return [[replace(t, routes=None) for t in group] for group in groups]


def step_gradient(
    path: str, groups: Sequence[Any], **settings: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(gradient, metrics) of one step."""
    runner = make_runner(path, Ranks.alone(), dtype=torch.float32, beta1=0.0, **settings)
    metrics = runner.run(groups, step=7)
    return last_gradient(runner), metrics


# --- values and gradients ---


@pytest.mark.parametrize("checkpointing", [*only_in_chaos(False), True])
def test_routes_of_the_live_choice_change_no_bit(moe: str, ranks: Ranks, checkpointing: bool) -> None:
    groups = groups_of(moe, routes="live")
    settings = {"budget_tokens": 60, "checkpointing": checkpointing}
    want, plain = step_gradient(moe, without_routes(groups), **settings)
    got, metrics = step_gradient(moe, groups, router_replay=True, **settings)
    assert metrics["router_disagreement"] == 0 and metrics["num_microbatches"] > 1
    assert metrics["shared_share"] == plain["shared_share"] > 0.2
    assert any(bool(grad.any()) for grad in want.values())
    assert {name for name in want if not torch.equal(got[name], want[name])} == set()
    # Without the setting, recorded routes have no effect.
    ignored, again = step_gradient(moe, groups, **settings)
    assert {name for name in want if not torch.equal(ignored[name], want[name])} == set()
    assert "router_disagreement" not in again and "routes_missing" not in again


@pytest.mark.parametrize(
    ("checkpointing", "shares_prefixes"),
    [(False, False), (True, True), *only_in_chaos((False, True), (True, False))],
)
def test_other_routes_equal_a_model_that_forces_them(
    moe: str, ranks: Ranks, checkpointing: bool, shares_prefixes: bool
) -> None:
    trajectories = [t for group in groups_of(moe, routes="random") for t in group][:8]
    policy = Policy.load(moe, ranks, gradient_checkpointing=checkpointing, router_replay=True)
    batch = packed(trajectories) if shares_prefixes else packed_apart(trajectories)
    assert (batch.num_rows < batch.num_tokens) == shares_prefixes
    got_S = policy(batch).logprobs_S
    assert policy.replay is not None
    num_other, num_choices = policy.replay.disagreement()
    assert 0.5 < float(num_other / num_choices) < 1, "two of eight experts at random"
    reference: Any = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float64).eval()
    want_S = torch.cat([forced_logprobs(reference, each) for each in trajectories])
    torch.testing.assert_close(got_S.detach().double(), want_S.detach(), rtol=0, atol=1e-5)
    live_S = forced_logprobs(reference, replace(trajectories[0], routes=None)).detach()
    assert float((live_S - want_S.detach()[: len(live_S)]).abs().max()) > 1e-3
    want_S.sum().backward()
    got_S.sum().backward()
    want = gradients(reference)
    assert want["model.layers.1.mlp.gate.weight"].abs().sum() > 0
    for name, grad in gradients(policy.model).items():
        torch.testing.assert_close(grad.double(), want[name], rtol=1e-4, atol=1e-4, msg=name)


def packed_apart(trajectories: Sequence[Trajectory]) -> PackedBatch:
    samples = [TrainingSample(trajectory=t, advantage=1.0, group=0) for t in trajectories]
    return collate(samples, shares_prefixes=False)


def test_each_backward_uses_its_own_routes(moe: str, ranks: Ranks) -> None:
    """Two micro-batches run forward before the first backward, which recomputes the layers."""
    first, second = (packed([t]) for t in groups_of(moe, routes="random")[0][:2])
    policy = Policy.load(moe, ranks, gradient_checkpointing=True, router_replay=True)

    def gradient(backward: Callable[[], None]) -> dict[str, Tensor]:
        policy.zero_grad()
        backward()
        return gradients(policy.model)

    def apart() -> None:
        policy(first).logprobs_S.sum().backward()
        policy(second).logprobs_S.sum().backward()

    def interleaved() -> None:
        outputs = [policy(batch).logprobs_S.sum() for batch in (first, second)]
        policy(packed(without_routes(groups_of(moe, routes="random"))[1]))
        for output in outputs:
            output.backward()

    want, got = gradient(apart), gradient(interleaved)
    assert {name for name in want if not torch.equal(got[name], want[name])} == set()


def test_scores_of_a_narrow_model_are_float32(moe: str, ranks: Ranks) -> None:
    policy = Policy.load(moe, ranks, dtype="bfloat16", router_replay=True)
    chosen: list[tuple[Tensor, ...]] = []
    for router in routers(policy):
        router.register_forward_hook(lambda _module, _inputs, output: chosen.append(output))
    (trajectory,) = groups_of(moe, routes="random")[0][:1]
    logp_S = policy(packed([trajectory])).logprobs_S
    assert trajectory.routes is not None
    for layer, (logits_UE, weights_UK, experts_UK) in enumerate(chosen):
        assert logits_UE.dtype == weights_UK.dtype == torch.float32
        assert np.array_equal(experts_UK[:-1].numpy(), trajectory.routes.experts_TLK[:, layer])
        probs_UK = torch.softmax(logits_UE, -1).gather(1, experts_UK)
        torch.testing.assert_close(weights_UK, probs_UK / probs_UK.sum(-1, keepdim=True))
    logp_S.sum().backward()
    assert all(router.weight.grad is not None for router in routers(policy))


def test_references_route_live_and_adapters_are_replayed(moe: str, ranks: Ranks) -> None:
    """A new adapter changes nothing, so policy and base differ only by their routes."""
    batch = packed(groups_of(moe, routes="random")[0])
    policy = Policy.load(moe, ranks, router_replay=True, lora_settings=LoraConfig(rank=2))
    want_S = Policy.load(moe, ranks)(batch).logprobs_S
    live_S, replayed_S = BaseReference(policy)(batch).logprobs_S, policy(batch).logprobs_S
    torch.testing.assert_close(live_S, want_S)
    unrouted_S = policy(packed(without_routes(groups_of(moe, routes="random"))[0])).logprobs_S
    torch.testing.assert_close(unrouted_S, want_S)
    assert float((replayed_S.detach() - live_S).abs().max()) > 1e-3
    replayed_S.sum().backward()
    assert any(param.grad is not None and bool(param.grad.any()) for param in policy.parameters())
    assert not any(
        segment.routes for t in groups_of(moe, routes="random")[0] for _, segment in segments_of(t)
    )


@pytest.mark.parametrize(
    ("norms", "lora"), [("exact", None), ("ghost", LoraConfig(rank=2))], ids=["exact", "ghost-lora"]
)
def test_gradients_of_single_samples_are_replayed(
    moe: str, ranks: Ranks, norms: str, lora: LoraConfig | None
) -> None:
    groups = groups_of(moe, routes="live")
    settings: dict[str, Any] = {
        "settings": {"objective": {"name": "vcpo", "norms": norms}},
        "lora": lora,
        "budget_tokens": 200,
    }
    want, _ = step_gradient(moe, without_routes(groups), **settings)
    got, metrics = step_gradient(moe, groups, router_replay=True, **settings)
    assert metrics["router_disagreement"] == 0
    assert {name for name in want if not torch.equal(got[name], want[name])} == set()
    other, _ = step_gradient(moe, groups_of(moe, routes="random"), router_replay=True, **settings)
    assert any(not torch.equal(other[name], want[name]) for name in want)


def test_a_critic_routes_live(moe: str, ranks: Ranks) -> None:
    groups = groups_of(moe, routes="random")
    found = []
    for has_routes in (False, True):
        settings = {"objective": {"name": "tis"}, "advantage": {"name": "gae"}}
        runner = make_runner(
            moe, ranks, dtype=torch.float32, beta1=0.0, settings=settings, router_replay=has_routes
        )
        metrics = runner.run(groups if has_routes else without_routes(groups), step=7)
        assert runner.critic is not None and metrics["value_loss"] > 0
        found.append((last_gradient(runner.critic), last_gradient(runner)))
    (want, plain), (got, replayed) = found
    assert {name for name in want if not torch.equal(got[name], want[name])} == set()
    assert any(not torch.equal(replayed[name], plain[name]) for name in plain)


# --- packing ---


def test_a_cut_sample_keeps_the_routes_of_its_segments() -> None:
    rng = np.random.default_rng(0)
    whole = routed(joined([t for group in random_groups(2, group_size=4) for t in group]), rng)
    sample = TrainingSample(trajectory=whole, advantage=1.0, group=0)
    parts = cut(sample, Packer(budget_tokens=20))
    assert len(parts) > 2
    want, got = (
        [sequence for each in samples for sequence in sequences_of(each.trajectory)]
        for samples in ([sample], parts)
    )
    for left, right in zip(want, got, strict=True):
        assert np.array_equal(left.tokens, right.tokens)
        assert np.array_equal(left.experts_TLK, right.experts_TLK)  # type: ignore[arg-type]
        assert left.experts_TLK is not None and len(left.experts_TLK) == left.num_tokens - 1


def test_long_samples_are_replayed_like_short_ones(moe: str, ranks: Ranks) -> None:
    rng = np.random.default_rng(1)
    pieces = [t for group in random_groups(2, group_size=4) for t in group]
    groups = [
        [routed(joined(pieces[i : i + 4], reward=float(i)), rng) for i in (0, 4)],
        [routed(replace(t, reward=float(i)), rng) for i, t in enumerate(pieces[:3])],
    ]
    want, _ = step_gradient(moe, groups, router_replay=True, budget_tokens=1000)
    got, _ = step_gradient(moe, groups, router_replay=True, budget_tokens=16)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-7, msg=name)


def test_rows_without_recorded_experts_are_live() -> None:
    batch = packed(groups_of("", routes="random")[0])
    assert batch.routes_ULK is not None and batch.shared is not None
    assert batch.routes_ULK.shape == (batch.num_rows, SHAPE.num_layers, SHAPE.num_chosen)
    last_U = np.flatnonzero((batch.routes_ULK == LIVE).all(dim=2).all(dim=1).numpy())
    ends = np.cumsum(batch.lengths) - 1
    assert np.array_equal(np.sort(batch.shared.row_T[ends]), last_U)
    assert int((batch.routes_ULK == LIVE).sum()) == len(last_U) * SHAPE.num_layers * SHAPE.num_chosen


# --- samples whose routes cannot be used ---


def test_faults_are_named() -> None:
    rng = np.random.default_rng(0)
    good = routed(random_groups(1)[0][0], rng)
    assert good.routes is not None
    assert fault_of(good, SHAPE) is None
    twice = good.routes.experts_TLK.copy()
    twice[-1, 1] = 3
    for routes, kind, text in (
        (None, FaultKind.MISSING, "it has none"),
        (
            random_routes(good.routes.num_tokens, rng, shape=SHAPE._replace(num_layers=3)),
            FaultKind.MALFORMED,
            "num_layers=3",
        ),
        (
            random_routes(good.routes.num_tokens, rng, shape=SHAPE._replace(num_experts=16)),
            FaultKind.MALFORMED,
            "num_experts=16",
        ),
        (Routes(twice, SHAPE.num_experts), FaultKind.MALFORMED, "a token has an expert twice"),
    ):
        fault = fault_of(replace(good, routes=routes), SHAPE)
        assert fault is not None and fault.kind is kind and text in fault.text


def test_samples_without_routes_are_left_out(
    moe: str, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """As those whose tokens are all beyond the staleness bound; the step goes on."""
    groups = groups_of(moe, routes="random")
    routes = groups[1][2].routes
    assert routes is not None
    malformed = Routes(np.full_like(routes.experts_TLK, 5), SHAPE.num_experts)
    broken = [list(group) for group in groups]
    broken[0][1] = replace(broken[0][1], routes=None)
    broken[1][2] = replace(broken[1][2], routes=malformed)
    with caplog.at_level(logging.WARNING):
        got, metrics = step_gradient(moe, broken, router_replay=True)
    (line,) = [r.getMessage() for r in caplog.records if "router_replay" in r.getMessage()]
    assert "step 7: sample 1 of position 0 is not trained on" in line and "it has none" in line
    assert (metrics["routes_missing"], metrics["routes_malformed"]) == (1, 1)
    left_out = [groups[0][1], groups[1][2]]
    num_sampled = sum(int(is_target(t).sum()) for group in groups for t in group)
    num_left_out = sum(int(is_target(t).sum()) for t in left_out)
    assert metrics["unrouted_share"] == pytest.approx(num_left_out / num_sampled)
    beyond = [
        replace(
            Position.plain(group, step=7),
            max_staleness=2,
            lags=[np.full(t.num_tokens, 3 if t in left_out else 0) for t in group],
        )
        for group in groups
    ]
    want, masked = step_gradient(moe, beyond, router_replay=True)
    assert (masked["routes_missing"], masked["unrouted_share"]) == (0, 0)
    assert {name for name in want if not torch.equal(got[name], want[name])} == set()
    assert metrics["loss"] == masked["loss"] and metrics["reward"] == masked["reward"]


@pytest.mark.parametrize("beyond", ["mask", "cap"])
def test_left_out_samples_of_closed_groups(moe: str, ranks: Ranks, beyond: str) -> None:
    """They are neither among the masked tokens nor among the lags of what is trained on."""
    groups = groups_of(moe, routes="random")
    groups[1][2] = replace(groups[1][2], routes=None)
    _, metrics = step_gradient(moe, groups, router_replay=True, beyond=beyond)
    assert (metrics["routes_missing"], metrics["masked_share"], metrics["beyond_share"]) == (1, 0, 0)
    assert metrics["unrouted_share"] > 0
    assert sum(metrics["lag_histogram"].values()) == metrics["num_sequences"] - 1


def test_a_step_without_any_routes_trains_nothing(moe: str, ranks: Ranks) -> None:
    groups = without_routes(groups_of(moe, routes="random"))
    gradient, metrics = step_gradient(moe, groups, router_replay=True)
    assert metrics["routes_missing"] == metrics["num_sequences"] and metrics["unrouted_share"] == 1
    assert metrics["num_tokens"] == 0 and not any(bool(grad.any()) for grad in gradient.values())


def test_a_method_of_whole_groups_leaves_out_the_group(moe: str, ranks: Ranks) -> None:
    groups = groups_of(moe, routes="random")
    groups[1][2] = replace(groups[1][2], routes=None)
    settings = {"objective": {"name": "online_dpo"}}
    _, metrics = step_gradient(moe, groups, router_replay=True, budget_tokens=500, settings=settings)
    assert metrics["routes_missing"] == 1
    of_second = sum(int(is_target(t).sum()) for t in groups[1])
    of_both = of_second + sum(int(is_target(t).sum()) for t in groups[0])
    assert metrics["unrouted_share"] == pytest.approx(of_second / of_both)
    assert metrics["num_tokens"] == sum(t.num_tokens for t in groups[0])


# --- families ---


def softmax_weights(router: Any, logits_UE: Tensor, experts_UK: Tensor) -> Tensor:
    probs_UK = torch.softmax(logits_UE.float(), -1).gather(1, experts_UK)
    return probs_UK / probs_UK.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else probs_UK


def sigmoid_weights(router: Any, logits_UE: Tensor, experts_UK: Tensor) -> Tensor:
    scores_UK = torch.sigmoid(logits_UE).gather(1, experts_UK)
    assert router.routed_scaling_factor != 1
    return scores_UK / scores_UK.sum(-1, keepdim=True) * router.routed_scaling_factor


def chosen_softmax(router: Any, logits_UE: Tensor, experts_UK: Tensor) -> Tensor:
    return torch.softmax(logits_UE.gather(1, experts_UK), -1)


FAMILIES: dict[str, Weights] = {
    "qwen3_moe": softmax_weights,
    "qwen3_next": softmax_weights,
    "qwen2_moe": softmax_weights,
    "mixtral": softmax_weights,
    "olmoe": softmax_weights,
    "glm4_moe": sigmoid_weights,
    "deepseek_v3": sigmoid_weights,
    "gpt_oss": chosen_softmax,
}

SIZES_OF: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["full_attention"] * 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank"), 8),
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_follows_routes_with_its_own_weights(family: str) -> None:
    """The weights of the chosen experts are those of the router's own formula, of its present scores."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_experts": 4, "num_local_experts": 4, "routed_scaling_factor": 2.5}
    sizes |= SIZES_OF.get(family, {})
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    found: list[Any] = list(routers(model))
    for router in found:
        torch.nn.init.normal_(router.weight)
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias.uniform_(-1, 1)
    tokens = torch.arange(3, 23)[None]
    want = model(input_ids=tokens, use_cache=False).logits
    route_in_float32(model)
    replay = RouterReplay(model, decoder_layers(model))
    num_layers = 1 if family in ("glm4_moe", "deepseek_v3") else 2
    assert replay.shape == (num_layers, 2, 4) and len(found) == num_layers
    assert torch.equal(model(input_ids=tokens, use_cache=False).logits, want)
    seen: list[tuple[Tensor, ...]] = []
    for router in found:
        router.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    routes = random_routes(20, np.random.default_rng(0), shape=replay.shape)
    experts_ULK = torch.from_numpy(routes.experts_TLK.astype(np.int16))
    experts_ULK[-1] = LIVE
    logits = model(input_ids=tokens, use_cache=False, **replay.arguments(experts_ULK)).logits
    assert not torch.equal(logits, want)
    for layer, (router, (logits_UE, weights_UK, experts_UK)) in enumerate(zip(found, seen, strict=True)):
        assert torch.equal(experts_UK[:-1], experts_ULK[:-1, layer].long())
        torch.testing.assert_close(
            weights_UK.float(), FAMILIES[family](router, logits_UE, experts_UK), rtol=1e-5, atol=1e-6
        )
    logits.square().sum().backward()
    assert all(float(router.weight.grad.abs().sum()) > 0 for router in found)
    assert replay.last is not None and isinstance(replay.last, RowRoutes)


def test_models_without_routers_to_replay_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no experts: set model\.router_replay=false"):
        Policy.build(write_model(tmp_path), router_replay=True)
    for family in ("phimoe", "jamba"):
        model = on_meta(family)
        with pytest.raises(ConfigError, match=r"cannot be replayed: set model\.router_replay=false"):
            RouterReplay(model, decoder_layers(model))


# --- several ranks ---


@pytest.mark.long
def test_two_ranks_replay_like_one(moe: str, tmp_path: Path) -> None:
    """One rank has fetched all samples: routes travel with them, and a rank without samples runs dummies."""
    for world_size in (1, 2):
        run_ranks("replays", str(tmp_path), moe, world_size=world_size, module="tests.support.moe_ranks")
    for name in ("tis", "ppo"):
        one, two = (tmp_path / f"replays-{n}" / name for n in (1, 2))
        want, got = (load_file(place.with_suffix(".safetensors")) for place in (one, two))
        assert want["model.layers.1.mlp.experts.gate_up_proj"].any()
        for key, grad in want.items():
            torch.testing.assert_close(got[key], grad, rtol=1e-4, atol=1e-7, msg=key)
        rows = [json.loads(place.with_suffix(".json").read_text()) for place in (one, two)]
        for row in rows:
            assert (row["routes_missing"], row["routes_malformed"]) == (1, 0)
            assert 0.5 < row["router_disagreement"] < 1
        assert rows[0]["unrouted_share"] == rows[1]["unrouted_share"] > 0
