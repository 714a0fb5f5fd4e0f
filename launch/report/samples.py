"""The worst and the best samples of the newest completed step, as HTML."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from areal_like.errors import ArealError
from areal_like.terminal_text import harmless_name
from launch.formatting import short
from launch.report.svg import escape
from launch.samples.choosing import NUM_AT_ENDS, choose, decoder, no_text
from launch.samples.reading import RunLedgers, Selection
from launch.samples.showing import facts
from launch.samples.transcripts import Part, Transcript, transcript

_SHOWN_CHARS = 3000
"""Of one part: half from its beginning, half from its end."""
_MAX_PARTS = 200


def samples_html(root: Path) -> str:
    """The samples, or the reason why there are none."""
    try:
        found = list(_samples(root))
    except (ArealError, OSError, sqlite3.Error) as error:
        return f'<div class="card"><p>{escape(str(error))}</p></div>'
    step = found[0].step
    return (
        f'<p class="soft">Of step {step}, the {NUM_AT_ENDS} with the lowest and the {NUM_AT_ENDS} with the '
        'highest reward. <span class="sampled">Marked</span> is what the policy sampled. '
        "<code>areal-like samples</code> shows others.</p>" + "".join(_one(sample) for sample in found)
    )


def _samples(root: Path) -> Iterator[Transcript]:
    ledgers = RunLedgers(root)
    rows = choose(ledgers.find(Selection()), worst=None, best=None, limit=None, is_ticket=False)
    records = [ledgers.read(row) for row in rows]
    has_text = any(not isinstance(record, str) for record in records)
    decode = decoder(root) if has_text else no_text
    steps = ledgers.version_steps()
    for row, record in zip(rows, records, strict=True):
        yield transcript(row, record, decode=decode, version_steps=steps)


def _one(sample: Transcript) -> str:
    parts = {**sample.reward_parts, **sample.metrics}
    listed = ", ".join(f"{harmless_name(name)} {short(value)}" for name, value in parts.items())
    text = [part for segment in sample.segments for part in segment]
    shown = "".join(_part(part) for part in text[:_MAX_PARTS])
    left_out = len(text) - _MAX_PARTS
    if left_out > 0:
        shown += f"\n[{left_out} more parts]"
    body = f"<pre>{shown}</pre>" if text else f'<p class="soft">No text: {escape(sample.missing)}.</p>'
    return (
        f'<div class="card sample"><span class="reward">reward {short(sample.reward)}</span>'
        f"{escape(f' ({listed})' if listed else '')} "
        f'<span class="soft">ticket {sample.ticket}, sample {sample.sample}: {escape(facts(sample))}</span>'
        f"{body}</div>"
    )


def _part(part: Part) -> str:
    text = part.text
    if len(text) > _SHOWN_CHARS:
        half = _SHOWN_CHARS // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
    shown = escape(text)
    return f'<span class="sampled">{shown}</span>' if part.is_sampled else shown
