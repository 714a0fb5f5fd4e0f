"""Shows samples on a terminal, or as plain text in a pipe.

A policy's text is not trusted: it may contain terminal escape sequences (`terminal_text.py`) or rich's
markup, so it is never parsed as markup.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from areal_like.terminal_text import harmless, harmless_name
from launch.samples.transcripts import Part, ShownStep, ShownTurn, Transcript

_SHOWN_CHARS = 2000
"""Longest part, in characters, that is shown whole without `--full`; a longer one is cut in the middle."""

_SHOWN_STEPS, _STEP_CHARS = 32, 80
"""Rewarded steps that are shown without `--full`, and characters of each."""


def lines_of(sample: Transcript, *, shows_all: bool) -> Iterator[Text]:
    """The lines of one sample. `shows_all`: no part is shortened."""
    yield _title(sample)
    yield Text(f"  {facts(sample)}", style="dim")
    if len(sample.turns) > 1:
        yield from (
            Text(f"  {_turn(index, turn)}", style="dim") for index, turn in enumerate(sample.turns, 1)
        )
    shown = len(sample.steps) if shows_all else min(len(sample.steps), _SHOWN_STEPS)
    for index, step in enumerate(sample.steps[:shown], start=1):
        yield Text(f"  {_step(index, step, shows_all=shows_all)}", style="dim")
    if left_out := len(sample.steps) - shown:
        yield Text(f"  {left_out} steps are left out: --full shows them", style="dim")
    if sample.missing:
        yield Text(f"  no text: {sample.missing}", style="yellow")
    for index, parts in enumerate(sample.segments, start=1):
        if len(sample.segments) > 1:
            yield Text(f"  segment {index} of {len(sample.segments)}", style="dim")
        for part in parts:
            yield from _part(part, shows_all=shows_all)
    yield Text()


def _title(sample: Transcript) -> Text:
    where = f"set {sample.eval_set}, weights of step {sample.step}" if sample.eval_set else _place(sample)
    part = "" if sample.recorded_in is None else f" (a part, in {sample.recorded_in})"
    title = Text(f"ticket {sample.ticket}, sample {sample.sample}{part}  ", style="bold")
    title.append(f"reward {sample.reward:g}", style="green" if sample.reward > 0 else "red")
    parts = {**sample.reward_parts, **sample.metrics}
    if parts:
        listed = "  ".join(f"{harmless_name(name)} {value:.4g}" for name, value in parts.items())
        title.append(f"  ({listed})", style="not bold")
    title.append(f"  {where}", style="not bold")
    return title


def _place(sample: Transcript) -> str:
    if sample.state == "dropped":
        return f"dropped ({sample.reason})"
    return sample.state if sample.step is None else f"step {sample.step}"


def facts(sample: Transcript) -> str:
    """Prompt, lengths, versions, lag and end of a sample, in one line."""
    facts = [
        f"prompt {sample.prompt_index}",
        f"label {harmless_name(sample.label)}" if sample.label else "",
        f"{sample.num_tokens - sample.num_sampled} tokens + {sample.num_sampled} sampled"
        if sample.num_tokens
        else f"{sample.num_sampled} sampled tokens",
        _versions(sample.oldest_version, sample.newest_version, sample.lag),
        f"ended by {sample.finish_reason}" if sample.finish_reason else "",
        "greedy" if sample.is_greedy else "",
        f"failed ({harmless_name(sample.failure)})" if sample.failure else "",
        f"{len(sample.turns)} turns" if len(sample.turns) > 1 else "",
        f"made in {sample.generation_s:.2f} s, reward computed in {sample.reward_s:.2f} s"
        if sample.finish_reason
        else "",
    ]
    return ", ".join(fact for fact in facts if fact)


def _versions(oldest: int, newest: int, lag: int | None) -> str:
    if oldest < 0:
        return ""
    versions = f"version {oldest}" if oldest == newest else f"versions {oldest} to {newest}"
    return versions if lag is None else f"{versions}, lag {lag}"


def _turn(index: int, turn: ShownTurn) -> str:
    reward = "" if turn.reward is None else f", reward {turn.reward:g}"
    versions = _versions(turn.oldest_version, turn.newest_version, turn.lag)
    return f"turn {index}: {turn.num_sampled} sampled, {versions}{reward}"


def _step(index: int, step: ShownStep, *, shows_all: bool) -> str:
    text = harmless_name(step.text.strip())
    if not shows_all and len(text) > _STEP_CHARS:
        text = f"{text[:_STEP_CHARS]}..."
    return f"step {index}: {step.num_sampled} sampled, reward {step.reward:g}: {text}"


def _part(part: Part, *, shows_all: bool) -> Iterator[Text]:
    note = " are left out: --full shows them"
    text = part.text if shows_all else part.shortened(_SHOWN_CHARS, note=note)
    mark, style = (">", "cyan") if part.is_sampled else ("|", "")
    for line in harmless(text).split("\n"):
        yield Text(f"  {mark} {line}", style=style)
