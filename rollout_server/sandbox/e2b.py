"""Remote sandboxes of E2B, made with its SDK (`pip install e2b`): `e2b` or `e2b:TEMPLATE`.

Its key is the environment variable E2B_API_KEY. A sandbox is a virtual machine of the service, without the
internet; its template decides memory and disk. A command has the same supervisor as in bwrap, so the template
needs `python3`. The service ends a sandbox after `lifetime_s`, at the latest after an hour (the longest time
of its free accounts). What is left because this process was killed has the owner in its metadata, by which
`reap` ends it.

Not proven: the tests run a module with the calls of the SDK that are used here, and no service.
"""

from __future__ import annotations

import contextlib
import importlib
import shlex
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from areal_like.errors import ConfigError, SandboxError
from rollout_server.sandbox.base import (
    Limits,
    OpenSandbox,
    ProgramResult,
    Sandbox,
    as_bytes,
    checked_name,
    problem_of,
)
from rollout_server.sandbox.owner import Owner
from rollout_server.sandbox.process import remote_command

_HOME = "/tmp/home"
_STDIN = "/tmp/.stdin"
_LONGEST_S = 3600
_REQUEST_TIMEOUT_S = 60.0
_READ_TIMEOUT_S = 10.0
_MARGIN_S = 20.0
"""Time that the service may take besides the command, in seconds."""
_MAX_DISCARDED_CHARS = 16 << 20
"""A command that writes more than this beyond the kept output is ended."""


class E2BSandbox(Sandbox):
    """Opens sandboxes of one template."""

    def __init__(self, template: str = "") -> None:
        """`template`: name or id; empty: the service's own."""
        self._template = template
        self.kind = f"e2b:{template}" if template else "e2b"

    def open(self, *, limits: Limits | None = None) -> OpenSandbox:
        limits = limits or Limits()
        sdk = _sdk()
        try:
            remote = sdk.Sandbox.create(
                self._template or None,
                timeout=min(_LONGEST_S, max(1, round(limits.lifetime_s))),
                metadata=Owner.of_this_process().marks,
                allow_internet_access=False,
                request_timeout=_REQUEST_TIMEOUT_S,
            )
        except _errors(sdk) as error:
            raise SandboxError(f"E2B opened no sandbox: {error!s:.300}") from error
        return _Remote(sdk, remote, limits)

    def check(self) -> None:
        if problem := problem_of(self):
            raise ConfigError(
                f"rewards.sandbox={self.kind}: no program can run in a sandbox of E2B ({problem}). It needs "
                "the environment variable E2B_API_KEY, and a template with python3 (3.9 or later)"
            )

    def reap(self, owner: Owner) -> int:
        sdk, num_reaped = _sdk(), 0
        try:
            pages = sdk.Sandbox.list(
                query=sdk.SandboxQuery(metadata=owner.marks), request_timeout=_REQUEST_TIMEOUT_S
            )
            while pages.has_next:
                for found in pages.next_items():
                    num_reaped += sdk.Sandbox.kill(found.sandbox_id, request_timeout=_REQUEST_TIMEOUT_S)
        except _errors(sdk) as error:
            raise SandboxError(f"E2B's sandboxes cannot be listed or ended: {error!s:.300}") from error
        return num_reaped


