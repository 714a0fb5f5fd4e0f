"""The code of the guides: it compiles, runs, and is as short as the text says."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from areal_like.config import Config
from areal_like.runtime.command_line import load_config
from launch.audit.run import audit_run
from rollout_server.environments.scripted import call, play, say
from rollout_server.tasks import Completion, Score, Task, make_task
from rollout_server.tasks.tools import ToolTask
from rollout_server.tools import Tool
from tests.rollout_server.sandbox.test_sandbox import problem_of_bwrap
from tests.support.launching import (
    ROOT,
    TEST_LIMIT_S,
    areal_like,
    finish,
    launcher,
    num_steps_done,
    wait_until,
)

_BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```", re.M | re.S)
_NAME = re.compile(r"# (\w+)\.py\n")


def blocks_of(page: str) -> list[str]:
    text = (ROOT / "docs" / "guides" / f"{page}.md").read_text()
    return [textwrap.dedent(body) for _, body in _BLOCK.findall(text)]


def modules_of(page: str) -> dict[str, str]:
    """Name of a file -> its code, of the blocks that begin with a comment with their file."""
    named = ((_NAME.match(block), block) for block in blocks_of(page))
    return {match[1]: block for match, block in named if match}


@pytest.fixture
def guides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of both guides, imported."""
    sources = modules_of("task") | modules_of("environment")
    for name, code in sources.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield {name: importlib.import_module(name) for name in sources}
    for name in sources:
        del sys.modules[name]


@pytest.mark.parametrize("page", sorted(path.stem for path in (ROOT / "docs" / "guides").glob("*.md")))
def test_code_of_a_guide_compiles(page: str) -> None:
    for block in blocks_of(page):
        ast.parse(block)


def test_an_agent_has_fifteen_lines() -> None:
    """Apart from its imports."""
    (agent,) = (code for name, code in modules_of("agents").items() if name == "my_agent")
    (task,) = (node for node in ast.parse(agent).body if isinstance(node, ast.ClassDef))
    assert num_lines(task, agent) <= 15


def agent_commands() -> list[str]:
    """The commands of the section about your own agent, each as one line."""
    page = (ROOT / "docs" / "guides" / "agents.md").read_text()
    section = page.split("## Your own agent", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    return [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]


def test_the_guide_has_the_commands_of_an_agent() -> None:
    install, real, check = agent_commands()
    assert install == "pip install openai" and "model=smollm2" in real and "TinyRenderer" in check


@pytest.mark.long
@pytest.mark.timeout(TEST_LIMIT_S)
def test_the_agent_of_the_guide_runs_without_a_model(tmp_path: Path, cache: dict[str, str]) -> None:
    """With the command that the guide gives for it, and a small budget."""
    (tmp_path / "my_agent.py").write_text(modules_of("agents")["my_agent"])
    program, verb, *settings = shlex.split(agent_commands()[-1])
    assert (program, verb) == ("areal-like", "run")
    small = [
        "name=x",
        "trainer.num_steps=1",
        "eval.num_prompts=4",
        "trainer.groups_per_step=4",
        "sampling.group_size=4",
    ]  # and as many samples at a time as by default
    environment = cache | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with launcher(*settings, *small, cwd=tmp_path, environment=environment) as process:
        code, out, err = finish(process, tmp_path / "runs" / "x")
    assert (code, err) == (0, ""), out + err


@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.chaos
@pytest.mark.parametrize("attempt", [1, 2, 3])
def test_a_reader_of_the_guide_trains_an_agent(tmp_path: Path, attempt: int) -> None:
    """What the guide says, in a shell in an empty directory of a machine without caches, beside two programs
    that need a core each. The goal is the first trained samples within ten minutes."""
    started_s = time.monotonic()
    environment = reader_environment(tmp_path)
    work, run = tmp_path / "work", tmp_path / "work" / "runs" / "default"
    work.mkdir()
    install, _, check = agent_commands()
    (work / "my_agent.py").write_text(modules_of("agents")["my_agent"])
    with busy_loops(2), (tmp_path / "out").open("w") as out:
        shell: dict[str, Any] = {"cwd": work, "env": environment, "stdin": subprocess.DEVNULL, "stdout": out}
        shell["stderr"] = subprocess.STDOUT
        subprocess.run(["bash", "-c", install], check=True, **shell)
        with subprocess.Popen(["bash", "-c", f"exec {check}"], start_new_session=True, **shell) as job:
            try:
                wait_until(
                    lambda: num_steps_done(run) > 0,
                    what="the first trained samples",
                    run_root=run,
                    process=job,
                )
                seconds = time.monotonic() - started_s
                os.killpg(job.pid, signal.SIGINT)  # Ctrl-C
                job.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGKILL)
                print((tmp_path / "out").read_text())
    assert job.returncode == 0
    audit = audit_run(run)
    assert audit.is_clean and not audit.failures, "\n".join(audit.lines())
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    print(f"attempt {attempt}: samples of {row['turns']:.1f} turns trained after {seconds:.0f} s")
    assert seconds < 600.0


