"""Configuration: settings survive a round trip, and every mistake gives one clear message."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

import trainer.advantages.gae  # noqa: F401  (registers the advantage gae)
from areal_like.config import BufferConfig, Config, ModelConfig, WeightsConfig, from_mapping, to_mapping
from areal_like.config.common import Section, check_choice, choices_of
from areal_like.errors import ConfigError
from areal_like.paths import model_path
from areal_like.runtime.command_line import CONFIGS, load_config, role_arguments, save_config
from trainer.advantages.base import ADVANTAGES
from trainer.objectives import OBJECTIVES


def test_default_job_has_the_defaults_of_the_dataclasses() -> None:
    assert load_config([]) == Config()


@pytest.mark.slow
def test_presets_state_only_what_differs_from_the_class() -> None:
    for section, registry in (("objective", OBJECTIVES), ("advantage", ADVANTAGES)):
        for file in (CONFIGS / section).glob("*.yaml"):
            if file.stem == "auto":  # not a class
                continue
            settings = getattr(load_config([f"{section}={file.stem}"]), section)
            default = registry.build({"name": settings["name"]})
            for key, value in settings.items():
                # Masks are terms around any objective, and no setting of one.
                assert key in ("name", "masks") or getattr(default, key) != value, (
                    f"{file}: {key}={value} is the default"
                )


def test_config_survives_yaml_and_dicts(tmp_path: Path) -> None:
    config = load_config(
        ["name=x", "trainer.lr=3e-4", "objective=tis", "objective.cap=8", "trainer.betas=[0.8,0.9]"]
    )
    assert (config.trainer.lr, config.objective["cap"], config.trainer.betas) == (3e-4, 8, (0.8, 0.9))
    assert from_mapping(to_mapping(config)) == config
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    again, name = role_arguments(
        ["--config", str(tmp_path / "config.yaml"), "--name", "rollout-3", "seed=4"], default_name="x"
    )
    assert (again.seed, name) == (4, "rollout-3")


def test_config_keeps_dollar_signs_and_backslashes(tmp_path: Path) -> None:
    texts = ["${x}", "\\${x}", "\\\\${x:y", "a $ {b} \\"]
    config = dataclasses.replace(Config(), task={"name": "data", "train": texts, "map": {"a": "${seed}"}})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    given = load_config([r"runs_dir=/data/\${x}", r"task.prompt=${seed} \${x}", "seed=7"])
    assert (given.runs_dir, given.task["prompt"]) == ("/data/${x}", "7 ${x}")
    save_config(given, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == given


def test_engine_options_and_environment_are_open() -> None:
    config = load_config(
        ["rollout.engine=sglang", "rollout.sglang.args=--tp-size 1", "rollout.sglang.env.NCCL_DEBUG=INFO"]
    )
    assert (config.rollout.sglang.args, config.rollout.sglang.env) == ("--tp-size 1", {"NCCL_DEBUG": "INFO"})


def test_update_mode_follows_engine_and_objective() -> None:
    sglang = ["rollout.engine=sglang", "rollout.engine_device=cuda"]
    own = ["objective._target_=my.Oapl", "buffer.group_filter=single_version"]
    for settings, mode in (
        ([], "recompute"),
        (sglang[:1], "recompute"),
        (["rollout.engine_device=cuda"], "recompute"),
        (sglang, "keep"),
        ([*sglang, "objective=oapl"], "drain"),
        ([*own, "weights.sync_interval=4"], "drain"),
        (own, "recompute"),
        ([*sglang, "objective=oapl", "weights.update_mode=auto"], "drain"),
        ([*sglang, "weights.update_mode=abort_resume"], "abort_resume"),
    ):
        assert load_config(settings).update_mode == mode, settings
    with pytest.raises(ConfigError, match=r"set weights\.update_mode=drain, not keep"):
        load_config([*sglang, "objective=oapl", "weights.update_mode=keep"])


def test_own_class_replaces_the_default_settings() -> None:
    config = load_config(["objective._target_=my.Objective", "objective.alpha=2"])
    assert config.objective == {"_target_": "my.Objective", "alpha": 2}
    for mapping in ("{name: vespo}", "{name:vespo}"):
        assert load_config([f"objective={mapping}", "objective.k_positive=3"]).objective == {
            "name": "vespo",
            "k_positive": 3,
        }


def test_text_is_taken_without_nested_quotes(tmp_path: Path) -> None:
    settings = ["model.path=~/x", "runs_dir=a,b", 'task.text=it\'s a "b" {c}', "+task.more='a, b'"]
    file = tmp_path / "config.yaml"
    file.write_text("name: mine\n")
    for config in (load_config(settings), load_config(["--config", str(file), *settings])):
        assert (config.model.path, config.runs_dir) == ("~/x", "a,b")
        assert (config.task["text"], config.task["more"]) == ('it\'s a "b" {c}', "a, b")


def test_a_setting_of_a_section_that_a_file_leaves_out(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("name: mine\n")
    config = load_config(["--config", str(file), "advantage.turn_discount=0.5", "task.num_train=9"])
    assert config.advantage == {"name": "grpo", "turn_discount": 0.5}
    assert config.task == {"name": "sort", "num_train": 9} and config.name == "mine"


def test_a_run_of_an_earlier_release_keeps_its_numbers(tmp_path: Path) -> None:
    """Its file names every setting of that release and lacks later ones; a user's file is short."""
    path = tmp_path / "config.yaml"
    recorded = to_mapping(Config(model=ModelConfig(path="/models/x", dtype="bfloat16")))
    del recorded["model"]["fp32_head"], recorded["trainer"]["kernels"], recorded["model"]["router_dtype"]
    path.write_text(json.dumps(recorded))
    config = load_config(["--config", str(path)])
    assert (config.model.fp32_head, config.trainer.kernels) == (False, "torch")
    assert config.model.router_dtype == "float32"
    assert load_config(["--config", str(path), "model.fp32_head=true"]).model.fp32_head is True
    path.write_text(json.dumps({"model": {"path": "/models/x", "dtype": "bfloat16"}}))
    config = load_config(["--config", str(path)])
    assert (config.model.fp32_head, config.trainer.kernels) == ("auto", "auto")
    assert config.model.router_dtype == "auto"
    save_config(config, path)
    assert load_config(["--config", str(path)]) == config


