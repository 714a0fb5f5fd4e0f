"""Chooses the renderer of conversations: by name, the one written for the model, or the chat template."""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_like.errors import ConfigError
from areal_like.registry import named_object
from rollout_server.rendering.base import ChatRenderer
from rollout_server.rendering.jinja import JinjaRenderer

log = logging.getLogger(__name__)

_CANDIDATES: Mapping[str, tuple[str, ...]] = {
    "deepseek_v3": ("deepseek-v3", "deepseek-r1", "kimi-k2"),
    "gemma4": ("gemma4",),
    "gemma4_text": ("gemma4",),
    "glm4_moe": ("glm-4.5", "glm-5"),
    "glm_moe_dsa": ("glm-5", "glm-5.1", "glm-5.3"),
    "gpt_oss": ("gpt-oss",),
    "kimi_k2": ("kimi-k2",),
    "llama": ("llama-3",),
    "minimax_m2": ("minimax-m2",),
    "nemotron_h": ("nemotron-3", "nemotron-3-ultra", "nemotron-3.5"),
    "qwen3": ("qwen3", "prime-qwen3"),
    "qwen3_5": ("qwen3.5", "qwen3.6", "qwen3.8"),
    "qwen3_5_moe": ("qwen3.5", "qwen3.6", "qwen3.8"),
    "qwen3_moe": ("qwen3",),
}
"""`model_type` of config.json -> candidate renderers; the first that agrees with the chat template is
used."""
_LLAMA_3_TOKEN = "<|start_header_id|>"
"""Many models of type llama use a different chat format."""
_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def choose_renderer(
    name: str,
    tokenizer: Any,
    *,
    model: str,
    model_type: str,
    stop_token_ids: Sequence[int],
    vocab_size: int,
    template_kwargs: Mapping[str, Any],
) -> ChatRenderer:
    """Returns the renderer named by `model.renderer`.

    `jinja`, `auto`, a name of the package `renderers`, or `module.Class`. `model`: the model's directory or
    its name at Hugging Face; `model_type`: of its config.json. `auto` uses a renderer of the package only if
    it renders some conversations to the same token ids as the tokenizer's chat template; a named one that
    does not is refused. Raises ConfigError.
    """
    options: dict[str, Any] = {
        "stop_token_ids": stop_token_ids,
        "vocab_size": vocab_size,
        "template_kwargs": template_kwargs,
    }
    has_library = importlib.util.find_spec("renderers") is not None
    if name == "jinja":
        return JinjaRenderer(tokenizer, **options)
    if name == "auto":
        candidates = _CANDIDATES.get(model_type, ())
        if model_type == "llama" and _LLAMA_3_TOKEN not in tokenizer.get_added_vocab():
            candidates = ()
        # The package takes a second to import, so it is imported only if it may have the renderer.
        if has_library and tokenizer.chat_template and (candidates or not Path(model).is_dir()):
            from rollout_server.rendering.library import find_renderer

            found = find_renderer(tokenizer, model=model, candidates=candidates, **options)
            if found is not None:
                log.info("model.renderer=auto: %s", found.name)
                return found
        log.info("model.renderer=auto: the chat template")
        return JinjaRenderer(tokenizer, **options)
    if _CLASS_PATH.fullmatch(name):
        return _custom_class(name)(tokenizer, **options)
    if not has_library:
        raise ConfigError(
            f"model.renderer={name}: the package `renderers` is not installed: "
            "pip install 'areal-like[agents]', or set model.renderer=jinja"
        )
    from rollout_server.rendering.library import named_renderer

    return named_renderer(name, tokenizer, **options)


def _custom_class(path: str) -> type[ChatRenderer]:
    key = f"model.renderer={path}"
    cls = named_object(path, key=key)
    if not (isinstance(cls, type) and issubclass(cls, ChatRenderer)):
        raise ConfigError(f"{key}: not a subclass of rollout_server.rendering.base.ChatRenderer")
    return cls
