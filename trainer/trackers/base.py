"""Base class and registry of trackers: programs that show a run's metrics, such as TensorBoard.

`metrics.jsonl` is the record of a run; a tracker copies it to another program. So a tracker may fail, and
rows that it has missed can be read from the file again: `TrackedRun.earlier_rows`.

All methods of a tracker are called in its own thread (feed.py). They may block and may raise: training
continues in either case. A complete custom tracker (`trackers=[{_target_: my_module.Csv}]`):

    class Csv(Tracker):
        def open(self, run):
            self.file = (run.root / "rewards.csv").open("a")

        def log(self, row):
            self.file.write(f"{row.step},{row.numbers.get('train/reward_mean')}\\n")

        def close(self):
            self.file.close()
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from areal_like.errors import ConfigError
from areal_like.registry import Registry

Aliases = Literal["none", "verl"]


@dataclass(frozen=True, kw_only=True)
class TrackedRow:
    """The numbers of one optimizer step, or of one evaluation."""

    step: int
    """For a step: steps completed before it. For an evaluation: the step whose weights were evaluated."""
    time_unix_s: float
    """When the step or evaluation ended."""
    is_evaluation: bool
    """True for the evaluation of one set."""
    numbers: Mapping[str, float]
    """Finite numbers by name (`train/loss`); docs/guides/trackers.md has the groups."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The data about a run that a tracker gets when it opens."""

    name: str
    """Name of the run."""
    root: Path
    """Directory of the run."""
    config: Mapping[str, Any]
    """The resolved configuration as plain dicts and lists, without secrets."""
    start_step: int
    """Number of steps completed before; 0 for a new run."""
    is_rewound: bool
    """True if rows of `start_step` and later steps were logged before: these steps are trained again."""
    earlier_rows: Callable[[], Iterator[TrackedRow]]
    """Reads the rows of the run's files that this start keeps, one at a time, in the order of their times:
    steps before `start_step`, and evaluations up to it."""


class Tracker(ABC):
    """Base of all trackers.

    open() -> log() * -> summarize()? -> close()
       any of them hangs at the end of the run -> abandon()
    """

    aliases: Aliases = "none"
    """`verl`: rows also have verl's names for the numbers that both have."""
    package: str = ""
    """Name of the package that this tracker needs."""

    def check(self) -> None:
        """Raises ConfigError if the tracker cannot work here. Called at the start of the trainer."""
        if self.package and importlib.util.find_spec(self.package) is None:
            raise ConfigError(
                f"trackers: the package {self.package} is not installed on the trainer's machine: "
                "pip install 'areal-like[trackers]', or leave it out of trackers"
            )

    @abstractmethod
    def open(self, run: TrackedRun) -> None:
        """Opens the run's series, or continues it. After an exception no other method is called."""

    @abstractmethod
    def log(self, row: TrackedRow) -> None:
        """Writes a row. Evaluations may come after rows of later steps."""

    def summarize(self, summary: Mapping[str, Any]) -> None:  # noqa: B027 (a tracker may leave it out)
        """Writes the run's summary, as in summary.json. Called at the end of the run, also after a drain."""

    @abstractmethod
    def close(self) -> None:
        """Writes the remaining data and closes the tracker."""

    def abandon(self) -> None:  # noqa: B027 (most trackers need nothing)
        """Called in another thread when the tracker has not ended in time: afterwards it must not delay the
        end of the process."""


TRACKERS = Registry[Tracker]("trackers", Tracker)  # type: ignore[type-abstract]


def build_trackers(settings: Sequence[str | Mapping[str, Any]]) -> dict[str, Tracker]:
    """The trackers that the setting `trackers` lists, by name; a second one of the same name gets a number.

    Raises ConfigError for an unknown name or setting, and for a package that is not installed.
    """
    sections = [{"name": one} if isinstance(one, str) else dict(one) for one in settings]
    trackers: dict[str, Tracker] = {}
    for section, tracker in zip(sections, TRACKERS.build_list(sections), strict=True):
        tracker.check()
        name = str(section.get("name") or type(tracker).__name__)
        num_same = sum(other.partition("-")[0] == name for other in trackers)
        trackers[f"{name}-{num_same + 1}" if num_same else name] = tracker
    return trackers
