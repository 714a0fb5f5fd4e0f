"""The documentation: links, length of the README, and pages that must name every setting or message.

`make docs` also builds the site with every warning an error; these tests need none of its packages.
"""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from areal_like.runtime.command_line import load_config
from areal_like.wire.messages import MESSAGES
from launch.cli import COMMANDS, overview, parser_of
from launch.settings_help import all_keys
from tests.support.launching import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGURATION = runpy.run_path(str(ROOT / "docs" / "conf.py"))
_FENCE = re.compile(r"^ *```.*?^ *```", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def known_settings() -> set[str]:
    return {setting.key for setting in all_keys()}


def prose_of(page: Path) -> str:
    """The page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in _LINK.findall(prose_of(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_file() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_images_are_used() -> None:
    text = "".join(page.read_text() for page in PAGES)
    images = [path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".svg")]
    assert [image.name for image in images if image.name not in text] == []


def test_settings_page_has_every_key() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text()
    for comment, generate in CONFIGURATION["GENERATED"].items():
        page = page.replace(comment, generate())
    cells = [re.split(r"(?<!\\)\|", row) for row in page.splitlines() if row.startswith("| `")]
    assert sorted(key.strip("` ") for _, key, *_ in cells) == sorted(known_settings())
    assert {len(row) for row in cells} == {6}  # four cells between five bars: no text splits a row


def test_site_check_finds_remote_resources(tmp_path: Path) -> None:
    remote_resources = CONFIGURATION["remote_resources"]
    page = tmp_path / "index.html"
    page.write_text(
        '<a href="https://example.org">a link</a><script src="a.js"></script><link rel="icon" href="b">'
    )
    assert remote_resources(tmp_path) == []
    for loads in (
        '<script async src="https://cdn.example.org/a.js">',
        '<img alt="" src="//example.org/a.png">',
        '<link rel="stylesheet" href="https://fonts.example.org/css">',
        '<style>@import "https://fonts.example.org/css";</style>',
    ):
        page.write_text(loads)
        assert len(remote_resources(tmp_path)) == 1, loads


def test_wire_page_names_every_message() -> None:
    page = (ROOT / "docs" / "reference" / "wire.md").read_text()
    assert [cls.__name__ for cls in MESSAGES.values() if f"`{cls.__name__}`" not in page] == []


def test_commands_on_the_pages_exist() -> None:
    blocks = "\n".join(block for page in PAGES for block in _FENCE.findall(page.read_text()))
    used = set(re.findall(r"^(?:\.venv/bin/)?areal-like ([a-z-]+)", blocks, re.M))
    assert {"run", "status", "audit", "deploy-files"} <= used
    assert used <= set(COMMANDS)


def test_commands_page_has_every_verb_and_option() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    for comment, generate in CONFIGURATION["GENERATED"].items():
        page = page.replace(comment, generate())
    assert overview() in page
    for verb in COMMANDS:
        section = page.split(f"\n### {verb}\n")[1].split("\n### ")[0]
        options = {option for action in parser_of(verb)._actions for option in action.option_strings}
        assert sorted(option for option in options - {"--words"} if option not in section) == []


def test_settings_on_the_pages_exist() -> None:
    known = known_settings()
    sections = "|".join({name.partition(".")[0] for name in known if "." in name})
    setting = re.compile(rf"`((?:{sections})\.[a-z_.]+[a-z])(?:=[^`]*)?`")
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]  # it names modules that are gone
    used = {name for page in pages for name in setting.findall(page.read_text())}
    modules = {name for name in used if list(ROOT.glob(f"{name.replace('.', '/')}*")) or name.endswith(".py")}
    unknown = {
        name for name in used - known - modules if not any(key.startswith(f"{name}.") for key in known)
    }
    files = {"model.safetensors", "model.safetensors.index.json", "metrics.jsonl", "scorer.token"}
    # A method of transformers, and a column of verl's rows.
    assert unknown - files == {"model.generate", "reward_model.ground_truth"}


def run_commands() -> list[str]:
    """The arguments of every `areal-like run` in a code block, without comments and placeholders."""
    blocks = "\n".join(block for page in PAGES for block in _FENCE.findall(page.read_text()))
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines()
    found = [line.partition("areal-like run")[2] for line in lines if "areal-like run " in line]
    return sorted(
        {line.partition("  #")[0].replace(" ...", "").strip() for line in found if "KEY" not in line}
    )


@pytest.mark.parametrize("arguments", [line for line in run_commands() if "=" in line and "key=" not in line])
def test_run_commands_are_valid_settings(arguments: str, tmp_path: Path) -> None:
    words = [word for word in shlex.split(arguments) if word != "--dry-run"]
    shown = {word: files_on_pages()[word] for word in words if word in files_on_pages()}
    for name, text in shown.items():
        (tmp_path / name).write_text(text)
    assert load_config([str(tmp_path / word) if word in shown else word for word in words])


def files_on_pages() -> dict[str, str]:
    """Name -> content of the YAML files that pages show whole, with their names in the first line."""
    blocks = [block for page in PAGES for block in _FENCE.findall(page.read_text())]
    named = ((re.search(r"^# (\w+\.yaml)\n", block, re.M), block) for block in blocks)
    return {match[1]: block[match.start() :].rstrip("` \n") for match, block in named if match}


def test_files_named_on_the_pages_exist() -> None:
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    named = {
        (page.name, path) for page in pages for path in re.findall(r"`((?:\w+/)+\w+\.\w+)`", page.read_text())
    }
    written_by_users = ("runs/", "segments/", "model/", "keys/", "rows/", "deploy/")
    missing = [(name, path) for name, path in named if not (ROOT / path).exists()]
    assert [item for item in missing if not item[1].startswith(written_by_users)] == []
