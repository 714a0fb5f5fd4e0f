"""The commands with which the processes of a local job are started."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from areal_like.config import Config
from launch.offline_verbs import OfflineVerb

DRAINED = 75
"""`daemon.exit_code_on_drain` of daemons that a launcher or a scheduler supervises: it tells a drain from a
failure. 0 means that the run is finished."""


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """The command line, thread count and stop signal of one child process."""

    name: str
    """Name of the process; its log files and, for a daemon, its endpoint file are named after it."""
    command: tuple[str, ...]
    """The words after `python -m`."""
    num_threads: int = 1
    """CPU threads of its numerical libraries (OMP_NUM_THREADS)."""
    stop_signal: signal.Signals = signal.SIGTERM
    """The signal on which it drains and ends."""

    def with_settings(self, settings: Sequence[str]) -> ChildSpec:
        """The same process with these `key=value` settings; they replace earlier values of the same keys."""
        changed = {setting.partition("=")[0] for setting in settings}
        command = tuple(word for word in self.command if word.partition("=")[0] not in changed)
        return dataclasses.replace(self, command=(*command, *settings))


class JobSpecs:
    """The specs of one job's processes. `config_path`: the resolved configuration that all of them read."""

    stopping = "the trainer finishes its step and writes a checkpoint"
    """The effect of the first stop signal, for the user."""
    stopped_at_once = "the training since the last checkpoint is lost"
    """The effect of the second stop signal, for the user."""

    def __init__(self, config: Config, *, config_path: Path) -> None:
        self._config = config
        # The launcher must distinguish a drain from the end of the run, whatever the user's setting is.
        # Trainer and servers look up the buffer's address, so that they can start together with it.
        settings = (f"daemon.exit_code_on_drain={DRAINED}", "buffer.discovery=run_dir")
        self._common = ("--config", str(config_path), *settings)

    def buffer(self, name: str) -> ChildSpec:
        """A buffer. It binds the port in its configuration, by default any free port."""
        return ChildSpec(name=name, command=("buffer", *self._common, "--name", name))

    def prepare_model(self, *arguments: str) -> ChildSpec:
        """The process that builds or checks the model and then ends. `arguments`: further ones.

        It has one thread, so that a seed gives the same model on every machine. Its stop signal is SIGINT, on
        which it removes its temporary files.
        """
        command = ("trainer.prepare_model", *self._common, *arguments)
        return ChildSpec(name="prepare_model", command=command, stop_signal=signal.SIGINT)

    def server(self, name: str) -> ChildSpec:
        """A rollout server."""
        port = self._http_port(int(name.rpartition("-")[2]))
        command = ("rollout_server", *self._common, *port, "--name", name)
        return ChildSpec(name=name, command=command, num_threads=self._config.rollout.least_threads)

    def scorer(self, name: str) -> ChildSpec:
        """A score server. With fixed ports, its daemon's port is after those of the trainer's ranks."""
        config = self._config
        port = self._http_port(
            config.rollout.num_servers + config.trainer.world_size + int(name.rpartition("-")[2])
        )
        command = ("rollout_server.scoring", *self._common, *port, "--name", name)
        return ChildSpec(name=name, command=command, num_threads=config.scorer.num_threads)

    def router(self, name: str) -> ChildSpec:
        """A router. With fixed ports, its daemon's port is after those of the score servers."""
        config = self._config
        before = config.rollout.num_servers + config.trainer.world_size
        before += config.scorer.num_servers if config.scorer.path else 0
        port = self._http_port(before + int(name.rpartition("-")[2]))
        return ChildSpec(name=name, command=("rollout_server.router", *self._common, *port, "--name", name))

    def offline(self, verb: OfflineVerb) -> ChildSpec:
        """The trainer of an offline run; with several ranks, the process that starts the ranks."""
        command = (verb.module, *self._common)
        return ChildSpec(name=verb.verb, command=command, num_threads=self._config.trainer.least_threads)

    def _http_port(self, index: int) -> list[str]:
        """The setting for the process with this index after the buffers; none if every port is free."""
        base = self._config.daemon.http_port
        return [f"daemon.http_port={base + self._config.buffer.num_shards + index}"] if base else []

    def trainer(self) -> ChildSpec:
        """The trainer; with several ranks, the process that starts the ranks."""
        port = self._http_port(self._config.rollout.num_servers)
        command = ("trainer", *self._common, *port)
        return ChildSpec(name="trainer", command=command, num_threads=self._config.trainer.least_threads)


class EvaluationSpecs(JobSpecs):
    """The specs of an evaluation without training: an evaluator takes the trainer's place."""

    stopping = "what is sampled stays in the ledger"
    stopped_at_once = "samples that were not finished are lost"

    def __init__(self, config: Config, *, config_path: Path, step: int) -> None:
        """`step`: optimizer steps of the model, for the results."""
        super().__init__(config, config_path=config_path)
        self._step = step

    def trainer(self) -> ChildSpec:
        """The evaluator: one process without torch."""
        words = ("trainer.evaluate", "--step", str(self._step))
        port = self._http_port(self._config.rollout.num_servers)
        return ChildSpec(name="trainer", command=(*words, *self._common, *port))
