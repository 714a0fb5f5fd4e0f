"""PEFT's directories: adapter_config.json and adapter_model.safetensors, read and written.

Only what `lora.py` computes is read: one rank and one alpha for all layers, matrices A and B of linear
layers. A reader that looks only at the matrices would silently ignore everything else that PEFT can put into
such a directory, so each is refused by the name of its key. Pickles (`adapter_model.bin`) are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_like.config import LoraConfig
from areal_like.errors import ConfigError, WeightSyncError, first_line
from areal_like.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from areal_like.weights.adapters import PEFT_PREFIX, AdapterHeader
from areal_like.weights.hf_layout import adapter_tensors
from areal_like.weights.snapshots_on_disk import ADAPTER_STATE, STATE_FILE
from trainer.models.row_loading import copy_rows, listed
from trainer.models.safetensors_rows import SafetensorsRows, find_file

CONFIG_FILE, WEIGHTS_FILE, _PICKLE = ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin"
_CHECKED = frozenset({"peft_type", "r", "lora_alpha", "bias", "use_rslora", "init_lora_weights"})
_WITHOUT_EFFECT = frozenset(
    {
        *(
            "auto_mapping",
            "base_model_name_or_path",
            "revision",
            "task_type",
            "inference_mode",
            "peft_version",
        ),
        *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("eva_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    }
)
"""Keys that do not change what given matrices compute; which layers have some is seen from their names."""
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base as it is."""
_ONLY_PLAIN = "only plain LoRA is supported: name another adapter, or merge this one with PEFT"


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the user of a command changes if an adapter does not fit the base model."""

    base: str
    """If it belongs to another base; `{base}` is the one that adapter_config.json names."""
    layers: str
    """If it lacks matrices of some layers; `{names}` are the last parts of the names of those that it has."""

    def other_base(self, path: str) -> str:
        """The text of `base` for the adapter in `path`. Raises ConfigError if it has no configuration."""
        return self.base.replace("{base}", base_of(path))


_SETTINGS = Advice(
    base="set model.path to {base}, the adapter's base",
    layers="set model.lora.targets=[{names}] (every layer of these names needs its matrices)",
)
"""Of the commands with the settings `model.path` and `model.lora`."""


def read_adapter(model: Any, settings: LoraConfig, *, base: str, rank: int, world_size: int) -> None:
    """Copies this rank's rows of the adapter in `model.lora.path` into a model with an adapter.

    `model`: a sharded transformers model. `base`: digest of its base (`adapters.base_digest`). Raises
    ConfigError that names the key or the tensor that does not fit, before anything is copied.
    """
    source = open_adapter(settings.path)
    check_config(settings.path, read_config(settings.path), settings)
    check_base(settings.path, base=base)
    copy_adapter(model, source, rank=rank, world_size=world_size)


def open_adapter(path: str, *, key: str = "model.lora.path") -> SafetensorsRows:
    """The matrices of a PEFT directory or hub name. Raises ConfigError. `key`: the setting that named it."""
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    if (file := find_file(path, WEIGHTS_FILE)) is not None:
        return SafetensorsRows([file])
    if find_file(path, _PICKLE) is not None:
        raise ConfigError(
            f"{key}={path}: its weights are a pickle ({_PICKLE}), which is not read here: convert it with "
            "PeftModel.from_pretrained(...).save_pretrained(DIRECTORY) and name that"
        )
    raise ConfigError(f"{key}={path}: no {WEIGHTS_FILE} there: name a directory that PEFT has written")


def read_config(path: str, *, key: str = "model.lora.path") -> dict[str, Any]:
    """adapter_config.json of a PEFT directory or hub name. Raises ConfigError."""
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    file = find_file(path, CONFIG_FILE)
    if file is None:
        raise ConfigError(f"{key}={path}: no {CONFIG_FILE} there: name a directory that PEFT has written")
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({first_line(error)}): {_ONLY_PLAIN}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not a JSON object: name a directory that PEFT has written")
    return config


def check_config(path: str, config: Mapping[str, Any], settings: LoraConfig) -> None:
    """Raises ConfigError if the matrices compute something else than those of `settings`."""
    check_plain(path, config)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if rank != settings.rank:
        raise ConfigError(
            f"model.lora.rank={settings.rank}: the adapter in {path} has rank {rank}: set "
            f"model.lora.rank={rank}"
        )
    if alpha != settings.alpha:
        raise ConfigError(
            f"model.lora.alpha={settings.alpha:g}: the adapter in {path} has alpha {alpha}: set "
            f"model.lora.alpha={alpha}"
        )


def check_plain(path: str, config: Mapping[str, Any]) -> None:
    """Raises ConfigError, by key, for an adapter that is more than A and B of one rank and alpha."""

    def refuse(key: str, why: str) -> ConfigError:
        return ConfigError(f"{path}/{CONFIG_FILE}: {key}={json.dumps(config[key])}: {why}")

    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{path}/{CONFIG_FILE}: peft_type={config.get('peft_type')}: {_ONLY_PLAIN}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not _is_positive(rank) or not _is_positive(alpha):
        raise ConfigError(f"{path}/{CONFIG_FILE}: r={rank}, lora_alpha={alpha}: want positive numbers")
    if config.get("bias", "none") != "none":
        raise refuse("bias", _ONLY_PLAIN)
    if config.get("use_rslora"):
        raise refuse(
            "use_rslora",
            f"its scale is alpha / sqrt(rank): set use_rslora to false there and lora_alpha to "
            f"{config['lora_alpha'] * math.sqrt(config['r']):g}, which computes the same",
        )
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise refuse(
            "init_lora_weights",
            "this start changes the base model too: save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it",
        )
    for key, value in config.items():
        if key not in _CHECKED | _WITHOUT_EFFECT and value:
            raise refuse(key, _ONLY_PLAIN)


def check_base(path: str, *, base: str, advice: Advice = _SETTINGS) -> None:
    """Raises ConfigError if the directory is a checkpoint of a run with another base."""
    file = Path(path).expanduser() / STATE_FILE
    if not file.is_file():
        return
    try:
        header = AdapterHeader.from_dict(read_json(file)[ADAPTER_STATE])
    except (OSError, ValueError, KeyError, TypeError, WeightSyncError) as error:
        raise ConfigError(f"{file} cannot be read ({error!r}): name another adapter") from None
    if header.base != base:
        raise ConfigError(f"{path} was trained on another base: {advice.other_base(path)}")


def base_of(path: str, *, key: str = "model.lora.path") -> str:
    """Directory or name of the model that the adapter belongs to, as its adapter_config.json names it."""
    return str(read_config(path, key=key).get("base_model_name_or_path") or "the model that it was made for")


def copy_adapter(model: Any, source: SafetensorsRows, *, rank: int, world_size: int) -> None:
    """Copies this rank's rows of the adapter of a sharded model. Raises ConfigError before it copies."""
    check_adapter_of(model, source)
    tensors = adapter_tensors(model)
    stored = {tensor.name: [tensor.name] for tensor in tensors}
    copy_rows(model, source, tensors, stored, rank=rank, world_size=world_size)


