"""Directories that are not reward models are refused before anything is served, with what to change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from areal_like.errors import ConfigError
from rollout_server.scoring.directory import checked_directory
from rollout_server.scoring.model import RewardModel
from tests.support.reward_models import loaded, write_reward_model
from tests.support.sft_model import write_sft_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_reward_model(tmp_path_factory.mktemp("rm") / "rm"))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def outside(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "stolen.safetensors")
    index = {"weight_map": {"score.weight": "../stolen.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def incomplete(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"score.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rewritten(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pickled, "only pytorch_model.bin, which is a pickle"),
        (without_tokenizer, "has no tokenizer"),
        (outside, "does not name safetensors files of the same directory"),
        (incomplete, "model-00001-of-00002.safetensors, which its .* is missing"),
        (rewritten("[1]"), "config.json is not a JSON object"),
        (rewritten("{"), "config.json cannot be read"),
        (rewritten("[" * 100_000), "config.json cannot be read"),
        (rewritten('{"architectures": ["LlamaForCausalLM"]}'), "is a LlamaForCausalLM: a reward model is"),
        (rewritten('{"architectures": ["LlamaForSequenceClassification"]}'), "has 2 labels"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json there"),
        (
            lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
            "is an adapter: merge it",
        ),
    ],
)
def test_a_bad_directory_is_refused(
    made: Path, tmp_path: Path, change: Callable[[Path], object], says: str
) -> None:
    folder = tmp_path / "rm"
    shutil.copytree(made, folder)
    change(folder)
    with pytest.raises(ConfigError, match=rf"^scorer.path={folder}.*{says}"):
        checked_directory(str(folder))


def test_weights_that_do_not_fit_are_refused(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rm"
    shutil.copytree(made, folder)
    weights = load_file(made / "model.safetensors")
    save_file(
        {name: one for name, one in weights.items() if name != "score.weight"}, folder / "model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"lacks weights .*score\.weight.*: it was not trained as a"):
        loaded(str(folder))
    (folder / "model.safetensors").write_bytes(b"\x10" * 100)
    with pytest.raises(ConfigError, match="cannot be loaded as a sequence classifier"):
        loaded(str(folder))
    shutil.copy(made / "model.safetensors", folder)
    (folder / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(ConfigError, match="cannot be loaded as a sequence classifier"):
        loaded(str(folder))
    code = {**json.loads((made / "config.json").read_text()), "model_type": "mine"}
    code["auto_map"] = {"AutoConfig": "mine.Config"}
    (folder / "config.json").write_text(json.dumps(code))
    (folder / "mine.py").write_text("raise SystemExit('code of a model directory was run')")
    with pytest.raises(ConfigError, match="cannot be loaded as a sequence classifier"):
        loaded(str(folder))


def test_a_language_model_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        checked_directory(write_sft_model(tmp_path / "lm"))


def test_the_identity_is_of_weights_config_and_tokenizer(made: Path, tmp_path: Path) -> None:
    def identity(change: Callable[[Path], object] = lambda folder: None) -> str:
        folder = tmp_path / "rm"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made, folder)
        change(folder)
        return checked_directory(str(folder)).identity

    first = identity()
    assert len(first) == 16 and first == identity(lambda folder: (folder / "README.md").write_text("new"))
    others = {
        identity(lambda folder: write_reward_model(folder, seed=1)),
        identity(lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}")),
        identity(rewritten((made / "config.json").read_text() + "\n")),
    }
    assert len(others | {first}) == 4


def test_several_labels_are_refused(tmp_path: Path) -> None:
    path = write_reward_model(tmp_path / "two", num_labels=2)
    with pytest.raises(ConfigError, match="has 2 labels: a reward model has one"):
        checked_directory(path)
    with pytest.raises(ConfigError, match=r"scorer\.device=cuda:7: this machine has \d GPUs"):
        RewardModel(checked_directory(write_reward_model(tmp_path / "one")), device="cuda:7")
    assert AutoTokenizer.from_pretrained(path)("12=")["input_ids"]