def reader_environment(directory: Path) -> dict[str, str]:
    """That of a shell in which this environment is active, without what tests or users have set."""
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "HOME") if key in os.environ}
    path = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"PATH": path, "XDG_CACHE_HOME": str(directory / "cache")}


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Other programs, each of which needs a core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def num_lines(node: ast.AST, source: str) -> int:
    segment = ast.get_source_segment(source, node)
    assert segment is not None
    return sum(bool(line.strip()) for line in segment.splitlines())


def test_an_environment_has_twenty_lines_and_a_tool_five() -> None:
    sources = modules_of("environment")
    environment = sources["my_agents"]
    assert sum(bool(line.strip()) for line in environment.splitlines()[1:]) <= 20
    tools = sources["my_cities"]
    functions = [node for node in ast.parse(tools).body if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: num_lines(node, tools) for node in functions}
    assert lengths == {"population": 5}


def test_a_reader_of_the_coding_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Its programs run, its environment rewards a repair, and its commands have settings that exist."""
    if problem := problem_of_bwrap():
        pytest.skip(problem)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, code in modules_of("coding").items():
        (tmp_path / f"{name}.py").write_text(code)
    runpy.run_path(str(tmp_path / "look_at_one.py"))
    said = capsys.readouterr().out
    assert "FAILED (failures=1)" in said and "\nOK\n" in said and "\n1.0 {" in said
    task = importlib.import_module("my_repairs").Repairs()
    for content, reward in (("print(42)\n", 1.0), ("print(41)\n", 0.0)):
        turns = [call("read", path="app.py"), call("write", path="app.py", content=content), say("done")]
        episode = play(task.environment(task.example("train", 0)), turns)
        assert episode.reward == reward and episode.messages[2]["content"] == "print(0 + 1)\n"
    page = (ROOT / "docs" / "guides" / "coding.md").read_text().replace("\\\n", " ")
    runs = re.findall(r"^areal-like run (.*)$", page, re.M)
    assert [load_config(shlex.split(line)).task["name"] for line in runs] == ["coding", "coding"]
    (box,) = [block for block in blocks_of("environment") if "make_sandbox" in block]
    exec(box, {})
    assert capsys.readouterr().out == "42\n 0 False False\nb'print(6 * 7)\\n'\n"


def test_tests_of_the_guide_pass(guides: dict[str, ModuleType]) -> None:
    tests = [
        (name, test) for name, test in vars(guides["test_my_cities"]).items() if name.startswith("test_")
    ]
    assert [name for name, _ in tests] == ["test_larger", "test_guess"]
    for _, test in tests:
        test()


def test_tasks_of_the_guides(guides: dict[str, ModuleType]) -> None:
    """All can be made by configuration, and are pure; environments start and take a reply."""
    found = []
    for name, module in guides.items():
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, Task) and cls.__module__ == name:
                settings = {"tools": ["calculator"]} if issubclass(cls, ToolTask) else {}
                task = make_task({"_target_": f"{name}.{cls.__name__}", **settings}, seed=0)
                task.fingerprint()
                found.append(cls.__name__)
                if (environment := task.environment(task.example("train", 0))) is not None:
                    assert play(environment, [say("5")]).messages[-1]["role"] in ("user", "assistant")
    assert found == ["Reverse", "Digits", "Halves", "Doubling", "GuessNumber", "Cities", "Powers"]


def test_rewards_of_the_task_guide(guides: dict[str, ModuleType]) -> None:
    def reward(target: str, completion: str, **settings: str) -> object:
        task = make_task({"_target_": target, **settings}, seed=0)
        example = task.example("train", 1)
        return task.reward(example, Completion(completion.format(answer=example.answer)))

    assert reward("my_tasks.Reverse", "{answer}") == 1.0
    score = reward("my_scores.Digits", "{answer}")
    assert isinstance(score, Score) and score.value == score.parts["digits"] == 1.0
    program = "print(2 * int(input()))"
    assert reward("my_programs.Doubling", program, sandbox="rlimits") == 1.0
    assert reward("my_programs.Doubling", "print(1)", sandbox="rlimits") == 0.0
    pytest.importorskip("math_verify", reason="needs areal-like[rewards]")
    score = reward("my_library.Halves", "{answer}")
    assert isinstance(score, Score) and score.parts == {"math": 1.0, "exact": 0.1}


def test_tools_of_the_environment_guide(guides: dict[str, ModuleType]) -> None:
    """The settings that the page shows for `tools` are valid."""
    page = (ROOT / "docs" / "guides" / "environment.md").read_text()
    names = []
    for block in re.findall(r"```yaml\n(.*?)```", page, re.S):
        task = make_task(yaml.safe_load(block)["task"], seed=0)
        assert isinstance(task, ToolTask)
        names.append([one.name if isinstance(one, Tool) else type(one).__name__ for one in task.make_tools()])
    assert names == [["calculator", "python", "search"], ["calculator", "MCPServer", "MCPServer"]]


def own_data() -> str:
    return (ROOT / "docs" / "guides" / "own-data.md").read_text()


def own_data_configurations() -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", own_data(), re.S)


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the files of the guide: its code, its first configuration, and the rows."""
    modules = modules_of("own-data")
    assert list(modules) == ["make_rows", "my_rewards"]
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "job.yaml").write_text(own_data_configurations()[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runpy.run_path("make_rows.py")
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def own_commands() -> list[list[str]]:
    """The words of each call of `areal-like` in the transcript."""
    lines = re.findall(r"^\$ areal-like (.*)$", own_data(), re.M)
    return [shlex.split(line) for line in lines]


def test_own_data_has_the_rows_that_it_shows(own_files: Path) -> None:
    shown = re.findall(r'^\{"question.*$', own_data(), re.M)
    assert len(shown) == 2 and shown == (own_files / "train.jsonl").read_text().splitlines()[:2]
    function = ast.parse(modules_of("own-data")["my_rewards"]).body[0]
    assert num_lines(function, modules_of("own-data")["my_rewards"]) <= 5


def test_settings_of_own_data(own_files: Path) -> None:
    """The file and the settings of every command are valid; the task makes examples, and scores them."""
    verbs = [words[0] for words in own_commands()]
    assert verbs == ["data", "sft", "run", "samples", "samples", "eval"]
    configs: list[Config] = []
    for verb, *words in own_commands():
        if verb in ("sft", "run", "eval"):
            settings = [word for word in words if "=" in word]
            configs.append(load_config(["--config", "job.yaml", *settings]))
    for config in configs:
        assert list(config.eval.sets) == ["greedy", "sampled"]
        assert config.eval.sets["sampled"].k == (1, 4, 8)
    task = make_task(configs[0].task, seed=0)
    assert (task.num_train, task.num_eval) == (2240, 200)
    example = task.example("train", 0)
    assert (example.answer, example.label) == ("bbcdggh", "long")
    for text, value in (("bbcdggh", 1.0), ("bbcdghg", 0.5 * 5 / 7), ("", 0.0)):
        score = task.reward(example, Completion(text))
        assert isinstance(score, Score) and score.value == pytest.approx(value)
        assert sorted(score.parts) == ["letters", "whole"]


def test_other_configurations_of_own_data(own_files: Path) -> None:
    """The blocks for a real model and for a mixture: their settings are valid, their tasks can be made."""
    _, real, mixture = own_data_configurations()
    for number, block in enumerate((real, mixture)):
        Path(f"{number}.yaml").write_text(block)
        config = load_config(["--config", f"{number}.yaml"])
        task = make_task(config.task, seed=0)
        assert task.example("train", 0).prompt
        for one in config.eval.sets.values():
            assert make_task(one.task, seed=0).example("eval", one.num_prompts - 1).prompt


@pytest.mark.chaos
def test_commands_of_own_data(own_files: Path) -> None:
    """All commands of the transcript, as they stand there; the model gets better, and pass@k is reported."""
    for words in own_commands():
        told = areal_like(*words, cwd=own_files)
        assert told.returncode == 0, (words, told.stdout, told.stderr)
    evaluations = own_files / "runs" / "letters" / "evaluations.jsonl"
    rows = [json.loads(line) for line in evaluations.read_text().splitlines()]
    sampled = [row for row in rows if row["set"] == "sampled"]
    assert [row["step"] for row in sampled] == [0, 100, 200]
    assert list(sampled[0]["pass_at_k"]) == ["1", "4", "8"]
    assert sampled[-1]["avg"] > sampled[0]["avg"] + 0.05
