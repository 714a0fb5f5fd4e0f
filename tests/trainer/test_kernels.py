"""trainer.kernels: what is chosen where, and that a choice changes neither names nor values on a CPU."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from areal_like.config import from_mapping
from tests.support.trainer_helpers import pretend_liger, write_model
from trainer.distributed.ranks import Ranks
from trainer.models import kernels
from trainer.models.kernels import Kernels, apply_liger, choose_kernels, use_kernels
from trainer.models.policy import Policy, build_policy

ON_H100: dict[str, Any] = {"dtype": "bfloat16", "is_cuda": True, "capability": (9, 0)}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The packages that can be found; a test changes it."""
    found = {"flash_attn_interface", "liger_kernel"}
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object() if name in found else None)
    return found


def test_both_are_chosen_where_they_can_run(installed: set[str]) -> None:
    assert choose_kernels("auto", **ON_H100) == Kernels(flash_attention_3="", liger="")
    assert str(choose_kernels("auto", **ON_H100)) == "FlashAttention 3: yes, Liger: yes"
    installed.clear()
    assert choose_kernels("auto", **ON_H100) == Kernels(
        flash_attention_3="flash_attn_interface is not installed", liger="liger_kernel is not installed"
    )


@pytest.mark.parametrize(
    ("changes", "uses_flash", "uses_liger"),
    [
        ({"setting": "torch"}, False, False),
        ({"is_cuda": False, "capability": None}, False, False),
        ({"capability": (8, 0)}, False, True),
        ({"capability": (10, 0)}, False, True),
        ({"dtype": "float32"}, False, True),
        ({"attention": "rectangles"}, False, True),
        ({"attention": "varlen"}, True, True),
        ({"compiles": True}, True, False),
    ],
)
def test_obstacles(installed: set[str], changes: dict[str, Any], uses_flash: bool, uses_liger: bool) -> None:
    found = choose_kernels(**{"setting": "auto"} | ON_H100 | changes)
    assert (found.flash_attention_3 == "", found.liger == "") == (uses_flash, uses_liger), found


def test_flash_attention_that_does_not_load_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's own function runs: a package that lacks the operators is found out when it is activated."""
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    kernels._activated.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            found = kernels._activated(Kernels(flash_attention_3="", liger="no GPU"))
    assert "does not expose FA3" in found.flash_attention_3
    assert [record.message.startswith("kernels: ") for record in caplog.records] == [True]
    kernels._activated.cache_clear()


def test_a_cpu_uses_none(tmp_path: Path, installed: set[str], ranks: Ranks) -> None:
    config = from_mapping({"model": {"path": "x", "dtype": "float32"}})
    found = use_kernels(config, torch.device("cpu"), dtype="float32")
    assert found == Kernels(flash_attention_3="no GPU", liger="no GPU")
    policy = build_policy(config, write_model(tmp_path, "qwen3"), ranks)
    assert not any("forward" in vars(module) for module in policy.model.base_model.modules())


def test_liger_changes_only_the_models_that_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger itself replaces classes of transformers, so that later models of this process would use them."""
    from transformers.models.qwen3 import modeling_qwen3

    def patch(model: Any, **_settings: bool) -> None:
        modeling_qwen3.Qwen3RMSNorm = torch.nn.Identity  # type: ignore[assignment,misc]
        modeling_qwen3.apply_rotary_pos_emb = lambda query, *_rest: pytest.fail("on a CPU")

    pretend_liger(monkeypatch, patch)
    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", modeling_qwen3.apply_rotary_pos_emb)
    norm = modeling_qwen3.Qwen3RMSNorm
    path = write_model(tmp_path, "qwen3")
    plain = AutoModelForCausalLM.from_pretrained(path)
    tokens_1T = torch.arange(7)[None]
    want = plain(tokens_1T).logits
    for _ in range(2):  # the second call finds what the first one left
        assert apply_liger(AutoModelForCausalLM.from_pretrained(path))
        assert modeling_qwen3.Qwen3RMSNorm is norm
        assert torch.equal(plain(tokens_1T).logits, want)


def test_liger_gets_the_whole_model_and_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    pretend_liger(monkeypatch, lambda **settings: calls.append(settings))
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "qwen3", "qwen3"))
    assert apply_liger(model)
    (settings,) = calls
    assert settings.pop("model") is model
    on = {name for name, value in settings.items() if value}
    assert on == {"rope", "rms_norm", "swiglu"} and len(settings) == 5
    # It overwrites k, which is kept for the backward.
    Policy.build(str(tmp_path / "qwen3"), liger=True, gradient_checkpointing="selective")
    assert not calls.pop()["rope"]
    Policy.build(str(tmp_path / "qwen3"), liger=True, gradient_checkpointing=True)
    assert calls.pop()["rope"]
    other = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "gpt2", "gpt2"))
    assert not apply_liger(other) and len(calls) == 1
