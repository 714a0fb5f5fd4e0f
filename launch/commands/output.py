"""Files that commands write for a user."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from areal_like.errors import ConfigError
from areal_like.paths import private_descriptor, replacing


@contextlib.contextmanager
def private_file(path: Path, *, verb: str) -> Iterator[BinaryIO]:
    """Opens a file for samples or settings: readable by its owner only, and it appears when it is complete.

    A device, a pipe or a link, such as /dev/stdout, is written to and not replaced. Raises ConfigError if the
    file cannot be written, BrokenPipeError if the reader of a pipe has ended.
    """
    try:
        if path.exists() and (path.is_symlink() or not path.is_file()):
            with path.open("wb") as file:
                yield file
            return
        with replacing(path) as partial, os.fdopen(private_descriptor(partial), "wb") as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"{verb}: {path} cannot be written: {error.strerror}; name another --out") from None
