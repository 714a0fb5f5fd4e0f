"""Log-probs of completions under the reference model, computed once and kept on disk.

    <cache>/reference_logps/<key>.safetensors     float64 `logp`; metadata: the SHA-256 of its bytes

The key is a hash of the reference model's files, of the settings of its forward, and of all tokens, so runs
that differ in method or beta share the file, and a changed model, template or row has another one. A file
whose content does not fit its hash is computed again. The reference model is in memory only while log-probs
are computed, never beside the policy that is trained.

Shape suffixes: N items, each with some completions; W completions of all items.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import AutoConfig

from areal_like.automatic_settings import compute_dtype, router_dtype, uses_fp32_head
from areal_like.chat.token_row import TokenRow
from areal_like.config import Config
from areal_like.data.cache import remembered_hash
from areal_like.errors import ConfigError, first_line
from areal_like.paths import cache_dir, model_path, replacing
from areal_like.vocabulary import check_vocabulary
from trainer.batching.segments import values_of_targets
from trainer.distributed.ranks import Ranks, share_of
from trainer.models.policy import Policy, build_policy
from trainer.models.safetensors_rows import SafetensorsRows, find_file
from trainer.offline.rows import training_sample

log = logging.getLogger(__name__)

_LAYOUT = 1
"""Part of the key, so that files of another layout are not found."""
_CHUNK = 256
"""Items that a rank renders and computes at a time."""
_LOG_INTERVAL_S = 10.0
_HEADER_BYTES = 4096
"""Most bytes of a file beside its numbers."""


class Reference:
    """The reference model of a run. Its methods are collective."""

    def __init__(self, config: Config, ranks: Ranks, *, path: str) -> None:
        """`path`: the model of `preferences.reference`; empty: the one before training, with LoRA its base.

        Raises ConfigError if it cannot be read, or has fewer tokens than the model that is trained.
        """
        self._config, self._ranks = config, ranks
        own = model_path(config)
        self._path = path or own
        try:
            found = [*SafetensorsRows.of_model(self._path).files, find_file(self._path, "config.json")]
            self._files = [file for file in found if file is not None]
            if path:
                _check_vocabulary(path, own)
        except (OSError, ValueError) as error:  # ConfigError is a ValueError
            if not path:
                raise
            raise ConfigError(f"preferences.reference={path}: {first_line(error)}") from error
        self._policy: Policy | None = None
        # The other ranks may be on machines without the files of rank 0, and need no key.
        self._identity = self._describe() if ranks.rank == 0 else ""

    def logps(
        self,
        num_N: NDArray[np.int64],
        completions_of: Callable[[int], Sequence[TokenRow | None]],
        *,
        content: str,
        what: str,
    ) -> NDArray[np.float64]:
        """[W] log-probs of the completions of all items, from the cache or computed. Collective.

        `num_N`: number of completions of each item; `completions_of`: returns those of an item, or None,
        whose log-prob is NaN. `content`: hash of all their tokens. `what`: their name in the log.
        """
        ranks, total = self._ranks, int(num_N.sum())
        path, found = Path(), None
        if ranks.rank == 0:
            key = hashlib.sha256(json.dumps([self._identity, content, num_N.tolist()]).encode()).hexdigest()
            path = cache_dir() / "reference_logps" / f"{key[:32]}.safetensors"
            found = stored_logps(path, total)
        if ranks.agree(int(found is not None)):
            if found is not None:
                log.info("log-probs of the reference for %s: read from %s", what, path)
            return ranks.gather(torch.from_numpy(np.zeros(0) if found is None else found)).numpy()
        logp_W = self._computed(num_N, completions_of, what=what)
        if ranks.rank == 0:
            try:
                store_logps(path, logp_W)
            except OSError as error:
                log.warning("%s cannot be written, so the next run computes it again: %s", path, error)
        return logp_W

    def close(self) -> None:
        """Frees the model's memory."""
        self._policy = None
        gc.collect()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _describe(self) -> str:
        """Everything that determines a log-prob beside the tokens."""
        config = self._config
        digests = sorted((file.name, remembered_hash(file)) for file in self._files)
        return json.dumps(
            [
                _LAYOUT,
                digests,
                compute_dtype(config),
                uses_fp32_head(config),
                router_dtype(config),
                self._ranks.device.type,
            ]
        )

    def _computed(
        self,
        num_N: NDArray[np.int64],
        completions_of: Callable[[int], Sequence[TokenRow | None]],
        *,
        what: str,
    ) -> NDArray[np.float64]:
        ranks, config = self._ranks, self._config
        ranks.place.enter("reference log-probs")
        started_s = time.monotonic()
        if self._policy is None:
            # A run that reads the cache instead must draw the same random numbers afterwards.
            with torch.random.fork_rng(devices=[ranks.device] if ranks.device.type == "cuda" else []):
                self._policy = build_policy(config, self._path, ranks, frozen=True)
        policy = self._policy
        shares = [
            share_of(
                len(num_N), rank=rank, world_size=ranks.world_size, context_parallel=ranks.context_parallel
            )
            for rank in range(ranks.world_size)
        ]
        share = shares[ranks.rank]
        mine: list[float] = []
        due_s = started_s + _LOG_INTERVAL_S
        for begin in range(0, len(shares[0]), _CHUNK):  # rank 0 has the most items
            items = share[begin : begin + _CHUNK]
            completions = [each for index in items for each in completions_of(index)]
            values = iter(
                values_of_targets(
                    [training_sample(each).trajectory for each in completions if each is not None],
                    lambda batch: policy.scored(batch).logprobs_S,
                    ranks,
                    budget_tokens=config.trainer.tokens_per_microbatch,
                    shares_prefixes=policy.shares_prefixes,
                )
            )
            mine += [math.nan if each is None else float(next(values).sum()) for each in completions]
            if ranks.rank == 0 and time.monotonic() > due_s:
                log.info("log-probs of the reference for %s: %d of %d", what, begin, len(shares[0]))
                due_s += _LOG_INTERVAL_S
        everyone = ranks.gather(torch.tensor(mine, dtype=torch.float64)).numpy()
        order = [index for each in shares for index in each]
        by_item = np.split(everyone, np.cumsum(num_N[order])[:-1])
        in_order = sorted(zip(order, by_item, strict=True), key=lambda each: each[0])
        logp_W = np.concatenate([part for _, part in in_order])
        if ranks.rank == 0:
            seconds = time.monotonic() - started_s
            log.info("log-probs of the reference for %s: %d in %.1f s", what, len(logp_W), seconds)
        return logp_W


