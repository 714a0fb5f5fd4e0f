"""Which renderer a model gets, and that those of the package `renderers` agree with the chat template."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest

from areal_like.config.job import ModelConfig
from areal_like.errors import ConfigError
from rollout_server.rendering.base import ChatRenderer
from rollout_server.rendering.jinja import JinjaRenderer
from rollout_server.rendering.library import LibraryRenderer
from rollout_server.rendering.prompt_renderer import PromptRenderer, choose_renderer
from rollout_server.tasks.base import Example
from tests.support.chat_models import (
    APPENDING,
    chat_tokenizer,
    llama_3_tokenizer,
    options_of,
    qwen3_tokenizer,
)


class Shouting(JinjaRenderer):
    """A renderer as a user writes it: calls are `name!arguments`."""

    def parse_call(self, body: str) -> tuple[str, str]:
        name, mark, arguments = body.partition("!")
        return (name, arguments) if mark else ("", body)


def choose(name: str, tokenizer: Any, *, model_type: str = "", **template_kwargs: Any) -> ChatRenderer:
    return choose_renderer(
        name,
        tokenizer,
        model="/models/mine",
        model_type=model_type,
        **options_of(tokenizer, **template_kwargs),
    )


@pytest.mark.parametrize("template_kwargs", [{}, {"enable_thinking": False}])
def test_auto_finds_the_renderer_of_qwen3(template_kwargs: dict[str, Any]) -> None:
    found = choose("auto", qwen3_tokenizer(), model_type="qwen3", **template_kwargs)
    assert isinstance(found, LibraryRenderer) and found.name == "qwen3" and found.supports_tools
    prompt = found.decode(found.render([{"role": "user", "content": "hi"}]))
    assert prompt.endswith("<think>\n\n</think>\n\n") is bool(template_kwargs)
    assert {found.decode([i]) for i in found.stop_token_ids} == {"<|im_end|>", "<|endoftext|>"}


def test_auto_finds_the_renderer_of_llama_3() -> None:
    found = choose("auto", llama_3_tokenizer(), model_type="llama")
    assert isinstance(found, LibraryRenderer) and found.name == "llama-3"


@pytest.mark.parametrize("change", ["template", "special token", "model type", "template kwargs"])
def test_auto_falls_back_to_the_template(change: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, kwargs, model_type = qwen3_tokenizer(), {}, "qwen3"
    if change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("# Tools", "# My tools")
    elif change == "special token":
        tokenizer = chat_tokenizer(
            tokenizer.chat_template, special=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"
        )
    elif change == "model type":
        model_type = "mamba"
    else:
        kwargs = {"my_switch": True}
    with caplog.at_level(logging.INFO):
        found = choose("auto", tokenizer, model_type=model_type, **kwargs)
    assert isinstance(found, JinjaRenderer)
    assert "model.renderer=auto: the chat template" in caplog.text


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("qwen4", "choose one of auto, jinja, "),
        ("default", "choose one of auto, jinja, "),
        ("llama-3", "cannot be used with this tokenizer"),
        ("prime-qwen3", "chat template renders "),
        ("no_such_module.Renderer", "No module named"),
        ("tests.rollout_server.rendering.test_choice.Missing", "has no Missing"),
        ("tests.rollout_server.rendering.test_choice.options_of", "not a subclass"),
    ],
)
def test_named_renderers_that_do_not_fit_are_refused(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        choose(name, qwen3_tokenizer(), model_type="qwen3")
    assert f"model.renderer={name}" in str(caught.value) and len(str(caught.value)) < 900


def test_wrong_template_kwargs_of_a_named_renderer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"chat_template_kwargs.*my_switch"):
        choose("qwen3", qwen3_tokenizer(), my_switch=True)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert isinstance(choose("auto", qwen3_tokenizer(), model_type="qwen3"), JinjaRenderer)
    with pytest.raises(ConfigError, match=r"areal-like\[agents\]"):
        choose("qwen3", qwen3_tokenizer())


def test_a_class_of_the_user() -> None:
    renderer = choose(f"{__name__}.Shouting", chat_tokenizer(APPENDING))
    assert isinstance(renderer, Shouting)
    ids = renderer.render([{"role": "user", "content": "<tool_call>add!1</tool_call>"}])
    [call] = renderer.parse(ids, prompt_ids=[]).tool_calls
    assert (call.name, call.arguments) == ("add", "1")


def test_no_template() -> None:
    tokenizer = chat_tokenizer("")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"add chat_template\.jinja"):
        choose("auto", tokenizer)


def test_template_kwargs_reach_prompts_of_one_turn(tmp_path: Any) -> None:
    qwen3_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen3", "vocab_size": 128, "max_position_embeddings": 256, "hidden_size": 8}'
    )
    example = Example(prompt=[{"role": "user", "content": "hi"}], answer=None)
    texts = []
    for settings in (
        None,
        ModelConfig(chat_template_kwargs={"enable_thinking": False}, renderer="qwen3"),
    ):
        renderer = PromptRenderer(str(tmp_path), settings=settings)
        texts.append(renderer.chat.decode(renderer.encode(example).tolist()))
        assert isinstance(renderer.chat, LibraryRenderer)
    start = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [start, start + "<think>\n\n</think>\n\n"]
    with pytest.raises(ValueError, match="cannot render these messages"):
        renderer.encode(Example(prompt=[], answer=None))
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": []}')
    with pytest.raises(ConfigError, match="no tokenizer and config that transformers can load"):
        PromptRenderer(str(tmp_path))
