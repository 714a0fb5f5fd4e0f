"""Checkpoints: a directory that transformers loads, with what it takes to go on training beside it. No pickle.

    step_000100/  model.safetensors config.json tokenizer*      the policy: `AutoModelForCausalLM.from_pretrained(...)`
                  optimizer.safetensors                         Adam's moments, whole tensors; random state
                  critic.safetensors critic_optimizer.safetensors    the same of the critic, where there is one
                  trainer_state.json                            step, update count, the daemon's own JSON

Whole tensors, gathered to rank 0: any number of ranks may resume, each reading its own rows. A checkpoint appears by the rename of
a finished, synced directory, so one that exists is complete. The masters are saved in float32, whatever dtype the engines run.
torch.distributed.checkpoint was left out because its metadata is a pickle.

    idle -> save(): state copied to the CPU -> writing (a thread; training goes on) -> renamed, old ones pruned, `then` called -> idle
                                                  +-> failed: what was written is removed at once -> idle

One is in flight at most: the next `save` waits for it. What went wrong with one is raised by the next `save` or `wait`. Only a full disk
does not end the training: that checkpoint is skipped, the one before stays, and the next `save` is another try; `wait` raises it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from areal_like.errors import ConfigError, DiskFullError
from areal_like.weights.snapshots_on_disk import STATE_FILE
from trainer.advantages.critic import Critic
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import PackedModel
from trainer.models.policy import Policy
from trainer.models.sharded_weights import MODEL_PREFIX, gather, row_range, shards_of
from trainer.optimizer import MOMENTS, ShardedAdamW

log = logging.getLogger(__name__)

FORMAT = 1
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
CRITIC_FILE, CRITIC_OPTIMIZER_FILE = "critic.safetensors", "critic_optimizer.safetensors"
RANDOM_STATE = "random_state.cpu"
_NAME = re.compile(r"step_(\d{6,})")
_NO_SPACE = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT)))
"""In the system's words: safetensors raises an error of its own, without the number."""


class Checkpoints:
    """The checkpoints of one run. `latest`, `save` and `load` are collective, the rest is not."""

    def __init__(self, root: Path, *, keep: int, tokenizer_path: str) -> None:
        """`keep`: how many of the newest stay on disk. `tokenizer_path`: where the tokenizer to copy is."""
        self._root = root
        self._keep = keep
        self._tokenizer_path = tokenizer_path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[DiskFullError | None] | None = None

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        if not self._root.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self._root.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def latest(self, ranks: Ranks) -> int | None:
        """The newest step, as rank 0 sees it: a directory over the network may look older from elsewhere. Collective."""
        step = ranks.agree(max(self.steps(), default=-1))
        return step if step >= 0 else None

    def path(self, step: int) -> Path:
        """Directory of one step."""
        return self._root / f"step_{step:06d}"

    def save(
        self,
        step: int,
        policy: Policy,
        optimizer: ShardedAdamW,
        ranks: Ranks,
        *,
        critic: Critic | None = None,
        extra: dict[str, Any],
        then: Callable[[int], None] = lambda oldest_kept_step: None,
    ) -> Path:
        """Copies the state after `step` optimizer steps, which may change afterwards; rank 0 writes it behind the caller's back.

        `extra`: JSON that `load` gives back (rank 0's counts). `then(oldest_kept_step)`: called by rank 0's writer when the checkpoint is
        complete on disk and old ones are pruned; never for one that was skipped.
        """
        self._settle()  # before the copies: the one in flight holds as much
        model, moments = _whole(policy, optimizer)
        # Nothing in a step draws random numbers today; an objective of one's own may.
        moments[RANDOM_STATE] = torch.get_rng_state()
        files = {MODEL_FILE: model, OPTIMIZER_FILE: moments}
        state = {"format": FORMAT, "step": step, "num_updates": optimizer.num_updates, "extra": extra}
        if critic is not None:
            files[CRITIC_FILE], files[CRITIC_OPTIMIZER_FILE] = _whole(critic.model, critic.optimizer)
            state["num_critic_updates"] = critic.optimizer.num_updates
        written = json.dumps(state, indent=2) + "\n"
        final = self.path(step)

        def fill(partial: Path) -> None:
            partial.mkdir(parents=True)
            for name, tensors in files.items():
                save_file(tensors, partial / name, {"format": "pt"})
            (partial / STATE_FILE).write_text(written)
            policy.model.config.save_pretrained(partial)
            if policy.model.generation_config is not None:
                policy.model.generation_config.save_pretrained(partial)
            AutoTokenizer.from_pretrained(self._tokenizer_path).save_pretrained(partial)

        def write() -> DiskFullError | None:
            if (full := _write(final, fill)) is not None:
                return full
            self.set_aside_after(step)
            for old in self.steps()[: -self._keep]:
                shutil.rmtree(self.path(old))
            then(self.steps()[0])
            return None

        if ranks.rank == 0:
            self._in_flight = self._thread.submit(write)
        return final

    def wait(self) -> None:
        """Waits for the checkpoint in flight, if there is one; raises what its writer or its `then` raised.

        DiskFullError: it was skipped.
        """
        if (full := self._settle()) is not None:
            raise full

    def close(self) -> None:
        """Waits for the checkpoint in flight and ends the thread. Whoever needs that checkpoint calls `wait` before."""
        try:
            self._settle()
        finally:
            self._thread.shutdown()

    def _settle(self) -> DiskFullError | None:
        """`wait`, but returns why a checkpoint was skipped: the log has it, and it must not hide what else ends the trainer."""
        in_flight, self._in_flight = self._in_flight, None
        return None if in_flight is None else in_flight.result()

    def load(
        self,
        step: int,
        policy: Policy,
        optimizer: ShardedAdamW,
        ranks: Ranks,
        *,
        critic: Critic | None = None,
    ) -> dict[str, Any]:
        """Restores weights, moments and random state in place, at any number of ranks; returns `extra`.

        A critic that the checkpoint does not have stays as it is, with a warning.

        Raises ConfigError if there is no such checkpoint, it cannot be read, or it is of another model.
        """
        path = self.path(step)
        if step not in self.steps():
            found = ", ".join(map(str, self.steps())) or "none"
            raise ConfigError(
                f"no checkpoint of step {step} in {self._root} (there: {found}): set resume to one of them"
            )
        try:
            state = json.loads((path / STATE_FILE).read_text())
            if state["format"] != FORMAT:
                raise ConfigError(
                    f"{path}: written by another version (format {state['format']}, this is {FORMAT})"
                )
            _read(
                path / MODEL_FILE,
                path / OPTIMIZER_FILE,
                policy,
                optimizer,
                ranks,
                num_updates=int(state["num_updates"]),
            )
            if critic is not None and "num_critic_updates" in state:
                num_updates = int(state["num_critic_updates"])
                _read(
                    path / CRITIC_FILE,
                    path / CRITIC_OPTIMIZER_FILE,
                    critic.model,
                    critic.optimizer,
                    ranks,
                    num_updates=num_updates,
                )
            elif critic is not None:
                log.warning("%s was made without a critic: it begins anew", path)
            with safe_open(path / OPTIMIZER_FILE, framework="pt") as file:
                torch.set_rng_state(file.get_tensor(RANDOM_STATE))
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): resume from another step") from error
        ranks.any(True)  # every rank has found and read it
        extra: dict[str, Any] = state["extra"]
        return extra

    def set_aside_after(self, step: int) -> None:
        """Renames later checkpoints (`step_000300.rolled_back`): of a branch that was left, they may neither push a new one out nor be
        taken for the latest. On rank 0, once it is certain that training goes on from here."""
        for later in self.steps():
            if later > step:
                aside = self._root / f"{self.path(later).name}.rolled_back"
                shutil.rmtree(aside, ignore_errors=True)
                self.path(later).rename(aside)


