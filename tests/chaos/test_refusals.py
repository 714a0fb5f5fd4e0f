"""Models and rows that a command cannot use end it before its first step: exit code 2, one message."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.chaos.test_second_models import REWARD, TASK, TAUGHT, write_files
from tests.support.judge_server import Answer, judge_server
from tests.support.launching import TEST_LIMIT_S, areal_like
from tests.support.reward_models import CONTEXT, write_reward_model
from tests.support.sft_model import write_rows, write_sft_model

PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
SCORED = TASK % REWARD
OF_PAIRS = "reward_model.train={}.jsonl".format
REFUSALS: dict[str, tuple[str, Sequence[str], str]] = {
    "scorer with two labels": ("run", (SCORED, "scorer.path=two"), r"scorer\.path=.*two has 2 labels"),
    "pickled scorer": ("run", (SCORED, "scorer.path=pickled"), r"scorer\.path=.*pickled .*which is a pickle"),
    "teacher without log-probs": (
        "run",
        (*TAUGHT, "distill.teachers.default=URL"),
        r"distill\.teachers: http.*: it returns no log-probs of prompts",
    ),
    "teacher with another tokenizer": (
        "run",
        (*TAUGHT, "distill.teachers.default=chat"),
        r"distill\.teachers\.default=chat: its tokenizer is not the policy's",
    ),
    "pickled teacher": (
        "run",
        (*TAUGHT, "distill.teachers.default=pickled-teacher"),
        r"distill\.teachers\.default=pickled-teacher: .*its weights are pickles",
    ),
    "reward model with two labels": (
        "reward-model",
        ("model.path=two", OF_PAIRS("pairs")),
        r"two: the model has 2 labels",
    ),
    "pickled reward model": (
        "reward-model",
        ("model.path=pickled", OF_PAIRS("pairs")),
        r"pickled: its weights are pickles",
    ),
    "rows beyond the context": (
        "reward-model",
        ("model.path=rm", OF_PAIRS("long")),
        rf"long\.jsonl:2: a completion with its prompt has \d+ tokens, and at most {CONTEXT} fit",
    ),
    "ties alone": (
        "reward-model",
        ("model.path=chat", OF_PAIRS("ties")),
        r"every comparison is a tie.*ties\.jsonl:1",
    ),
    "ties alone, without a reward model": (
        "preferences",
        ("model.path=chat", "preferences.train=ties.jsonl"),
        r"every comparison is a tie.*ties\.jsonl:1",
    ),
    "an empty answer": (
        "preferences",
        ("model.path=chat", "preferences.train=empty.jsonl"),
        r"empty\.jsonl:2: `rejected` is empty",
    ),
    "reference with another tokenizer": (
        "preferences",
        ("model.path=chat", "preferences.train=pairs.jsonl", "preferences.reference=teacher"),
        r"preferences\.reference=teacher: .*(tokenizer|vocabulary)",
    ),
    "a pickle as rows": (
        "preferences",
        ("model.path=chat", "preferences.train=rows.pkl"),
        r"preferences\.train: rows\.pkl is neither JSON lines",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and rows, good and bad ones."""
    folder = tmp_path_factory.mktemp("refusals")
    write_files(folder)
    write_reward_model(folder / "two", num_labels=2)
    write_sft_model(folder / "chat")
    for name, whole in (("pickled", "rm"), ("pickled-teacher", "teacher")):
        shutil.copytree(folder / whole, folder / name)
        (folder / name / "model.safetensors").rename(folder / name / "pytorch_model.bin")
    write_rows(folder / "pairs.jsonl", [PAIR])
    write_rows(folder / "ties.jsonl", [{**PAIR, "tie": True}] * 2)
    write_rows(folder / "empty.jsonl", [PAIR, {**PAIR, "rejected": ""}])
    write_rows(folder / "long.jsonl", [PAIR, {**PAIR, "chosen": "2" * CONTEXT}])
    (folder / "rows.pkl").write_bytes(b"\x80\x04N.")
    return folder


@pytest.mark.chaos
@pytest.mark.timeout(TEST_LIMIT_S)
@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused_at_the_start(name: str, folder: Path, cache: dict[str, str]) -> None:
    verb, words, message = REFUSALS[name]
    with judge_server(Answer(status=404, body=b"no such route")) as other:
        url = other.url.removesuffix("/v1")
        settings = [word.replace("URL", url) for word in words]
        if verb == "run":
            settings.append("model.warm_start_steps=0")
        done = areal_like(verb, "name=x", *settings, cwd=folder, environment=cache)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not list((folder / "runs").glob("x*")), "a new run that is refused leaves no directory"