def _check_vocabulary(path: str, own: str) -> None:
    """Raises ConfigError if the model of `path` has fewer tokens than that of `own`, or other ones. A
    directory without a tokenizer has only their number."""
    of_own, of_reference = (
        int(AutoConfig.from_pretrained(each, trust_remote_code=False).get_text_config().vocab_size)
        for each in (own, path)
    )
    if of_reference < of_own:
        raise ConfigError(
            f"its vocabulary has {of_reference} tokens and that of {own} {of_own}: the reference must have "
            "the same tokenizer"
        )
    if find_file(path, "tokenizer_config.json") is not None:
        check_vocabulary(path, own)


def stored_logps(path: Path, num: int) -> NDArray[np.float64] | None:
    """The log-probs in a file; None if there is no file, or not one of that many with their hash."""
    try:
        if path.stat().st_size > 8 * num + _HEADER_BYTES:
            raise ValueError("it is longer than its numbers")
        with safe_open(path, framework="numpy") as file:
            logp_W, digest = file.get_tensor("logp"), (file.metadata() or {}).get("sha256")
        if logp_W.shape != (num,) or logp_W.dtype != np.float64 or _sha256(logp_W) != digest:
            raise ValueError("its content does not have its hash")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, SafetensorError) as error:
        log.warning("%s is computed again: %s", path, error)
        return None
    return np.asarray(logp_W, dtype=np.float64)


def store_logps(path: Path, logp_W: NDArray[np.float64]) -> None:
    """Writes the file; readers see all of it or none. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file({"logp": np.ascontiguousarray(logp_W)}, partial, metadata={"sha256": _sha256(logp_W)})


def _sha256(values: NDArray[np.float64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