def _copy(whole: Tensor) -> Tensor:
    return whole.detach().clone(memory_format=torch.contiguous_format)


def _whole(model: PackedModel, optimizer: ShardedAdamW) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, moments) as copies, by the names in their files, on rank 0. Collective."""
    weights = {name: _copy(whole) for name, whole in gather(shards_of(model))}
    moments: dict[str, Tensor] = {}
    for key in MOMENTS:
        values = {name: optimizer.moments(name)[key] for name in optimizer.shards}
        moments.update((f"{key}.{name}", _copy(whole)) for name, whole in gather(shards_of(model, values)))
    return weights, moments


def _read(
    weights_path: Path,
    moments_path: Path,
    model: PackedModel,
    optimizer: ShardedAdamW,
    ranks: Ranks,
    *,
    num_updates: int,
) -> None:
    """This rank's rows of weights and moments, as `_whole` gave them."""
    _read_rows(weights_path, model, optimizer.shards, ranks, prefix="")
    moments = {
        name: {key: torch.empty_like(shard) for key in MOMENTS} for name, shard in optimizer.shards.items()
    }
    for key in MOMENTS:
        _read_rows(
            moments_path,
            model,
            {name: tensors[key] for name, tensors in moments.items()},
            ranks,
            prefix=f"{key}.",
        )
    optimizer.restore(moments, num_updates=num_updates)


def _read_rows(
    file_path: Path, model: PackedModel, into: Mapping[str, Tensor], ranks: Ranks, *, prefix: str
) -> None:
    """Copies this rank's rows of every parameter-like tensor of a file into `into` (by the model's names)."""
    with safe_open(file_path, framework="pt") as file, torch.no_grad():
        for name, param in model.named_parameters():
            rows = file.get_slice(prefix + name.removeprefix(MODEL_PREFIX))
            if tuple(rows.get_shape()) != tuple(param.shape):
                raise ConfigError(
                    f"{file_path}: {name} is {tuple(rows.get_shape())} there and {tuple(param.shape)} in this model; "
                    "resume with the model that the run began with"
                )
            first, end = row_range(param.shape, rank=ranks.rank, world_size=ranks.world_size)
            if end > first:
                into[name].copy_(rows[first:end])


def remove_partials(root: Path) -> None:
    """Removes what a killed trainer had half written. On rank 0, while no other trainer of the run is alive."""
    for left in root.glob(".step_*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _write(final: Path, fill: Callable[[Path], None]) -> DiskFullError | None:
    """Makes `final` appear with what `fill` writes, whole or not at all; returns why not when there was no space.

    Returned and not raised: a trace-back would keep the copies that were being written.
    """
    remove_partials(final.parent)
    partial = final.with_name(f".{final.name}.partial")
    try:
        fill(partial)
        _commit(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)  # at once: the ledger may wait for this space
        if not any(words in str(error) for words in _NO_SPACE):
            raise
        full = DiskFullError(
            f"{final} was not written ({error}): free space there, or lower trainer.keep_checkpoints"
        )
        log.error("%s; the checkpoint before it stays the newest, and the next is the next try", full)
        return full
    return None


def _commit(partial: Path, final: Path) -> None:
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if final.exists():  # the same step again, after a resume from an earlier one
        shutil.rmtree(final)
    partial.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
