"""The warm start on rows with a loss mask, and the tiny model's chat format."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from areal_like.adding import noisy_demonstration
from areal_like.chat.learned_tokens import ConversationTokens
from areal_like.chat.token_row import TokenRow
from areal_like.config import Config, ModelConfig
from areal_like.data import RowFormat
from areal_like.errors import ConfigError
from areal_like.sorting import noisy_demonstration as sort_demonstration
from rollout_server.rendering.tiny import TinyRenderer
from rollout_server.tasks.adding import AddingTask
from trainer.models import tiny
from trainer.models.tiny_chat import chat_tokenizer, demonstrations
from trainer.models.warm_start import IGNORED, packed, padded
from trainer.prepare_model import TINY_RENDERER, prepare_model

TASK = AddingTask()
TOOLS = list(TASK.environment(TASK.example("train", 0)).tools)


def rows(num: int) -> list[TokenRow]:
    def demonstration(index: int) -> list[dict[str, Any]]:
        return noisy_demonstration(seed=0, index=index, uses_tool=True)

    return list(islice(demonstrations(chat_tokenizer(), demonstration, uses_tool=True), num))


def test_the_loss_mask_covers_the_assistants_turns() -> None:
    tokenizer = chat_tokenizer()
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 37, "b": 85}}}
    messages = [
        {"role": "user", "content": "37+85"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "122"},
        {"role": "assistant", "content": "122"},
    ]
    conversation = RowFormat().conversation_of({"messages": messages, "tools": TOOLS})
    (row,) = ConversationTokens(tokenizer).rows(conversation)
    assert tokenizer.decode(row.tokens) == (
        "<tools>add<user>37+85<assistant><call>add 37 85</call><eos><tool>122<assistant>122<eos>"
    )
    learned = [token for token, is_learned in zip(row.tokens, row.loss_mask, strict=True) if is_learned]
    assert tokenizer.decode(learned) == "<call>add 37 85</call><eos>122<eos>"
    assert len(row.tokens) == len(row.loss_mask) and tokenizer.unk_token_id not in row.tokens

    for end in range(1, len(messages)):
        part = tokenizer.apply_chat_template(messages[:end], tools=TOOLS, tokenize=False)
        assert tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False).startswith(part)
    without_loss = tokenizer.decode([t for t, m in zip(row.tokens, row.loss_mask, strict=True) if not m])
    assert without_loss == "<tools>add<user>37+85<assistant><tool>122<assistant>"


def test_packed_rows_have_the_loss_of_single_rows() -> None:
    some = rows(12)
    model = tiny.untrained_model(chat_tokenizer(), seed=0, num_layers=2, initializer_range=0.1)
    batches = list(packed(some, num_rows=2, length=160, pad_token_id=0))
    assert sum(len(batch.tokens_BL) for batch in batches) < len(some)
    with torch.no_grad():
        count = [int((batch.labels_BL != IGNORED).sum()) for batch in batches]
        assert sum(count) == sum(sum(row.loss_mask) for row in some), "every learned token has one label"
        total = sum(float(batch.loss(model)) * num for batch, num in zip(batches, count, strict=True))
        single = 0.0
        for row in some:
            (batch,) = padded([row], num_rows=1, length=len(row.tokens), pad_token_id=0)
            single += float(batch.loss(model)) * sum(row.loss_mask)
    assert total == pytest.approx(single, rel=1e-5)
    with pytest.raises(ValueError, match="does not fit into 8"):
        next(packed(some, num_rows=1, length=8, pad_token_id=0))


def test_the_sorting_model_is_trained_as_before(tmp_path: Any) -> None:
    """Bitwise: the loop that the first releases had, written out."""
    num_steps, seed, swap_prob = 3, 5, 0.5
    tiny.build_tiny_model(
        tmp_path, seed=seed, warm_start_steps=num_steps, swap_prob=swap_prob, hidden_size=32, num_layers=1
    )
    tokenizer = tiny.character_tokenizer()
    model = tiny.untrained_model(tokenizer, seed=seed, hidden_size=32, num_layers=1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    vocabulary = tokenizer.get_vocab()
    model.train()
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, (step + 1) / 10) * (1 - step / num_steps)
        tokens = torch.full((128, 18), tokenizer.pad_token_id, dtype=torch.long)
        labels = torch.full_like(tokens, -100)
        for at in range(128):
            demo = sort_demonstration(seed=seed, index=step * 128 + at, swap_prob=swap_prob)
            ids = torch.tensor([vocabulary[token] for token in (*demo.prompt, *demo.answer, "<eos>")])
            tokens[at, : len(ids)] = ids
            labels[at, len(demo.prompt) : len(ids)] = ids[len(demo.prompt) :]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    built = type(model).from_pretrained(tmp_path)
    for (name, ours), theirs in zip(built.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_renderer_extends_what_it_rendered() -> None:
    tokenizer = chat_tokenizer()
    renderer = TinyRenderer(
        tokenizer, stop_token_ids=[tokenizer.eos_token_id], vocab_size=len(tokenizer), template_kwargs={}
    )
    assert renderer.supports_tools
    demonstrations = (noisy_demonstration(seed=0, index=index, uses_tool=True) for index in range(100))
    messages = max(demonstrations, key=len)
    assert len(messages) > 6
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    for at in range(1, len(messages) - 1, 2):
        prompt = renderer.render(messages[:at], tools=TOOLS)
        whole = renderer.render(messages[: at + 1], tools=TOOLS, add_generation_prompt=False)
        completion = whole[len(prompt) :]
        bridge = renderer.bridge(
            prompt, completion, messages[: at + 1], messages[at + 1 : at + 2], tools=TOOLS
        )
        assert bridge is not None
        assert [*whole, *bridge] == renderer.render(messages[: at + 2], tools=TOOLS)
        (call,) = renderer.parse(completion, prompt_ids=prompt, tools=TOOLS).tool_calls
        assert {"name": call.name, "arguments": call.arguments} == messages[at]["tool_calls"][0]["function"]


def test_the_warm_start_needs_the_formats_renderer() -> None:
    with pytest.raises(ConfigError, match=r"needs model\.renderer=rollout_server\.rendering\.tiny"):
        prepare_model(Config(task={"name": "adding"}))
    module, _, name = TINY_RENDERER.rpartition(".")
    assert (module, name) == (TinyRenderer.__module__, TinyRenderer.__name__)


def test_each_variant_has_its_own_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = ModelConfig(renderer=TINY_RENDERER, warm_start_steps=2)
    weights = set()
    for number, use_tool in enumerate((True, False, True)):
        config = Config(task={"name": "adding", "use_tool": use_tool}, model=model)
        path = prepare_model(config, out_dir=tmp_path / str(number))
        weights.add((tmp_path / str(number) / "model.safetensors").read_bytes())
        assert path == str(tmp_path / str(number))
    assert len(weights) == 2
    random = ModelConfig(renderer=TINY_RENDERER, warm_start_steps=0)
    own_task = Config(task={"_target_": "my_agents.Guess"}, model=random)
    tokenizer = AutoTokenizer.from_pretrained(prepare_model(own_task, out_dir=tmp_path / "own"))
    assert tokenizer.chat_template == chat_tokenizer().chat_template
