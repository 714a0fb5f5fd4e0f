"""Configuration: what is accepted comes back the same, what is wrong is one clear message."""

from pathlib import Path

import pytest

from areal_like.config import Config, from_mapping, to_mapping
from areal_like.errors import ConfigError
from areal_like.runtime.command_line import load_config, role_arguments, save_config


def test_the_default_job_is_the_dataclasses_defaults() -> None:
    assert load_config([]) == Config()


def test_round_trips(tmp_path: Path) -> None:
    config = load_config(["name=x", "trainer.lr=3e-4", "objective.cap=8", "trainer.betas=[0.8,0.9]"])
    assert (config.trainer.lr, config.objective["cap"], config.trainer.betas) == (3e-4, 8, (0.8, 0.9))
    assert from_mapping(to_mapping(config)) == config
    save_config(config, tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    again, name = role_arguments(
        ["--config", str(tmp_path / "config.yaml"), "--name", "rollout-3", "seed=4"], default_name="x"
    )
    assert (again.seed, name) == (4, "rollout-3")


def test_an_engines_options_and_variables() -> None:
    config = load_config(
        ["rollout.engine=sglang", "rollout.sglang.args=--tp-size 2", "rollout.sglang.env.NCCL_DEBUG=INFO"]
    )
    assert (config.rollout.sglang.args, config.rollout.sglang.env) == ("--tp-size 2", {"NCCL_DEBUG": "INFO"})


def test_a_class_of_ones_own_replaces_the_defaults_settings() -> None:
    config = load_config(["objective._target_=my.Objective", "objective.alpha=2"])
    assert config.objective == {"_target_": "my.Objective", "alpha": 2}
    assert load_config(["objective={name: vespo}", "objective.k_positive=3"]).objective == {
        "name": "vespo",
        "k_positive": 3,
    }


def test_text_needs_no_quotes_within_quotes() -> None:
    config = load_config(["model.path=~/x", "name=a,b", 'task.text=it\'s a "b" {c}'])
    assert (config.model.path, config.name, config.task["text"]) == ("~/x", "a,b", 'it\'s a "b" {c}')


def test_presets_go_with_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    save_config(load_config(["objective.cap=7", "trainer.num_steps=3"]), file)

    def read(*settings: str) -> Config:
        return load_config(["--config", str(file), *settings])

    config = read("objective.dual_clip=3", "objective=ppo")
    assert (
        config.objective == {"name": "ppo", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3}
        and config.trainer.num_steps == 3
    )
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
        (["trainer.lr=abc"], "trainer.lr: want a number"),
        (["trainer.num_steps=1.5"], "trainer.num_steps: want int"),
        (["trainer.num_steps=0"], "at least 1"),
        (["max_staleness=-1"], "max_staleness must be at least 0"),
        (["buffer.port=70000"], r"0\.\.65535"),
        (["weights.update_mode=later"], "recompute"),
        (["name=a/b"], "plain directory name"),
        (["resume=yesterday"], "latest or step:K"),
        (["sampling.temperature=0"], "above 0"),
        (["trainer.device=gpu"], "use cpu, cuda or cuda:N"),
        (["rollout.engine_device=tpu"], r"rollout\.engine_device=tpu: use cpu, cuda or cuda:N"),
        (["trainer.betas=[2,3]"], "at least 0 and below 1"),
        (["eval.timeout_s=-1"], r"eval\.timeout_s must be above 0"),
        (["rollout.host="], r"rollout\.host is empty"),
        (["buffer.lease_timeout_s=1", "daemon.heartbeat_s=1"], "every lease would run out"),
        (["rollout.engine=vllm"], "use embedded or sglang"),
        (["rollout.sglang.args=--tp-size 2"], r"set rollout\.engine=sglang"),
        (["rollout.engine=sglang", "rollout.sglang.args=tp-size 2"], "begin with an option"),
        (["rollout.engine=sglang", "rollout.sglang.url=gpu0"], "http://host:port"),
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
        (["--config", "/nowhere.yaml"], "no such file"),
        (["--config"], "name a resolved"),
        (["--config", "/dev/null", "trainer.nope=1"], "no such file|unknown key"),
    ],
)
def test_mistakes_are_one_clear_message(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)
