"""The torch and NCCL versions of SGLang's Python environment, which the trainer's must match to push over
NCCL.

NCCL does not form a communicator between different versions, and SGLang does not report its version. So a
command in its interpreter reports it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.runtime.tied_exec import foreign_environment

_TIMEOUT_S = 120.0
"""An import of torch from a cold network file system takes a minute."""
_QUESTION = """
import json, torch, torch.distributed as dist
nccl = ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else ""
print(json.dumps({"torch": torch.__version__, "nccl": nccl}))
"""


@dataclass(frozen=True, kw_only=True)
class TorchVersions:
    """Versions such as `2.14.1+cu130` and `2.29.7`; `nccl` is empty for a torch without NCCL."""

    torch: str
    nccl: str


@functools.cache
def torch_versions(python: str) -> TorchVersions | None:
    """The versions in the environment of an interpreter; None if it does not respond. Asks once."""
    try:
        asked = subprocess.run(
            [str(Path(python).expanduser()), "-c", _QUESTION],
            env=foreign_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=True,
        )
        found = json.loads(asked.stdout.splitlines()[-1])
        return TorchVersions(torch=str(found["torch"]), nccl=str(found["nccl"]))
    except (OSError, subprocess.SubprocessError, ValueError, LookupError, TypeError):
        return None


def check_engine_nccl(config: Config, *, ours: TorchVersions) -> None:
    """Raises ConfigError if the engines' NCCL is not the trainer's, so that weights cannot travel over NCCL.

    Checks only engines on GPUs that the rollout servers start with `rollout.sglang.python`, and only if that
    interpreter is on this machine. An engine elsewhere is checked before the first push.
    """
    rollout = config.rollout
    is_asked = rollout.engine == "sglang" and rollout.sglang.python and not rollout.sglang.url
    if config.weights.backend == "gloo" or not is_asked or not rollout.engine_device.startswith("cuda"):
        return
    theirs = torch_versions(rollout.sglang.python)
    if theirs is None or not (ours.nccl and theirs.nccl) or theirs.nccl == ours.nccl:
        return
    raise ConfigError(
        f"the trainer has NCCL {ours.nccl} (torch {ours.torch}), SGLang in {rollout.sglang.python} has "
        f"NCCL {theirs.nccl} (torch {theirs.torch}): {NCCL_REMEDY}"
    )


NCCL_REMEDY = (
    "NCCL connects equal versions only. Install the torch of SGLang's environment for the trainer too, or "
    "set weights.backend=gloo: weights then travel through the memory of the hosts"
)
"""What the user can do about different versions of NCCL."""
