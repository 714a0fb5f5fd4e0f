"""Profiles of steps: what is recorded, what is refused, and that results and training stay as they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from areal_like.errors import UserError
from launch.view.profile import profile_lines
from tests.support.full_state import gather_full_state
from tests.support.trainer_helpers import random_groups, write_model
from tests.support.trainer_ranks import make_runner
from trainer.distributed.ranks import Ranks
from trainer.profiling.ranges import PREFIX, named_range
from trainer.profiling.recorder import MAX_STEPS, ProfileRequest, StepRecorder

ID = "0123456789abcdef"
STEP_PARTS = {"wait", "compute", "reduce", "update", "forward", "head", "objective", "backward", "optimizer"}


@pytest.fixture
def recorder(tmp_path: Path) -> StepRecorder:
    return StepRecorder(tmp_path / "profiles", rank=3, device=torch.device("cpu"))


def report_of(tmp_path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((tmp_path / "profiles" / f"report-{ID}-rank3.json").read_text())
    return report


def parts_of_trace(path: Path) -> set[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" and event["dur"] > 0 for event in events)
    return {
        event["name"].removeprefix(PREFIX) for event in events if event.get("name", "").startswith(PREFIX)
    }


@pytest.mark.chaos
def test_a_profile_records_its_steps_and_changes_nothing(
    tmp_path: Path, ranks: Ranks, recorder: StepRecorder
) -> None:
    path, groups = write_model(tmp_path), random_groups(4)
    plain, profiled = make_runner(path, ranks), make_runner(path, ranks)
    for step in range(5):
        want = plain.run(groups, step=step)
        if step == 2:
            recorder.ask(ProfileRequest.of({"id": ID, "steps": 2}))
        assert recorder.meet(ranks, stop=False) == (False, [])
        with recorder.step(step):
            got = profiled.run(groups, step=step)
        assert got["loss"] == want["loss"] and got["grad_norm"] == want["grad_norm"]
    recorder.close()
    for (name, one), (_, other) in zip(
        gather_full_state(plain.policy), gather_full_state(profiled.policy), strict=True
    ):
        assert torch.equal(one, other), name
    report = report_of(tmp_path)
    traces = [f"trace-rank3-step{step}.json.gz" for step in (2, 3)]
    assert report["steps"] == [2, 3] and report["traces"] == traces and report["error"] == ""
    for trace in traces:
        assert parts_of_trace(tmp_path / "profiles" / trace) == STEP_PARTS
    ranges = {row["name"]: row for row in report["ranges"]}
    assert all(ranges[name]["cpu_s"] > 0 for name in STEP_PARTS)
    assert ranges["compute"]["calls"] == ranges["forward"]["calls"] == ranges["optimizer"]["calls"] == 2
    assert {file.name for file in (tmp_path / "profiles").iterdir()} == {*traces, f"report-{ID}-rank3.json"}
    text = "\n".join(profile_lines([report], directory=Path("runs/x/profiles")))
    assert "rank 3: 2 of 2 steps\n  runs/x/profiles/trace-rank3-step2.json.gz" in text
    assert "compute " in text and "aten::mm " in text


def test_ranks_begin_once_all_of_a_profile_are_asked(
    tmp_path: Path, ranks: Ranks, recorder: StepRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Votes of one that trains on, of one of another profile, of this one, and later of its partner."""
    request = ProfileRequest.of({"id": ID, "steps": 1, "ranks": 2})
    other = ProfileRequest.of({"id": "f" * 16, "steps": 1, "ranks": 2})
    partner = [0]

    def stack(mine: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.tensor([0, vote]) for vote in (0, other.vote, *partner)] + [mine])

    monkeypatch.setattr(ranks, "stack", stack)
    recorder.ask(request)
    for step in range(3):
        partner[0] = request.vote if step == 2 else 0
        assert recorder.meet(ranks, stop=False) == (False, [])
        with recorder.step(step):
            torch.ones(2) + 1
    recorder.close()
    assert report_of(tmp_path)["steps"] == [2]
    assert recorder.meet(ranks, stop=True) == (True, [])


def test_a_profile_whose_other_ranks_never_come_ends(
    tmp_path: Path, ranks: Ranks, recorder: StepRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.ask(ProfileRequest.of({"id": ID, "steps": 1, "ranks": 2}))
    assert not recorder.meet(ranks, stop=False)[0] and recorder.status()
    monkeypatch.setattr("trainer.profiling.recorder._MEETING_S", -1.0)
    assert recorder.meet(ranks, stop=False) == (False, [])
    recorder.close()
    assert (report_of(tmp_path)["steps"], recorder.status()) == ([], {})
    assert report_of(tmp_path)["error"].startswith("1 of the 2 ranks were asked within")


def test_the_end_of_a_trainer_writes_what_there_is(
    tmp_path: Path, ranks: Ranks, recorder: StepRecorder
) -> None:
    recorder.ask(ProfileRequest.of({"id": ID, "steps": 5}))
    with pytest.raises(UserError, match=r"still recording another profile \(0 of 5 steps recorded\)"):
        recorder.ask(ProfileRequest.of({"id": "f" * 8, "steps": 1}))
    assert recorder.meet(ranks, stop=False, shared=[7, -1]) == (False, [7, -1])
    with recorder.step(7), named_range("forward"):
        torch.ones(8, 8) @ torch.ones(8, 8)
    assert recorder.status()["id"] == ID
    with pytest.raises(RuntimeError, match="in the step"), recorder.step(8):
        raise RuntimeError("in the step")
    recorder.close()
    assert recorder.status() == {}
    report = report_of(tmp_path)
    assert report["steps"] == [7, 8] and report["error"] == "the trainer ended after 2 of the steps"
    assert parts_of_trace(tmp_path / "profiles" / "trace-rank3-step7.json.gz") == {"forward"}
    with pytest.raises(UserError, match="ending"):
        recorder.ask(ProfileRequest.of({"id": ID, "steps": 1}))


def test_a_disk_that_fails_ends_the_profile_only(
    tmp_path: Path, ranks: Ranks, recorder: StepRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profiles").write_text("a file")
    recorder.ask(ProfileRequest.of({"id": ID, "steps": 1}))
    recorder.meet(ranks, stop=False)
    with recorder.step(0):
        torch.ones(2) + 1
    recorder.close()
    assert recorder.status() == {}
    assert "the trace of step 0 cannot be written" in caplog.text and "report of a profile" in caplog.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "id must be"),
        ({"id": "../../etc", "steps": 1}, "id must be"),
        ({"id": ID}, f"steps must be 1 to {MAX_STEPS}, not 'None'"),
        ({"id": ID, "steps": 0}, "steps must be"),
        ({"id": ID, "steps": True}, "steps must be"),
        ({"id": ID, "steps": MAX_STEPS + 1}, "steps must be"),
        ({"id": ID, "steps": "9" * 1000}, "steps must be"),
        ({"id": ID, "steps": 1, "ranks": 0}, "ranks must be"),
        ({"id": ID, "steps": 1, "shapes": 1}, "shapes must be true or false"),
    ],
)
def test_a_wrong_request_is_refused(body: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ProfileRequest.of(body)
