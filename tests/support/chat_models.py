"""Tokenizers with chat templates, made offline: one token a character, and a template's special tokens."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from rollout_server.rendering.jinja import JinjaRenderer

TEMPLATE_FILES = Path(__file__).parent / "chat_templates"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"

APPENDING = """\
{%- if tools %}<|system|>
{%- for tool in tools %}{{ tool | tojson }}
{% endfor %}<|end|>
{% endif %}
{%- for message in messages %}<|{{ message.role }}|>
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>
{%- endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|end|>
{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
"""Only appends, and renders tools."""

STRIPPING = APPENDING.replace(
    "if message.reasoning_content", "if message.reasoning_content and loop.index0 > last.user"
).replace(
    "{%- if tools %}",
    "{%- set last = namespace(user=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}{%- if tools %}",
    1,
)
"""Leaves out the reasoning before the last user message, as Qwen3's template does."""

WITH_BOS = "<s>" + APPENDING
"""Begins with a BOS, which the tokenizer would add, too."""

TOOLLESS = """\
{%- for message in messages %}[{{ message.role }}]{{ message.content | trim }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
"""Has no place for tools, and changes the white space of a reply."""

NEVER_ENDING = """\
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{%- if add_generation_prompt %}assistant: {% endif %}"""
"""Marks the end of no turn."""

TEMPLATES: Mapping[str, str] = {
    "appending": APPENDING,
    "stripping": STRIPPING,
    "with_bos": WITH_BOS,
    "toolless": TOOLLESS,
    "never_ending": NEVER_ENDING,
}
SPECIAL = ("<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
QWEN3_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA_3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|eom_id|>",
)  # fmt: skip


def chat_tokenizer(
    template: str, *, special: tuple[str, ...] = SPECIAL, eos: str = "<|end|>", bos: str | None = None
) -> Any:
    """A tokenizer with this chat template.

    Some words are tokens too, so that a text has many tokenizations: a policy samples another one than the
    tokenizer would choose.
    """
    words = ["<unk>", *CHARACTERS, "ab", "abc", "7\n"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"abc|ab|7\n|[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token=eos, bos_token=bos
    )
    fast.chat_template = template
    return fast


def qwen3_tokenizer() -> Any:
    """With the chat template and the special tokens of Qwen3."""
    template = (TEMPLATE_FILES / "qwen3.jinja").read_text()
    return chat_tokenizer(template, special=QWEN3_SPECIAL, eos="<|im_end|>")


def llama_3_tokenizer() -> Any:
    """With the chat template and the special tokens of Llama 3.2."""
    template = (TEMPLATE_FILES / "llama_3.jinja").read_text()
    return chat_tokenizer(template, special=LLAMA_3_SPECIAL, eos="<|eot_id|>", bos="<|begin_of_text|>")


def options_of(tokenizer: Any, **template_kwargs: Any) -> dict[str, Any]:
    """Arguments of a renderer of this tokenizer."""
    return {
        "stop_token_ids": [tokenizer.eos_token_id],
        "vocab_size": len(tokenizer),
        "template_kwargs": template_kwargs,
    }


def jinja_renderer(template: str, **template_kwargs: Any) -> JinjaRenderer:
    """The renderer of a tokenizer with this chat template."""
    tokenizer = chat_tokenizer(template)
    return JinjaRenderer(tokenizer, **options_of(tokenizer, **template_kwargs))


def tokens_in(renderer: JinjaRenderer, text: str) -> list[int]:
    """Returns one token for each character, and for each marker."""
    tokenizer = renderer.tokenizer
    marked = [token for token in tokenizer.get_added_vocab() if token in text]
    ids: list[int] = []
    while text:
        word = next((token for token in marked if text.startswith(token)), text[0])
        ids.append(tokenizer.convert_tokens_to_ids(word))
        text = text[len(word) :]
    return ids
