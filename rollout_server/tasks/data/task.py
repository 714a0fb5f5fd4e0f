"""The task over rows of files: `task: {name: data, train: train.jsonl, reward: exact}`.

    rows of a file -> checked -> divided into train and eval -> the first num_train -> those that fit

Every row is read once when a server starts, so that a broken row ends the job at its start, with its file and
line, and not in the middle of a run. The result of that pass is cached. Index i of a split is the i-th
remaining row. Worker processes get exactly these rows by their name in the cache (`settings_of_workers`),
because they have no tokenizer, and the file may have changed since.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np

from areal_like.data import RowFormat, Rows, open_rows
from areal_like.data.cache import Numbers, remembered
from areal_like.errors import ConfigError
from rollout_server.rewards.library import Rewards, make_rewards
from rollout_server.tasks.base import Completion, Example, FittingPrompts, Prompt, Rewarded, Split, Task

log = logging.getLogger(__name__)

_BATCH = 512
"""Number of prompts tokenized at a time."""
_RULES = 1
"""Part of the cache keys: increase it when the rules below or those of RowFormat change."""


@dataclass(frozen=True, kw_only=True)
class DataTask(Task):
    """Prompts from rows, in the formats of verl and TRL or with configured keys."""

    fields_of_settings: ClassVar[Mapping[str, str]] = {"reward": "rewards"}
    least: ClassVar[Mapping[str, int]] = {"num_train": 0, "num_eval": 0, "max_prompt_tokens": 1}

    num_train: int = 0
    """Maximum number of rows of `train` to use, from the first one; 0: all."""
    num_eval: int = 0
    """Maximum number of rows of `eval` to use, from the first one; without `eval`, about this many rows of
    `train` are held out. 0: all, or the share `eval_share`."""
    train: Any = ""
    """Rows to train on: a file (.jsonl, .parquet), a pattern, a list of these, or `hf:owner/name`."""
    eval: Any = ""
    """Held-out rows, in the same forms; empty: some rows of `train`, which are then not trained on."""
    eval_share: float = 0.05
    """Share of the rows of `train` that is held out if there is neither `eval` nor `num_eval`. A hash of the
    prompt selects the rows, so equal prompts are in the same split."""
    prompt_key: str = ""
    """Key of the prompt (text or messages); `a.b` is b in the object a. Empty: the first of `prompt`,
    `question`, `problem`, `messages` that a row has."""
    answer_key: str = ""
    """Key of the reference answer. Empty: the first of `reward_model.ground_truth`, `answer`, `ground_truth`,
    `solution`, if there is one."""
    label_key: str = ""
    """Key of the label for metrics. Empty: `data_source` if a row has it."""
    system_prompt: str = ""
    """System prompt for prompts without a system message; a text prompt becomes a user message."""
    chat: bool = False
    """True: text prompts become messages for the chat template, even without a system prompt."""
    rewards: Any = ""
    """`task.reward`: the name of a reward, the path of a function, a mapping with settings, or a list."""
    gold_reward: Any = ""
    """One more reward, described like one of `task.reward`, that is recorded (`reward_gold_mean`) and not
    trained on: it shows whether the policy exploits the reward. Empty: none."""
    max_new_tokens: int = 0
    """Longest completion in tokens, below the job's `sampling.max_new_tokens`; 0: the job's."""

    rows: Mapping[str, Rows] = field(init=False, repr=False, compare=False)
    """Split -> its rows; index i is row i."""
    scoring: Rewards = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eval_share < 1:
            raise ConfigError(f"task.eval_share={self.eval_share:g}: use a number from 0 to below 1")
        if not self.rewards:
            raise ConfigError(
                "task.reward is not set: name a reward (exact, regex, math, code, judge, model) or the path "
                "of a function (my_rewards.score)"
            )
        object.__setattr__(
            self, "scoring", make_rewards(self.rewards, gold=self.gold_reward, sandbox=self.sandbox)
        )
        self._set_rows(self._open())

    def example(self, split: Split, index: int) -> Example:
        """Returns row `index` of the split. `metadata` has the whole `row`, and its `place` for messages."""
        rows = self.rows[split]
        row, read = rows[index], self.format
        try:
            return Example(
                prompt=read.prompt_of(row),
                answer=read.answer_of(row),
                metadata={"row": row, "place": rows.place(index)},
                label=read.label_of(row),
                max_new_tokens=self.max_new_tokens,
            )
        except ConfigError as error:
            raise ConfigError(f"{rows.place(index)}: {error}") from error

    def reward(self, example: Example, completion: Completion) -> Rewarded | Awaitable[Rewarded]:
        return self.scoring.score(example, completion)

    @property
    def has_async_reward(self) -> bool:
        return self.scoring.is_async

    def check(self) -> None:
        self.scoring.check()

    @property
    def content(self) -> list[str]:
        return [self.rows[split].fingerprint for split in ("train", "eval")]

    @property
    def format(self) -> RowFormat:
        """The keys by which rows are read."""
        names = {key.name for key in dataclasses.fields(RowFormat)} & set(vars(self))
        return RowFormat(**{name: getattr(self, name) for name in names})

    def without_long_prompts(self, fitting: FittingPrompts) -> Self:
        """Returns the task without prompts that do not fit. Logs their number and the place of the first
        one."""
        limit = min(self.max_prompt_tokens, fitting.max_prompt_tokens)
        kept = {}
        for split, rows in self.rows.items():
            chosen = _fitting_rows(rows, self.format, fitting, limit=limit, key=f"task.{split}")
            kept[split] = rows.only(chosen)
            if num_long := len(rows) - len(chosen):
                first = int(np.flatnonzero(np.append(chosen, -1) != np.arange(len(chosen) + 1))[0])
                which = f"{num_long} of {len(rows)} prompts have more than {limit} tokens"
                hint = "(task.max_prompt_tokens, rollout.max_context)"
                if not len(chosen) and split == "train":
                    raise ConfigError(f"task.{split}: {which} {hint}: raise the limit")
                log.warning("task.%s: %s %s: left out, first %s", split, which, hint, rows.place(first))
        fitted = copy.copy(self)
        fitted._set_rows(kept)
        return fitted

    def settings_of_workers(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns the settings with the rows replaced by their names in the cache."""
        named = {split: rows.cached if len(rows) else "" for split, rows in self.rows.items()}
        return {**settings, **named, "num_train": 0, "num_eval": 0, "eval_share": 0.0}

    def _open(self) -> dict[str, Rows]:
        if not (self.train or self.eval):
            raise ConfigError("task.train is not set: name a file (.jsonl, .parquet) or hf:owner/name")
        if not self.train:
            held_out = self._checked(self.eval, split="test", key="task.eval")
            return {"train": _first(held_out, 0), "eval": _first(held_out, self.num_eval or None)}
        rows = self._checked(self.train, split="train", key="task.train")
        if self.eval:
            held_out = self._checked(self.eval, split="test", key="task.eval")
            held_out = _first(held_out, self.num_eval or None)
        else:
            numbers = _divide(rows, self.format, num_eval=self.num_eval, share=self.eval_share)
            rows, held_out = rows.only(numbers[0]), rows.only(numbers[1])
        return {"train": _first(rows, self.num_train or None), "eval": held_out}

    def _checked(self, source: Any, *, split: str, key: str) -> Rows:
        rows = open_rows(source, split=split, key=key)
        if not (isinstance(source, Mapping) and "cached" in source):  # the server has checked those
            _check_rows(rows, self.format, key=key)
        return rows

    def _set_rows(self, rows: Mapping[str, Rows]) -> None:
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "num_train", len(rows["train"]))
        object.__setattr__(self, "num_eval", len(rows["eval"]))


