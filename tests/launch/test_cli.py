"""The command line: one message and exit code 2 for a mistake, and a quick start."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from areal_like.config import Config
from areal_like.errors import ConfigError
from areal_like.runtime.command_line import load_config, save_config
from launch.cli import COMMANDS, main, parser_of
from launch.commands.output import private_file
from launch.commands.parser import VERBS
from launch.settings_help import all_keys

ROOT = Path(__file__).resolve().parents[2]


def areal_like(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command as a process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "launch", *args],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["rnu"], "unknown command 'rnu': did you mean `run`?"),
        (["xyzzy"], "unknown command 'xyzzy': `areal-like --help` lists them"),
        (["status", "nowhere", "--wathc"], "unrecognized arguments: --wathc: did you mean --watch? (usage"),
        (
            ["run", "trainer.num_stpes=3"],
            "unknown key `trainer.num_stpes`: did you mean `trainer.num_steps`?",
        ),
        (
            ["status", "--watch", "nowhere"],
            "'nowhere' is not a time from 0.1 to 86400 s, such as 60s or 5m; put RUN before --watch (usage",
        ),
        (["run", "trainer.num_steps=0"], "trainer.num_steps must be at least 1"),
        (["run", "max_staleness=soon"], "max_staleness"),
        (["run", "objective=magic"], "known choices are"),
        (["run", "fast"], "key=value"),
        (["run", "--config", "nowhere.yaml"], "no such file"),
        (["run", "--config"], "run: argument --config: expected one argument"),
        (["run", "--config", "a.yaml", "seed=1", "--config", "b.yaml"], "--config is given more than once"),
        (["run", "resume=latest"], "there is no run in"),
        (["run", "runs_dir=/proc/1/nowhere"], "cannot create the run directory"),
        (["status", "nowhere"], "no run 'nowhere'"),
        (["status", "x" * 300], "no run 'xxx"),
        (["run", "runs_dir=~no.such.user/x"], "runs_dir=~no.such.user/x: this machine has no such user"),
        (["samples", "nowhere", "--step", "9" * 30], "expected a number of at least 0"),
        (["samples", "nowhere", "--ticket", "-1"], "expected a number of at least 0"),
        (["audit", "nowhere"], "no run 'nowhere'"),
        (["score-server", "nowhere"], "score-server: no directory /"),
        (["audit"], "audit: the following arguments are required: RUN"),
        (["drop", "nowhere"], "drop: the following arguments are required: TICKET"),
        (["drop", "nowhere", "x"], "'x' is not a ticket number"),
        (["replay", "objective=ppo"], "replay: put the run before the settings"),
        (["status"], "status: the following arguments are required: RUN"),
        (["version", "--foo"], "version: unrecognized arguments: --foo"),
        (["rollout", "nowhere"], "rollout: the following arguments are required: --join"),
        (["rollout", "--join", "name=x"], "rollout --join: there is no buffer to join"),
        (
            ["rollout", "nowhere", "--join", "--config", "job.yaml"],
            "rollout: --config is for the form without RUN: the settings of nowhere are in its directory",
        ),
        (["rollout", "--join", "--buffer", "a:1", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["replay"], "replay: the following arguments are required: RUN (usage"),
        (["restart", "nowhere"], "restart: the following arguments are required: ROLE (usage"),
        (["restart", "nowhere", "trainer"], "no run 'nowhere'"),
        (["restart", "nowhere", "trainer.lr=1"], "areal-like restart RUN trainer trainer.KEY=VALUE"),
        (["run", "model=/models/X"], "is model.path=/models/X"),
        (["run", "objective=tsi"], "did you mean tis?"),
    ],
)
def test_a_mistake_is_one_message_and_code_2(
    args: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o022)
    try:
        assert main(args) == 2
    finally:
        os.umask(before)
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.strip().splitlines()) == 1 and shown.out == ""
    assert not list(tmp_path.iterdir()), "a mistake has left files behind"


def test_a_process_ends_with_the_code_of_a_mistake(tmp_path: Path) -> None:
    done = areal_like("run", "trainer.num_steps=0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "areal-like: trainer.num_steps must be at least 1, not 0\n"


def test_a_mistyped_run_gets_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sort").mkdir(parents=True)
    (tmp_path / "runs" / "sort" / "config.yaml").touch()
    assert main(["why", "srot"]) == 2
    assert capsys.readouterr().err == "areal-like: there is no run 'srot': did you mean sort?\n"


def test_help_names_the_keys_with_their_defaults(tmp_path: Path) -> None:
    done = areal_like("run", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert (
        "model.path=tiny" in done.stdout
        and "rollout.engine=" in done.stdout
        and "--config FILE" in done.stdout
    )
    assert (
        "trainer.num_steps=" in done.stdout
        and "max_staleness=4" in done.stdout
        and "model=smollm2 | tiny" in done.stdout
    )
    assert len(done.stdout.splitlines()) < 110


def test_the_overview_has_one_line_for_each_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb, summary in COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.split()[:1] == [verb] and summary in line]
    assert max(map(len, lines)) <= 90
    assert len(lines) < 60
    files = (ROOT / "launch" / "commands").glob("*.py")
    declared = {path.stem for path in files if "@command(" in path.read_text()}
    mains = {parser_of(verb).declared.main.__module__ for verb in COMMANDS}
    assert {f"launch.commands.{name}" for name in declared} == mains
    assert set(VERBS) == set(COMMANDS)


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_has_usage_description_options_and_valid_examples(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert main(["help", verb]) == 0
    assert capsys.readouterr().out == shown
    parser = parser_of(verb)
    assert shown.startswith(f"usage: {parser.format_usage()}\n\n")
    assert parser.description and parser.description.split(".")[0].split()[-1] in shown
    for action in parser._actions:
        assert action.help, f"{action.dest} has no help"
        assert all(option in shown for option in action.option_strings) or action.help == argparse.SUPPRESS
    assert parser.declared.examples
    for example in parser.declared.examples:
        assert f"\n  areal-like {example}\n" in shown
        first, *words = shlex.split(example)
        assert first == verb
        parsed = parser_of(verb, words).parse_words(words)
        if settings := [word for word in getattr(parsed, "settings", []) if "=" in word]:
            load_config(settings)


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help-all"], ["rollout", "x", "--help"]])
def test_help_returns_0(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    assert "areal-like" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["buffer", "rollout_server", "trainer", "trainer.prepare_model"])
def test_roles_have_help(module: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m {module}" in done.stdout and "--config FILE" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_printed_defaults_are_valid_settings(tmp_path: Path) -> None:
    defaults = [f"{setting.key}={setting.default}" for setting in all_keys()]
    assert load_config(defaults) == Config()
    save_config(Config(), tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml"), *defaults]) == Config()


def test_no_command_imports_torch_or_a_daemon() -> None:
    code = (
        "import sys, launch.cli\n"
        "for verb in launch.cli.COMMANDS:\n"
        "    launch.cli.parser_of(verb)\n"
        "daemons = ('torch', 'transformers', 'buffer', 'trainer', 'rollout_server')\n"
        "print([name for name in daemons if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("words", [["run", "--help-all"], ["--help"]])
def test_a_reader_that_has_ended_is_no_failure(words: list[str]) -> None:
    """As with `areal-like run --help-all | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "launch", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["--help", "plan --help"])
def test_a_closed_stdout_is_no_failure(words: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m launch {words} >&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with private_file(pipe, verb="report") as file:
        file.write(b"page")
    assert os.read(reader, 10) == b"page" and pipe.is_fifo()
    os.close(reader)
    (link := tmp_path / "stdout").symlink_to(tmp_path / "redirected")
    (tmp_path / "redirected").touch()
    with private_file(link, verb="report") as file:
        file.write(b"page")
    assert link.is_symlink() and link.read_bytes() == b"page"
    with pytest.raises(ConfigError, match="Is a directory"), private_file(tmp_path, verb="report"):
        pass
