"""The bodies of rewards that agents post, for one sample or for a group. Pure.

{"reward": 1.0, "turns": {"chatcmpl-...": 0.5}, "metrics": {"tool_errors": 2}, "label": "hard"}
{"rewards": {"17-0-52": 1.0, "17-1-52": 0.0}}     of a group
{"ranking": ["17-1-52", ["17-0-52", "17-2-52"]]}  of a group, best first; a list is a tie
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

from areal_like.config.episode import MAX_TURNS
from areal_like.http.bodies import ParamError, text
from areal_like.trajectory import LARGEST_METRIC, LARGEST_REWARD
from areal_like.wire.records import MAX_LABEL_CHARS
from rollout_server.sessions.open_session import MAX_METRICS

_MAX_NAME_CHARS = 64
_OF_ONE = 0.5
"""Reward of a ranking of one, which says nothing."""


def parse_reward(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `OpenSession.set_reward`. Raises ParamError."""
    value = None if body.get("reward") is None else _number(body["reward"], "reward", largest=LARGEST_REWARD)
    id = "" if body.get("completion_id") is None else text(body, "completion_id")
    turns = _numbers(body, "turns", most=MAX_TURNS, largest=LARGEST_REWARD)
    metrics = _numbers(body, "metrics", most=MAX_METRICS, largest=LARGEST_METRIC)
    label = "" if body.get("label") is None else text(body, "label")
    if value is None and (id or not (turns or metrics or label)):
        raise ParamError("reward must be a number", param="reward")
    if not _is_name(label or "-", most=MAX_LABEL_CHARS):
        raise ParamError(f"label must have at most {MAX_LABEL_CHARS} printable characters", param="label")
    if not all(_is_name(name, most=_MAX_NAME_CHARS) for name in metrics):
        raise ParamError(
            f"metrics: names must have 1 to {_MAX_NAME_CHARS} printable characters", param="metrics"
        )
    return {"value": value, "completion_id": id, "turns": turns, "metrics": metrics, "label": label}


def parse_group_rewards(body: Mapping[str, Any], *, ids: Collection[str]) -> dict[str, float]:
    """Returns rewards by session. `ids`: the sessions of the group. Raises ParamError."""
    if (body.get("rewards") is None) is (body.get("ranking") is None):
        raise ParamError("give either rewards (by session) or a ranking (of sessions)", param="rewards")
    if body.get("rewards") is not None:
        rewards = _numbers(body, "rewards", most=len(ids), largest=LARGEST_REWARD)
        _check_ids(list(rewards), ids, param="rewards")
        return rewards
    places = _places(body["ranking"])
    _check_ids([id for place in places for id in place], ids, param="ranking")
    return ranked(places)


def ranked(places: list[list[str]]) -> dict[str, float]:
    """Returns evenly spaced rewards from 1 (the first place) to 0. Those in one place get the mean of theirs;
    a single one gets 0.5."""
    num = sum(map(len, places))
    starts = itertools.accumulate(map(len, places), initial=0)
    return {
        id: 1 - (start + (len(place) - 1) / 2) / (num - 1) if num > 1 else _OF_ONE
        for start, place in zip(starts, places, strict=False)
        for id in place
    }


def _places(raw: Any) -> list[list[str]]:
    places = [one if isinstance(one, list) else [one] for one in raw] if isinstance(raw, list) else []
    if not places or not all(place and all(isinstance(id, str) for id in place) for place in places):
        raise ParamError(
            "ranking must be a list of session ids, best first, or of lists of them (ties)", param="ranking"
        )
    return places


def _check_ids(given: list[str], ids: Collection[str], *, param: str) -> None:
    known = frozenset(ids)
    if (strange := next((id for id in given if id not in known), None)) is not None:
        raise ParamError(f"{param}: {strange!r:.100} is no session of this group", param=param)
    if len(set(given)) < len(given):
        raise ParamError(f"{param}: a session is there twice", param=param)


def _numbers(body: Mapping[str, Any], name: str, *, most: int, largest: float) -> dict[str, float]:
    raw = {} if body.get(name) is None else body[name]
    if not isinstance(raw, dict) or len(raw) > most:
        raise ParamError(f"{name} must be an object of at most {most} numbers", param=name)
    return {key: _number(value, f"{name}[{key!r:.100}]", largest=largest) for key, value in raw.items()}


def _number(raw: Any, name: str, *, largest: float) -> float:
    param = name.partition("[")[0]
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ParamError(f"{name} must be a number", param=param)
    if not abs(raw) <= largest:  # also if it is NaN
        raise ParamError(f"{name} must be a finite number of at most {largest:g} in size", param=param)
    return float(raw)


def _is_name(name: str, *, most: int) -> bool:
    return 0 < len(name) <= most and name.isprintable()
