"""The coding task: its repositories, its tools, and what an agent can do to be rewarded without a repair."""

from __future__ import annotations

import json
import sys
import types
import unittest
from collections.abc import Iterator

import pytest

from areal_like.errors import ConfigError, SandboxError
from rollout_server.environments.base import Reply
from rollout_server.environments.scripted import Episode, call, play, say
from rollout_server.tasks.base import Task, make_task
from rollout_server.tasks.coding import CodingTask
from rollout_server.tasks.coding.environment import RepairEnvironment
from rollout_server.tasks.coding.repositories import TEMPLATES, TESTS, Repository, bugs_of
from tests.rollout_server.sandbox.test_sandbox import SEES_THE_INTERPRETER, problem_of_bwrap
from tests.support.waiting import HANG_LIMIT_S

DONE = say("DONE")


@pytest.fixture
def task() -> CodingTask:
    if problem := problem_of_bwrap():
        pytest.skip(problem)
    return CodingTask(seed=3)


def repository_of(task: CodingTask, index: int = 0) -> Repository:
    repository = task.example("train", index).answer
    assert isinstance(repository, Repository)
    return repository


def episode_of(task: Task, replies: list[Reply], *, index: int = 0) -> Episode:
    environment = task.environment(task.example("train", index))
    assert isinstance(environment, RepairEnvironment)
    return play(environment, replies)


def outputs(episode: Episode) -> list[str]:
    return [message["content"] for message in episode.messages if message["role"] == "tool"]


def test_examples_are_reproducible_and_the_splits_disjoint() -> None:
    task, again = CodingTask(seed=5), CodingTask(seed=5)
    assert [task.example("train", n) for n in range(20)] == [again.example("train", n) for n in range(20)]
    assert task.fingerprint() == again.fingerprint() != CodingTask(seed=6).fingerprint()
    train, held_out = (
        {(t.source, b.wrong) for t, b in bugs_of(held_out=is_held_out)} for is_held_out in (False, True)
    )
    assert not train & held_out and len(train | held_out) == sum(len(one.bugs) for one in TEMPLATES)
    examples = [task.example("train", n) for n in range(60)]
    assert len({example.label for example in examples}) >= 8
    assert len({example.answer.package for example in examples}) >= 6


@pytest.mark.parametrize("split", ["train", "eval"])
def test_each_bug_shows_in_visible_tests_and_hidden_calls(split: str) -> None:
    """Every bug of the split, with other names and constants, and one to three modules."""
    seen = set()
    for index in range(60):
        task = CodingTask(num_modules=1 + index % 3)
        repository = task.example(split, index).answer  # type: ignore[arg-type]
        seen.add((repository.kind, repository.repaired != repository.files[repository.broken]))
        assert any(one.shows_bug for one in repository.hidden)
        assert len({(one.function, str(one.arguments)) for one in repository.hidden}) == len(
            repository.hidden
        )
        for content, fails in ((repository.files[repository.broken], True), (repository.repaired, False)):
            assert is_failing(repository, content) is fails, (repository.kind, content)
    assert all(differs for _, differs in seen)
    assert {kind for kind, _ in seen} == {bug.kind for _, bug in bugs_of(held_out=split == "eval")}


def is_failing(repository: Repository, content: str) -> bool:
    """Runs the visible tests in this process: the sources are those of the templates."""
    files = {**repository.files, repository.broken: content}
    made = {}
    package = types.ModuleType(repository.package)
    made[repository.package] = package
    for path, source in files.items():
        folder, _, name = path.partition("/")
        if folder == repository.package and name != "__init__.py":
            module = types.ModuleType(f"{folder}.{name.removesuffix('.py')}")
            exec(source, module.__dict__)
            made[module.__name__] = module
            setattr(package, name.removesuffix(".py"), module)
    tests = types.ModuleType("tests_of_repository")
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        exec(files[TESTS], tests.__dict__)
    finally:
        for name, module_before in before.items():
            if module_before is None:
                del sys.modules[name]
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(tests.Tests).run(result)
    return not result.wasSuccessful()


@SEES_THE_INTERPRETER
def test_a_repair_is_rewarded(task: CodingTask) -> None:
    repository = repository_of(task)
    episode = episode_of(
        task,
        [
            call("read"),
            call("read", path="README.md"),
            call("read", path=f"/tmp/{repository.package}/"),
            call("read", path=repository.broken),
            call("run_tests"),
            call("edit", path=repository.broken, old=repository.files[repository.broken], new="broken("),
            call("run_tests"),
            call("edit", path=f"./{repository.broken}", old="", new=repository.repaired),
            call("run_tests"),
            DONE,
        ],
    )
    listed, readme, package, source, failing, _, broken, _, passing = outputs(episode)
    assert sorted(listed.splitlines()) == sorted(repository.files)
    assert readme == repository.files["README.md"] and source == repository.files[repository.broken]
    assert package.splitlines() == [name for name in sorted(repository.files) if "/" in name]
    assert "FAILED (failures=1)" in failing and "SyntaxError" in broken and passing.endswith("\nOK")
    assert episode.is_done and episode.reward == 1.0
    assert episode.metrics["edits"] == 2 and episode.metrics["test_runs"] == 3
    assert episode.metrics["repaired"] == episode.metrics["tests_passed"] == 1