def check_adapter_of(model: Any, source: SafetensorsRows, *, advice: Advice = _SETTINGS) -> None:
    """Raises ConfigError unless the file has exactly the matrices of the model's adapter."""
    check_layers(model, source, advice=advice)
    wanted = {tensor.name: tensor.shape for tensor in adapter_tensors(model)}
    where = source.folder / WEIGHTS_FILE
    names = [name for name in source.names if name not in wanted]
    missing = [name for name in wanted if name not in source.names]
    if names or missing:
        what = f"has matrices for {listed(names)}" if names else f"lacks {listed(missing)}"
        there = ",".join(layer_names(source))
        raise ConfigError(f"{where} {what}: {advice.layers.replace('{names}', there)}")
    for name, shape in wanted.items():
        if source.shape(name) != shape:
            raise ConfigError(
                f"{where}: {name} has shape {list(source.shape(name))}, and {type(model).__name__} needs "
                f"{list(shape)}: {advice.other_base(str(source.folder))}"
            )
        if not source.is_float(name):
            raise ConfigError(f"{where}: {name} is not a floating-point tensor: name another adapter")


def layer_names(source: SafetensorsRows) -> tuple[str, ...]:
    """The last parts of the names of the layers that have matrices in a file, sorted."""
    return tuple(sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in source.names}))


def check_layers(model: Any, source: SafetensorsRows, *, advice: Advice = _SETTINGS) -> None:
    """Raises ConfigError if the file has other tensors than A and B, or matrices of layers that the model,
    with or without an adapter, does not have."""
    where = source.folder / WEIGHTS_FILE
    foreign = [name for name in source.names if ".lora_A." not in name and ".lora_B." not in name]
    if foreign:
        raise ConfigError(f"{where} holds {listed(foreign)}: {_ONLY_PLAIN}")
    layers = {f"{PEFT_PREFIX}{name}" for name, _ in model.named_modules()}
    absent = [name for name in source.names if name.rpartition(".lora_")[0] not in layers]
    if absent:
        raise ConfigError(
            f"{where} has matrices for {listed(absent)}, which {type(model).__name__} does not have: "
            f"{advice.other_base(str(source.folder))}"
        )


def write_config(directory: Path, header: AdapterHeader, *, base: str) -> None:
    """Writes adapter_config.json. `base`: directory or name of the base model; a directory is written as an
    absolute path."""
    folder = Path(base).expanduser()
    model = str(folder.resolve()) if folder.is_dir() else base
    text = json.dumps(header.peft_config(model=model), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n")


def check_same_adapter(path: Path, state: Mapping[str, Any], header: AdapterHeader | None) -> None:
    """Raises ConfigError unless a checkpoint's state file belongs to this adapter and base; None: to none.

    `path`: the checkpoint, for messages.
    """
    if (ADAPTER_STATE in state) != (header is not None):
        kind = "an adapter" if ADAPTER_STATE in state else "all weights of a model"
        change = "set model.lora.rank to its rank" if header is None else "set model.lora.rank=0"
        raise ConfigError(f"{path} is a checkpoint of {kind}: {change}, or start a new run")
    if header is None:
        return
    there = AdapterHeader.from_dict(state[ADAPTER_STATE])
    for key, of_run, of_job in (
        ("model.lora.rank", there.rank, header.rank),
        ("model.lora.alpha", there.alpha, header.alpha),
        ("model.lora.targets", ",".join(there.targets), ",".join(header.targets)),
    ):
        if of_run != of_job:
            raise ConfigError(f"{path} was trained with {key}={of_run}, not {of_job}: resume with that")
    if there.base != header.base:
        raise ConfigError(
            f"{path} was trained on another base (model.path={base_of(str(path))}), or its files have "
            "changed: resume with that model"
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
