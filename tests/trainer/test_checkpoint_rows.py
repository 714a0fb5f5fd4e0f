"""Rows in checkpoints: layout of the files, memory of a rank, ranks that fail, damaged and old files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from areal_like.errors import ConfigError
from rollout_server.weights.checkpoint_shapes import CheckpointShapes
from tests.support.full_state import gather_full_state
from tests.support.small_disk import small_disk
from tests.support.trainer_helpers import random_groups, run_ranks, write_model
from tests.support.trainer_ranks import make_runner
from trainer.checkpoints.checkpoint import Checkpoints
from trainer.distributed.ranks import Ranks
from trainer.models.safetensors_rows import INDEX_FILE
from trainer.models.tiny import character_tokenizer
from trainer.step.runner import StepRunner

OLD = Path(__file__).with_name("checkpoint_of_format_1")
"""Written by the release before, with a critic; and all weights one step later."""
CRITIC = {"advantage": {"name": "gae", "critic_updates": 2}}


def saved(
    root: Path, runner: StepRunner, ranks: Ranks, path: str, *, max_file_bytes: int = 10**9, dtype: str
) -> Path:
    """A checkpoint of step 1."""
    checkpoints = Checkpoints(root, keep=9, tokenizer_path=path, dtype=dtype, max_file_bytes=max_file_bytes)
    checkpoints.save(1, runner.policy, runner.optimizer, ranks, extra={})
    checkpoints.wait()
    checkpoints.close()
    return checkpoints.path(1)


def test_weights_are_files_that_hugging_face_writes(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    runner = make_runner(path, ranks, dtype=torch.float32)
    weights = {name: tensor.clone() for name, tensor in gather_full_state(runner.policy)}
    for dtype in ("float32", "bfloat16"):
        cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()}
        single = saved(tmp_path / dtype, runner, ranks, path, dtype=dtype)
        save_file(cast, tmp_path / "expected", {"format": "pt"})
        assert (single / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()

        cut = saved(tmp_path / f"{dtype}-cut", runner, ranks, path, dtype=dtype, max_file_bytes=9000)
        files = sorted(file.name for file in cut.glob("*.safetensors"))
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
        index = json.loads((cut / INDEX_FILE).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in cast.values())
        for directory in (single, cut):
            model = AutoModelForCausalLM.from_pretrained(directory)
            assert model.dtype == getattr(torch, dtype)
            assert all(torch.equal(param, cast[name]) for name, param in model.named_parameters())
            shapes = CheckpointShapes.of(str(directory)).shapes
            assert shapes == {name: tuple(tensor.shape) for name, tensor in cast.items()}
        for directory in (single, cut):  # masters from the weights' files, or from the row files
            other = make_runner(path, ranks, dtype=torch.float32)
            with torch.no_grad():
                for param in other.policy.parameters():
                    param.zero_()
            checkpoints = Checkpoints(directory.parent, keep=9, tokenizer_path=path)
            checkpoints.load(1, other.policy, other.optimizer, ranks)
            assert all(torch.equal(tensor, weights[name]) for name, tensor in gather_full_state(other.policy))


def test_masters_are_written_once(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    runner = make_runner(path, ranks, dtype=torch.float32)
    runner.run(random_groups(4), step=0)
    num_bytes = sum(param.nbytes for param in runner.policy.parameters())
    for dtype, factor in (("float32", 3), ("bfloat16", 3.5)):
        files = list(saved(tmp_path / dtype, runner, ranks, path, dtype=dtype).glob("**/*.safetensors"))
        written = sum(file.stat().st_size for file in files)
        headers = 80 * 200
        assert factor * num_bytes < written < factor * num_bytes + headers, dtype


def test_a_checkpoint_of_the_release_before_resumes(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(OLD / "step_000002", tmp_path / "step_000002")
    path = str(tmp_path / "step_000002")
    runner = make_runner(path, ranks, dtype=torch.float32, settings=CRITIC)
    assert runner.critic is not None
    checkpoints = Checkpoints(tmp_path, keep=9, tokenizer_path=path)
    with torch.no_grad():
        for model in (runner.policy, runner.critic.model):
            for param in model.parameters():
                param.fill_(9.0)
    extra = checkpoints.load(2, runner.policy, runner.optimizer, ranks, critic=runner.critic)
    assert extra == {"cursor": [7, 9]} and not caplog.records
    assert (runner.optimizer.num_updates, runner.critic.optimizer.num_updates) == (2, 4)
    runner.run(random_groups(4, seed=2), step=2)
    expected = load_file(OLD / "one_step_later.safetensors")
    for kind, model, optimizer in (
        ("policy", runner.policy, runner.optimizer),
        ("critic", runner.critic.model, runner.critic.optimizer),
    ):
        for (name, tensor), shard in zip(gather_full_state(model), optimizer.shards, strict=True):
            # Other CPUs add up the gradients of a tensor in another order, with errors of a unit in the last
            # place of the largest one. AdamW divides a gradient by its own root mean square, which is up to
            # 300 times smaller than that of the largest, and multiplies it by the learning rate.
            rms = optimizer.moments(shard)["exp_avg_sq"].sqrt()
            scale = expected[f"{kind}.{name}"].abs() + optimizer.lr * rms.max() / rms
            difference = (tensor - expected[f"{kind}.{name}"]).abs()
            assert (difference <= 4 * torch.finfo(torch.float32).eps * scale).all(), (kind, name)
    (tmp_path / "step_000002" / "critic_optimizer.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"critic_optimizer.safetensors cannot be read"):
        checkpoints.load(2, runner.policy, runner.optimizer, ranks, critic=runner.critic)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-4])


def _edit(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


ROWS = "rows/policy-00000-of-00001.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "rows cut": (ROWS, _cut, "cannot be read .*: resume from another"),
    "rows missing": (
        "rows/policy-00000-of-00001.safetensors",
        Path.unlink,
        "No such file.*resume from another",
    ),
    "weights cut": ("model.safetensors", _cut, "cannot be read .*: resume from another"),
    "weights missing": ("model.safetensors", Path.unlink, "No such file"),
    "random state missing": ("rows/random_state.safetensors", Path.unlink, "No such file"),
    "another random state": (
        "rows/random_state.safetensors",
        lambda f: save_file({"random_state.cpu": torch.zeros(3, dtype=torch.uint8)}, f),
        "not a random state of this torch",
    ),
    "index missing": ("rows/index.json", Path.unlink, "No such file"),
    "index cut": ("rows/index.json", _cut, "cannot be read"),
    "configuration cut": ("config.json", _cut, "cannot be read"),
    "no configuration": ("config.json", Path.unlink, "cannot be read"),
    "tokenizer cut": ("tokenizer.json", _cut, "cannot be read"),
    "state cut": ("trainer_state.json", _cut, "cannot be read"),
    "another dtype": ("rows/index.json", lambda f: _edit(f, "float32", "float16"), "the run started with"),
    "another model": ("rows/index.json", lambda f: _edit(f, "[41, 32]", "[41, 31]"), "the run started with"),
    "a parameter without rows": (
        "rows/index.json",
        lambda f: _edit(f, "[41, 32]", "[]"),
        "cannot be read .*: resume from another",
    ),
    "rows twice": ("rows/index.json", lambda f: _edit(f, "[[0, 41]]", "[[0, 40]]"), "every row"),
    "outside": ("rows/index.json", lambda f: _edit(f, "policy-0", "../policy-0"), "another directory"),
}


def test_damaged_files_are_named(tmp_path: Path, ranks: Ranks) -> None:
    path = write_model(tmp_path / "model", dtype=torch.float32)
    runner = make_runner(path, ranks, dtype=torch.float32)
    runner.run(random_groups(4), step=0)
    good = saved(tmp_path / "good", runner, ranks, path, dtype="float32")
    for case, (name, damage, message) in DAMAGE.items():
        bad = tmp_path / case / good.name
        shutil.copytree(good, bad)
        damage(bad / name)
        checkpoints = Checkpoints(bad.parent, keep=9, tokenizer_path=path)
        with pytest.raises(ConfigError, match=message) as caught:
            checkpoints.load(1, runner.policy, runner.optimizer, ranks)
        assert str(bad / name) in str(caught.value), (case, caught.value)


@pytest.mark.long
def test_ranks_write_their_rows_or_no_checkpoint(tmp_path: Path, ranks: Ranks) -> None:
    """Long, because ranks hang or die in checkpoints, and the others wait for them."""
    path = write_model(tmp_path / "model", dtype=torch.float32)
    wide = tmp_path / "wide"
    config = LlamaConfig(
        vocab_size=12288,
        hidden_size=384,
        intermediate_size=1152,
        num_hidden_layers=3,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    config.save_pretrained(wide)
    character_tokenizer().save_pretrained(wide)
    with small_disk(tmp_path / "disk", num_mib=4) as disk:
        module = "tests.support.checkpoint_ranks"
        run_ranks("rows", str(tmp_path), path, str(wide), str(disk), world_size=4, module=module)
        shutil.copytree(disk / "c", tmp_path / "kept")
    runner = make_runner(path, ranks, dtype=torch.float32)
    checkpoints = Checkpoints(tmp_path / "kept", keep=9, tokenizer_path=path)
    checkpoints.load(4, runner.policy, runner.optimizer, ranks)
    assert runner.optimizer.num_updates == 1
    weights = dict(gather_full_state(runner.policy))
    for name, tensor in load_file(checkpoints.path(4) / "model.safetensors").items():
        assert torch.equal(weights[name].bfloat16(), tensor)