def test_presets_apply_on_top_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    save_config(load_config(["objective=tis", "objective.cap=7", "trainer.num_steps=3"]), file)

    def read(*settings: str) -> Config:
        return load_config(["--config", str(file), *settings])

    config = read("objective.dual_clip=3", "objective=ppo")
    assert config.objective == {"name": "ppo", "dual_clip": 3} and config.trainer.num_steps == 3
    config = read("objective=oapl", "model=smollm2")
    assert (config.weights.sync_interval, config.objective["name"], config.model.path) == (
        4,
        "oapl",
        "smollm2",
    )
    assert read("objective._target_=my.Objective", "objective.alpha=2").objective == {
        "_target_": "my.Objective",
        "alpha": 2,
    }
    with pytest.raises(ConfigError, match="did you mean tis"):
        read("objective=tsi")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.num_step=1"], "did you mean `trainer.num_steps`"),
        (["objectiv=tis"], "unknown key `objectiv`"),
        (["objective=nope"], "known choices are"),
        (["objective=null"], "known choices are"),
        (["trainer.lr=abc"], "trainer.lr: want a number"),
        (["sampling.stop=abc"], r"sampling.stop: want a list such as \[a, b\], got 'abc'"),
        (["trainer.num_steps=1.5"], "trainer.num_steps: want int"),
        (["trainer.num_steps=0"], "at least 1"),
        (["max_staleness=-1"], "max_staleness must be at least 0"),
        (["buffer.port=70000"], r"0\.\.65535"),
        (["weights.update_mode=later"], "one of auto, recompute, keep, abort_resume, drain"),
        (["weights.update_mode=recompte"], r"did you mean recompute\?"),
        (["weights.integrity=crc32"], r"weights\.integrity=crc32: use none or sha256"),
        (["weights.delta=on"], r"weights\.delta=on: use auto or off"),
        (["weights.integrity=sha256", "rollout.engine=sglang"], r"needs rollout\.engine=embedded"),
        (["weights.port_range=20000"], r"weights\.port_range='20000': give two ports"),
        (["weights.port_range=20099-20000"], "give two ports"),
        (["weights.port_range=0-10"], "give two ports"),
        (["weights.port_range=60000-70000"], "give two ports"),
        (["weights.host=0.0.0.0"], "not an address that engines can connect to"),
        (["weights.push_deadline_s=4000"], "at most 3600"),
        (
            ["buffer.durability=fsync"],
            r"buffer\.durability=fsync: use one of power_loss, process_crash, none",
        ),
        (["buffer.overdue="], r"buffer\.overdue=: use one of auto, wait, drop, close"),
        (["max_staleness=soon"], "max_staleness=soon: use a whole number or auto"),
        (["max_staleness=true"], "max_staleness=True: use a whole number or auto"),
        (["name=a/b"], "use 1 to 64 of the characters"),
        (["resume=yesterday"], "latest or step:K"),
        (["resume=step:²"], "latest or step:K"),
        (["sampling.temperature=0"], "above 0"),
        (["trainer.device=gpu"], "use cpu, cuda or cuda:N"),
        (["rollout.engine_device=tpu"], r"rollout\.engine_device=tpu: use cpu, cuda or cuda:N"),
        (["trainer.betas=[2,3]"], "at least 0 and below 1"),
        (["trainer.compile=true", "trainer.gradient_checkpointing=selective"], "cannot keep products"),
        (["eval.sets.a.num_samples=2"], r"eval\.sets\.a\.num_samples=2 with temperature=0: .*set a temp"),
        (["eval.sets.a.num_sample=2"], r"did you mean `eval\.sets\.a\.num_samples`"),
        (["eval.sets={a: {temperature: 1, num_samples: 2, k: [4]}}"], r"eval\.sets\.a\.k=\[4\]: .*1 to .*2"),
        (["eval.sets.a.top_p=0.5"], r"eval\.sets\.a: top_p, top_k and min_p change nothing"),
        (["eval.sets={a: {task: {digits: 2}}}"], r"eval\.sets\.a\.task: give either `name` or `_target_`"),
        (["eval.sets={a: 3}"], r"eval\.sets\.a: want a mapping, got 3"),
        (["eval.sets={a: {}}", "eval.num_prompts=200000"], r"eval\.num_prompts=200000: use"),
        (["eval.sets.a.max_new_tokens=64", "rollout.max_context=64"], r"max_new_tokens=64 leaves no room"),
        (["eval.num_prompts=9000", "buffer.max_message_bytes=65536"], r"evaluation set eval does not fit"),
        (["eval.timeout_s=-1"], r"eval\.timeout_s must be above 0"),
        (["rollout.host="], r"rollout\.host is empty"),
        (["buffer.lease_timeout_s=1", "daemon.heartbeat_s=1"], "every lease would expire"),
        (
            ["trainer.buffer_timeout_s=1"],
            r"trainer\.buffer_timeout_s=1 is not above .*daemon\.heartbeat_s=0\.5.*count as lost",
        ),
        (
            ["rollout.generate_timeout_s=3", "daemon.heartbeat_s=2"],
            r"rollout\.generate_timeout_s=3 is not above .*daemon\.heartbeat_s=2.*be replaced",
        ),
        (
            ["rollout.reward_timeout_s=420"],
            r"trainer\.fetch_timeout_s=300 .*not above rollout\.reward_timeout_s=420",
        ),
        (["rollout.reward_timeout_s=300"], r"eval\.timeout_s=120 .*not above rollout\.reward_timeout_s=300"),
        (["rollout.max_episodes=127"], r"rollout\.max_episodes=127 is below rollout\.max_running=128"),
        (["rollout.reward_concurrency=0"], r"rollout\.reward_concurrency must be at least 1"),
        (["rollout.sample_timeout_s=-1"], r"rollout\.sample_timeout_s must be at least 0"),
        (["trainer.checkpoint_minutes=-1"], r"trainer\.checkpoint_minutes must be at least 0"),
        (["rollout.engine=vllm"], "use embedded or sglang"),
        (["rollout.sglang.args=--tp-size 2"], r"set rollout\.engine=sglang"),
        (["rollout.engine=sglang", "rollout.sglang.args=tp-size 2"], "begin with an option"),
        (["rollout.engine=sglang", "rollout.sglang.url=gpu0"], "https://host:port"),
        (["rollout.engine=sglang", "rollout.sglang.url=http://gpu0:30000"], "is not encrypted"),
        (["rollout.engine=sglang", "rollout.sglang.url=https://gpu0:30000"], "api_key_file"),
        (
            ["task={name: data, reward: [{name: judge, url: 'http://u:pw@far:1/v1', api_key_file: k}]}"],
            r"task\.reward\.url: http://far is not encrypted, and task\.reward\.api_key_file would go there",
        ),
        (
            ["eval.sets={a: {task: {name: x, reward: {name: model, url: [http://far], api_key_file: k}}}}"],
            r"eval\.sets\.a\.reward\.url: http://far is not encrypted",
        ),
        (["rollout.engine=sglang", "rollout.sglang.args=--api-key=x"], "remove --api-key"),
        (["rollout.engine=sglang", "rollout.sglang.args=--tp 1 --host 0.0.0.0"], "remove --host"),
        (["rollout.engine=sglang", "rollout.sglang.args=--tp 2"], r"rollout\.gpus_per_engine=1 contradict"),
        (["rollout.engine=sglang", "rollout.sglang.args=--tp x"], "give a whole number"),
        (["rollout.engine=sglang", "rollout.sglang.args=--dp-size=2"], "one data-parallel replica"),
        (["rollout.engine=sglang", "rollout.sglang.args=--pp-size 2"], "one pipeline stage"),
        (["rollout.gpus_per_engine=2"], "the embedded engine uses one device"),
        (
            ["rollout.engine=sglang", "rollout.sglang.url=http://127.0.0.1:1", "rollout.gpus_per_engine=2"],
            "start that engine with --tp-size",
        ),
        (["rollout.engine=sglang", "rollout.sglang.api_key_file=k"], "an engine at rollout.sglang.url"),
        (
            ["rollout.engine=sglang", "rollout.sglang.url=http://gpu0:30000", "rollout.num_servers=2"],
            "into the url",
        ),
        (
            ["rollout.engine=sglang", "rollout.sglang.url=http://gpu0:30000", "rollout.sglang.args=--x"],
            "would change nothing",
        ),
        (["rollout.max_context=5000"], r"does not fit into trainer\.tokens_per_microbatch"),
        (["trainer={"], "brackets and quotes"),
        (["objective=tsi"], "did you mean tis"),
        (["model=/models/X"], "model.path=/models/X"),
        (["nonsense"], "key=value"),
        (["job.yaml"], "cannot read .job.yaml.: write --config job.yaml"),
        (["--config", "/nowhere.yaml"], "no such file"),
        (["--config"], "--config: expected one argument"),
        (["--config", "--name"], "--config: expected one argument"),
        (["--config", "/dev/null", "--config", "/dev/null"], "--config is given more than once"),
        (["objective.name=gspo"], r"write objective=gspo for .*, or 'objective=\{name: gspo\}' for"),
        (["--config", "/dev/null", "objective.name=gspo"], "write objective=gspo for"),
        (["advantage.name=rloo"], "write advantage=rloo for"),
        (["+task.name=sort"], "write task=sort for"),
        (["objective={name: vespo}", "objective=ppo"], "both choose the objective"),
        (["objective=ppo", "objective={name:tis}"], "both choose the objective"),
        (["objective=ppo", "objective._target_=my.Objective"], "both choose the objective"),
        (["--config", "/dev/null", "model=tiny", "model=smollm2"], "both choose the model"),
        (["-v"], "key=value"),
        (["--config", "/dev/null", "trainer.nope=1"], "no such file|unknown key"),
    ],
)
def test_mistake_gives_one_clear_message(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_yaml_is_one_message(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: [")
    with pytest.raises(ConfigError, match=r"not YAML .*line 1") as caught:
        load_config(["--config", str(file)])
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_port_range_is_a_range_of_ports() -> None:
    assert list(WeightsConfig().ports) == [0], "any free port"
    assert list(load_config(["weights.port_range=20000-20002"]).weights.ports) == [20000, 20001, 20002]
    assert list(WeightsConfig(port_range="65535-65535").ports) == [65535]


def test_a_second_daemon_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="--name is given more than once"):
        role_arguments(["--name", "buffer", "--name", "x"], default_name="buffer")


def _sections(cls: type[Section]) -> list[type[Section]]:
    nested = [hint for hint in typing.get_type_hints(cls).values() if dataclasses.is_dataclass(hint)]
    return [cls, *(section for hint in nested for section in _sections(typing.cast(type[Section], hint)))]


@pytest.mark.parametrize("cls", _sections(Config), ids=lambda cls: cls.__name__)
def test_constructor_refuses_a_value_outside_the_choices(cls: type[Section]) -> None:
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if choices_of(typing.get_type_hints(cls)[field.name]):
            with pytest.raises(ConfigError, match=f"{cls.key}.{field.name}".lstrip(".") + "=xyz: use "):
                cls(**{field.name: "xyz"})


def test_ranges_are_checked_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="at least 1024"):
        WeightsConfig(bucket_bytes=1)
    with pytest.raises(ConfigError, match=r"retain_trajectories=true"):
        BufferConfig(durability="none", retain_trajectories=True)


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        (typing.Literal["a", "b"], ["a", "b"], ["c", None, 1]),
        (int | typing.Literal["auto"], [3, "auto"], ["3", True, 1.5, None]),
        (typing.Literal["a"] | None, ["a", None], ["b", 0, ""]),
        (typing.Optional[typing.Literal["a"]], ["a", None], ["b"]),  # noqa: UP045
        (typing.Literal[1, True, None], [1, True, None], [0, False, "1", 1.0]),
        (float | typing.Literal["auto"], [1, 1.5, "auto"], [True, "1.5", None]),
        (list[int] | typing.Literal["auto"], [[1], "auto"], ["autos", 1, None]),
        (float | None, [1.0, None, "anything"], []),
    ],
    ids=str,
)
def test_choices_of_unions_are_checked(annotation: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        check_choice(annotation, value, key="k")
    for value in bad:
        with pytest.raises(ConfigError, match="k="):
            check_choice(annotation, value, key="k")


def test_evaluation_sets_have_defaults_of_the_job(tmp_path: Path) -> None:
    settings = ["eval.sets={plain: {}, hard: {num_samples: 8, temperature: 0.6, k: [8, 1]}}", "seed=3"]
    config = load_config([*settings, "eval.num_prompts=20", "eval.sets.hard.num_prompts=5"])
    plain, hard = config.eval.resolved_sets.values()
    assert (plain.num_prompts, plain.num_samples, plain.temperature, plain.ks) == (20, 1, 0.0, (1,))
    assert (hard.num_prompts, hard.ks) == (5, (1, 8))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    assert load_config(["--config", str(tmp_path / "config.yaml"), "eval.num_prompts=0"]).eval.sets
    assert not load_config([*settings, "eval.num_prompts=0"]).eval.resolved_sets
    assert list(Config().eval.resolved_sets) == ["eval"]


def test_an_existing_directory_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/first`, in place of a checkpoint of that run, has the form of a name."""
    monkeypatch.chdir(tmp_path)
    newest = Path("runs/first/checkpoints/step_000020")
    newest.mkdir(parents=True)
    config = from_mapping({"model": {"path": "runs/first"}})
    with pytest.raises(ConfigError, match=f"no config.json there; this run's newest checkpoint is {newest}"):
        model_path(config)
    assert model_path(from_mapping({"model": {"path": "owner/name"}})) == "owner/name"
