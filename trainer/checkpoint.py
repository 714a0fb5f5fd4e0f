"""The checkpoints of a run: directories that transformers can load, and from which a run resumes.

    step_000100/  model.safetensors config.json tokenizer*        the policy, for `from_pretrained`
                  optimizer.safetensors                           Adam's moments; the random state
                  critic.safetensors critic_optimizer.safetensors the same for the critic, if there is one
                  trainer_state.json                              step, number of updates, `extra`

A directory gets its final name only after it was written and synced, so every checkpoint that exists is
complete. There is no pickle in it: torch.distributed.checkpoint was left out because its metadata is a
pickle.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from areal_like.errors import ConfigError, DiskFullError
from areal_like.paths import checkpoint_name, find_checkpoints
from areal_like.weights.snapshots_on_disk import STATE_FILE
from trainer.advantages.critic import Critic
from trainer.checkpoint_files import copy_state, read_state, write_directory
from trainer.distributed.ranks import Ranks
from trainer.models.policy import Policy
from trainer.optimizer import ShardedAdamW

log = logging.getLogger(__name__)

FORMAT = 1
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
CRITIC_FILE, CRITIC_OPTIMIZER_FILE = "critic.safetensors", "critic_optimizer.safetensors"
RANDOM_STATE = "random_state.cpu"


class Checkpoints:
    """Saves and loads the checkpoints of one run.

    `latest`, `save` and `load` are collective, the rest is not.

        IDLE -> save(): state copied to the CPU -> WRITING, in a thread while training continues
             -> renamed, old ones pruned, `on_saved` called -> IDLE
             -> failed: the partial directory is removed at once -> IDLE

    At most one checkpoint is being written: the next `save` waits for it. An error in the thread is raised by
    the next `save` or `wait`. A full disk does not end the training: that checkpoint is skipped, the one
    before it stays, and the next `save` is another attempt; only `wait` raises it.
    """

    def __init__(self, root: Path, *, keep: int, tokenizer_path: str) -> None:
        """`keep`: number of checkpoints that stay on disk, the newest ones.

        `tokenizer_path`: the tokenizer that is copied into every checkpoint.
        """
        self._root = root
        self._keep = keep
        self._tokenizer_path = tokenizer_path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[DiskFullError | None] | None = None

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return list(find_checkpoints(self._root))

    def latest(self, ranks: Ranks) -> int | None:
        """The newest step, as rank 0 sees it: over a network file system another rank may see fewer.

        Collective.
        """
        step = ranks.agree(max(self.steps(), default=-1))
        return step if step >= 0 else None

    def path(self, step: int) -> Path:
        """Directory of one step."""
        return self._root / checkpoint_name(step)

    def save(
        self,
        step: int,
        policy: Policy,
        optimizer: ShardedAdamW,
        ranks: Ranks,
        *,
        critic: Critic | None = None,
        extra: dict[str, Any],
        on_saved: Callable[[int], None] = lambda oldest_kept_step: None,
    ) -> Path:
        """Copies the state after `step` optimizer steps; a thread of rank 0 writes it beside the training.

        `extra`: JSON that `load` returns (rank 0's). `on_saved(oldest_kept_step)`: called in rank 0's thread
        when the checkpoint is complete on disk and old ones are pruned; not called for a checkpoint that was
        skipped.
        """
        self._finish_in_flight()  # before copying: the checkpoint in flight holds the same amount of memory
        model, moments = copy_state(policy, optimizer)
        # Nothing in a step draws random numbers today; a user's objective may.
        moments[RANDOM_STATE] = torch.get_rng_state()
        files = {MODEL_FILE: model, OPTIMIZER_FILE: moments}
        state = {"format": FORMAT, "step": step, "num_updates": optimizer.num_updates, "extra": extra}
        if critic is not None:
            files[CRITIC_FILE], files[CRITIC_OPTIMIZER_FILE] = copy_state(critic.model, critic.optimizer)
            state["num_critic_updates"] = critic.optimizer.num_updates
        # Serialized now: `extra` may change while the thread writes.
        state_json = json.dumps(state, indent=2) + "\n"
        final = self.path(step)

        def fill(partial: Path) -> None:
            partial.mkdir(parents=True)
            for name, tensors in files.items():
                save_file(tensors, partial / name, {"format": "pt"})
            (partial / STATE_FILE).write_text(state_json)
            policy.model.config.save_pretrained(partial)
            if policy.model.generation_config is not None:
                policy.model.generation_config.save_pretrained(partial)
            AutoTokenizer.from_pretrained(self._tokenizer_path).save_pretrained(partial)

        def write() -> DiskFullError | None:
            if (full := write_directory(final, fill)) is not None:
                return full
            self.set_aside_after(step)
            for old in self.steps()[: -self._keep]:
                shutil.rmtree(self.path(old))
            on_saved(self.steps()[0])
            return None

        if ranks.rank == 0:
            self._in_flight = self._thread.submit(write)
        return final

    def wait(self) -> None:
        """Waits for the checkpoint in flight, if any; raises what its thread or `on_saved` raised.

        DiskFullError: the checkpoint was skipped.
        """
        if (full := self._finish_in_flight()) is not None:
            raise full

    def close(self) -> None:
        """Waits for the checkpoint in flight and ends the thread.

        Call `wait` first if that checkpoint is needed.
        """
        try:
            self._finish_in_flight()
        finally:
            self._thread.shutdown()

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

        Collective.

        If the checkpoint has no critic, `critic` gets its initial weights, with a warning. Raises ConfigError
        if there is no such checkpoint, it cannot be read, or it is of another model.
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
            self._read(path, state, policy, optimizer, ranks, critic)
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): resume from another step") from error
        ranks.any(True)  # waits until every rank has found and read it
        extra: dict[str, Any] = state["extra"]
        return extra

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints after `step` to `step_000300.rolled_back`: the run continues from `step`.

        Under their own names they could cause a new checkpoint to be pruned, or be taken for the latest.
        On rank 0, once it is certain that training continues from `step`.
        """
        for later in self.steps():
            if later > step:
                aside = self._root / f"{self.path(later).name}.rolled_back"
                shutil.rmtree(aside, ignore_errors=True)
                self.path(later).rename(aside)

    def _read(
        self,
        path: Path,
        state: dict[str, Any],
        policy: Policy,
        optimizer: ShardedAdamW,
        ranks: Ranks,
        critic: Critic | None,
    ) -> None:
        moments = path / OPTIMIZER_FILE
        num_updates = int(state["num_updates"])
        read_state(path / MODEL_FILE, moments, policy, optimizer, ranks, num_updates=num_updates)
        if critic is not None and "num_critic_updates" in state:
            read_state(
                path / CRITIC_FILE,
                path / CRITIC_OPTIMIZER_FILE,
                critic.model,
                critic.optimizer,
                ranks,
                num_updates=int(state["num_critic_updates"]),
            )
        elif critic is not None:
            critic.model.read_initial_weights()
            log.warning("%s was saved without a critic: the critic starts from its initial weights", path)
        with safe_open(moments, framework="pt") as file:
            torch.set_rng_state(file.get_tensor(RANDOM_STATE))

    def _finish_in_flight(self) -> DiskFullError | None:
        """Waits for the checkpoint in flight; returns why it was skipped, if it was.

        The error is returned, not raised: it is in the log already, and raising it in `close` would hide the
        error that ends the trainer.
        """
        in_flight, self._in_flight = self._in_flight, None
        return None if in_flight is None else in_flight.result()
