"""From a command line to a `Config`: hydra composes `configs/`, the dataclasses check it.

Two forms, the same for every role:
    python -m buffer key=value ...                    compose from configs/
    python -m buffer --config run/config.yaml ...     a resolved file (what the launcher hands to its children), then overrides

`objective`, `advantage` and `task` are open: `objective.cap=8` or `objective._target_=my_module.MyObjective` need no `+`; so are the
variables of `rollout.sglang.env`. `objective=ppo` takes a preset of configs/ in both forms. Text that hydra's grammar cannot read
(`model.path=~/x`, `name=a,b`) is taken as it stands, so nobody needs quotes within quotes.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from areal_like.config import Config, from_mapping, to_mapping
from areal_like.errors import ConfigError

OPEN_SECTIONS = ("objective", "advantage", "task")
GROUPS = ("model", *OPEN_SECTIONS)
"""Sections that have presets in configs/: `model=smollm2` names one."""
_OPEN_PREFIXES = (*(f"{section}." for section in OPEN_SECTIONS), "rollout.sglang.env.")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def presets(section: str) -> list[str]:
    """Names that `section=name` accepts."""
    return sorted(path.stem for path in (CONFIGS / section).glob("*.yaml") if path.stem != "custom")


def shows_help(argv: Sequence[str], text: str | None) -> bool:
    """Writes the help of `python -m role` where it is asked for; `text`: what the role's own options are."""
    if not any(arg in ("-h", "--help") for arg in argv):
        return False
    common = "--config FILE reads a resolved config.yaml, key=value changes it. All keys: `areal-like run --help-all`."
    sys.stdout.write(f"{(text or '').strip()}\n\n{common}\n")
    return True


def load_config(argv: Sequence[str]) -> Config:
    """The configuration that a command line asks for. Raises ConfigError with one clear message."""
    args = list(argv)
    file: str | None = None
    if "--config" in args:
        at = args.index("--config")
        if at + 1 >= len(args):
            raise ConfigError("--config: name a resolved configuration file")
        file = args[at + 1]
        del args[at : at + 2]
    for arg in args:
        if "=" not in arg or arg.startswith("-"):
            raise ConfigError(f"cannot read {arg!r}: settings are given as key=value (see --help)")
    raw = _compose(args) if file is None else _from_file(Path(file), args)
    return from_mapping(raw)


def role_arguments(argv: Sequence[str], *, default_name: str) -> tuple[Config, str]:
    """(configuration, daemon name) of one role: `--name rollout-1` beside what `load_config` takes."""
    args, name = list(argv), default_name
    if "--name" in args:
        at = args.index("--name")
        if at + 1 >= len(args):
            raise ConfigError("--name: give the daemon's name, e.g. rollout-1")
        name = args[at + 1]
        del args[at : at + 2]
    return load_config(args), name


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration so that `--config` reads it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(to_mapping(config)), path)


def _from_file(path: Path, overrides: list[str]) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        merged: Any = OmegaConf.load(path)
        settings = []
        for override in overrides:
            section, _, choice = override.partition("=")
            if section.removesuffix("._target_") in OPEN_SECTIONS:
                merged[
                    section.removesuffix("._target_")
                ] = {}  # what another class was told is not for this one
            if section in GROUPS and not choice.startswith("{"):
                merged = OmegaConf.merge(merged, _preset(section, choice))
            else:
                settings.append(override)
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(settings))
    except ConfigError:
        raise
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"--config {path}: {_first_line(error)}") from None
    return _plain(merged)


def _preset(section: str, choice: str) -> Any:
    if choice not in presets(section):
        raise ConfigError(_no_choice(section, choice))
    file = CONFIGS / section / f"{choice}.yaml"
    preset = OmegaConf.load(file)
    return (
        preset if file.read_text().startswith("# @package _global_") else OmegaConf.create({section: preset})
    )


def _compose(overrides: list[str]) -> dict[str, Any]:
    from hydra import (
        compose,
        initialize_config_dir,
    )  # hydra costs half a second that a child with --config does not need
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    base = to_mapping(Config())
    ConfigStore.instance().store(name="base", node={k: v for k, v in base.items() if k not in OPEN_SECTIONS})
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose("config", overrides=[_readable(override) for override in _open(overrides)])
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides, base)) from None
    return _plain(composed)


def _open(overrides: list[str]) -> Iterator[str]:
    """Lets open sections take any key, and drops the default's own keys when a `_target_` or a whole mapping replaces it."""
    for section in OPEN_SECTIONS:
        whole = any(o.startswith((f"{section}._target_=", f"{section}={{")) for o in overrides)
        if whole and not any(
            o.startswith(f"{section}=") and not o.startswith(f"{section}={{") for o in overrides
        ):
            yield f"{section}=custom"
    for override in overrides:
        is_open = override.startswith((*_OPEN_PREFIXES, *(f"{section}={{" for section in OPEN_SECTIONS)))
        yield f"++{override}" if is_open else override


def _readable(override: str) -> str:
    """The override with its value in quotes where hydra could not read it as one value otherwise."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        if not OverridesParser.create().parse_override(override).is_sweep_override():
            return override
    except HydraException:
        pass
    key, _, value = override.partition("=")
    if value.startswith(("[", "{", "'", '"')):
        raise ConfigError(f"cannot read {override.lstrip('+')!r}: do its brackets and quotes match?")
    escaped = value.replace('"', '\\"')
    return f'{key}="{escaped}"'


def _plain(node: Any) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _explain(error: Exception, overrides: list[str], base: dict[str, Any]) -> str:
    known = list(_dotted(base))
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key not in known and not key.startswith(_OPEN_PREFIXES):
            near = difflib.get_close_matches(key, known, n=1)
            return f"unknown key `{key}`" + (
                f": did you mean `{near[0]}`?" if near else ": see --help for the keys"
            )
        if key in GROUPS and "Could not find" in str(error):
            return _no_choice(key, override.partition("=")[2])
    return _first_line(error)


def _no_choice(section: str, choice: str) -> str:
    known = presets(section)
    near = difflib.get_close_matches(choice, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    own = (
        f"a Hugging Face directory or name is model.path={choice}"
        if section == "model"
        else f"a class of yours is {section}._target_=..."
    )
    return f"{section}={choice}: {hint}known choices are {', '.join(known)}; {own}"


def _dotted(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
