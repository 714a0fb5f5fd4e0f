"""`areal-like samples`: which samples, their text, lags by turn, hostile text, and records that are gone."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401 (transformers must not be imported without it in the tests' process)
from rich.console import Console

from areal_like.config import from_mapping
from areal_like.paths import RunPaths
from areal_like.runtime.command_line import save_config
from areal_like.terminal_text import harmless, harmless_name
from areal_like.trajectory import NOT_SAMPLED, STEP_ENDS, STEP_REWARDS, FinishReason, Trajectory
from areal_like.wire.records import Record
from buffer.storage import sql
from buffer.storage.segments import SegmentWriter
from launch.cli import main
from tests.support.launching import ROOT
from tests.support.row_store import Closing

CHARS = "abcdefghijklmnopqrstuvwxyzJ0123456789=[];/ \n\x1b\x07\u202eé"
HOSTILE = "\x1b]0;owned\x07\x1b[2J[red]x[/red]\u202eé"
VERSIONS = {3: 2, 4: 3, 5: 4}
"""Version -> step of its weights."""


def trajectory(*pieces: tuple[str, int], **fields: Any) -> Trajectory:
    """`pieces`: text, and the version that has sampled it (NOT_SAMPLED: a prompt)."""
    texts = [CHARS.index(char) for text, _ in pieces for char in text]
    versions = np.array([version for text, version in pieces for _ in text], dtype=np.int32)
    mask = (versions >= 0).astype(np.uint8)
    defaults: dict[str, Any] = {"reward": 0.0, "finish_reason": FinishReason.STOP}
    return Trajectory(
        tokens=np.array(texts, dtype=np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        versions=versions,
        **(defaults | fields),
    )


class LedgerOnDisk:
    """Writes a ledger as the buffer does, row by row."""

    def __init__(self, directory: Path, *, migrations: int = len(sql.MIGRATIONS)) -> None:
        (directory / "segments").mkdir(parents=True)
        file = directory / "ledger.sqlite3"
        self.connection = sqlite3.connect(
            file, isolation_level=None, check_same_thread=False, factory=Closing
        )
        self.connection.execute("PRAGMA journal_mode = WAL")
        sql.migrate(self.connection, path=directory, migrations=sql.MIGRATIONS[:migrations])
        self.segments = SegmentWriter(directory, segment=0, offset=0, segment_bytes=1 << 20, sync=False)
        self.insert("segments", segment=0, num_bytes=0, retained=0)
        for version, step in VERSIONS.items():
            self.insert("versions", version=version, step=step, parent=version - 1, trainer_incarnation=1)

    def insert(self, table: str, **columns: Any) -> None:
        marks = ",".join("?" * len(columns))
        self.connection.execute(
            f"INSERT INTO {table} ({','.join(columns)}) VALUES ({marks})", [*columns.values()]
        )

    def group(self, ticket_id: int, *trajectories: Trajectory, **columns: Any) -> None:
        defaults = {"purpose": "train", "state": "trained", "max_staleness": 4, "num_greedy": 0, "eval_id": 0}
        self.insert(
            "tickets",
            **{"ticket_id": ticket_id, "prompt_index": 100 + ticket_id, "num_samples": len(trajectories)},
            **{"parent": 0, "num_reissues": 0},
            **(defaults | columns),
        )
        for index, one in enumerate(trajectories):
            record = Record.of(ticket_id, index, one)
            (place,) = self.segments.write([[record.data]])
            self.insert(
                "samples",
                **{"ticket_id": ticket_id, "sample_index": index, "lease_id": 1, "oldest_step": 0},
                **{"sum_token_steps": 0, "oldest_version": one.oldest_version},
                **{
                    "newest_version": one.newest_version,
                    "num_sampled": one.num_sampled,
                    "reward": one.reward,
                },
                **{"segment": place.segment, "offset": place.offset, "num_bytes": place.num_bytes},
                crc32=place.crc32,
            )


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({char: index for index, char in enumerate(CHARS)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def fill(ledger: LedgerOnDisk) -> None:
    """Step 4 of two groups, a conversation among them; step 5, which is not completed; an evaluation."""
    prompt = ("1=", NOT_SAMPLED)
    talk = trajectory(
        prompt,
        ("call", 3),
        ("\ntool\n", NOT_SAMPLED),
        ("ok", 4),
        reward=1.5,
        turns=((6, 0.5), (14, 1.0)),
        reward_components={"format": 0.5},
        metrics={"calls": 1.0},
        label="tools",
    )
    ledger.group(1, talk, trajectory(prompt, ("b", 4), reward=0.25), step=4, position=1)
    ledger.group(
        2, trajectory(prompt, (HOSTILE, 3)), trajectory(prompt, ("cc", 3), reward=2.0), step=4, position=0
    )
    ledger.group(3, trajectory(prompt, ("d", 5)), step=5, position=0, state="batched")
    evaluated = {"purpose": "eval", "state": "evaluated", "eval_set": "aime"}
    ledger.group(4, trajectory(prompt, ("old", 3)), **evaluated, eval_id=2)
    ledger.group(
        5, trajectory(prompt, ("new", 4)), trajectory(prompt, ("x" * 3000, 4)), **evaluated, eval_id=3
    )
    ledger.insert("marks", name="trainer_step", value=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Path:
    """A run without a ledger yet."""
    config = from_mapping({"name": "x", "runs_dir": str(tmp_path), "model": {"path": str(model)}})
    save_config(config, RunPaths.of(config).config)
    return RunPaths.of(config).root


@pytest.fixture
def ledger(run: Path) -> Iterator[LedgerOnDisk]:
    """Of a run that goes on: its connection is open, and nothing has been checkpointed into the file."""
    ledger = LedgerOnDisk(run / "ledger")
    fill(ledger)
    yield ledger
    ledger.connection.close()


def samples(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert main(["samples", str(run), "--json", *options]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    return list(json.loads(out)["samples"])


def identity(found: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(one["ticket"], one["sample"]) for one in found]


@pytest.mark.usefixtures("ledger")
def test_the_wanted_samples_are_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def found(*options: str) -> list[tuple[int, int]]:
        return identity(samples(run, capsys, *options))

    assert found() == [(2, 0), (1, 1), (1, 0), (2, 1)], (
        "the newest completed step: worst first, then the best"
    )
    assert found("--worst", "1") == [(2, 0)]
    assert found("--best", "2") == [(2, 1), (1, 0)]
    assert found("--worst", "1", "--best", "9") == [(2, 0), (2, 1), (1, 0), (1, 1)], "each once"
    assert found("--limit", "3") == [(2, 0), (2, 1), (1, 0)], "by position"
    assert found("--step", "5") == [(3, 0)]
    assert found("--ticket", "1") == [(1, 0), (1, 1)]
    assert found("--set", "aime") == [(5, 0), (5, 1)]
    assert found("--set", "aime", "--step", "2") == [(4, 0)]


@pytest.mark.usefixtures("ledger")
def test_a_conversation_has_lags_by_turn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (talk, _) = samples(run, capsys, "--ticket", "1")
    assert [(part["is_sampled"], part["text"]) for part in talk["segments"][0]] == [
        (False, "1="),
        (True, "call"),
        (False, "\ntool\n"),
        (True, "ok"),
    ]
    first = {"num_sampled": 4, "oldest_version": 3, "newest_version": 3, "lag": 2, "reward": 0.5}
    second = {"num_sampled": 2, "oldest_version": 4, "newest_version": 4, "lag": 1, "reward": 1.0}
    assert talk["turns"] == [first, second] and talk["lag"] == 2
    assert (talk["reward"], talk["reward_parts"], talk["metrics"]) == (1.5, {"format": 0.5}, {"calls": 1.0})
    assert (talk["label"], talk["finish_reason"], talk["step"]) == ("tools", "stop", 4)
    assert main(["samples", str(run), "--ticket", "1"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "ticket 1, sample 0  reward 1.5  (format 0.5  calls 1)  step 4",
        "  prompt 101, label tools, 8 tokens + 6 sampled, versions 3 to 4, lag 2, ended by stop, 2 turns",
        "  turn 2: 2 sampled, version 4, lag 1, reward 1",
        "  > call",
        "  | tool",
    ):
        assert line in shown
    (evaluated, _) = samples(run, capsys, "--set", "aime")
    assert (evaluated["lag"], evaluated["step"], evaluated["newest_version"]) == (None, 3, 4)


def test_steps_with_rewards_are_listed(
    run: Path, ledger: LedgerOnDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    pieces = [("1=", NOT_SAMPLED), ("ab\ncd", 3), ("tool", NOT_SAMPLED), ("e" * 90, 4)]
    ends, rewards = np.array([4, 7, 7, 101], np.int32), np.array([0.5, -1, 0, 0.25], np.float32)
    arrays = {STEP_ENDS: ends, STEP_REWARDS: rewards}
    ledger.group(6, trajectory(*pieces, reward=-0.25, arrays=arrays), step=4, position=2)
    (found,) = samples(run, capsys, "--ticket", "6")
    texts, counts = ["ab", "\ncd", "", "e" * 90], [2, 3, 0, 90]
    assert found["steps"] == [
        {"text": text, "num_sampled": count, "reward": reward}
        for text, count, reward in zip(texts, counts, rewards.tolist(), strict=True)
    ]
    assert main(["samples", str(run), "--ticket", "6"]) == 0
    shown = capsys.readouterr().out
    for line in (
        "  step 1: 2 sampled, reward 0.5: ab\n",
        "  step 2: 3 sampled, reward -1: cd\n",
        f"  step 4: 90 sampled, reward 0.25: {'e' * 80}...\n",
    ):
        assert line in shown


@pytest.mark.usefixtures("ledger")
def test_hostile_text_is_shown_harmlessly(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["samples", str(run), "--worst", "1"]) == 0
    plain = capsys.readouterr().out
    assert "  > \\x1b]0;owned\\x07\\x1b[2J[red]x[/red]\\u202eé\n" in plain and "\x1b" not in plain
    monkeypatch.setattr(Console, "is_terminal", True)
    assert main(["samples", str(run), "--worst", "1"]) == 0
    colored = capsys.readouterr().out
    assert "\x1b]" not in colored and "\x1b[2J" not in colored and "\x07" not in colored
    assert harmless("a\tb\r\u2028\x9b\ud800") == "a\tb\\r\\u2028\\x9b\\ud800"
    assert harmless_name("a\nticket 9\t\x1b") == "a\\nticket 9\\t\\x1b"


@pytest.mark.usefixtures("ledger")
def test_long_text_is_shortened(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(run), "--set", "aime"]) == 0
    assert "1,000 characters are left out: --full shows them" in capsys.readouterr().out
    assert main(["samples", str(run), "--set", "aime", "--full"]) == 0
    assert "x" * 3000 in capsys.readouterr().out


def test_deleted_records_are_named_with_the_setting(
    run: Path, ledger: LedgerOnDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "ledger" / "segments" / "000000.seg").unlink()
    assert main(["samples", str(run)]) == 1, "the ledger still needs the file"
    assert "000000.seg is missing" in capsys.readouterr().err
    ledger.connection.execute("UPDATE tickets SET released = 1")
    for options, setting in (((), "buffer.retain_trajectories=true"), (("--set", "aime"), "eval.keep")):
        assert main(["samples", str(run), *options]) == 0
        shown = capsys.readouterr().out
        assert shown.count("no text") == shown.count(setting) > 1 and "reward 0" in shown


def test_ledgers_of_earlier_releases_and_shards(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ("1=", NOT_SAMPLED)
    for shard in (1, 0):
        ledger = LedgerOnDisk(run / f"ledger-{shard}", migrations=2)
        for place in (0, 1):
            ticket = 2 * place + shard + 2
            ledger.group(ticket, trajectory(prompt, ("a", 3)), step=0, position=place)
        ledger.group(10 + shard, trajectory(prompt, ("e", 3)), purpose="eval", state="evaluated")
        ledger.connection.close()
    assert identity(samples(run, capsys, "--limit", "9")) == [(2, 0), (3, 0), (4, 0), (5, 0)]
    assert identity(samples(run, capsys, "--set", "eval")) == [(10, 0), (11, 0)]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--step", "9"], ["step 9 has no samples", "steps 4 to 5"]),
        (["--set", "gsm"], ["the set gsm", "evaluated are aime"]),
        (["--set", "aime", "--step", "9"], ["aime has no samples of step 9", "steps 2 to 3"]),
        (["--ticket", "77"], ["ticket 77 has no samples"]),
        (["--ticket", "1", "--step", "4"], ["leave out --step"]),
        (["--worst", "0"], ["--worst", "at least 1"]),
    ],
)
@pytest.mark.usefixtures("ledger")
def test_mistakes_are_one_message(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], parts: list[str]
) -> None:
    assert main(["samples", str(run), *options]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and all(part in err for part in parts), err


def test_a_run_without_samples_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(run)]) == 2 and "no ledger yet" in capsys.readouterr().err
    LedgerOnDisk(run / "ledger").connection.close()
    assert main(["samples", str(run)]) == 2 and "no group is recorded" in capsys.readouterr().err


def test_samples_of_a_supervised_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunPaths(run).rows.write_text("{}")
    assert main(["samples", str(run)]) == 2 and "a run of `areal-like sft`" in capsys.readouterr().err


@pytest.mark.usefixtures("ledger")
def test_samples_are_decoded_without_torch(run: Path) -> None:
    command = f"main(['samples', {str(run)!r}])"
    code = f"import sys; from launch.cli import main; {command}; assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "> call" in shown.stdout and shown.stderr == ""


@pytest.mark.usefixtures("ledger")
def test_an_unreadable_tokenizer_is_named(
    run: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text("{}")
    text = (run / "config.yaml").read_text().replace(str(model), str(empty))
    (run / "config.yaml").write_text(text)
    assert main(["samples", str(run)]) == 2
    assert f"the tokenizer in {empty} cannot be loaded" in capsys.readouterr().err


def test_one_evaluation_of_a_step_is_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = LedgerOnDisk(run / "ledger")
    text = trajectory(("1=", NOT_SAMPLED), ("e", 3))
    states = ("done", "cancelled", "done", "running")
    # An earlier trainer came to step 30. This one went back, and was killed while step 10 was evaluated.
    for number, (state, step) in enumerate(zip(states, (30, 10, 10, 20), strict=True)):
        first = 1 + 2 * number
        ledger.insert(
            "evaluations",
            **{"first_ticket": first, "eval_id": step, "eval_set": "aime", "state": state},
            **{"num_prompts": 2, "num_samples": 1, "min_version": 0},
        )
        for ticket in (first, first + 1)[: 2 if state == "done" else 1]:
            columns = {"purpose": "eval", "state": "evaluated", "eval_set": "aime", "eval_id": step}
            ledger.group(ticket, text, **columns)
    assert identity(samples(run, capsys, "--set", "aime", "--step", "10", "--limit", "9")) == [(5, 0), (6, 0)]
    assert identity(samples(run, capsys, "--set", "aime", "--limit", "9")) == [(7, 0)]
    ledger.connection.close()
