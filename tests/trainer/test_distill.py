"""Distillation: its gradient against a direct one, teachers by label, ranks, records, refusals."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from areal_like.config import Config, DistillConfig
from areal_like.config.loading import from_mapping
from areal_like.errors import ConfigError
from areal_like.trajectory import TEACHER_LOGPROBS, Trajectory
from areal_like.wire.records import Record
from tests.support.objective_helpers import evaluate, published
from tests.support.quick import only_in_chaos, others_in_chaos
from tests.support.trainer_helpers import dense_logprobs, joined, random_groups, run_ranks, write_model
from tests.support.trainer_ranks import last_gradient, make_runner
from trainer.batching.packing import PackedBatch, TrainingSample, collate
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Distributions, Policy, TokenLogProbs
from trainer.objectives import Distill, build_objective
from trainer.step.recipe import StepRecipe, warn_of_unused_weights
from trainer.step.teachers import Teachers, check_teacher

URL = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A student and two teachers; LayerNorm, so that float64 holds throughout."""
    root = tmp_path_factory.mktemp("models")
    names = ("student", "first", "second")
    return {name: write_model(root / name, "gpt2", seed=seed) for seed, name in enumerate(names)}


def distill(teachers: dict[str, Any], *, loss: str = "sampled") -> dict[str, Any]:
    settings = {"teachers": teachers, "coef": 0.5, "loss": loss}
    return {"objective": {"name": "distill"}, "distill": settings}


def full_logprobs(model: Any, trajectory: Trajectory) -> Tensor:
    """[L, V] log-probs at each token given those before it; the first row is not used."""
    tokens_1L = torch.from_numpy(trajectory.tokens.astype(np.int64))[None]
    logps_LV = torch.log_softmax(model(input_ids=tokens_1L, use_cache=False).logits[0, :-1], -1)
    return torch.cat([torch.zeros_like(logps_LV[:1]), logps_LV])


