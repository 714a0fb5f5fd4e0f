"""Sandboxes that are containers of Docker or Podman, made with their command lines: `docker:IMAGE`.

    open     docker run -i --rm --network none --read-only --tmpfs /tmp ... IMAGE    (its stdin stays open)
    exec     docker exec -i --user 65534 NAME python3 -c SUPERVISOR LIMITS COMMAND...
    close    docker rm --force NAME

A command has the same supervisor as in bwrap, so the image needs Python 3.9 or later as `python3`, and `sh`,
`tar`, `head`, `timeout` and `cat`. The root file system is read-only and /tmp is in memory, with the size of
`file_mb`. The container's own program reads the stdin of `docker run` and ends with it, so a container ends
with the process that opened it; it ends also after `lifetime_s`. What is left because the command line was
killed too has the owner's label, by which `reap` removes it. Images are not pulled here: many workers would
pull at once, within the time limits of samples.

Not proven: the tests run a program that follows the documentation of both command lines, and no daemon.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace

from areal_like.errors import ConfigError, SandboxError
from rollout_server.sandbox.base import (
    Limits,
    OpenSandbox,
    ProgramResult,
    Sandbox,
    problem_of,
)
from rollout_server.sandbox.owner import Owner
from rollout_server.sandbox.process import remote_command, run_bounded
from rollout_server.sandbox.running import RunningProgram

_HOME = "/tmp"
_NOBODY = "65534:65534"
_READY = b"ready\n"
_START_TIMEOUT_S = 60.0
_CLI_TIMEOUT_S = 60.0
"""Time limit for a call of the command line that runs no command of the policy, in seconds."""
_MARGIN_S = 20.0
"""Time that the command line may take besides the command, in seconds."""
_OTHER_PROCESSES = 8
"""The container's own program and the supervisor."""
_DAEMON_CODES = (1, 125, 126, 127, 255)
"""Exit codes of the command line for its own failures; a command may have them, too."""
_PASSED = (
    "PATH", "HOME", "XDG_RUNTIME_DIR",
    "DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "DOCKER_CERT_PATH", "DOCKER_TLS_VERIFY",
    "CONTAINER_HOST",
)  # fmt: skip
"""Variables that the command lines read. Commands in the container get none of them."""