def test_without_a_repair_there_is_no_reward(task: CodingTask) -> None:
    """Nor for changed tests, nor for a package without the function, nor for one that breaks another."""
    repository = repository_of(task)
    other = next(
        name
        for name in repository.files
        if name.startswith(f"{repository.package}/")
        and name not in (repository.broken, f"{repository.package}/__init__.py")
    )
    empty = "import unittest\nclass Tests(unittest.TestCase):\n    def test_nothing(self): pass\n"
    for turns in (
        [],
        [call("edit", path=TESTS, old="", new=empty), call("run_tests")],
        [call("edit", path=repository.broken, old="", new="")],
        [
            call("edit", path=repository.broken, old="", new=repository.repaired),
            call("edit", path=other, old="", new=repository.files[other].replace("return", "return None #")),
        ],
    ):
        for give in ("all", "share"):
            episode = episode_of(make_task({"name": "coding", "give": give}, seed=3), [*turns, DONE])
            assert episode.is_done and episode.reward == 0.0, turns
    assert episode.metrics["broke"] == 1 and episode.metrics["repaired"] == 0


CHEATS = {
    "ends the process": "import os\nos._exit(0)\n",
    "prints a result": "import sys\nfor number in range(99): print('nonce', number, 'null')\n",
    "equals everything": (
        "class Any(list):\n    def __eq__(self, other): return True\n"
        "def __getattr__(name): return lambda *arguments: Any()\n"
    ),
    "looks for the values": (
        "import gc, sys\n"
        "found = [one for one in gc.get_objects() if isinstance(one, dict) and 'expected' in one]\n"
        "def __getattr__(name): return lambda *arguments: found\n"
    ),
    "replaces the harness": (
        "import json, os, builtins\n"
        "json.dumps = lambda *_, **__: '[null, null]'\nos.write = lambda *_: 0\nbuiltins.print = None\n"
    ),
    "hangs": "while True: pass\n",
    "forks": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
    "floods": "while True: print('x' * 65536)\n",
    "fills the disk": (
        "for number in range(10**6):\n"
        "    with open(f'/tmp/{number}', 'wb') as file: file.write(bytes(1 << 20))\n"
    ),
}
ENDLESS = ("hangs", "forks", "floods")


@pytest.mark.parametrize("cheat", CHEATS)
def test_hostile_code_is_not_rewarded_and_ends(task: CodingTask, cheat: str) -> None:
    """The tests run it, then the hidden calls: what it does is an output, and the reward is 0."""
    limit_s = 2.0 if cheat in ENDLESS else HANG_LIMIT_S
    limited = CodingTask(seed=3, timeout_s=limit_s, file_mb=4)
    repository = repository_of(limited)
    turns = [call("edit", path=repository.broken, old="", new=CHEATS[cheat]), call("run_tests")]
    if cheat == "fills the disk":
        turns.append(call("edit", path="more", old="", new="x" * 60_000))
    episode = episode_of(limited, [*turns, call("read"), DONE])
    assert episode.is_done and episode.reward == 0.0 and episode.metrics["repaired"] == 0
    if cheat == "hangs":
        assert "[killed after 2 s]" in outputs(episode)[1]
    if cheat == "fills the disk":
        assert (
            "No space left" in outputs(episode)[1] and "Error: files cannot be written" in outputs(episode)[2]
        )


def test_a_wrong_call_is_told_to_the_agent(task: CodingTask) -> None:
    repository = repository_of(task)
    episode = episode_of(
        task,
        [
            call("read", path="missing.py"),
            call("read", path="../../etc/passwd"),
            call("edit", path=TESTS, old="self", new="me"),
            call("edit", path="../x", old="", new="y"),
            call("edit", path="big", old="", new="x" * 70_000),
            call("edit", path=repository.package, old="", new="a file in place of the package"),
            call("edit", path="new/module.py", old="", new="1\n"),
            call("read", path="new"),
            DONE,
        ],
    )
    assert ["Error" in one[:5] for one in outputs(episode)] == [True] * 6 + [False] * 2
    assert "must occur exactly once" in outputs(episode)[2] and outputs(episode)[-1] == "new/module.py"
    assert episode.metrics["tool_errors"] == 6 and episode.metrics["edits"] == 1


def test_a_lost_sandbox_fails_the_sample(task: CodingTask) -> None:
    environment = task.environment(task.example("train", 0))
    assert isinstance(environment, RepairEnvironment)

    def replies() -> Iterator[Reply]:
        yield call("read")
        environment._open._program.process.kill()  # type: ignore[attr-defined]
        yield call("run_tests")

    with pytest.raises(SandboxError, match="the sandbox has ended"):
        play(environment, replies())


def test_tools_in_the_prompt() -> None:
    task = CodingTask(describes_tools=True)
    environment = task.environment(task.example("train", 0))
    assert isinstance(environment, RepairEnvironment) and not environment.tools
    system = environment._prompt[0]
    assert isinstance(system, dict) and "<tool_call>" in system["content"]
    schemas = [json.loads(line) for line in system["content"].splitlines() if line.startswith('{"name"')]
    assert [one["name"] for one in schemas] == ["read", "edit", "run_tests"]


def test_settings() -> None:
    assert isinstance(make_task({"name": "coding", "num_modules": 3}, seed=1), CodingTask)
    for wrong, message in (
        ({"give": "some"}, "use all or share"),
        ({"timeout_s": 0}, "timeout_s=0.0: must be above 0"),
        ({"file_mb": -1}, "file_mb=-1: must be above 0"),
        ({"sandbox": "none"}, "choose one of bwrap"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_task({"name": "coding", **wrong}, seed=3)
    with pytest.raises(ConfigError, match="num_modules=99: want 1 to 10"):
        CodingTask(num_modules=99).example("train", 0)
