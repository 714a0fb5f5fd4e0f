"""Scores the steps of a completion with a local process reward model, inside a reward worker.

    text     prompt, step 1, separator, step 2, separator, ...        in the model's chat format, or plain
    value_k  softmax(logits at the last token of separator k, over two classes)[good]

Three kinds of models, known by `architectures` of their config.json:

* `...ForTokenClassification` with two labels, as TRL's PRMTrainer saves them. Class 1 is good.
* `...ForProcessRewardModel` (Qwen2.5-Math-PRM): likewise, with a head of two layers, `score.0`, ReLU and
  `score.2`. The code beside its weights is not run.
* `...ForCausalLM` (Math-Shepherd, arXiv 2312.08935): the classes are the next tokens `good` and `bad`.

A value is the model's probability that the step is right. A completion cannot move a separator or end its
turn: separators and special tokens in its own text are removed before, and places are those in the text, not
occurrences of a token. The model is loaded at the first call and kept, once in each reward worker. Left out:
models that are asked turn by turn, and models that grade by writing a text (`judge`).

Shape suffixes: T tokens, K steps, C = 2 classes, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.chat.plain_text import special_texts
from areal_like.errors import ConfigError, RewardError
from rollout_server.environments.base import Message

_KINDS = ("ForTokenClassification", "ForProcessRewardModel", "ForCausalLM")


def score_steps(
    prompt: str | Sequence[Message],
    steps: Sequence[str],
    *,
    model: str,
    separator: str = "<extra_0>",
    after: str = "",
    good: str = "+",
    bad: str = "-",
    system: str = "",
    chat: bool = True,
    max_tokens: int = 4096,
    device: str = "cpu",
) -> list[float]:
    """Returns a value from 0 to 1 for each step, by the formula in the module's docstring.

    `prompt`: a text, or the messages before the completion. `steps`: their texts, in order. `model`: a
    Hugging Face directory with safetensors and a fast tokenizer. `separator`: text after each step; `after`:
    text between a separator and the next step. `good`, `bad`: for a causal language model, the texts of its
    two classes. `system`: a system message. `chat`: use the tokenizer's chat template; False: prompt, a
    space, completion. `max_tokens`: longest text. `device`: as in torch.

    Raises ConfigError for a directory that is not such a model, and RewardError for a text that is too long
    or that the template changes, and for a value that is not a number: then the sample fails.
    """
    if not steps:
        return []
    loaded = _loaded(str(Path(model).resolve()), device, good, bad)
    clean = [_without(step, [separator, *special_texts(loaded.tokenizer)]) for step in steps]
    return loaded.values(
        *loaded.text_of(prompt, clean, separator=separator, after=after, system=system, chat=chat),
        adds_special=not chat,
        max_tokens=max_tokens,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _StepModel:
    tokenizer: Any
    model: Any
    device: str
    classes: tuple[int, int]
    """Indices of bad and good in the logits' last dimension."""
    is_causal: bool

    def text_of(
        self,
        prompt: str | Sequence[Message],
        steps: Sequence[str],
        *,
        separator: str,
        after: str,
        system: str,
        chat: bool,
    ) -> tuple[str, list[int]]:
        """(the whole text, the place in it of each separator's last character)"""
        content = after.join(step + separator for step in steps)
        if chat:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            if system:
                messages = [{"role": "system", "content": system}, *messages]
            messages.append({"role": "assistant", "content": content})
            if not self.tokenizer.chat_template:
                raise ConfigError("score_steps: the reward model has no chat template: pass chat=False")
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        elif isinstance(prompt, str):
            text = f"{prompt} {content}"
        else:
            raise ConfigError("score_steps: chat=False needs the prompt as a text, not as messages")
        first = text.rfind(content)
        if first < 0:
            raise RewardError("score_steps: the chat template changes the completion, so its steps are lost")
        places, end = [], first
        for step in steps:
            end += len(step) + len(separator)
            places.append(end - 1)
            end += len(after)
        return text, places

    def values(self, text: str, places: Sequence[int], *, adds_special: bool, max_tokens: int) -> list[float]:
        """The value at the token of each place."""
        import torch

        encoded = self.tokenizer(text, add_special_tokens=adds_special, return_offsets_mapping=True)
        tokens = encoded["input_ids"]
        if len(tokens) > max_tokens:
            raise RewardError(f"score_steps: a text of {len(tokens)} tokens, at most max_tokens={max_tokens}")
        at = {
            place: token
            for token, (start, stop) in enumerate(encoded["offset_mapping"])
            for place in range(start, stop)
        }
        if not all(place in at for place in places):
            raise RewardError("score_steps: the tokenizer drops a separator of steps")
        at_K = torch.tensor([at[place] for place in places], device=self.device)
        tokens_1T = torch.tensor([tokens], device=self.device)
        with torch.inference_mode():
            if self.is_causal:
                logits_KV = self.model(input_ids=tokens_1T, logits_to_keep=at_K, use_cache=False).logits[0]
            else:
                logits_KV = self.model(input_ids=tokens_1T).logits[0].index_select(0, at_K)
            values_KC = torch.softmax(logits_KV[:, list(self.classes)].float(), dim=-1)
        values: list[float] = values_KC[:, 1].tolist()
        if not all(map(math.isfinite, values)):
            raise RewardError("score_steps: the reward model's value of a step is not a number")
        return values