def _check_rows(rows: Rows, read: RowFormat, *, key: str) -> None:
    """Raises ConfigError with file and line for the first row without prompt, answer or label."""

    def check() -> Numbers:
        answered = None
        for index in range(len(rows)):
            try:
                row = rows[index]
                read.prompt_of(row)
                read.label_of(row)
                has_answer = read.answer_of(row) is not None
                if answered is None:
                    answered = has_answer
                if has_answer is not answered:
                    raise ConfigError(
                        "the row has no answer, and others do: set answer_key, or complete the row"
                        if answered
                        else "the row has an answer, and those before it do not: set answer_key"
                    )
            except ConfigError as error:
                raise ConfigError(f"{key}: {rows.place(index)}: {error}") from error
        return np.arange(0)

    remembered(_key("checked", rows, read), check)


def _divide(rows: Rows, read: RowFormat, *, num_eval: int, share: float) -> tuple[Numbers, Numbers]:
    """Returns the rows to train on and the held-out rows: `num_eval` rows plus those with the same prompts,
    or, if it is 0, a share of all prompts (at least one).

    Prompts with the smallest hashes are held out, independently of their position in the file. Raises
    ConfigError if no row is left to train on.
    """
    if not (num_eval or share):
        return np.arange(len(rows)), np.arange(0)

    def held_out() -> Numbers:
        hashes = np.fromiter((_hash(prompt) for prompt in _prompts(rows, read)), np.uint64, len(rows))
        smallest = np.partition(hashes, min(num_eval, len(rows)) - 1 if num_eval else 0)
        least = smallest[min(num_eval, len(rows)) - 1 if num_eval else 0]
        bound = least if num_eval else max(least, np.uint64(share * (1 << 64)))
        return np.flatnonzero(hashes <= bound).astype(np.int64)

    numbers = remembered([*_key("held out", rows, read), num_eval, share], held_out)
    rest = np.setdiff1d(np.arange(len(rows)), numbers, assume_unique=True)
    if not len(rest):
        raise ConfigError(
            f"task.train: all {len(rows)} rows would be held out: name the held-out rows with task.eval, or "
            "lower task.num_eval"
        )
    return rest, numbers


