"""Prepares the initial policy: `python -m trainer.prepare_model --config run/config.yaml`.

The result is a Hugging Face directory. This runs once before the daemons start, because trainer and engines
must load the same weights. Models that are built here (`tiny`, `smollm2`) are cached under a hash of
everything that determines them, including the code that builds them, and then linked into the run's
directory, so that the run stays complete when the cache is cleared. Any other model is only checked: its
configuration, its tokenizer, its layers, the kernels that they need, and the names and shapes in its files.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from areal_like import adding, sorting
from areal_like.automatic_settings import compute_dtype
from areal_like.built_model import note_settings
from areal_like.chat import learned_tokens
from areal_like.config import Config
from areal_like.errors import ConfigError, UserError, first_line
from areal_like.paths import RunPaths, cache_dir, model_path
from areal_like.runtime.command_line import Options, load_config, shows_help
from areal_like.runtime.imports import uncollected
from areal_like.runtime.process import die_with_launcher, keep_files_private

log = logging.getLogger(__name__)

TINY_RENDERER = "rollout_server.rendering.tiny.TinyRenderer"
"""`model.renderer` for conversations with the tiny model."""


def prepare_model(config: Config, *, out_dir: Path | None = None, is_reward_model: bool = False) -> str:
    """Makes `config.model` loadable and returns a directory, or the hub name, for `from_pretrained`.

    `out_dir`: directory for a built model; by default the directory of the run that
    `areal_like.paths.model_path` returns. `is_reward_model`: the initial model of a reward model, which may
    be one itself. Raises ConfigError when the model cannot be built, found or loaded.
    """
    if plan_of := _BUILT.get(config.model.path):
        path = str(_cached(config, plan_of(config), out_dir=out_dir or RunPaths.of(config).built_model))
    else:
        path = _check_existing(config, is_reward_model=is_reward_model)
    if config.distill.models:
        from trainer.step.teachers import check_teachers

        check_teachers(config, student=path)
    return path


BuildPlan = tuple[str, Mapping[str, Any], Callable[[Path], None]]
"""(name, everything that determines the result, function that writes the result into a directory)"""


def _tiny(config: Config) -> BuildPlan:
    task = config.task.get("name", config.task.get("_target_"))
    steps = config.model.warm_start_steps
    if task in ("adding", "adding_agent") or (steps == 0 and config.model.renderer == TINY_RENDERER):
        return _tiny_chat(config)
    if steps > 0 and task != "sort":
        raise ConfigError(
            "model.path=tiny is warm-started on the tasks sort, adding and adding_agent, and task is "
            f"{task}: name a pretrained model, or set model.warm_start_steps=0 for random weights"
        )
    key = {
        "seed": config.seed,
        "steps": steps,
        "swap_prob": config.model.warm_start_swap_prob,
        "sources": _sources("tiny", "warm_start", sorting.__file__),
    }

    def build(out_dir: Path) -> None:
        with uncollected():
            from trainer.models import tiny

        tiny.build_tiny_model(
            out_dir, seed=config.seed, warm_start_steps=steps, swap_prob=config.model.warm_start_swap_prob
        )

    return "tiny", key, build


def _tiny_chat(config: Config) -> BuildPlan:
    if config.model.renderer != TINY_RENDERER:
        raise ConfigError(
            f"task={config.task.get('name')} with model.path=tiny needs model.renderer={TINY_RENDERER}, the "
            "format of its tool calls: begin with --config configs/jobs/tools.yaml, or agents.yaml there"
        )
    arguments: dict[str, Any] = {
        "seed": config.seed,
        "warm_start_steps": config.model.warm_start_steps,
        "uses_tool": bool(config.task.get("use_tool", True)),
    }
    shared = (sorting.__file__, adding.__file__, learned_tokens.__file__)
    files = ("tiny", "tiny_chat", "warm_start", *shared)

    def build(out_dir: Path) -> None:
        with uncollected():
            from trainer.models import tiny_chat

        tiny_chat.build_tiny_chat_model(out_dir, **arguments)

    return "tiny-chat", {**arguments, "sources": _sources(*files)}, build


def _sources(*modules: str) -> list[str]:
    """The code of modules of trainer.models, by name, or of other files, by path."""
    # Read instead of imported: a cached model must not cost an import of torch.
    models = Path(__file__).parent / "models"
    paths = (Path(module) if module.endswith(".py") else models / f"{module}.py" for module in modules)
    return [path.read_text() for path in paths]


def _smollm2(config: Config) -> BuildPlan:
    from trainer.models import smollm2

    source = smollm2.smollm2_gguf()
    key = {
        "file": source.name,
        "num_bytes": source.stat().st_size,
        "source": Path(smollm2.__file__).read_text(),
    }
    return "smollm2", key, smollm2.convert_smollm2


_BUILT: Mapping[str, Callable[[Config], BuildPlan]] = {"tiny": _tiny, "smollm2": _smollm2}
"""Value of `model.path` -> plan, for the models that are built here."""


def _cached(config: Config, plan: BuildPlan, *, out_dir: Path) -> Path:
    """Builds the model into the cache unless it is there, and replaces `out_dir` by links to it."""
    name, key, build = plan
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    root = cache_dir()
    cached = root / f"{name}-{digest}"
    if not cached.exists():
        root.mkdir(parents=True, exist_ok=True)
        log.info("building model %s into %s", name, cached)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            build(partial)
            _rename_into_cache(partial, cached)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    linked = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        for file in cached.iterdir():
            _link_or_copy(file, linked / file.name)
        note_settings(config, linked)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        linked.chmod(0o755)
        linked.rename(out_dir)
    finally:
        shutil.rmtree(linked, ignore_errors=True)
    return out_dir


def _rename_into_cache(partial: Path, final: Path) -> None:
    partial.chmod(0o755)
    try:
        partial.rename(final)
    except OSError:
        # Two processes may build the same model at once: the second one uses the model of the first.
        if not final.exists():
            raise


def _link_or_copy(source: Path, target: Path) -> None:
    # Only weights are linked: users edit the small files in place, and an edit must not change the cache.
    if source.suffix == ".safetensors":
        try:
            target.hardlink_to(source)
            return
        except OSError:  # another file system
            pass
    shutil.copy2(source, target)


def _check_existing(config: Config, *, is_reward_model: bool) -> str:
    """Checks everything that needs no weights in memory, before any daemon loads the model."""
    path = model_path(config)  # refuses a directory that does not exist before torch is imported
    with uncollected():
        import torch
        from transformers import AutoConfig, AutoTokenizer

        from areal_like.weights.untrained import auto_class
        from trainer.attention.linear import check_kernels
        from trainer.models.packed_model import DTYPES
        from trainer.models.policy import Policy
        from trainer.models.reward_model import RewardModel

    try:
        found = AutoConfig.from_pretrained(path, trust_remote_code=False)
        is_known = type(found) in auto_class(found)._model_mapping
        AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # for a broken file, tokenizers raises plain exceptions
        raise ConfigError(
            f"model.path={config.model.path}: transformers cannot load a configuration and tokenizer "
            f"from it ({first_line(error)}). Use tiny, smollm2, a directory with config.json, or an "
            "owner/name"
        ) from error
    if not is_known:
        raise ConfigError(
            f"model.path={config.model.path}: transformers has no causal language model of type "
            f"{found.model_type}"
        )
    # This also downloads the files from a hub, once for all processes.
    model = (RewardModel if is_reward_model else Policy).build(path)
    model.check_initial_weights()
    if model.linear_layers:
        dtype = DTYPES[compute_dtype(config)]
        check_kernels(torch.device(config.trainer.device), kind=config.trainer.attention, dtype=dtype)
    return path


def main(argv: list[str]) -> int:
    """`[--config FILE] [--out DIR] [--reward-model] [key=value ...]`; writes the model's path to stdout.

    Exit code 2: a user's mistake.
    """
    if shows_help(argv, f"python -m trainer.prepare_model {inspect.getdoc(main)}\n\n{__doc__}"):
        return 0
    die_with_launcher()
    keep_files_private()
    # One thread, set before torch is imported: a seed then gives the same model on every machine, and a tiny
    # model is built faster.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    try:
        options = Options()
        options.add_argument("--out", type=Path)
        options.add_argument("--reward-model", action="store_true")
        values, settings = options.parse_known_args(argv)
        config = load_config(settings)
        path = prepare_model(config, out_dir=values.out, is_reward_model=values.reward_model)
        sys.stdout.write(path + "\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
