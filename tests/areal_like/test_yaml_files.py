"""Reading and writing settings gives what OmegaConf's and hydra's own code gives, in less time."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from areal_like.config import Config, to_mapping
from areal_like.errors import ConfigError
from areal_like.runtime import command_line
from areal_like.runtime.command_line import CONFIGS, load_config, save_config
from areal_like.runtime.yaml_files import read_yaml, to_yaml

ODD = """
texts: [on, 'on', "1e3", 2001-01-01, 12:30:45, "tab\\there", "é 😀", '${a}', "???", ~, null, '', 'a: b', '#c']
numbers: [1e-4, 1_000, 0x1f, 0o17, .5, -.inf, .nan, 1e3, +1, 010, 1.5e+3]
&anchor nested: {deep: [[], {}, {a: [1, {b: c}]}], again: &list [1, 2]}
alias: *list
block: |
  two
  lines
folded: >-
  one
  line
3: key is a number
"""


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_files_are_read_as_by_omegaconf(file: Path) -> None:
    assert read_yaml(file) == OmegaConf.to_container(OmegaConf.load(file), resolve=False)


@pytest.mark.parametrize(
    "text", [ODD, "", "word", "- a\n- b", "a:\n\tb: 1", "a: 1\na: 2", "a: [", "\x07: 1", "- - - &a"]
)
def test_odd_files_too(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    try:
        want = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        with pytest.raises(type(error)) as caught:
            read_yaml(file)
        assert str(caught.value) == str(error)
    else:
        assert repr(read_yaml(file)) == repr(want)


def test_a_deeply_nested_file_ends_no_process(tmp_path: Path) -> None:
    """The parser in C has no recursion limit of Python's."""
    file = tmp_path / "x.yaml"
    for text in ("[" * 200_000, "a: " + "{a: " * 200_000, "".join(f"{' ' * i}a:\n" for i in range(3000))):
        file.write_text(text)
        with pytest.raises((yaml.YAMLError, RecursionError)):
            read_yaml(file)


def test_settings_are_written_as_by_omegaconf(tmp_path: Path) -> None:
    words = {
        "texts": ["on", "1", "1e3", "a: b", "- c", "", "é", "${a}", "x" * 200, " y "],
        "none": None,
        "no": False,
    }
    for plain in (to_mapping(Config()), words):
        text = to_yaml(plain)
        assert text == OmegaConf.to_yaml(OmegaConf.create(plain))
        (tmp_path / "x.yaml").write_text(text)
        assert read_yaml(tmp_path / "x.yaml") == plain


def test_a_list_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("- a")
    with pytest.raises(ConfigError, match=r"x\.yaml: want a mapping"):
        load_config(["--config", str(tmp_path / "x.yaml")])


def test_a_file_alone_is_what_it_is_with_a_setting(tmp_path: Path) -> None:
    save_config(load_config(["objective=ppo", "model.path=/a/b"]), tmp_path / "x.yaml")
    alone = load_config(["--config", str(tmp_path / "x.yaml")])
    assert alone == load_config(["--config", str(tmp_path / "x.yaml"), "seed=0"])
    (tmp_path / "x.yaml").write_text("trainer: {num_steps: '${seed}'}\nseed: 7")
    assert load_config(["--config", str(tmp_path / "x.yaml")]).trainer.num_steps == 7


@given(
    st.from_regex(command_line._SIMPLE, fullmatch=True)
    | st.sampled_from(["-0", "x.true", "a-1/b.c", "/tmp/x-0/y"])
)
def test_a_simple_value_is_what_hydra_reads(text: str) -> None:
    want = OverridesParser.create().parse_override(f"k={text}").value()
    key, value = command_line._parsed(f"k={text}")
    assert (key, value, type(value)) == ("k", want, type(want))
