"""Faster imports of torch and transformers, for processes whose start a user waits for.

Importing both takes about three seconds of CPU time and 350 MB in every process of a job; on a small machine
the processes slow each other down. This module has three remedies:

- `torch_hidden`: a rollout server needs only a tokenizer and a configuration. transformers provides both
  without torch if torch cannot be imported.
- `uncollected`: during imports the garbage collector repeatedly scans all modules imported so far, although
  imports leave hardly any garbage.
- `stored_index`, a part of `uncollected`: the list of transformers' models is not rebuilt each time.

Seconds of CPU time for the imports of one process (median of 3; torch 2.13, transformers 5.19, two cores):

    remedies               rollout server    trainer
    none                   3.0               2.9
    torch hidden           0.93
    + without collection   0.80              2.1
    + stored index         0.44              1.7

Left out: one process that imports torch and is forked for each daemon. It would save most of the rest, but
the daemons' parent would no longer be the launcher, which watches over them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Iterator

from areal_like.runtime.transformers_index import stored_index

_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"


@contextlib.contextmanager
def torch_hidden() -> Iterator[None]:
    """Makes `import torch` fail inside the block. Does nothing if torch is already imported, e.g. by a task.

    Use it at the start of a process, in the main thread. If transformers is imported inside the block, it has
    tokenizers and configurations but no models for the rest of the process. torch itself can be imported
    afterwards.
    """
    if "torch" in sys.modules:
        yield
        return
    quiet = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"  # transformers would warn on stderr that PyTorch was not found
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
    """Disables the garbage collector inside the block; it never scans the objects that exist at the end.

    An import of transformers inside the block uses the stored index.
    """
    gc.disable()
    try:
        with stored_index():
            yield
    finally:
        gc.freeze()
        gc.enable()
