"""Formats the numbers of `areal-like data stats` as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_LENGTHS = {
    "prompt_chars": "prompt characters",
    "prompt_tokens": "prompt tokens",
    "response_chars": "response characters",
}
_BAR = 40


def text_of_report(report: Mapping[str, Any]) -> str:
    """Formats all splits, then their overlap, then the results of a run."""
    lines = [line for name, split in report["splits"].items() for line in _split(name, split)]
    for overlap in report["overlaps"]:
        lines += [*_overlap(overlap), ""]
    if heard := report.get("heard"):
        lines += [*_heard(heard), ""]
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _split(name: str, split: Mapping[str, Any]) -> Iterator[str]:
    rest = f", of which the first {split['rows']:,} were read" if split["rows"] < split["of_rows"] else ""
    yield f"{name}: {split['of_rows']:,} rows{rest}"
    for key, title in _LENGTHS.items():
        if (lengths := split[key]) is not None:
            yield f"  {title:<20} {_lengths(lengths)}"
    found = split["duplicates"]
    yield (
        f"  {'repeated prompts':<20} {_share(found['exact'], split['rows'])} exact, "
        f"{_share(found['normalised'], split['rows'])} normalised"
        f"{_examples(found['examples'])}"
    )
    if found["conflicting"]:
        places = _examples(found["conflicting_examples"])
        yield f"  {'':<20} of these {found['conflicting']:,} prompts have rows with different answers{places}"
    if 0 < split["without_answer"] < split["rows"]:
        yield f"  {'without an answer':<20} {_share(split['without_answer'], split['rows'])}"
    for problem, broken in split["problems"].items():
        places = _examples(broken["examples"])
        yield f"  {'problem':<20} {problem}: {_share(broken['rows'], split['rows'])}{places}"
    for label, count in split["labels"].items():
        yield f"  {'label':<20} {label}: {_share(count, split['rows'])}"
    yield ""


def _overlap(overlap: Mapping[str, Any]) -> Iterator[str]:
    here, there = overlap["split"], overlap["other"]
    num_rows = overlap["rows"]
    if not overlap["normalised"]:
        yield f"no prompt of {here} is in {there}"
        return
    yield (
        f"prompts of {here} that are also in {there}: {_share(overlap['exact'], num_rows)} exact, "
        f"{_share(overlap['normalised'], num_rows)} normalised"
    )
    for pair in overlap["examples"]:
        yield f"  {pair[0]} = {pair[1]}"


def _heard(heard: Mapping[str, Any]) -> Iterator[str]:
    unseen = _share(heard["never_issued"], heard["prompts"])
    epochs = "" if heard["epochs"] is None else f"{heard['epochs']:g} epochs; "
    yield f"the run: {epochs}{unseen} of the prompts were never issued"
    times = ", ".join(f"{times}x {count:,}" for times, count in heard["issued"].items())
    yield f"  {'prompts issued':<20} {times or 'none'}"
    yield f"  {'solve rate':<20} {_rates(heard)}"
    most = max(heard["histogram"], default=0)
    for place, count in enumerate(heard["histogram"] if most else ()):
        bar = "#" * round(_BAR * count / most)
        yield f"  {f'  {place / 10:.1f} to {(place + 1) / 10:.1f}':<20} {count:>8,} {bar}".rstrip()
    for label, rates in heard.get("by_label", {}).items():
        yield f"  {label or '(no label)':<20} {_rates(rates)}"
    if heard["never_solved_examples"]:
        yield f"  {'never solved':<20} {', '.join(map(str, heard['never_solved_examples']))}"
    if num_beyond := heard.get("beyond_the_split"):
        yield f"  {num_beyond:,} prompts of the ledger are not in the split: the data has changed since"


def _rates(rates: Mapping[str, Any]) -> str:
    if not rates["heard"]:
        return "no sample yet"
    outcomes = ", ".join(f"{name} {rates[name]:,}" for name in ("never", "sometimes", "always"))
    return f"{rates['solve_rate']:.3f} over {rates['samples']:,} samples; prompts solved {outcomes}"


def _lengths(lengths: Mapping[str, Any]) -> str:
    numbers = "  ".join(
        f"{name} {lengths[name]:,}" for name in lengths if name not in ("num", "limit", "over")
    )
    over = f"  limit {lengths['limit']:,}: {lengths['over']:,} longer" if "limit" in lengths else ""
    return numbers + over


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if count and total else f"{count:,}"


def _examples(groups: Sequence[Any]) -> str:
    """The first examples: places, or groups of places that belong together."""
    texts = [" = ".join(map(str, group)) if isinstance(group, list) else str(group) for group in groups[:3]]
    return f": {'; '.join(texts)}" if texts else ""
