"""The default job's policy: a character-level Llama of 0.3M parameters, warm-started.

RL needs a policy that is right sometimes. The warm start, on mostly wrong demonstrations, teaches the format
and part of the skill, so that some completions are rewarded and there is still something to learn. The model
is a function of (seed, steps, swap probability), so it can be cached. `tiny_chat` has the same model for
conversations.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split as SplitOn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from areal_like.chat.token_row import TokenRow
from areal_like.sorting import MAX_DIGITS, noisy_demonstration
from trainer.models.warm_start import padded, warm_start

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
WARM_START_BATCH = 128
WARM_START_LR = 2e-3


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of printable ASCII.

    It adds no special tokens, so a prompt is exactly its characters.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNK, *CHARACTERS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = SplitOn(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=512,
    )


def build_tiny_model(
    out_dir: Path,
    *,
    seed: int,
    warm_start_steps: int,
    swap_prob: float,
    hidden_size: int = 96,
    num_layers: int = 3,
) -> None:
    """Writes a warm-started model and its tokenizer into `out_dir` (Hugging Face layout).

    About 10 s on one thread.
    """
    tokenizer = character_tokenizer()
    model = untrained_model(tokenizer, seed=seed, hidden_size=hidden_size, num_layers=num_layers)
    batches = padded(
        _demonstrations(tokenizer, seed=seed, swap_prob=swap_prob),
        num_rows=WARM_START_BATCH,
        length=2 * MAX_DIGITS + 2,
        pad_token_id=tokenizer.pad_token_id,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=WARM_START_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    warm_start(model, batches, [optimizer], num_steps=warm_start_steps)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def untrained_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    hidden_size: int = 96,
    num_layers: int = 3,
    context_tokens: int = 512,
    **settings: Any,
) -> Any:
    """A Llama with random weights. `settings`: further settings of its configuration."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=hidden_size * 8 // 3,
        max_position_embeddings=context_tokens,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **settings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def _demonstrations(tokenizer: PreTrainedTokenizerFast, *, seed: int, swap_prob: float) -> Iterator[TokenRow]:
    """Prompts with noisy answers, without end; answer and end token are learned."""
    vocabulary = tokenizer.get_vocab()
    for index in count():
        demo = noisy_demonstration(seed=seed, index=index, swap_prob=swap_prob)
        tokens = [vocabulary[token] for token in (*demo.prompt, *demo.answer, EOS)]
        num_learned = len(tokens) - len(demo.prompt)
        yield TokenRow(tokens=tokens, loss_mask=[0] * len(demo.prompt) + [1] * num_learned)
