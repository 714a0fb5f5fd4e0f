"""Builds a `Config` from a command line: hydra composes the YAML files, the dataclasses check the result.

Every role (`buffer`, `trainer`, `rollout_server`) accepts the same two forms:

    python -m buffer key=value ...                               composes configs/ with these settings
    python -m buffer --config run/config.yaml key=value ...      reads a resolved file, then applies them

The launcher starts its children with the second form.

`objective`, `advantage` and `task` are open mappings, so `objective.cap=8` and
`objective._target_=my_module.MyObjective` need no `+` in front; the variables of `rollout.sglang.env` do not
need it either. Both forms accept the presets in configs/, e.g. `objective=ppo`. Values that hydra's grammar
cannot parse (`model.path=~/x`, `name=a,b`) are taken literally, so that users need no nested quotes.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from areal_like.config import Config, from_mapping, to_mapping
from areal_like.config.common import NAME, NAME_RULE
from areal_like.errors import ConfigError, first_line

OPEN_SECTIONS = ("objective", "advantage", "task")
GROUPS = ("model", *OPEN_SECTIONS)
"""Sections that have presets in configs/: `model=smollm2` selects one."""
SCALE = "scale"
"""Presets of whole jobs: `scale=8xh100_8b` is `--config configs/scale/8xh100_8b.yaml`."""
_OPEN_PREFIXES = (*(f"{section}." for section in OPEN_SECTIONS), "rollout.sglang.env.", "eval.sets.")
_OPEN_MAPPINGS = tuple(f"{section}={{" for section in (*OPEN_SECTIONS, "eval.sets"))
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class OneValue(argparse.Action):
    """Stores the value of an option. Raises ConfigError if the option is repeated or its value is empty."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if not values:
            raise ConfigError(f"{option_string}: the value is empty")
        if getattr(namespace, self.dest) is not None:
            raise ConfigError(f"{option_string} is given more than once")
        setattr(namespace, self.dest, values)


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--config FILE`; None by default."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        action=OneValue,
        help="begin with the settings of a config.yaml, such as that of another run",
    )


class Options(argparse.ArgumentParser):
    """The `--options` of one role; all other arguments on its command line are settings.

        options = Options()
        add_config_option(options)
        values, settings = options.parse_known_args(argv)

    Unlike plain argparse, a mistake raises ConfigError with one message instead of printing the usage and
    exiting.
    """

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError where argparse would exit."""
        raise ConfigError(message)


def presets(section: str) -> list[str]:
    """Names that `section=name` accepts."""
    return sorted(path.stem for path in (CONFIGS / section).glob("*.yaml"))


def shows_help(argv: Sequence[str], text: str | None) -> bool:
    """Writes the help of `python -m role` and returns True if `argv` contains -h or --help.

    `text` describes the role's options.
    """
    options = Options()
    options.add_argument("-h", "--help", action="store_true")
    if not options.parse_known_args(list(argv))[0].help:
        return False
    common = (
        "--config FILE reads a resolved config.yaml, key=value changes it. "
        "All keys: `areal-like run --help-all`."
    )
    sys.stdout.write(f"{(text or '').strip()}\n\n{common}\n")
    return True


def load_config(argv: Sequence[str]) -> Config:
    """The configuration that `--config FILE` (optional) and `key=value` settings describe.

    Raises ConfigError with a message of one line.
    """
    options = Options()
    add_config_option(options)
    values, settings = options.parse_known_args(list(argv))
    for setting in settings:
        if "=" not in setting or setting.startswith("-"):
            raise ConfigError(f"cannot read {setting!r}: settings are given as key=value (see --help)")
    _refuse_mixed_choices(settings)
    file, settings = _whole_job(values.config, settings)
    raw = _compose(settings) if file is None else _from_file(file, settings)
    return from_mapping(raw)


def role_arguments(argv: Sequence[str], *, default_name: str) -> tuple[Config, str]:
    """(configuration, daemon name) of one role: the arguments of `load_config` and `--name rollout-1`.

    Raises ConfigError.
    """
    options = Options()
    options.add_argument("--name", action=OneValue)
    values, rest = options.parse_known_args(list(argv))
    name = values.name or default_name
    if not NAME.fullmatch(name):
        raise ConfigError(f"--name {name[:80]}: {NAME_RULE}")
    return load_config(rest), name


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration so that `--config` reads it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    OmegaConf.save(OmegaConf.create(to_mapping(config)), partial)
    partial.replace(path)  # a daemon that starts meanwhile reads the old file or the new one


def keep_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration of a job whose roles are started by hand, if there is none yet.

    Settings that belong to this process alone are left out.
    """
    if path.exists():
        return
    security = dataclasses.replace(config.security, identity="")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    save_config(dataclasses.replace(config, security=security), partial)
    try:
        os.link(partial, path)  # unlike a rename, it replaces nothing that another shard has written
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        partial.replace(path)
    partial.unlink(missing_ok=True)


def _refuse_mixed_choices(settings: Sequence[str]) -> None:
    """Raises ConfigError for settings that would mix a class with the settings chosen for another one."""
    chosen: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        section, _, rest = key.lstrip("+").partition(".")
        if section in OPEN_SECTIONS and rest == "name":
            raise ConfigError(
                f"{setting}: write {section}={value} for the preset, "
                f"or '{section}={{name: {value}}}' for the class's own defaults"
            )
        if section in GROUPS and rest in ("", "_target_"):
            if section in chosen:
                raise ConfigError(f"{chosen[section]} and {setting} both choose the {section}: give only one")
            chosen[section] = setting


def _whole_job(config: str | None, settings: list[str]) -> tuple[Path | None, list[str]]:
    """(the file that `--config` or `scale=PRESET` names, the other settings)"""
    chosen = [setting for setting in settings if setting.startswith(f"{SCALE}=")]
    if not chosen:
        return None if config is None else Path(config), settings
    if config is not None or len(chosen) > 1:
        raise ConfigError(f"--config and {SCALE}=PRESET both choose the whole job: give one of them, once")
    name = chosen[0].partition("=")[2]
    if name not in presets(SCALE):
        raise ConfigError(f"{chosen[0]}: known choices are {', '.join(presets(SCALE))}")
    return CONFIGS / SCALE / f"{name}.yaml", [setting for setting in settings if setting not in chosen]


def _from_file(path: Path, overrides: list[str]) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        merged: Any = OmegaConf.load(path)
        defaults = to_mapping(Config())
        # A single setting of a section that the file leaves out changes that section's default.
        merged = OmegaConf.merge({key: defaults[key] for key in OPEN_SECTIONS if key not in merged}, merged)
        settings = []
        for override in overrides:
            section, _, choice = override.partition("=")
            if section.removesuffix("._target_") in OPEN_SECTIONS:
                # The class is replaced, so the settings of the old one in the file do not apply.
                merged[section.removesuffix("._target_")] = {}
            if section in GROUPS and not choice.startswith("{"):
                merged = OmegaConf.merge(merged, _preset(section, choice))
            else:
                settings.append(override)
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(settings))
    except ConfigError:
        raise
    except YAMLError as error:
        raise ConfigError(f"--config {path}: no YAML ({' '.join(str(error).split())})") from None
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"--config {path}: {first_line(error)}") from None
    return _plain(merged)


def _preset(section: str, choice: str) -> Any:
    if choice not in presets(section):
        raise ConfigError(_unknown_preset(section, choice))
    file = CONFIGS / section / f"{choice}.yaml"
    preset = OmegaConf.load(file)
    is_global = file.read_text().startswith("# @package _global_")
    return preset if is_global else OmegaConf.create({section: preset})


def _compose(overrides: list[str]) -> dict[str, Any]:
    # Imported here because it takes half a second, and a child started with --config does not need it.
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException

    defaults = to_mapping(Config())
    base = {key: value for key, value in defaults.items() if not _is_replaced(key, overrides)}
    ConfigStore.instance().store(name="base", node=base)
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose("config", overrides=[_readable(override) for override in _open(overrides)])
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, overrides, defaults)) from None
    return _plain(composed)


def _is_replaced(section: str, overrides: list[str]) -> bool:
    """True if a preset, a `_target_` or a whole mapping replaces the default of an open section."""
    return section in OPEN_SECTIONS and any(
        override.startswith((f"{section}=", f"{section}._target_=")) for override in overrides
    )


def _open(overrides: list[str]) -> Iterator[str]:
    """The overrides in hydra's grammar, with `++` for keys of open sections, which may be new."""
    for override in overrides:
        is_open = override.startswith((*_OPEN_PREFIXES, *_OPEN_MAPPINGS))
        yield f"++{override}" if is_open else override


def _readable(override: str) -> str:
    """The override, with its value in quotes if hydra could not parse it as a single value."""
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
        raise ConfigError(first_line(error)) from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _explain(error: Exception, overrides: list[str], defaults: dict[str, Any]) -> str:
    """hydra's error in one line, with the nearest key or the known presets."""
    known = list(_dotted(defaults))
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~")
        if key not in known and not key.startswith(_OPEN_PREFIXES):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else "see --help for the keys"
            return f"unknown key `{key}`: {hint}"
        # hydra raises a bare ValueError for `objective=null`.
        if key in GROUPS and ("Could not find" in str(error) or "Got NoneType" in str(error)):
            return _unknown_preset(key, override.partition("=")[2])
    return first_line(error)


def _unknown_preset(section: str, choice: str) -> str:
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
