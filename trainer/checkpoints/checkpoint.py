"""The checkpoints of a run: directories that transformers can load, and from which a run resumes.

    step_000100/  model*.safetensors config.json tokenizer*    the policy, for `from_pretrained` and engines
                  or adapter_model.safetensors adapter_config.json tokenizer*    its adapter, for PEFT
                  rows/                                        masters, moments, random state (`writing`)
                  trainer_state.json                           format, step, `extra`

Each rank of replica 0 writes its rows, and every rank reads its own, so no rank ever holds the whole state.
The weights' files have the dtype of `model.dtype`. If that is the masters' dtype, they hold the masters,
which are not written twice.

With an adapter neither weights nor config.json of the base are written, only its digest.

A directory gets its final name only after every rank has written and synced its part, so every checkpoint
that exists is complete. There is no pickle in it: torch.distributed.checkpoint was left out because its
metadata is a pickle.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch

from areal_like.automatic_settings import compute_dtype
from areal_like.config import Config, TrainerConfig
from areal_like.errors import ConfigError, DiskFullError, WeightSyncError
from areal_like.paths import RunPaths, checkpoint_name, find_checkpoints, model_path, read_json
from areal_like.weights.hf_layout import hf_tensors
from areal_like.weights.safetensors_header import tensors_in
from areal_like.weights.snapshots_on_disk import ADAPTER_STATE, FORMAT, OLD_FORMAT, STATE_FILE
from trainer.advantages.critic import Critic
from trainer.advantages.implicit_rewards import ImplicitRewards
from trainer.checkpoints.directory import (
    Peers,
    check_shared,
    remove,
    remove_rolled_back,
    set_aside,
    wait_until_visible,
    write_directory,
)
from trainer.checkpoints.reading import CRITIC, POLICY, PRM, PROXIMAL, StateReader
from trainer.checkpoints.writing import (
    FOLDER,
    MAX_FILE_BYTES,
    ModelFiles,
    ModelRows,
    ModelState,
    write_index,
    write_model_files,
    write_tokenizer,
)
from trainer.distributed.ranks import Ranks
from trainer.models.packed_model import DTYPES, PackedModel
from trainer.models.peft_folder import CONFIG_FILE, check_same_adapter, write_config
from trainer.optimizer import ShardedAdamW
from trainer.step.proximal import ProximalPolicy

log = logging.getLogger(__name__)


class Checkpoints:
    """Saves and loads the checkpoints of one run.

    `open`, `latest`, `save`, `wait` and `load` are called on all ranks at the same time.

        IDLE -> save(): this rank's rows copied to the CPU -> WRITING, in a thread while training continues:
                rank 0 makes the directory -> every rank writes and syncs its rows
             -> renamed, old ones pruned, `on_saved` called -> IDLE
             -> failed on any rank: the partial directory is removed at once -> IDLE

    At most one checkpoint is being written: the next `save` waits for it, and uses its memory again. An error
    in the thread of any rank is raised on all by the next `save` or `wait`. A full disk does not end the
    training: that checkpoint is skipped, the previous one stays, and the next `save` is another attempt;
    only `wait` raises it.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep: int,
        tokenizer_path: str,
        keep_rolled_back: int = 1,
        dtype: str = "float32",
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        """`keep`: number of checkpoints that stay on disk, the newest ones; `keep_rolled_back`: number of
        checkpoints that were set aside and stay.

        `tokenizer_path`: the tokenizer that is copied into every checkpoint. `dtype`: dtype of the weights'
        files; `max_file_bytes`: largest size of one of them.
        """
        self._root = root
        self._keep = keep
        self._keep_rolled_back = keep_rolled_back
        self._tokenizer_path = tokenizer_path
        self._dtype = DTYPES[dtype]
        self._max_file_bytes = max_file_bytes
        self._files: dict[str, ModelFiles] = {}
        self._peers: Peers | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[DiskFullError | None] | None = None
        self.saved_step = 0
        """Step of the state that was last saved or loaded; 0: none."""
        self._saved_s = time.monotonic()

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(
            RunPaths.of(config).checkpoints,
            keep=config.trainer.keep_checkpoints,
            keep_rolled_back=config.trainer.keep_rolled_back,
            tokenizer_path=model_path(config),
            dtype=compute_dtype(config),
        )

    def open(self, ranks: Ranks) -> None:
        """Raises ConfigError on every rank if the ranks do not see the same directory.

        The first `save` calls it.
        """
        if self._peers is None:
            check_shared(self._root, ranks)
            self._peers = Peers(ranks)

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return list(find_checkpoints(self._root))

    def latest(self, ranks: Ranks) -> int | None:
        """The newest step, as rank 0 sees it: over a network file system another rank may see fewer.

        Collective.
        """
        step = ranks.agree(max(self.steps(), default=-1))
        return step if step >= 0 else None

    def resume_step(self, resume: str, ranks: Ranks) -> int | None:
        """The step that the setting `resume` names; None for a new run. Collective.

        Raises ConfigError if `latest` names none.
        """
        if not resume:
            return None
        step = self.latest(ranks) if resume in ("latest", "auto") else int(resume.removeprefix("step:"))
        if step is None and resume == "latest":
            raise ConfigError(f"resume=latest: there is no checkpoint in {self._root}")
        if step is None:
            log.info("resume=auto: no checkpoint in %s, step 0", self._root)
        return step

    def is_due(self, step: int, settings: TrainerConfig, ranks: Ranks) -> bool:
        """True every `checkpoint_interval` steps, and `checkpoint_minutes` after the last checkpoint.

        Rank 0's clock decides. Collective.
        """
        if step % settings.checkpoint_interval == 0:
            return True
        minutes = settings.checkpoint_minutes
        return minutes > 0 and bool(ranks.agree(int(time.monotonic() - self._saved_s >= 60 * minutes)))

    def path(self, step: int) -> Path:
        return self._root / checkpoint_name(step)

    def save(
        self,
        step: int,
        policy: PackedModel,
        optimizer: ShardedAdamW,
        ranks: Ranks,
        *,
        critic: Critic | None = None,
        prm: ImplicitRewards | None = None,
        proximal: ProximalPolicy | None = None,
        extra: dict[str, Any],
        on_saved: Callable[[int], None] = lambda oldest_kept_step: None,
    ) -> Path:
        """Copies the state after `step` optimizer steps; a thread writes it while training continues.

        `extra`: JSON that `load` returns (rank 0's). `on_saved(oldest_kept_step)`: called in rank 0's thread
        when the checkpoint is complete on disk and old ones are pruned; not called for a checkpoint that was
        skipped.
        """
        self._finish_in_flight()  # before copying: its copies are still being written
        self.open(ranks)
        self.saved_step, self._saved_s = step, time.monotonic()
        assert self._peers is not None
        models = _models(policy, optimizer, critic, prm, proximal) if ranks.replica == 0 else {}
        files = {name: self._files_of(name, model, adam, ranks) for name, (model, adam) in models.items()}
        for each in files.values():
            each.take()
        # A step itself draws no random numbers, but a user's objective may.
        random_state = torch.get_rng_state()
        # Serialized now: `extra` may change while the thread writes.
        state = {"format": FORMAT, "step": step, "extra": extra}
        header = policy.adapter_header if policy.has_adapter else None
        if header is not None:
            state[ADAPTER_STATE] = header.to_dict()
        state_json = json.dumps(state, indent=2) + "\n"
        final, peers = self.path(step), self._peers

        def create(partial: Path) -> None:
            (partial / FOLDER).mkdir()
            for each in files.values():
                each.create(partial)

        def fill(partial: Path) -> None:
            if not wait_until_visible(partial):
                raise ConfigError(
                    f"rank {ranks.rank} does not see {partial}, which rank 0 has made: runs_dir has to be on "
                    "a file system that all hosts of the trainer share"
                )
            for each in files.values():
                each.write(partial)
            if ranks.rank > 0:
                return
            rows = {name: each.rows for name, each in files.items()}
            write_index(
                partial / FOLDER, rows, step=step, world_size=ranks.world_size, random_state=random_state
            )
            (partial / STATE_FILE).write_text(state_json)
            if header is not None:
                write_config(partial, header, base=policy.base_path)
            else:
                write_model_files(policy.model, partial, base=policy.base_path, dtype=self._dtype)
            write_tokenizer(partial, self._tokenizer_path)

        def write() -> DiskFullError | None:
            if (full := write_directory(final, peers, create=create, fill=fill)) is not None:
                return full
            if ranks.rank == 0:
                self.set_aside_after(step)
                for old in self.steps()[: -self._keep]:
                    remove(self.path(old))
                on_saved(self.steps()[0])
            return None

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

        Call `wait` first if that checkpoint is needed. Other ranks, which may be gone after an error, are
        waited for no longer than a minute.
        """
        try:
            if self._peers is not None:
                self._peers.hurry()
            self._finish_in_flight()
        finally:
            self._thread.shutdown()

    def load(
        self,
        step: int,
        policy: PackedModel,
        optimizer: ShardedAdamW,
        ranks: Ranks,
        *,
        critic: Critic | None = None,
        prm: ImplicitRewards | None = None,
        proximal: ProximalPolicy | None = None,
    ) -> dict[str, Any]:
        """Restores weights, moments and random state in place, at any number of ranks; returns `extra`.

        Collective.

        If the checkpoint has no critic or reward model, `critic` or `prm` gets its initial weights, and if
        it has no proximal policy, `proximal` gets the policy's, with a warning. Raises ConfigError if there
        is no such checkpoint, it cannot be read, or it is of another model, or if the replicas differ.
        """
        path = self.path(step)
        if step not in self.steps():
            found = ", ".join(map(str, self.steps())) or "none"
            raise ConfigError(
                f"no checkpoint of step {step} in {self._root} (there: {found}): set resume to one of them"
            )
        try:
            state = _read_json(path / STATE_FILE)
            check_same_adapter(path, state, policy.adapter_header if policy.has_adapter else None)
            main_file = CONFIG_FILE if policy.has_adapter else "config.json"
            for file in sorted({path / main_file, *path.glob("*.json")}):
                _read_json(file)  # engines and users load them; the trainer does not
            if state["format"] not in (OLD_FORMAT, FORMAT):
                raise ConfigError(
                    f"{path}: written by another version (format {state['format']}, this is {FORMAT})"
                )
            extra: dict[str, Any] = state["extra"]
            reader, models = StateReader(path, ranks), _models(policy, optimizer, critic, prm, proximal)
            self._read(reader, state, path, models)
            if state["format"] == FORMAT and not policy.has_adapter:
                _check_untouched(path, policy)
        except (OSError, KeyError, TypeError, WeightSyncError) as error:
            raise ConfigError(f"{path} cannot be read ({error!r}): resume from another step") from error
        ranks.any(True)  # waits until every rank has found and read it
        for model, state_of_model in models.values():
            model.check_replicas(state_of_model.shards.values())
        self.saved_step, self._saved_s = step, time.monotonic()
        return extra

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints after `step` to `step_000300.rolled_back`: the run continues from `step`.

        Under their own names they could cause a new checkpoint to be pruned, or be mistaken for the latest.
        Of these directories, only the newest `keep_rolled_back` stay, including those of earlier rollbacks:
        each is as large as a checkpoint. Called on rank 0, once it is certain that training continues from
        `step`.
        """
        for later in self.steps():
            if later > step:
                set_aside(self.path(later))
        remove_rolled_back(self._root, keep=self._keep_rolled_back)

    def _files_of(self, name: str, model: PackedModel, optimizer: ModelState, ranks: Ranks) -> ModelFiles:
        if name not in self._files or not self._files[name].is_of(optimizer):
            self._files[name] = ModelFiles(
                name,
                model,
                optimizer,
                ranks,
                dtype=self._dtype if name == POLICY else None,
                max_file_bytes=self._max_file_bytes,
            )
        return self._files[name]

    def _read(
        self,
        reader: StateReader,
        state: dict[str, Any],
        path: Path,
        models: dict[str, tuple[PackedModel, ModelState]],
    ) -> None:
        is_old = state["format"] == OLD_FORMAT
        counts = {POLICY: "num_updates", CRITIC: "num_critic_updates"}
        stored: dict[str, ModelRows] = {} if is_old else reader.models()
        for name, (model, optimizer) in models.items():
            if name == CRITIC and (counts[name] not in state if is_old else name not in stored):
                model.read_initial_weights()
                log.warning("%s was saved without a critic: the critic starts from its initial weights", path)
            elif name == PRM and (is_old or name not in stored):
                model.read_initial_weights()
                log.warning("%s was saved without a reward model: it starts from its initial weights", path)
            elif isinstance(optimizer, ProximalPolicy) and (is_old or name not in stored):
                optimizer.restart()  # the policy has been read before it
                log.warning("%s was saved without a proximal policy: it starts from the policy", path)
            elif is_old:
                reader.read_old(name, model, optimizer, num_updates=int(state[counts[name]]))
            else:
                reader.read(stored[name], model, optimizer)
        torch.set_rng_state(reader.random_state(is_old=is_old))

    def _finish_in_flight(self) -> DiskFullError | None:
        """Waits for the checkpoint in flight; returns why it was skipped, if it was.

        The error is returned, not raised: it is in the log already, and raising it in `close` would hide the
        error that ends the trainer.
        """
        in_flight, self._in_flight = self._in_flight, None
        return None if in_flight is None else in_flight.result()


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): resume from another step") from error


