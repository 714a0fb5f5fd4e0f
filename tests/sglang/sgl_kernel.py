"""Replaces SGLang's compiled kernels, whose wheels are CUDA builds.

SGLang imports these names when it starts, for speculative decoding and for moving KV blocks. Plain generation
with the torch_native attention backend calls none of them; a call raises NotImplementedError.
"""

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.4.10"

_NAMES = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
)


def _absent(name: str) -> Callable[..., NoReturn]:
    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: there are no compiled kernels in this environment")

    return kernel


globals().update({name: _absent(name) for name in _NAMES})
