"""`python -m tests.support.quick_start MODULE ARGS`: runs MODULE with the faster imports of a daemon."""

from __future__ import annotations

import runpy
import sys

from areal_like.runtime.imports import uncollected

if __name__ == "__main__":
    with uncollected():
        import trainer.models.policy  # all of torch and transformers that ranks use
    # As in a large model: the layers of the tests' models are gathered and reduced one by one.
    trainer.models.packed_model.SMALLEST_SHARDED_APART = 0
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
