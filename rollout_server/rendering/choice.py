"""Chooses the renderer of conversations: by name, or the one made for the model, or the chat template."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from areal_like.errors import ConfigError
from rollout_server.rendering.base import ChatRenderer
from rollout_server.rendering.jinja import JinjaRenderer

log = logging.getLogger(__name__)

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
    """The renderer that `model.renderer` names.

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
        if not has_library or not tokenizer.chat_template:
            return JinjaRenderer(tokenizer, **options)
        from rollout_server.rendering.library import find_renderer

        found = find_renderer(tokenizer, model=model, model_type=model_type, **options)
        if found is None:
            log.info("model.renderer=auto: the chat template, as no renderer of the model agrees with it")
            return JinjaRenderer(tokenizer, **options)
        log.info("model.renderer=auto: %s", found.name)
        return found
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
    module_name, _, attribute = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ConfigError(
            f"model.renderer={path}: {error}; it must be importable from the directory the job starts in"
        ) from error
    except AttributeError:
        raise ConfigError(f"model.renderer={path}: module {module_name} has no {attribute}") from None
    if not (isinstance(cls, type) and issubclass(cls, ChatRenderer)):
        raise ConfigError(
            f"model.renderer={path}: not a subclass of rollout_server.rendering.base.ChatRenderer"
        )
    return cls
