"""An environment of Harbor without containers: the machine's programs in a root directory of its own.

For tests where no container engine runs. It isolates files; processes, users and the network are the
machine's.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

from harbor.environments.base import BaseEnvironment, ExecResult

_DIRECTORIES = ("app", "logs/agent", "logs/verifier", "logs/artifacts", "tests", "solution", "tmp", "root")
_READ_ONLY = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc")


class BubblewrapEnvironment(BaseEnvironment):
    @staticmethod
    def type() -> str:
        return "bubblewrap"

    def _validate_definition(self) -> None:
        pass

    async def start(self, force_build: bool) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="harbor-"))
        for name in _DIRECTORIES:
            (self._root / name).mkdir(parents=True)

    async def stop(self, delete: bool) -> None:
        await self.exec("tmux kill-server")
        shutil.rmtree(self._root, ignore_errors=True)

    def _outside(self, path: str | Path) -> Path:
        return self._root / str(path).lstrip("/")

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        self._outside(target_path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source_path, self._outside(target_path))

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        shutil.copytree(source_dir, self._outside(target_dir), dirs_exist_ok=True)

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        shutil.copy(self._outside(source_path), target_path)

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        shutil.copytree(self._outside(source_dir), target_dir, dirs_exist_ok=True)

    async def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_sec: int | None = None,
        user: str | int | None = None,
        **_: Any,
    ) -> ExecResult:
        words = ["bwrap", "--bind", str(self._root), "/", "--proc", "/proc", "--dev", "/dev", "--clearenv"]
        for path in _READ_ONLY:
            words += ["--ro-bind-try", path, path]
        variables = {
            "PATH": "/usr/bin:/bin",
            "HOME": "/root",
            "TERM": "xterm",
            "LANG": "C.UTF-8",
            **(env or {}),
        }
        for name, value in variables.items():
            words += ["--setenv", name, value]
        words += ["--chdir", cwd or "/app", "bash", "-c", command]
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(timeout_sec):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            raise
        assert process.returncode is not None
        return ExecResult(stdout=out.decode(), stderr=err.decode(), return_code=process.returncode)
