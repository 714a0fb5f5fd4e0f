"""Resolves settings that are `auto` for a job's devices and model.

Every role computes them by the same functions from the same settings, `areal-like run` writes the results
into the run's config.yaml, and the buffer refuses a peer whose dtype differs from the first peer's.

    model.dtype                      a GPU anywhere in the job: the checkpoint's dtype; else bfloat16 where
                                     the CPU is fast in it and the model is large enough, or float32
    rollout.num_threads              1; a large model on a CPU also uses the cores that are idle
    trainer.num_threads              1; a large model on CPUs has all cores where it trains from rows
    model.fp32_head                  on where model.dtype is bfloat16; in float32 it changes nothing
    model.router_dtype               bfloat16 where model.dtype is bfloat16; in float32 it changes nothing
    trainer.gradient_checkpointing   on where the trainer is on GPUs
    objective                        the default method (`areal_like/config/default_objective.py`)

Only config.json is read, never weights. For a model that is given by its hub name, it may be downloaded.

On a CPU with avx512_bf16 or amx_bf16, products of matrices with 8 to 512 rows are several times faster in
bfloat16, and a decode step, which reads every weight once, reads half as many bytes. A small model spends its
time between the kernels, and would only lose precision.

`start_limit_s` is a limit that depends on the size of the weights.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from areal_like.config import Config
from areal_like.config.trainer import Recomputation
from areal_like.context_parallel import context_obstacle
from areal_like.cpus import FAST_BFLOAT16, cpu_flags, fast_bfloat16, usable_cores
from areal_like.errors import ConfigError, first_line
from areal_like.paths import BUILT_MODELS, model_path

Dtype = Literal["float32", "bfloat16"]
LEAST_PARAMETERS = 20_000_000
"""Parameters of a model from which on it gains from bfloat16 and from more threads, on a CPU."""
_BUILT_PARAMETERS = {"tiny": 300_000, "smollm2": 134_515_008}
"""Of models that a run builds: their config.json does not exist yet when the settings are resolved."""
LEAST_BYTES_PER_S = 100e6
"""Read rate in bytes per second that start limits assume: that of a slow file system."""
LONG_TOKENS = 4096
"""Sequences beyond this length need an attention kernel that never holds the matrix of scores."""


def compute_dtype(config: Config) -> Dtype:
    """The resolved `model.dtype`: the dtype of the engine's weights and of the trainer's forward pass.

    On CPUs `cpu_dtype` decides. On GPUs a checkpoint in float16 counts as bfloat16: the trainer has no loss
    scaling. Raises ConfigError if the model's config.json is needed, and cannot be read or names no dtype.
    """
    if config.model.dtype != "auto":
        return config.model.dtype
    if _is_all_on_cpu(config):
        return _dtype_on_cpu(config)[0]
    if config.model.path in BUILT_MODELS:
        return "float32"  # `trainer.prepare_model` saves them so
    facts = model_facts(config, needed_for="model.dtype=auto")
    named = facts.get("dtype") or facts.get("torch_dtype")
    if not isinstance(named, str):
        raise ConfigError(
            f"model.dtype=auto: config.json of {config.model.path} names no dtype: set model.dtype to "
            "bfloat16 or float32"
        )
    return "float32" if named.removeprefix("torch.") == "float32" else "bfloat16"


def dtype_choice(config: Config) -> str:
    """What `model.dtype=auto` is on CPUs, and why, on one line; empty with a GPU or a dtype that was set.

    Raises ConfigError as `compute_dtype` does.
    """
    if config.model.dtype != "auto" or not _is_all_on_cpu(config):
        return ""
    dtype, reason = _dtype_on_cpu(config)
    return f"model.dtype=auto is {dtype}: {reason}"


def cpu_dtype(flags: frozenset[str], *, num_parameters: int) -> tuple[Dtype, str]:
    """The dtype in which a CPU with these flags computes such a model fastest, and the reason."""
    size = f"a model of {num_parameters / 1e6:.3g} million parameters"
    flag = fast_bfloat16(flags)
    if not flag:
        return "float32", f"the CPU has neither {' nor '.join(FAST_BFLOAT16)}"
    if num_parameters < LEAST_PARAMETERS:
        return "float32", f"{size} gains nothing from bfloat16"
    return "bfloat16", f"the CPU has {flag}, and {size} gains from it"


def most_threads(config: Config) -> int:
    """The threads that an engine may use while cores of its machine are idle: `rollout.num_threads`, or with
    `auto` all cores, for a model that gains from them. Raises ConfigError as `compute_dtype` does."""
    rollout = config.rollout
    if rollout.num_threads != "auto":
        return rollout.num_threads
    gains = rollout.engine == "embedded" and _is_on_cpu(rollout.engine_device)
    return usable_cores() if gains and _gains_from_threads(config) else rollout.least_threads


def threads_alone(config: Config) -> int:
    """The threads of a rank of the trainer in a run without engines: `trainer.num_threads`, or with `auto`
    its share of the cores, for a model that gains from them. Raises ConfigError as `compute_dtype` does."""
    trainer = config.trainer
    if trainer.num_threads != "auto":
        return trainer.num_threads
    share = usable_cores() // (trainer.world_size // trainer.num_hosts)
    gains = share > 1 and _is_on_cpu(trainer.device)
    return share if gains and _gains_from_threads(config) else trainer.least_threads


def uses_fp32_head(config: Config) -> bool:
    """The resolved `model.fp32_head`. Raises ConfigError as `compute_dtype` does."""
    setting = config.model.fp32_head
    return compute_dtype(config) == "bfloat16" if setting == "auto" else setting


def router_dtype(config: Config) -> Dtype:
    """The resolved `model.router_dtype`. Raises ConfigError as `compute_dtype` does."""
    setting = config.model.router_dtype
    return compute_dtype(config) if setting == "auto" else setting


def recomputation(config: Config) -> Recomputation:
    """The resolved `trainer.gradient_checkpointing`."""
    setting = config.trainer.gradient_checkpointing
    return not _is_on_cpu(config.trainer.device) if setting == "auto" else setting


def resolved(config: Config) -> Config:
    """The configuration with its `auto` settings resolved. Raises ConfigError as `compute_dtype` does, and
    for a model whose attention would not fit on a GPU in that dtype, or cannot be divided among
    `trainer.context_parallel` ranks.
    """
    config = dataclasses.replace(
        config.with_resolved_objective(),
        model=dataclasses.replace(
            config.model,
            dtype=compute_dtype(config),
            fp32_head=uses_fp32_head(config),
            router_dtype=router_dtype(config),
        ),
        trainer=dataclasses.replace(config.trainer, gradient_checkpointing=recomputation(config)),
    )
    _check_attention(config)
    _check_context(config)
    return config


def start_limit_s(config: Config) -> float:
    """Longest time without output of an engine that starts or loads weights, in seconds.

    This is `rollout.start_timeout_s` plus the time to read the weights of the model and of a reward model. No
    time is added for a model that is given by its hub name or built by the run.
    """
    folders = [Path(path).expanduser() for path in (config.model.path, config.scorer.path) if path]
    num_bytes = sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors"))
    return config.rollout.start_timeout_s + num_bytes / LEAST_BYTES_PER_S


def _check_attention(config: Config) -> None:
    """Raises ConfigError for an attention that would hold L x L scores for each head. In float32, torch has
    no flash attention on GPUs, and its memory-efficient kernel does not support grouped queries. What remains
    needs 137 GB for 32 heads and 32k tokens.
    """
    if config.trainer.attention == "varlen" and config.model.dtype == "float32":
        raise ConfigError(
            "trainer.attention=varlen is a kernel for 16 bits, and model.dtype is float32: set "
            "model.dtype=bfloat16, or trainer.attention=auto"
        )
    longest = max(config.rollout.max_context, config.sampling.max_new_tokens + 1)
    is_affected = config.model.dtype == "float32" and not _is_on_cpu(config.trainer.device)
    if not is_affected or longest <= LONG_TOKENS or config.model.path in BUILT_MODELS:
        return
    facts = model_facts(config, needed_for=f"sequences of {longest} tokens")
    num_heads = facts.get("num_attention_heads")
    if facts.get("num_key_value_heads", num_heads) != num_heads:
        raise ConfigError(
            f"model.dtype=float32 with sequences of {longest} tokens on "
            f"trainer.device={config.trainer.device}: beyond {LONG_TOKENS} tokens no attention kernel fits "
            "this model (grouped queries) into memory: set model.dtype=bfloat16"
        )


def _check_context(config: Config) -> None:
    size = config.trainer.context_parallel
    if size == 1 or config.model.path in BUILT_MODELS:  # a built model is checked where it is loaded
        return
    obstacle = context_obstacle(model_facts(config, needed_for=f"trainer.context_parallel={size}"), size)
    if obstacle:
        raise ConfigError(obstacle)


def _is_all_on_cpu(config: Config) -> bool:
    return _is_on_cpu(config.trainer.device) and _is_on_cpu(config.rollout.engine_device)


def _dtype_on_cpu(config: Config) -> tuple[Dtype, str]:
    if config.rollout.engine != "embedded":
        return "float32", "SGLang on a CPU"
    flags = cpu_flags()
    # A model is looked at only where its size matters.
    num_parameters = _num_parameters(config) if fast_bfloat16(flags) else 0
    return cpu_dtype(flags, num_parameters=num_parameters)


def _gains_from_threads(config: Config) -> bool:
    return usable_cores() > 1 and _num_parameters(config) >= LEAST_PARAMETERS


def _num_parameters(config: Config) -> int:
    """The parameters of the policy, by its config.json: embeddings, attention and MLPs, all experts. 0 if it
    does not tell them, or cannot be read, which is an error where the model is loaded."""
    if config.model.path in BUILT_MODELS:
        return _BUILT_PARAMETERS[config.model.path]
    try:
        facts = model_facts(config, needed_for="the choice of dtype and threads on a CPU")
    except ConfigError:
        return 0

    def number(*names: str) -> int:
        values = (facts.get(name) for name in names)
        return next((value for value in values if type(value) is int and value > 0), 0)

    hidden, layers = number("hidden_size"), number("num_hidden_layers")
    heads = number("num_attention_heads") or 1
    head_dim = number("head_dim") or hidden // heads
    attention = 2 * hidden * head_dim * (heads + (number("num_key_value_heads") or heads))
    experts = number("num_experts", "n_routed_experts") or 1
    inner = experts * number("moe_intermediate_size", "intermediate_size")
    return number("vocab_size") * hidden + layers * (attention + 3 * hidden * inner)


def _is_on_cpu(device: str) -> bool:
    return device == "cpu"


def model_facts(config: Config, *, needed_for: str) -> dict[str, Any]:
    """The model's config.json, or its text section if it has several. Raises ConfigError."""
    path = model_path(config)
    try:
        file = Path(path) / "config.json"
        if not file.is_file():
            # Imported here: it takes half a second, which only a model of the hub needs.
            from huggingface_hub import hf_hub_download

            file = Path(hf_hub_download(path, "config.json"))
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={config.model.path}: config.json, which {needed_for} needs, cannot be read: "
            f"{first_line(error)}"
        ) from None
    if not isinstance(facts, dict):
        raise ConfigError(f"model.path={config.model.path}: config.json is not a JSON object")
    text = facts.get("text_config")
    return facts | text if isinstance(text, dict) else facts
