"""The reward model: token ids to scores.

A decoder's score is a linear function of the hidden state of the text's last token. transformers reads it at
the last token that is not the padding token; `scored_tokens` leaves such tokens out at the end, so both are
the same. Other classifiers (encoders) run as transformers runs them.

Legend of shape suffixes: B texts, T tokens of the longest, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from areal_like.errors import ConfigError, first_line
from rollout_server.scoring.directory import ModelDirectory

Prompt = str | Sequence[Mapping[str, Any]]
_UNBOUNDED = 1 << 20
"""Longest text of a model whose configuration has no limit, in tokens."""


class RewardModel:
    """A sequence classifier with one label, and its tokenizer. Use it from one thread at a time."""

    def __init__(
        self,
        directory: ModelDirectory,
        *,
        device: str,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        num_threads: int = 1,
    ) -> None:
        """Raises ConfigError if the files cannot be loaded, or lack a weight."""
        torch.set_num_threads(num_threads)
        self._device = _device(device)
        on_cpu = self._device.type == "cpu"
        is_float32 = dtype == "float32" or (dtype == "auto" and on_cpu)
        path = directory.path
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                path, trust_remote_code=False, local_files_only=True
            )
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
            loaded, report = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=torch.float32 if is_float32 else torch.bfloat16,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # for a broken file, tokenizers raises plain exceptions
            raise ConfigError(
                f"scorer.path={path} cannot be loaded as a sequence classifier: {first_line(error)}"
            ) from error
        absent = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
        if absent:
            raise ConfigError(
                f"scorer.path={path} lacks weights of a {type(loaded).__name__} ({', '.join(absent[:3])}): "
                "it was not trained as a reward model"
            )
        text = config.get_text_config()
        self.max_length = int(getattr(text, "max_position_embeddings", 0) or 0) or _UNBOUNDED
        """Longest text that the model supports, in tokens."""
        self.vocab_size = int(text.vocab_size)
        """Every token id is below it."""
        self.model_type = str(config.model_type)
        pad = getattr(text, "pad_token_id", None)
        self.pad_token_id = pad if isinstance(pad, int) else None
        self._module: Any = loaded.to(self._device).eval()
        head = getattr(self._module, "score", None)
        self.survives_errors = on_cpu
        """False on a GPU, whose context is lost after most errors."""
        self._head: nn.Linear | None = head if isinstance(head, nn.Linear) else None
        if self._head is not None and self._head.out_features != 1:
            raise ConfigError(
                f"scorer.path={path}: its head has {self._head.out_features} outputs: a reward model has one"
            )

    @torch.inference_mode()
    def scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Returns the score of each text, given its token ids (at least one, each below `vocab_size`).

        Scores that overflow are infinite or NaN; the caller decides. Raises torch.OutOfMemoryError.
        """
        lengths = [len(text) for text in texts]
        ids_BT = torch.zeros((len(texts), max(lengths)), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        for row, text in enumerate(texts):
            ids_BT[row, : len(text)] = torch.tensor(text, dtype=torch.long)
            mask_BT[row, : len(text)] = 1
        ids_BT, mask_BT = ids_BT.to(self._device), mask_BT.to(self._device)
        if self._head is None:
            logits_B = self._module(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0]
        else:
            hidden_BTH = self._module.base_model(
                input_ids=ids_BT, attention_mask=mask_BT, use_cache=False
            ).last_hidden_state
            last_B = torch.tensor(lengths, device=self._device) - 1
            last_BH = hidden_BTH[torch.arange(len(texts), device=self._device), last_B]
            # In float32: bfloat16 would round a score of 5 to a multiple of 1/32.
            bias = None if self._head.bias is None else self._head.bias.float()
            logits_B = F.linear(last_BH.float(), self._head.weight.float(), bias)[:, 0]
        scores: list[float] = logits_B.float().tolist()
        return scores

    def forget(self) -> None:
        """Returns cached memory of the device, after it ran out."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"scorer.device={name}: this machine has {torch.cuda.device_count()} GPUs for torch"
        )
    return device