def _check_untouched(path: Path, policy: PackedModel) -> None:
    """Raises ConfigError if the next checkpoint would lack tensors of this one: they are copied from the
    initial model, and no longer there. Raises WeightSyncError for a damaged file."""
    kept = {tensor.name for tensor in hf_tensors(policy.model)} | {one.name for one in policy.untouched()}
    try:
        names = {tensor.name for file in path.glob("*.safetensors") for tensor in tensors_in(file)}
    except ValueError as error:
        raise WeightSyncError(str(error)) from None
    if lost := sorted(names - kept):
        raise ConfigError(
            f"{path} has {len(lost)} tensors that are not trained ({lost[0]}, ...). Every checkpoint copies "
            f"them from the initial model, and {policy.base_path} no longer has them: put its weights' files "
            "back, or copy those of this checkpoint there"
        )


def _models(
    policy: PackedModel,
    optimizer: ShardedAdamW,
    critic: Critic | None,
    prm: ImplicitRewards | None,
    proximal: ProximalPolicy | None,
) -> dict[str, tuple[PackedModel, ModelState]]:
    models: dict[str, tuple[PackedModel, ModelState]] = {POLICY: (policy, optimizer)}
    if critic is not None:
        models[CRITIC] = critic.model, critic.optimizer
    if prm is not None:
        models[PRM] = prm.model, prm.optimizer
    if proximal is not None:
        models[PROXIMAL] = proximal.model, proximal
    return models
