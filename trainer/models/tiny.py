"""The default job's policy: a character-level Llama of 0.3M parameters, warm-started.

RL needs a policy that is right sometimes. The warm start, on mostly wrong demonstrations, teaches the format
and part of the skill, so that some answers are rewarded and there is still something to learn. The model is a
function of (seed, steps, swap probability): the same arguments give the same model, so the result may be
cached.
"""

from __future__ import annotations

import logging
import string
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split as SplitOn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from areal_like.sorting import MAX_DIGITS, noisy_demonstration

log = logging.getLogger(__name__)

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
WARM_START_BATCH = 128
WARM_START_LR = 2e-3
IGNORED = -100
"""Label of a position that cross-entropy leaves out."""


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
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=hidden_size * 8 // 3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    warm_start(model, tokenizer, seed=seed, num_steps=warm_start_steps, swap_prob=swap_prob)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def warm_start(
    model: Any, tokenizer: PreTrainedTokenizerFast, *, seed: int, num_steps: int, swap_prob: float
) -> None:
    """Trains in place: cross-entropy on answer and end token, learning rate falling linearly to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=WARM_START_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    model.train()
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = WARM_START_LR * min(1.0, (step + 1) / 10) * (1 - step / num_steps)
        first = step * WARM_START_BATCH
        tokens_BL, labels_BL = _demonstrations(tokenizer, seed=seed, first=first, swap_prob=swap_prob)
        # Padding is on the right, where a causal model does not attend to it: no attention mask is needed.
        logits_BLV = model(input_ids=tokens_BL[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == num_steps:
            log.info("warm start: step %d of %d, loss %.3f", step + 1, num_steps, loss.item())
    model.eval()


def _demonstrations(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, first: int, swap_prob: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [B, L] int64 of the demonstrations `first`, `first + 1`, ..."""
    length = 2 * MAX_DIGITS + 2
    vocabulary = tokenizer.get_vocab()
    tokens_BL = torch.full((WARM_START_BATCH, length), tokenizer.pad_token_id, dtype=torch.long)
    labels_BL = torch.full_like(tokens_BL, IGNORED)
    for row in range(WARM_START_BATCH):
        demo = noisy_demonstration(seed=seed, index=first + row, swap_prob=swap_prob)
        ids = [vocabulary[token] for token in (*demo.prompt, *demo.answer, EOS)]
        tokens_BL[row, : len(ids)] = torch.tensor(ids)
        labels_BL[row, len(demo.prompt) : len(ids)] = tokens_BL[row, len(demo.prompt) : len(ids)]
    return tokens_BL, labels_BL
