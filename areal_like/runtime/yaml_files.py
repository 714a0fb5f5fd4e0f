"""YAML as OmegaConf reads and writes it, by the code in C that PyYAML has in most builds.

Every daemon reads the config.yaml of its run when it starts.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_omega_conf_dumper, get_yaml_loader


def read_yaml(file: Path) -> Any:
    """The plain values of `OmegaConf.load(file)`, with interpolations as texts.

    Raises what that raises: YAMLError, OmegaConfBaseException, OSError, ValueError.
    """
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader=_loader())
    except yaml.YAMLError:
        found = None
    if isinstance(found, dict):
        return found
    # A mistake, of which the parser in Python says the file, or values that OmegaConf reads in its own way.
    return OmegaConf.to_container(OmegaConf.load(file), resolve=False)


def to_yaml(plain: dict[str, Any]) -> str:
    """`OmegaConf.to_yaml` of plain values: mappings, lists, texts, numbers, bools and None."""
    style: dict[str, Any] = {"default_flow_style": False, "allow_unicode": True, "sort_keys": False}
    text: str = yaml.dump(plain, Dumper=_dumper(), **style)
    return text


@functools.cache
def _loader() -> Any:
    by_omegaconf = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return by_omegaconf

    class Loader(yaml.cyaml.CParser, by_omegaconf):  # type: ignore[misc]
        def __init__(self, stream: str) -> None:
            yaml.cyaml.CParser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    return Loader


@functools.cache
def _dumper() -> Any:
    by_omegaconf = get_omega_conf_dumper()
    if not yaml.__with_libyaml__:
        return by_omegaconf

    class Dumper(yaml.CDumper, by_omegaconf):  # type: ignore[misc, valid-type]
        """CDumper, with OmegaConf's representers."""

    return Dumper
