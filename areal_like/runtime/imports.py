"""How torch and transformers are imported by processes that a person waits for.

Importing both costs some five seconds of CPU time and 350 MB, the same in every process of a job, and on a small machine the processes
start one at the expense of another. Two things make it less, where each is safe:

- A rollout server, and the check of a model's name, need a tokenizer and a configuration. transformers has them without torch, if it finds
  none: `torch_hidden`.
- The collector walks everything that has been imported so far, again and again, while imports leave hardly any garbage: `uncollected`.

Not done: to skip transformers' own table of its thousand modules, which it makes by reading them; that would take a patch of its insides.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


@contextlib.contextmanager
def torch_hidden() -> Iterator[None]:
    """Within, nothing can import torch. Does nothing where it is imported already, as by a task that runs models itself.

    For the start of a process of its own, in the main thread: a transformers that was imported within has tokenizers and configurations
    for good, and no models. torch itself can be imported afterwards.
    """
    if "torch" in sys.modules:
        yield
        return
    quiet = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"  # "PyTorch was not found", on stderr
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
        if quiet is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = quiet


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within, no garbage is collected; what is there at its end is never walked by the collector again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
