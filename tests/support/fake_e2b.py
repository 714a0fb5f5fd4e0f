"""Stands in for the module `e2b`, with the calls that the sandbox uses, written from the source of e2b 2.63.

A sandbox is a directory in place of its /tmp; commands run on this machine, as `/bin/bash -l -c COMMAND`,
which is what the service's agent runs. The signatures are compared with those of the real package where that
is installed (tests/rollout_server/sandbox/test_elsewhere.py).
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

REMOTE_TMP = "/tmp/"


class SandboxException(Exception):
    pass


class AuthenticationException(Exception):
    pass


class ServiceBusyException(Exception):
    pass


class TimeoutException(SandboxException):
    pass


class NotFoundException(SandboxException):
    pass


@dataclass
class CommandResult:
    stderr: str | None
    stdout: str | None
    exit_code: int
    error: str | None


class CommandExitException(SandboxException):
    def __init__(self, exit_code: int) -> None:
        super().__init__(f"Command exited with code {exit_code}")
        self.exit_code = exit_code


@dataclass
class SandboxQuery:
    metadata: dict[str, str] | None = None


@dataclass
class SandboxInfo:
    sandbox_id: str


@dataclass
class Service:
    """The sandboxes that run, and what the next call does."""

    running: dict[str, Sandbox] = field(default_factory=dict)
    key: str = "e2b_test"


service = Service()


class Paginator:
    def __init__(self, ids: list[str]) -> None:
        self._ids = ids

    @property
    def has_next(self) -> bool:
        return bool(self._ids)

    def next_items(self) -> list[SandboxInfo]:
        first, self._ids = self._ids[:1], self._ids[1:]
        return [SandboxInfo(one) for one in first]


class Handle:
    def __init__(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        self._process = process
        self._timer = threading.Timer(timeout, process.kill)
        self._timer.start()
        self.pid = process.pid

    def __iter__(self) -> Iterator[tuple[str | None, str | None, None]]:
        said: SimpleQueue[tuple[int, bytes]] = SimpleQueue()

        def read(number: int, stream: Any) -> None:
            while data := os.read(stream.fileno(), 1 << 16):
                said.put((number, data))
            said.put((number, b""))

        streams = (self._process.stdout, self._process.stderr)
        for number, stream in enumerate(streams):
            threading.Thread(target=read, args=(number, stream), daemon=True).start()
        ends = 0
        while ends < len(streams):
            number, data = said.get()
            ends += not data
            text = data.decode(errors="replace")
            yield (text, None, None) if number == 0 else (None, text, None)
        for stream in streams:
            assert stream is not None
            stream.close()

    def wait(self) -> CommandResult:
        code = self._process.wait()
        self._timer.cancel()
        if code:
            raise CommandExitException(code)
        return CommandResult("", "", 0, None)


class Commands:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def run(
        self, cmd: str, background: bool | None = None, *, timeout: float = 60, retain_output: bool = True
    ) -> Any:
        self._sandbox.must_run()
        local = cmd.replace(REMOTE_TMP, f"{self._sandbox.tmp}/")
        process = subprocess.Popen(
            ["/bin/bash", "-l", "-c", local], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        handle = Handle(process, timeout)
        if background:
            return handle
        for _ in handle:
            pass
        return handle.wait()


class Stream:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def __enter__(self) -> Iterator[bytes]:
        return (self._data[at : at + 100] for at in range(0, len(self._data), 100))

    def __exit__(self, *_: object) -> None:
        pass


class Files:
    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def _path(self, path: str) -> Path:
        self._sandbox.must_run()
        assert path.startswith(REMOTE_TMP)
        return self._sandbox.tmp / path.removeprefix(REMOTE_TMP)

    def make_dir(self, path: str, request_timeout: float | None = None) -> bool:
        self._path(path).mkdir(parents=True, exist_ok=True)
        return True

    def write(self, path: str, data: bytes, request_timeout: float | None = None) -> None:
        self._path(path).parent.mkdir(parents=True, exist_ok=True)
        self._path(path).write_bytes(data)

    def write_files(self, files: list[dict[str, Any]], request_timeout: float | None = None) -> None:
        for entry in files:
            self.write(entry["path"], entry["data"])

    def read(self, path: str, format: str = "text", request_timeout: float | None = None) -> Stream:
        assert format == "stream"
        if not self._path(path).is_file():
            raise NotFoundException(f"file {path!r} not found")
        return Stream(self._path(path).read_bytes())


class Sandbox:
    def __init__(self, metadata: dict[str, str]) -> None:
        self.sandbox_id = uuid.uuid4().hex
        self.metadata = metadata
        self.tmp = Path(tempfile.mkdtemp(prefix="areal-like-test-e2b-", dir="/var/tmp"))
        self.commands = Commands(self)
        self.files = Files(self)

    @classmethod
    def create(
        cls,
        template: str | None = None,
        timeout: int | None = None,
        metadata: dict[str, str] | None = None,
        allow_internet_access: bool | None = None,
        request_timeout: float | None = None,
    ) -> Sandbox:
        if os.environ.get("E2B_API_KEY") != service.key:
            raise AuthenticationException("Invalid API key")
        if template not in (None, "python"):
            raise NotFoundException(f"template {template!r} not found")
        assert timeout is not None and 1 <= timeout <= 3600 and allow_internet_access is False
        made = cls(metadata or {})
        service.running[made.sandbox_id] = made
        return made

    @staticmethod
    def list(query: SandboxQuery | None = None, request_timeout: float | None = None) -> Paginator:
        assert query is not None and query.metadata is not None
        wanted = query.metadata.items()
        return Paginator([name for name, one in service.running.items() if wanted <= one.metadata.items()])

    def kill(self: Sandbox | str, request_timeout: float | None = None) -> bool:
        """Of a sandbox, or with an id in its place, as the SDK's `class_method_variant`."""
        name = self if isinstance(self, str) else self.sandbox_id
        return service.running.pop(name, None) is not None

    def must_run(self) -> None:
        if self.sandbox_id not in service.running:
            raise NotFoundException("The sandbox was not found")