class _Remote(OpenSandbox):
    """A running sandbox of the service."""

    def __init__(self, sdk: ModuleType, remote: Any, limits: Limits) -> None:
        super().__init__(_HOME, limits)
        self._sdk = sdk
        self._remote = remote
        self._is_closed = False
        self._has_home = False

    def _exec(
        self, command: list[str], *, stdin: str | bytes, directory: str, limits: Limits
    ) -> ProgramResult:
        words = remote_command(command, limits)
        self._check_open()
        try:
            self._make_home()
            self._remote.files.write(_STDIN, as_bytes(stdin), request_timeout=_REQUEST_TIMEOUT_S)
            handle = self._remote.commands.run(
                f"cd {shlex.quote(directory)} && HOME={_HOME} exec {shlex.join(words)} < {_STDIN}",
                background=True,
                timeout=limits.timeout_s + _MARGIN_S,
                retain_output=False,
            )
            return self._collected(handle, limits)
        except _errors(self._sdk) as error:
            raise SandboxError(f"E2B's sandbox is lost: {error!s:.300}") from error

    def write(self, files: Mapping[str, str | bytes]) -> None:
        entries = [
            {"path": f"{_HOME}/{checked_name(name)}", "data": as_bytes(content)}
            for name, content in files.items()
        ]
        self._check_open()
        try:
            self._remote.files.write_files(entries, request_timeout=_REQUEST_TIMEOUT_S)
        except _errors(self._sdk) as error:
            raise SandboxError(f"files cannot be written into the sandbox: {error!s:.300}") from error

    def read(self, name: str, *, max_bytes: int = 1 << 20) -> bytes:
        path = f"{_HOME}/{checked_name(name)}"
        self._check_open()
        data = b""
        try:
            with self._remote.files.read(path, format="stream", request_timeout=_READ_TIMEOUT_S) as chunks:
                for chunk in chunks:
                    data += chunk
                    if len(data) >= max_bytes:
                        break
        except _errors(self._sdk) as error:
            raise OSError(f"{name} cannot be read: {error!s:.300}") from error
        return data[:max_bytes]

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            # Otherwise it ends after its lifetime, and `reap` finds it.
            with contextlib.suppress(*_errors(self._sdk)):
                self._remote.kill(request_timeout=_REQUEST_TIMEOUT_S)

    def _check_open(self) -> None:
        if self._is_closed:
            raise SandboxError("the sandbox is closed")

    def _make_home(self) -> None:
        if not self._has_home:
            self._remote.files.make_dir(_HOME, request_timeout=_REQUEST_TIMEOUT_S)
            self._has_home = True

    def _collected(self, handle: Any, limits: Limits) -> ProgramResult:
        """Reads the output of a command until it ends."""
        started_s = time.monotonic()
        kept, num_chars, was_killed = ["", ""], [0, 0], False
        for texts in handle:
            for stream, text in enumerate(texts[:2]):
                num_chars[stream] += len(text or "")
                kept[stream] += (text or "")[: limits.output_bytes - len(kept[stream])]
            if sum(num_chars) > 2 * limits.output_bytes + _MAX_DISCARDED_CHARS and not was_killed:
                was_killed = True
                # Not handle.kill(): without the supervisor nothing would end what the command started.
                self._remote.commands.run(f"kill -TERM {int(handle.pid)}", timeout=_REQUEST_TIMEOUT_S)
        try:
            code = handle.wait().exit_code
        except self._sdk.CommandExitException as ended:
            code = ended.exit_code
        code = 128 - code if code < 0 else code
        return ProgramResult(
            stdout_bytes=kept[0].encode()[: limits.output_bytes],
            stderr=kept[1],
            exit_code=code,
            timed_out=code == 137 and time.monotonic() - started_s >= limits.timeout_s,
            output_was_cut=any(number > limits.output_bytes for number in num_chars),
            was_flood=was_killed,
        )


def _sdk() -> ModuleType:
    """Returns E2B's package. Raises ConfigError without it."""
    try:
        return importlib.import_module("e2b")
    except ImportError as error:
        raise ConfigError("rewards.sandbox=e2b: the SDK is not installed: pip install e2b") from error


def _errors(sdk: ModuleType) -> tuple[type[Exception], ...]:
    """Returns what the SDK raises because of the service or the network."""
    httpx = importlib.import_module("httpx")  # the SDK's own HTTP client
    return (sdk.SandboxException, sdk.AuthenticationException, sdk.ServiceBusyException, httpx.HTTPError)
