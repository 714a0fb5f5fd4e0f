"""How others find the HTTP server of a daemon: its port, its address, and a file for Prometheus.

With `metrics.sd_path` each daemon keeps a file there in the format of Prometheus' `file_sd_configs`. It names
the pages of the daemon and its engine and has no secrets, so everyone may read it. A daemon that is killed
leaves its file, and the next process of the same name replaces it. Until then Prometheus correctly shows a
target that is down.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.paths import replacing
from areal_like.shards import Shard

_READABLE = 0o644


def http_port(config: Config, *, role: str, name: str) -> int:
    """The port that a daemon binds; 0: a free one.

    Shard i of the buffer binds `daemon.http_port` + i, a rank adds its number on its machine.
    """
    base = config.daemon.http_port
    if not base:
        return 0
    if role == "buffer":
        return base + Shard.named(name, count=config.buffer.num_shards).index
    return base + (int(os.environ.get("LOCAL_RANK", "0")) if role == "trainer" else 0)


def http_address(config: Config, port: int) -> str:
    """HOST:PORT at which others reach a daemon that has bound this port."""
    return f"{config.daemon.advertise_host or config.daemon.http_host}:{port}"


class DiscoveryFile:
    """One daemon's targets for Prometheus: `write` while it runs, `remove` at its end."""

    def __init__(self, config: Config, *, role: str, name: str) -> None:
        folder = config.metrics.sd_path
        self._path = Path(folder).expanduser() / f"{config.name}.{name}.json" if folder else None
        self._labels = {"run": config.name, "role": role, "name": name}
        if config.security.tls_certificate:
            self._labels["__scheme__"] = "https"
        self._has_engine = role == "rollout"

    def write(self, address: str) -> None:
        """Writes the file atomically. Raises ConfigError if it cannot be written."""
        if self._path is None:
            return
        targets = [{"targets": [address], "labels": self._labels}]
        if self._has_engine:
            labels = self._labels | {"role": "engine", "__metrics_path__": "/metrics/engine"}
            targets.append({"targets": [address], "labels": labels})
        try:
            if not self._path.parent.is_dir():
                self._path.parent.mkdir(parents=True)
                self._path.parent.chmod(0o755)
            with replacing(self._path) as partial:
                # Others may write into the directory: an existing file or link is not followed.
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                with os.fdopen(descriptor, "w") as file:
                    os.fchmod(descriptor, _READABLE)
                    file.write(json.dumps(targets, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                f"metrics.sd_path={self._path.parent}: {error.strerror}; "
                "name a directory that this user can write"
            ) from None

    def remove(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):  # it was never written, or its directory is gone
                self._path.unlink()