def _without(text: str, markers: Sequence[str]) -> str:
    """The text without these markers, also those that appear when others are removed."""
    before = ""
    while before != text:
        before = text
        for marker in markers:
            text = text.replace(marker, "")
    return text


@functools.lru_cache(maxsize=2)
def _loaded(path: str, device: str, good: str, bad: str) -> _StepModel:
    # Imported here: they take a second, and only some tasks score steps.
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        name = (getattr(config, "architectures", None) or [""])[0]
        kind = next((kind for kind in _KINDS if name.endswith(kind)), None)
        if kind is None:
            raise ConfigError(
                f"score_steps: {path} is a {name or 'model without architectures'}: want one of "
                f"{', '.join(f'...{kind}' for kind in _KINDS)}"
            )
        model: Any
        options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True}
        classes = (0, 1)
        if kind == "ForCausalLM":
            model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **options)
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (bad, good)]
            if not all(ids) or ids[0][-1] == ids[1][-1]:
                raise ConfigError(f"score_steps: good={good!r} and bad={bad!r} have no tokens of their own")
            classes = (ids[0][-1], ids[1][-1])
        elif kind == "ForTokenClassification":
            if config.num_labels != 2:
                raise ConfigError(f"score_steps: {path} has {config.num_labels} labels: want bad and good")
            model = AutoModelForTokenClassification.from_pretrained(path, trust_remote_code=False, **options)
        else:
            model = _with_two_layers(path, config)
    except ConfigError:
        raise
    except Exception as error:  # for a broken file, tokenizers raises plain exceptions
        raise ConfigError(f"score_steps: {path} cannot be loaded: {error}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"score_steps: {path} has no fast tokenizer, so its separators cannot be found")
    model.to(device).eval()
    return _StepModel(
        tokenizer=tokenizer, model=model, device=device, classes=classes, is_causal=kind == "ForCausalLM"
    )


def _with_two_layers(path: str, config: Any) -> Any:
    """The model of a directory whose head has two layers. Raises ConfigError if its weights do not fit."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForTokenClassification

    config.num_labels = 2
    dtype = getattr(config, "dtype", None) or torch.float32
    auto: Any = AutoModelForTokenClassification
    model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    size = config.hidden_size
    head = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 2))
    model.score = head.to(dtype)
    weights: dict[str, Any] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights |= load_file(file)
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # other shapes
        raise ConfigError(f"score_steps: {path}: {error}") from None
    if missing or set(unknown) - {"lm_head.weight"}:
        named = ", ".join([*missing, *unknown][:3])
        raise ConfigError(f"score_steps: the weights in {path} are not those of a step model ({named})")
    return model
