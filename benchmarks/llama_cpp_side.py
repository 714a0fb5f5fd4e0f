"""llama.cpp's half of benchmarks/llama_cpp.py: runs in an environment with llama-cpp-python.

    python llama_cpp_side.py SPEC     (JSON; prints one line of JSON, milliseconds of CPU time)

Tokens are random: only the time matters.
"""

import ctypes
import json
import random
import sys
import time
from pathlib import Path

import llama_cpp as lc

FILE_TYPES = {"bf16": 32, "q8_0": 7}
"""llama.cpp's `llama_ftype` of the weights that are made here."""
spec = json.loads(sys.argv[1])
source, kind = spec["gguf"], spec["type"]


@lc.llama_log_callback
def silent(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    """Drops llama.cpp's log."""


lc.llama_log_set(silent, ctypes.c_void_p(0))
lc.llama_backend_init()
path = Path(source)
if kind in FILE_TYPES:
    path = Path(spec["folder"]) / f"{kind}.gguf"
    if not path.exists():
        settings = lc.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize, settings.nthread = FILE_TYPES[kind], True, 1
        if lc.llama_model_quantize(source.encode(), str(path).encode(), ctypes.byref(settings)) != 0:
            sys.exit("llama_model_quantize failed")

model_settings = lc.llama_model_default_params()
model_settings.n_gpu_layers = 0
model_settings.use_extra_bufts = not spec["plain"]
model = lc.llama_model_load_from_file(str(path).encode(), model_settings)
num_rows = max(spec["rows"])
most_tokens = max(num_rows, spec["prompts"] * spec["prompt_tokens"])
settings = lc.llama_context_default_params()
settings.n_ctx = num_rows * (spec["prompt_tokens"] + 2 * spec["steps"])
settings.n_batch = settings.n_ubatch = most_tokens
settings.n_seq_max = num_rows
settings.n_threads = settings.n_threads_batch = 1
context = lc.llama_init_from_model(model, settings)
batch = lc.llama_batch_init(most_tokens, 0, 1)
rng = random.Random(7)


def decode(positions: list[tuple[int, int]], last: int) -> float:
    """Computes one token of each (row, position); logits of each token at position `last`. Milliseconds."""
    batch.n_tokens = len(positions)
    for at, (row, position) in enumerate(positions):
        batch.token[at] = rng.randrange(3, 100)
        batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = position, 1, row
        batch.logits[at] = position == last
    began_s = time.process_time()
    if lc.llama_decode(context, batch) != 0:
        sys.exit("llama_decode failed")
    lc.llama_get_logits(context)
    return 1e3 * (time.process_time() - began_s)


def measure() -> dict[str, float]:
    """The prefill, and the mean of the decode steps of each number of rows."""
    lc.llama_memory_clear(lc.llama_get_memory(context), True)
    size = spec["prompt_tokens"]
    prompts = [(row, position) for row in range(spec["prompts"]) for position in range(size)]
    found = {"prefill": decode(prompts, size - 1)}
    for rows in spec["rows"]:
        lc.llama_memory_clear(lc.llama_get_memory(context), True)
        for first in range(0, rows, spec["prompts"]):
            some = range(first, min(rows, first + spec["prompts"]))
            decode([(row, position) for row in some for position in range(size)], size - 1)
        steps = [
            decode([(row, size + step) for row in range(rows)], size + step) for step in range(spec["steps"])
        ]
        found[f"decode {rows}"] = sum(steps) / len(steps)
    return found


measure()  # warms up
print(json.dumps(measure() | {"version": lc.__version__}))
