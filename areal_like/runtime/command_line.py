"""Builds a `Config` from a command line: settings in hydra's grammar change the defaults or a file.

Every role (`buffer`, `trainer`, `rollout_server`) accepts the same two forms:

    python -m buffer key=value ...                               begins with the defaults
    python -m buffer --config run/config.yaml key=value ...      begins with a resolved file

The launcher starts its children with the second form. Both accept the presets in configs/, e.g.
`objective=ppo`, which apply before the other settings. A value that hydra's grammar cannot parse
(`model.path=~/x`, `name=a,b`) is read as text, so that users need no nested quotes. The dataclasses check the
result, unknown keys included.

Left out: `hydra.compose`. It refuses new keys in `objective`, `advantage` and `task`, which are open
mappings, and takes 0.1 s of CPU time at the start of every daemon.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from areal_like.config import Config, from_mapping, to_mapping
from areal_like.config.common import NAME, NAME_RULE
from areal_like.errors import ConfigError, first_line
from areal_like.paths import RunPaths, replacing

OPEN_SECTIONS = ("objective", "advantage", "task")
GROUPS = ("model", *OPEN_SECTIONS)
"""Sections that have presets in configs/: `model=smollm2` selects one."""
DEFAULTS_BEFORE: dict[str, dict[str, Any]] = {
    "model": {"fp32_head": False, "router_dtype": "float32"},
    "trainer": {"kernels": "torch"},
}
"""Settings that did not exist when some runs began, and what those runs did: their numbers stay the same."""
SCALE = "scale"
"""Presets of whole jobs: `scale=8xh100_8b` is `--config configs/scale/8xh100_8b.yaml`."""
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


def add_config_option(parser: argparse._ActionsContainer) -> None:
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

    Unlike with plain argparse, a mistake raises ConfigError with one message, without printing the usage and
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
            is_file = setting.endswith((".yaml", ".yml"))
            hint = f"write --config {setting}" if is_file else "settings are given as key=value (see --help)"
            raise ConfigError(f"cannot read {setting!r}: {hint}")
    _refuse_mixed_choices(settings)
    file, settings = _whole_job(values.config, settings)
    return from_mapping(_merged(file, settings))


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
    return load_role_config(rest), name


def load_role_config(argv: Sequence[str]) -> Config:
    """`load_config` for a daemon: with what its run has chosen, or the one that `objective=auto` is."""
    config = load_config(argv)
    own = RunPaths.of(config).config
    return with_kept_choices(config, argv, own=own).with_resolved_objective()


def with_kept_choices(config: Config, argv: Sequence[str], *, own: Path) -> Config:
    """The configuration, with the objective and `model.dtype` that the run's own config.yaml has where `auto`
    is only a default.

    Another release may have another default objective, and another machine another dtype, and a run keeps its
    own. `objective=auto` or `model.dtype=auto` in `argv` chooses again. A file that cannot be read changes
    nothing.
    """

    def is_given(key: str) -> bool:
        return any(arg.lstrip("+").startswith(f"{key}=") for arg in argv)

    keeps_objective = bool(config.objective_choice) and not is_given("objective")
    keeps_dtype = config.model.dtype == "auto" and not is_given("model.dtype")
    if not (keeps_objective or keeps_dtype) or not own.is_file():
        return config
    try:
        kept = load_config(["--config", os.fspath(own)])
    except ConfigError:
        return config
    if keeps_dtype:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=kept.model.dtype))
    if keeps_objective:
        changed = {key: value for key, value in config.objective.items() if key != "name"}
        config = dataclasses.replace(config, objective=kept.objective | changed)
    return config


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration so that `--config` reads it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        OmegaConf.save(OmegaConf.create(_escaped(to_mapping(config))), partial)


_INTERPOLATION = re.compile(r"(\\*)\$\{")


def _escaped(value: Any) -> Any:
    """Plain values in which `${` in a text is no interpolation: those of the user are resolved by now."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return _INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value


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
        os.link(partial, path)  # unlike a rename, this does not replace what another shard has written
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


def _merged(file: Path | None, settings: Sequence[str]) -> dict[str, Any]:
    """The defaults, or the settings in a file, changed by presets and then by the other settings."""
    where = "" if file is None else f"--config {file}: "
    defaults = to_mapping(Config())
    try:
        if file is None:
            merged: Any = OmegaConf.create(defaults)
        elif not file.is_file():
            raise ConfigError(f"{where}no such file")
        else:
            merged = OmegaConf.load(file)
            if not isinstance(merged, DictConfig):
                raise ConfigError(f"{where}want a mapping of settings")
            _add_defaults_before(merged)
            # A single setting of a section that the file leaves out changes that section's default.
            merged.update({key: defaults[key] for key in OPEN_SECTIONS if key not in merged})
        overrides = [(setting, *_parsed(setting)) for setting in settings]
        for setting, key, value in overrides:
            section = key.removesuffix("._target_")
            if section in OPEN_SECTIONS:
                merged[section] = {}  # another class: the settings of the previous one do not apply
            if key in GROUPS and not isinstance(value, dict):
                merged = OmegaConf.merge(merged, _preset(key, setting.partition("=")[2]))
        for _, key, value in overrides:
            if key not in GROUPS or isinstance(value, dict):
                OmegaConf.update(merged, key, value)
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except ConfigError:
        raise
    except YAMLError as error:
        raise ConfigError(f"{where}not YAML ({' '.join(str(error).split())})") from None
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise ConfigError(f"{where}{first_line(error)}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


_MODEL_BEFORE = frozenset(
    {"path", "dtype", "warm_start_steps", "warm_start_swap_prob", "renderer", "chat_template_kwargs"}
)
"""Settings of `model` that every file of a run of an earlier release has."""


def _add_defaults_before(file: DictConfig) -> None:
    """Adds DEFAULTS_BEFORE to the settings of a file that a run of an earlier release wrote."""
    # Only the file that a run has written names every setting of its release. `OmegaConf.merge` would take as
    # long as reading the file.
    if not _MODEL_BEFORE.issubset(file.get("model") or {}):
        return
    for section, settings in DEFAULTS_BEFORE.items():
        known = file.setdefault(section, {})
        if isinstance(known, DictConfig):
            known.update({key: value for key, value in settings.items() if key not in known})


def _parsed(setting: str) -> tuple[str, Any]:
    """The key and the value of a setting, by hydra's grammar; a value that it cannot parse is a text.

    `++key=value` and `+key=value` are the same as `key=value`.
    """
    # Imported here: it takes 0.05 s, and commands without settings do not need it.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, text = setting.lstrip("+").partition("=")
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
        if not override.is_sweep_override():
            return key, override.value()
    except HydraException:
        pass
    if text.startswith(("[", "{", "'", '"')):
        raise ConfigError(f"cannot read {setting.lstrip('+')!r}: do its brackets and quotes match?")
    return key, text


def _preset(section: str, choice: str) -> Any:
    if choice not in presets(section):
        raise ConfigError(_unknown_preset(section, choice))
    file = CONFIGS / section / f"{choice}.yaml"
    preset = OmegaConf.load(file)
    is_global = file.read_text().startswith("# @package _global_")
    return preset if is_global else OmegaConf.create({section: preset})


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
