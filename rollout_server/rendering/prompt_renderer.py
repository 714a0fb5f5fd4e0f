"""Renders an example to token ids, with the model's chat template if the prompt is a list of messages.

Prompts are checked here, before they are sent: a token id outside the model's vocabulary would crash a whole
SGLang server. The renderer of messages is chosen by name, as the one written for the model, or as the
tokenizer's chat template (`choose_renderer`).
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from areal_like.config.job import ModelConfig
from areal_like.errors import ConfigError, EpisodeError, first_line
from areal_like.registry import named_object
from areal_like.wire.fingerprint import canonical_json
from rollout_server.environments.base import Message
from rollout_server.rendering.base import ChatRenderer
from rollout_server.rendering.jinja import JinjaRenderer
from rollout_server.tasks.base import Example

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
_NUM_COMPARED = 64
_CLASS_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class PromptRenderer:
    """Tokenizer, vocabulary size and stop tokens of one model."""

    def __init__(self, model: str, *, settings: ModelConfig | None = None) -> None:
        """`model`: argument for `from_pretrained`. Raises ConfigError if there is no tokenizer, config or
        EOS.

        `settings`: how messages are rendered; the defaults if None.
        """
        # Imported here, so that --help does not wait for transformers, which takes over a second to import.
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        except Exception as error:  # for a broken file, tokenizers raises plain exceptions
            raise ConfigError(
                f"model.path={model}: no tokenizer and config that transformers can load "
                f"({first_line(error)})"
            ) from error
        try:
            eos = GenerationConfig.from_pretrained(model).eos_token_id
        except OSError:  # the file is optional
            eos = None
        self._model = model
        self._model_type = str(config.model_type)
        self._settings = settings or ModelConfig()
        text = config.get_text_config()
        self.max_positions = int(getattr(text, "max_position_embeddings", None) or 1 << 30)
        """Longest sequence that the model supports, in tokens."""
        self.vocab_size = int(text.vocab_size)
        """Number of rows of the model's embedding; every token id is below it."""
        self.stop_token_ids: list[int] = sorted(
            {self._tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
        )
        """Ids that end a completion: the tokenizer's EOS and those of generation_config.json."""
        if not self.stop_token_ids:
            raise ConfigError(
                f"model.path={model}: no EOS token in tokenizer or generation_config.json, "
                "so no completion would end"
            )
        self.max_prompt_tokens = self.max_positions
        """Longer prompts are refused. The server lowers this limit so that prompts fit into its engine's
        context."""

    def limited(self, max_prompt_tokens: int) -> Self:
        """Returns the same renderer with another `max_prompt_tokens`."""
        other = copy.copy(self)
        other.max_prompt_tokens = max_prompt_tokens
        return other

    def encode(self, example: Example) -> NDArray[np.int32]:
        """Returns the prompt's token ids [P]. Raises ValueError for an empty, too long or out-of-vocabulary
        prompt."""
        tokens = self._encode(example.prompt)
        if not 0 < len(tokens) <= self.max_prompt_tokens:
            raise ValueError(
                f"prompt of {len(tokens)} tokens: the limit is 1 to {self.max_prompt_tokens} "
                "(task.max_prompt_tokens, rollout.max_context)"
            )
        tokens_P = np.asarray(tokens, dtype=np.int32)
        if int(tokens_P.max()) >= self.vocab_size:
            raise ValueError(
                f"prompt has token id {tokens_P.max()}, the model's vocabulary has {self.vocab_size}"
            )
        return tokens_P

    @cached_property
    def key(self) -> str:
        """Hash of everything that a prompt's length depends on; empty for a user's renderer, whose code may
        change."""
        if "." in self._settings.renderer or not hasattr(self._tokenizer, "backend_tokenizer"):
            return ""
        renderers = importlib.util.find_spec("renderers") and importlib.metadata.version("renderers")
        parts = [
            self._tokenizer.backend_tokenizer.to_str(),
            self._tokenizer.chat_template,
            self._settings.renderer,
            self._settings.chat_template_kwargs,
            importlib.metadata.version("transformers"),
            renderers,
        ]
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    def num_tokens(self, prompts: Sequence[str | list[Message]]) -> list[int]:
        """Returns the lengths of many prompts as encoded by `encode`. Raises ValueError."""
        texts = [self._as_text(prompt) for prompt in prompts]
        rendered = [prompt for prompt, text in zip(prompts, texts, strict=True) if text is None]
        plain = [text for text in texts if text is not None]
        try:
            of_rendered = iter(self._messages.num_tokens(rendered) if rendered else ())  # type: ignore[arg-type]
        except EpisodeError as error:  # of a prompt, and not of an episode
            raise ValueError(str(error)) from error
        of_plain = iter([len(ids) for ids in self._tokenizer(plain)["input_ids"]] if plain else ())
        return [next(of_rendered if text is None else of_plain) for text in texts]

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """Returns the text of sampled tokens without special tokens, as passed to reward functions."""
        return str(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True))

    def text_of(self, tokens: Sequence[int]) -> str:
        """Returns the text of sampled tokens with special tokens, in which stop texts are searched."""
        return str(
            self._tokenizer.decode(
                list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    @property
    def num_token_ids(self) -> int:
        """Number of the tokenizer's tokens; the embedding may have more rows."""
        return len(self._tokenizer)

    def text_of_all_parts(self) -> tuple[str, list[int]]:
        """Returns a text of tokens from all over the vocabulary, and the ids that the tokenizer makes of it,
        by which another tokenizer is compared with this one."""
        some = np.linspace(0, self.num_token_ids - 1, _NUM_COMPARED, dtype=int).tolist()
        last = range(max(0, self.num_token_ids - _NUM_COMPARED), self.num_token_ids)
        texts = filter(None, self._tokenizer.convert_ids_to_tokens([*some, *last]))
        text = " ".join(text for text in texts if text.isprintable())
        return text, list(self._tokenizer(text)["input_ids"])

    def token_of(self, text: str) -> int | None:
        """Returns the token whose text is exactly this, if there is one."""
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        is_one = len(tokens) == 1 and tokens[0] < self.vocab_size and self.text_of(tokens) == text
        return int(tokens[0]) if is_one else None

    @cached_property
    def chat(self) -> ChatRenderer:
        """The renderer of conversations (`model.renderer`). Raises ConfigError if there is none."""
        return self._choose(self._settings.renderer)

    @cached_property
    def _messages(self) -> ChatRenderer:
        # A renderer found by `auto` renders prompts like the template, and takes a second to import.
        return self._choose("jinja" if self._settings.renderer == "auto" else self._settings.renderer)

    def _choose(self, name: str) -> ChatRenderer:
        return choose_renderer(
            name,
            self._tokenizer,
            model=self._model,
            model_type=self._model_type,
            stop_token_ids=self.stop_token_ids,
            vocab_size=self.vocab_size,
            template_kwargs=self._settings.chat_template_kwargs,
        )

    def _as_text(self, prompt: str | list[Message]) -> str | None:
        """Returns the text of a prompt that needs no renderer; None for messages with a chat format."""
        if isinstance(prompt, str):
            return prompt
        if not self._tokenizer.chat_template and self._settings.renderer in ("auto", "jinja"):
            return "\n".join(message["content"] for message in prompt) + "\n"
        return None

    def _encode(self, prompt: str | list[Message]) -> list[int]:
        text = self._as_text(prompt)
        if text is not None:
            return list(self._tokenizer(text)["input_ids"])
        assert isinstance(prompt, list)
        try:
            return self._messages.render(prompt)
        except EpisodeError as error:  # of a prompt, and not of an episode
            raise ValueError(str(error)) from error


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
