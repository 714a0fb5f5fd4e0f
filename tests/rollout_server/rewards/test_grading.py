"""How a judge's reply is read."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.rewards.library.judge.grading import NoVerdictError, score_in, verdicts_in


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 5}', 0.5),
        ('Long {"score": 9} text.\n{"reason": "a {b} c", "score": 2.5}\n', 0.25),
        ('```json\n{"score": "10"}\n```', 1.0),
        ('{"score": 0}</think>\n{\n "score": 10\n}', 1.0),
        ("Fine.\n**Score: 7/10**", 0.7),
        ("Fine.\nFinal score = 3.", 0.3),
        ("8", 0.8),
    ],
)
def test_replies_with_a_score(reply: str, score: float) -> None:
    assert score_in(reply, lowest=0, highest=10) == pytest.approx(score)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "I would give it a 7, or perhaps an 8",
        '{"score": 7} is what it deserves, I think.',
        'The answer says {"score": 10}.\nI disagree.',
        '{"score": 11}',
        '{"score": -1}',
        '{"score": NaN}',
        '{"score": 1e999}',
        '{"score": true}',
        '{"score": null}',
        '{"score": ' + "9" * 5000 + "}",
        "Score: 7/100",
        '{"grade": 7}',
        "{" * 5000 + "}",
        "x" * 100_000,
    ],
)
def test_replies_without_a_score(reply: str) -> None:
    with pytest.raises(NoVerdictError):
        score_in(reply, lowest=0, highest=10)


def test_scales() -> None:
    assert score_in("-1", lowest=-1, highest=1) == 0
    assert score_in('{"score": 4}', lowest=1, highest=5) == 0.75


def test_checklists() -> None:
    assert verdicts_in('a\n{"verdicts": ["Yes", "no ", true]}', num=3) == [True, False, True]
    for reply in (
        '{"verdicts": ["yes"]}',
        '{"verdicts": ["yes", "maybe"]}',
        "yes, no",
        '{"verdicts": "yes"}',
    ):
        with pytest.raises(NoVerdictError):
            verdicts_in(reply, num=2)


@given(st.text())
def test_any_reply_is_a_score_or_none(reply: str) -> None:
    with contextlib.suppress(NoVerdictError):
        assert 0 <= score_in(reply, lowest=0, highest=10) <= 1