def direct_gradient(
    groups: list[list[Trajectory]],
    student: str,
    teacher_of: Callable[[Trajectory], str],
    *,
    is_full: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Mean reverse KL of the tokens with a teacher, and the gradient of the loss by its definition."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    teachers: dict[str, Any] = {}
    total, num_tokens, gaps = torch.zeros((), dtype=torch.float64), 0, []
    for t in (t for group in groups for t in group):
        if not (path := teacher_of(t)):
            continue
        if path not in teachers:
            teachers[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        sampled = torch.from_numpy(t.loss_mask.astype(bool))
        if is_full:
            own_SV = full_logprobs(model, t)[sampled]
            with torch.no_grad():
                its_SV = full_logprobs(teachers[path], t)[sampled]
            kl_S = (own_SV.exp() * (own_SV - its_SV)).sum(1)
            total, num_tokens = total + 0.5 * kl_S.sum(), num_tokens + len(kl_S)
            gaps += kl_S.tolist()
            continue
        logp_S = dense_logprobs(model, [t])[0][sampled]
        with torch.no_grad():
            teacher_S = dense_logprobs(teachers[path], [t])[0][sampled]
        gap_S = logp_S.detach() - teacher_S
        ratio_S = (logp_S.detach() - torch.from_numpy(t.logprobs)[sampled].double()).exp()
        total = total + (ratio_S.clamp(max=2.0) * 0.5 * gap_S * logp_S).sum()
        num_tokens += len(logp_S)
        gaps += gap_S.tolist()
    (total / num_tokens).backward()
    return float(np.mean(gaps)), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= 1e-9 * float(value.norm()), name


@pytest.mark.parametrize(
    ("loss", "budget_tokens", "teachers"),
    others_in_chaos(
        itertools.product(("sampled", "full"), (30, 10_000), ("one", "by label", "without default")),
        quick=[("sampled", 30, "by label"), ("full", 30, "without default"), ("full", 10_000, "one")],
    ),
)
def test_gradient_equals_the_direct_one(
    paths: dict[str, str], ranks: Ranks, teachers: str, budget_tokens: int, loss: str
) -> None:
    """Of whole micro-batches, of those with samples of several teachers, and of samples without one."""
    named = {
        "one": {"default": paths["first"]},
        "by label": {"even": paths["first"], "default": paths["second"]},
        "without default": {"even": paths["first"]},
    }[teachers]
    groups = random_groups(5, prompt=4)
    settings = distill(named, loss=loss)
    runner = make_runner(paths["student"], ranks, beta1=0.0, settings=settings, budget_tokens=budget_tokens)
    metrics = runner.run(groups, step=7)
    kl, want = direct_gradient(
        groups,
        paths["student"],
        lambda t: named.get(t.label) or named.get("default", ""),
        is_full=loss == "full",
    )
    assert_equal(last_gradient(runner), want)
    assert metrics["reverse_kl"] == pytest.approx(kl, rel=1e-9)
    sampled = [(t.num_sampled, bool(named.get(t.label) or "default" in named)) for g in groups for t in g]
    share = sum(num for num, is_taught in sampled if is_taught) / sum(num for num, _ in sampled)
    assert metrics["teacher_share"] == pytest.approx(share) and (share < 1) == (teachers == "without default")
    assert 0 < metrics["clipped_fraction"] < 1
    assert metrics["reward"] == pytest.approx(np.mean([t.reward for g in groups for t in g]))


@pytest.mark.parametrize("loss", [*only_in_chaos("sampled"), "full"])
def test_samples_longer_than_a_microbatch(paths: dict[str, str], ranks: Ranks, loss: str) -> None:
    groups = random_groups(4)
    groups[1][0] = joined(groups[1], label="even")  # its segments are cut over micro-batches
    named = {"even": paths["first"], "default": paths["second"]}
    gradients = []
    for budget_tokens in (14, 10_000):
        settings = distill(named, loss=loss)
        runner = make_runner(
            paths["student"], ranks, beta1=0.0, settings=settings, budget_tokens=budget_tokens
        )
        runner.run(groups, step=7)
        gradients.append(last_gradient(runner))
    assert_equal(gradients[0], gradients[1])


@pytest.mark.chaos
def test_two_ranks_give_the_gradient_of_one(paths: dict[str, str], ranks: Ranks, tmp_path: Path) -> None:
    """Also where one rank has no sample of a teacher, or none at all, and where samples change ranks."""
    cases = [
        distill({"even": paths["first"], "default": paths["second"]}),
        distill({"even": paths["first"]}, loss="full"),
        {**distill({"default": paths["first"]}), "objective": {"name": "gspo", "clip_low": 0.5}},
    ]
    run_ranks("steps", str(tmp_path), paths["student"], json.dumps(cases), world_size=2)
    for index, settings in enumerate(cases):
        runner = make_runner(paths["student"], ranks, beta1=0.0, settings=settings, budget_tokens=10_000)
        runner.run(random_groups(8, prompt=6), step=7)
        for share in ("even", "one-sided", "balanced"):
            assert_equal(load_file(tmp_path / f"{index}-{share}.safetensors"), last_gradient(runner))


def test_recorded_log_probs_need_no_teacher(paths: dict[str, str], ranks: Ranks) -> None:
    """The records of a teacher at a server give what the same teacher gives here, in another precision."""
    settings = DistillConfig(teachers={"even": URL})
    teacher = AutoModelForCausalLM.from_pretrained(paths["first"], dtype=torch.float64)
    groups = random_groups(4)
    recorded = []
    for group in groups:
        with torch.no_grad():
            logp_BL = dense_logprobs(teacher, group).numpy()
        recorded.append(
            [
                replace(
                    t, arrays={TEACHER_LOGPROBS: (logp_L[: t.num_tokens] * t.loss_mask).astype(np.float32)}
                )
                for t, logp_L in zip(group, logp_BL, strict=True)
            ]
        )
    packed = [
        [Record.opened(Record.of(1, i, t).data).trajectory() for i, t in enumerate(group)]
        for group in recorded
    ]
    found = []
    for place, data in ((paths["first"], groups), (settings.teachers["even"], packed)):
        runner = make_runner(paths["student"], ranks, beta1=0.0, settings=distill({"even": place}))
        metrics = runner.run(data, step=7)
        found.append((metrics["reverse_kl"], metrics["teacher_share"], last_gradient(runner)))
    (kl, share, want), (recorded_kl, recorded_share, got) = found
    assert recorded_kl == pytest.approx(kl, rel=1e-6) and recorded_share == share
    assert all(float((got[n] - value).norm()) <= 1e-5 * float(value.norm()) for n, value in want.items())


class Blank:
    """A teacher whose log-probs have no memory, so that no number of them can be read."""

    shares_prefixes = True

    def __call__(self, batch: PackedBatch) -> TokenLogProbs:
        logp_S = torch.zeros(len(batch.sampled_S), device="meta")
        return TokenLogProbs(logp_S, logp_S, None)

    def all_logprobs(self, batch: PackedBatch) -> Tensor:
        return torch.zeros(len(batch.target_C), 7, device="meta")

    def of_all(self, batch: PackedBatch, values: list[Tensor]) -> list[Tensor]:
        return values


def test_a_teachers_numbers_are_not_read() -> None:
    """On a GPU the host would wait for the micro-batch before."""
    ranks, models = Ranks.alone(), dict[str, Any]({"a": Blank(), "b": Blank()})
    ranks.device = torch.device("meta")
    settings = DistillConfig(teachers={"even": "a", "default": "b"})
    teachers = Teachers(settings, ranks, models=models, vocab_size=7)
    trajectories = [t for group in random_groups(2, prompt=4) for t in group]
    samples = [
        TrainingSample(trajectory=replace(t, label=label), advantage=0.0, group=0)
        for t, label in zip(trajectories, itertools.cycle(("even", "odd")), strict=False)
    ]
    whole: Any = SimpleNamespace(size=1, rank=0)
    for context in (None, whole):
        batch = collate(samples, device="meta", context=context)
        teacher_S, kept = teachers.distributions(batch)
        assert teachers(batch).shape == teacher_S.shape == batch.sampled_S.shape
        assert kept.logprobs_CV.is_meta


def test_expected_gradient_is_that_of_the_kl() -> None:
    """Over all tokens of a vocabulary, weighted by the probabilities with which mu samples them."""
    torch.manual_seed(0)
    logits_V, mu_V, teacher_V = (torch.randn(7, dtype=torch.float64) for _ in range(3))
    logits_V.requires_grad_()
    logp_V, mu_V, teacher_V = (torch.log_softmax(x, 0) for x in (logits_V, mu_V, teacher_V))
    (want_V,) = torch.autograd.grad((logp_V.exp() * (logp_V - teacher_V)).sum(), logits_V, retain_graph=True)
    objective = build_objective(
        {"name": "distill", "cap": 1e9}, distill=DistillConfig(teachers={"default": "x"})
    )
    assert isinstance(vars(objective)["inner"], Distill)
    total_V = torch.zeros_like(want_V)
    for token in range(7):
        one = published(teacher_logp=[[0.0] * 3, [0.0] * 2])
        at = torch.zeros(1, dtype=torch.int64)
        batch = replace(
            one.only(torch.arange(5) == 0),
            logp_S=logp_V[token : token + 1],
            behavior_logp_S=mu_V[token : token + 1],
            teacher_logp_S=teacher_V[token : token + 1],
            advantage_S=torch.zeros(1, dtype=torch.float64),
            sample_S=at,
            num_masked_N=None,
        )
        loss = objective.losses(batch, {}).loss_S.sum()
        (grad_V,) = torch.autograd.grad(loss, logits_V, retain_graph=True)
        total_V += mu_V[token].exp() * grad_V
    assert torch.allclose(total_V, want_V, rtol=1e-12, atol=1e-14)


def test_the_term_beside_the_rewards() -> None:
    """With another objective, -coef log(pi / teacher) is added to each token's advantage."""
    teacher = [[-0.5, -1.0, -2.0], [-1.5, -0.2]]
    settings = DistillConfig(teachers={"default": "x"}, coef=0.25)
    taught = build_objective({"name": "ppo"}, distill=settings)
    batch = published(teacher_logp=teacher)
    gap_S = batch.logp_S.detach() - torch.tensor([x for row in teacher for x in row], dtype=torch.float64)
    want = replace(published(), advantage_S=batch.advantage_S - 0.25 * gap_S)
    plain = build_objective({"name": "ppo"})
    assert evaluate(taught, [batch]) == evaluate(plain, [want])
    assert not taught.skips_zero_advantage and plain.skips_zero_advantage
    absent = replace(published(), teacher_logp_S=torch.full_like(gap_S, torch.nan))
    assert evaluate(taught, [absent]) == evaluate(plain, [published()])


def test_cap_beyond_the_bound_uses_the_term() -> None:
    """A token beyond the staleness bound keeps the weight of its own advantage, which the teacher gives."""
    settings = DistillConfig(teachers={"default": "x"})
    objective = build_objective({"name": "distill", "cap": 5.0}, distill=settings, caps_beyond=True)
    batch = published(teacher_logp=[[-0.5, -1.0, -2.0], [-1.5, -0.2]])
    batch = replace(
        batch,
        advantage_S=torch.zeros(5, dtype=torch.float64),
        beyond_S=torch.tensor([False, True, False, False, True]),
    )
    _, grad = evaluate(objective, [batch])
    gap_S = batch.logp_S.detach() - batch.teacher_logp_S
    w_S = batch.log_ratio_S.exp()
    assert w_S[1] > 1 > w_S[4]
    want_S = torch.where(batch.beyond_S, w_S.clamp(max=1.0), w_S) * gap_S / 5
    assert grad == pytest.approx(want_S.tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"objective": {"name": "distill"}}, r"needs a teacher: name one in distill\.teachers"),
        ({"objective": {"name": "oapl"}, "distill": {"teachers": {"default": "x"}}}, "one advantage for all"),
        ({"objective": {"name": "vcpo"}, "distill": {"teachers": {"default": "x"}}}, "one advantage for all"),
        ({"objective": {"name": "sppo"}, "distill": {"teachers": {"default": "x"}}}, "one advantage for all"),
        ({"distill": {"teachers": {"math": 3}}}, r"distill\.teachers\.math=3: give a directory"),
        ({"distill": {"teachers": {"math": []}}}, "give a directory"),
        ({"distill": {"teachers": {"math": ["a", URL]}}}, "give a directory"),
        ({"distill": {"teachers": {"math": "x"}, "api_key_file": "key"}}, "names none: remove"),
        ({"distill": {"coef": 0}}, r"distill\.coef must be above 0"),
        (
            {"distill": {"teachers": {"x": URL}, "loss": "full"}},
            "of the whole vocabulary, and servers return",
        ),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        StepRecipe.of(from_mapping(settings))


def test_settings_of_weights_that_the_loss_does_not_have(caplog: pytest.LogCaptureFixture) -> None:
    teachers = {"default": "x"}
    warn_of_unused_weights(from_mapping(distill(teachers, loss="full")))
    weighted = {**distill(teachers), "objective": {"name": "distill", "level": "sequence"}}
    warn_of_unused_weights(from_mapping(weighted))
    assert not caplog.text
    weighted["distill"]["loss"] = "full"
    warn_of_unused_weights(from_mapping(weighted))
    assert "objective.level=sequence is ignored: with distill.loss=full" in caplog.text


def test_teachers_of_labels() -> None:
    settings = DistillConfig(teachers={"math": "a", "default": "b", "code": URL, "chat": [URL, URL]})
    assert [settings.teacher_of(label) for label in ("math", "", "x", "code")] == [
        "math",
        "default",
        "default",
        "code",
    ]
    assert settings.models == {"math": "a", "default": "b"}
    assert settings.servers == {"code": (URL,), "chat": (URL, URL)}
    assert DistillConfig(teachers={"math": "a"}).teacher_of("x") == ""


def test_unsuitable_teachers_are_refused(paths: dict[str, str], tmp_path: Path) -> None:
    config = Config()
    check_teacher(config, paths["first"], label="default", student=paths["student"])
    other = write_model(tmp_path / "other", "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ConfigError, match=r"distill\.teachers\.x=.* absent here: name a model with the same"):
        check_teacher(config, other, label="x", student=paths["student"])
    llama = write_model(tmp_path / "llama")  # 2048 positions, and the teachers have 64
    with pytest.raises(
        ConfigError, match="its context has 64 tokens, and a sample may have 2048: set rollout"
    ):
        check_teacher(config, paths["first"], label="x", student=llama)
    full = replace(config, distill=DistillConfig(teachers={"x": paths["first"]}, loss="full"))
    larger = AutoConfig.from_pretrained(paths["student"])
    larger.vocab_size += 1
    larger.save_pretrained(tmp_path / "larger")
    AutoTokenizer.from_pretrained(paths["student"]).save_pretrained(tmp_path / "larger")
    with pytest.raises(ConfigError, match="head has 41 rows, and the policy's 42: "):
        check_teacher(full, paths["first"], label="x", student=str(tmp_path / "larger"))
    with pytest.raises(ConfigError, match=r"distill\.teachers\.x=/nowhere/at/all: "):
        check_teacher(config, "/nowhere/at/all", label="x", student=llama)
    (tmp_path / "llama" / "model.safetensors").rename(tmp_path / "llama" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"^distill\.teachers\.x=.*llama: .*its weights are pickles"):
        check_teacher(config, llama, label="x", student=llama)


def test_a_runner_without_teachers_is_refused(paths: dict[str, str], ranks: Ranks) -> None:
    objective = build_objective({"name": "distill"}, distill=DistillConfig(teachers={"default": "x"}))
    runner = make_runner(paths["student"], ranks)
    with pytest.raises(ConfigError, match="needs the log-probs of a teacher"):
        type(runner)(
            runner.policy,
            runner.optimizer,
            ranks,
            objective=objective,
            advantage=runner.advantages.estimator,
            normalizer=runner._normalizer,
            budget_tokens=100,
        )


def test_models_of_several_labels_are_loaded_once(paths: dict[str, str], ranks: Ranks) -> None:
    config = from_mapping(
        {
            "objective": {"name": "distill"},
            "distill": {"teachers": {"a": paths["first"], "b": paths["first"], "c": URL}},
        }
    )
    teachers = Teachers.of(config, ranks, student=paths["student"])
    assert list(teachers.models) == [paths["first"]]
    assert isinstance(teachers.models[paths["first"]], Policy)
    assert not any(p.requires_grad for p in teachers.models[paths["first"]].parameters())


class FullSizes(TorchDispatchMode):
    """Names of the operations that make a tensor of this shape without being a model's."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("full", "nan_to_num", "clone") and tuple(made.shape) == self.shape:
            self.found.append(name)
        return made


def test_distributions_make_no_second_tensor(paths: dict[str, str], ranks: Ranks) -> None:
    """Where one teacher has all samples; otherwise the parts need one to be joined in."""
    labels = ("a", "b")
    samples = [
        TrainingSample(trajectory=replace(each, label=label), advantage=0.0, group=0)
        for each, label in zip(random_groups(1, group_size=2, seed=3)[0], labels, strict=True)
    ]
    batch = collate(samples)
    found = {}
    for names in (("first", "first"), ("first", "second")):
        places = {label: paths[name] for label, name in zip(labels, names, strict=True)}
        config = from_mapping({**distill(places, loss="full"), "model": {"dtype": "float32"}})
        teachers = Teachers.of(config, ranks, student=paths["student"])
        with FullSizes(len(batch.sampled_S), 41) as sizes:
            logp_S, _ = teachers.distributions(batch)
        assert torch.equal(logp_S, teachers(batch))
        found[names] = sizes.found
    assert list(found.values()) == [[], ["full"]]


def test_a_bfloat16_student_reads_exact_teachers(paths: dict[str, str], ranks: Ranks) -> None:
    policy = Policy.load(paths["student"], ranks, dtype="bfloat16")
    samples = [
        TrainingSample(trajectory=each, advantage=0.0, group=0) for each in random_groups(1, seed=3)[0]
    ]
    batch = collate(samples)
    own_SV = policy.all_logprobs(batch)
    generator = torch.Generator().manual_seed(0)
    teacher_SV = torch.randn(own_SV.shape, generator=generator).mul(4).log_softmax(-1)
    with torch.no_grad():
        found_S = policy(batch, Distributions(teacher_SV)).reverse_kl_S
    torch.testing.assert_close(found_S, (own_SV.exp() * (own_SV - teacher_SV)).sum(-1))