class ContainerSandbox(Sandbox):
    """Opens containers of one image."""

    def __init__(self, cli: str, image: str) -> None:
        """`cli`: docker or podman."""
        self._cli = cli
        self._image = image
        self.kind = f"{cli}:{image}"

    def open(self, *, limits: Limits | None = None) -> OpenSandbox:
        limits = limits or Limits()
        name = f"areal-like-{secrets.token_hex(8)}"
        memory = f"{2 * limits.memory_mb + limits.file_mb}m"
        size = f"{limits.file_mb}m"
        command = [
            *(self._executable(), "run", "--interactive", "--rm", "--name", name, "--pull", "never"),
            *_options("--label", Owner.of_this_process()),
            *("--network", "none", "--hostname", "sandbox"),
            *("--read-only", "--tmpfs", f"{_HOME}:rw,exec,nosuid,nodev,mode=1777,size={size}"),
            *("--shm-size", size, "--workdir", _HOME, "--user", "0:0", "--cap-drop", "ALL"),
            *("--security-opt", "no-new-privileges"),
            *("--pids-limit", str(limits.max_processes + _OTHER_PROCESSES)),
            *("--memory", memory, "--memory-swap", memory),
            # Podman mounts unlimited file systems over a read-only root unless it is told not to.
            *(["--read-only-tmpfs=false"] if self._cli == "podman" else []),
            *("--entrypoint", "sh", self._image, "-c"),
            f"echo ready; exec timeout {max(1, round(limits.lifetime_s))} cat",
        ]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"{self._cli} cannot be started: {error}") from error
        container = _Container(self, name, RunningProgram(process, signal.SIGKILL), limits)
        try:
            container.wait_until_ready()
        except BaseException:
            container.close()
            raise
        return container

    def check(self) -> None:
        if problem := problem_of(self):
            raise ConfigError(
                f"rewards.sandbox={self.kind}: no program can run in a container ({problem}). {self._cli} "
                f"needs its daemon or a user namespace, the image (`{self._cli} pull {self._image}`), and in "
                "the image python3 (3.9 or later), sh, tar, head, timeout and cat"
            )

    def reap(self, owner: Owner) -> int:
        names = self.call("ps", "--all", "--quiet", *_options("--filter", owner, "label=")).split()
        if names:
            self.call("rm", "--force", *names)
        return len(names)

    def call(self, *arguments: str) -> str:
        """Returns the output of a call of the command line. Raises SandboxError if it fails."""
        try:
            done = subprocess.run(
                [self._executable(), *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=_environment(),
                timeout=_CLI_TIMEOUT_S,
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise SandboxError(f"{self._cli} {arguments[0]} took longer than {_CLI_TIMEOUT_S:g} s") from None
        except subprocess.CalledProcessError as error:
            raise SandboxError(f"{self._cli} {arguments[0]}: {_last_line(error.stderr)}") from None
        return done.stdout.decode(errors="replace")

    def exec(
        self, name: str, words: Sequence[str], *, stdin: str | bytes, directory: str, limits: Limits
    ) -> ProgramResult:
        """Runs a command in a container."""
        command = [
            *(self._executable(), "exec", "--interactive", "--user", _NOBODY, "--workdir", directory),
            *("--env", f"HOME={_HOME}", "--env", f"TMPDIR={_HOME}", "--env", "LANG=C.UTF-8", name),
            *remote_command(words, limits),
        ]
        started_s = time.monotonic()
        result = run_bounded(
            command,
            environment=_environment(),
            directory="/",
            stdin=stdin,
            limits=replace(limits, timeout_s=limits.timeout_s + _MARGIN_S),
            end_signal=signal.SIGKILL,
        )
        # The command line was killed, and what it ran may go on.
        if result.timed_out:
            raise SandboxError(f"{self._cli} exec did not end {_MARGIN_S:g} s after the command's time limit")
        if result.was_flood:
            raise SandboxError("a command wrote more output than is read; its container is not used again")
        is_late = result.exit_code == 137 and time.monotonic() - started_s >= limits.timeout_s
        return replace(result, timed_out=is_late)

    def _executable(self) -> str:
        if (found := shutil.which(self._cli)) is None:
            raise ConfigError(f"rewards.sandbox={self.kind}: {self._cli} is not installed")
        return found


class _Container(OpenSandbox):
    """A running container."""

    def __init__(self, sandbox: ContainerSandbox, name: str, program: RunningProgram, limits: Limits) -> None:
        """`program`: the `run` of the command line, whose stdin keeps the container alive."""
        super().__init__(_HOME, limits)
        self._sandbox = sandbox
        self._name = name
        self._program = program
        self._is_closed = False

    def wait_until_ready(self) -> None:
        """Waits until the container runs. Raises SandboxError."""
        process = self._program.process
        assert process.stdout is not None and process.stderr is not None
        said, deadline_s = b"", time.monotonic() + _START_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while said != _READY:
                if not selector.select(deadline_s - time.monotonic()):
                    raise SandboxError(f"the container did not start within {_START_TIMEOUT_S:g} s")
                data = os.read(process.stdout.fileno(), len(_READY) - len(said))
                if not data or not _READY.startswith(said + data):
                    process.kill()
                    words = process.stderr.read()
                    raise SandboxError(f"the container did not start: {_last_line(words)}")
                said += data

    def _exec(
        self, command: list[str], *, stdin: str | bytes, directory: str, limits: Limits
    ) -> ProgramResult:
        if self._is_closed:
            raise SandboxError("the sandbox is closed")
        try:
            result = self._sandbox.exec(self._name, command, stdin=stdin, directory=directory, limits=limits)
        except SandboxError:
            self.close()
            raise
        if result.exit_code in _DAEMON_CODES and "rror" in result.stderr and not self._is_running():
            raise SandboxError(f"the container has ended: {_last_line(result.stderr.encode())}")
        return result

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            with contextlib.suppress(SandboxError):  # without its stdin it ends by itself; `reap` finds it
                self._sandbox.call("rm", "--force", self._name)
            self._program.end()

    def _is_running(self) -> bool:
        try:
            said = self._sandbox.call("inspect", "--format", "{{.State.Running}}", self._name)
        except SandboxError:
            return False
        return said.strip() == "true"


def _options(option: str, owner: Owner, before: str = "") -> list[str]:
    return [word for name, mark in owner.marks.items() for word in (option, f"{before}{name}={mark}")]


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _PASSED if name in os.environ}


def _last_line(words: bytes) -> str:
    lines = words.decode(errors="replace").strip().splitlines()
    return f"{lines[-1]:.300}" if lines else "it says nothing"
