"""The tiny model for conversations with a tool: the same Llama, with a chat template.

    <tools>add<user>37+85+12<assistant><call>add 37 85</call><eos><tool>122<assistant>...

Roles and the ends of a call are single tokens, everything else is a character. The template only appends: a
longer conversation begins with the tokens of the shorter one. The warm start renders its demonstrations with
it, and learns the tokens inside the template's `generation` blocks: the assistant's turns.

Copying a number from far back is a skill that a Transformer acquires abruptly, after many steps with hardly
any progress. Muon on the matrices, wider initial weights and a rotary base for short contexts shorten that
time from minutes to half a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from areal_like.adding import TOOL, noisy_demonstration
from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.chat.token_row import TokenRow
from areal_like.data import RowFormat
from trainer.models.muon import Muon
from trainer.models.tiny import character_tokenizer, untrained_model
from trainer.models.warm_start import packed, warm_start

CHAT_TOKENS = ("<tools>", "<user>", "<tool>", "<assistant>", "<call>", "</call>")
CHAT_TEMPLATE = """\
{%- for tool in tools or [] %}{{ '<tools>' + tool.function.name }}{% endfor -%}
{%- for message in messages -%}
{{- '<' + message.role + '>' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}
{{- message.content -}}
{%- for call in message.tool_calls or [] -%}
{{- '<call>' + call.function.name -}}
{%- for value in call.function.arguments.values() %}{{ ' ' ~ value }}{% endfor -%}
{{- '</call>' -}}
{%- endfor -%}
{{- eos_token -}}
{%- endgeneration -%}
{%- else -%}
{{- message.content -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif -%}
"""
MATRIX_LR = 4e-3
"""Learning rate of Muon."""
OTHER_LR = 2e-3
"""Learning rate of AdamW: embedding and norms."""
NUM_ROWS, ROW_LENGTH = 4, 256
"""Tokens of one step; the longest conversation has about 200."""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The character tokenizer with CHAT_TOKENS as special tokens, and the template."""
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(CHAT_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny_chat_model(out_dir: Path, *, seed: int, warm_start_steps: int, uses_tool: bool) -> None:
    """Writes a model that is warm-started on additions, with its tokenizer, into `out_dir`.

    A minute on one thread for 1,000 steps; after 400 some seeds cannot copy numbers yet. `uses_tool`: see
    `areal_like.adding.noisy_demonstration`.
    """
    tokenizer = chat_tokenizer()
    model = untrained_model(
        tokenizer,
        seed=seed,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )
    rows = demonstrations(
        tokenizer, lambda index: noisy_demonstration(seed=seed, index=index, uses_tool=uses_tool), uses_tool
    )
    batches = packed(rows, num_rows=NUM_ROWS, length=ROW_LENGTH, pad_token_id=tokenizer.pad_token_id)
    warm_start(model, batches, _optimizers(model), num_steps=warm_start_steps)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def demonstrations(
    tokenizer: PreTrainedTokenizerFast,
    demonstration: Callable[[int], list[dict[str, Any]]],
    uses_tool: bool,
) -> Iterator[TokenRow]:
    """The conversations `demonstration(0)`, `demonstration(1)`, ... without end."""
    tools = [{"type": "function", "function": {"name": TOOL}}] if uses_tool else []
    rows, row_format = ConversationTokens(tokenizer), RowFormat()
    for index in count():
        row = {"messages": demonstration(index), "tools": tools}
        yield from rows.rows(row_format.conversation_of(row))


def _optimizers(model: Any) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        Muon(matrices, lr=MATRIX_LR),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
