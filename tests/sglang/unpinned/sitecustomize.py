"""Lets SGLang load adapters on a machine without an accelerator, whose memory cannot be pinned.

SGLang 0.5.23 has a backend for LoRA on CPUs (`--lora-backend torch_native`), but asks for pinned memory in
every backend, which torch refuses here. Pinned or not, the values are the same. Python imports this file at
its start in each of SGLang's processes.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def _unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def made(*args: Any, pin_memory: bool = False, **options: Any) -> Any:
        return make(*args, **options)

    return made


if not torch.cuda.is_available():
    for _name in ("tensor", "empty", "zeros", "ones", "arange"):
        setattr(torch, _name, _unpinned(getattr(torch, _name)))
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