def _fitting_rows(rows: Rows, read: RowFormat, fitting: FittingPrompts, *, limit: int, key: str) -> Numbers:
    """Returns the rows whose prompts have at most `limit` tokens. Raises ConfigError with the place of a row
    that cannot be rendered."""

    def count() -> Numbers:
        kept: list[int] = []
        for first in range(0, len(rows), _BATCH):
            numbers = range(first, min(first + _BATCH, len(rows)))
            prompts = list(_prompts(rows, read, numbers))
            try:
                lengths = fitting.num_tokens(prompts)
            except ValueError:
                lengths = [_num_tokens(rows, i, read, fitting, key=key) for i in numbers]
            kept += [i for i, length in zip(numbers, lengths, strict=True) if 0 < length <= limit]
        return np.asarray(kept, np.int64)

    if not fitting.key:
        return count()
    return remembered([*_key("fitting", rows, read), limit, fitting.key], count)


def _num_tokens(rows: Rows, index: int, read: RowFormat, fitting: FittingPrompts, *, key: str) -> int:
    try:
        return fitting.num_tokens([read.prompt_of(rows[index])])[0]
    except ValueError as error:
        raise ConfigError(f"{key}: {rows.place(index)}: {error}") from error


def _prompts(rows: Rows, read: RowFormat, numbers: range | None = None) -> Iterator[Prompt]:
    for index in range(len(rows)) if numbers is None else numbers:
        yield read.prompt_of(rows[index])


def _hash(prompt: Prompt) -> int:
    """Returns a 64-bit hash of a prompt: of its text, or of its messages without the system message."""
    if isinstance(prompt, list):
        said = [message for message in prompt if message["role"] != "system"] or prompt
        prompt = said[0]["content"] if len(said) == 1 else json.dumps(said, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(prompt.strip().encode(), digest_size=8).digest(), "little")


def _key(rule: str, rows: Rows, read: RowFormat) -> list[object]:
    return [rule, _RULES, rows.fingerprint, dataclasses.asdict(read)]


def _first(rows: Rows, most: int | None) -> Rows:
    return rows if most is None or most >= len(rows) else rows.only(np.arange(most))
