"""Finds the sampled tokens in which given characters of a completion end. Pure.

A step of a completion ends at a character, and its reward belongs to a token. That token is the first one
after which the text up to the character is complete:

    tokens      "Fir" "st.\\n" "Sec" "ond" <eos>       text "First.\\nSecond", steps end at 6 and 13
    characters    3      7      10    13    13        the steps end with tokens 2 and 4

So a token that is part of two steps belongs to the earlier one, in which its first characters are. A
character whose bytes are spread over several tokens belongs to the last of them, and tokens without text,
such as special tokens, belong to the step that follows. The text is never tokenized again: another
tokenization of it may have other tokens than those that were sampled.

Tokens are decoded in windows of _WINDOW new tokens after the tokens of the window before, because what a
token decodes to depends on its neighbors (bytes of one character, a space that a first token loses). A window
has text and ends where no character is incomplete, which may take more tokens. If the windows do not add up
to the text, as with a tokenizer that removes spaces before punctuation, all tokens are one window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from areal_like.errors import RewardError

Decode = Callable[[Sequence[int]], str]
"""Converts token ids to a text without special tokens."""

_WINDOW = 16
_REPLACEMENT = "\ufffd"
"""Decoders put it where bytes are not, or not yet, a character."""
_MAX_COST = 1 << 22
"""Most tokens that are decoded for the ends of one completion: the server's event loop waits."""


def tokens_of_ends(token_ids: Sequence[int], ends: Sequence[int], *, text: str, decode: Decode) -> list[int]:
    """For each end, a number of characters of `text`, the number of tokens up to the token that it is in.

    `ends`: ascending, from 1 to the length of the text. `text`: what the tokens decode to. Raises RewardError
    if they decode to something else.
    """
    ids = list(token_ids)
    windows = _windows(ids, decode, size=_WINDOW)
    if "".join(added for *_, added in windows) != text:
        if decode(ids) != text:
            raise RewardError(
                "the text of this completion is not that of its tokens (reasoning or tool calls were removed "
                "from it), so its steps have no place in them: reward turns or tokens"
            )
        windows = [(0, 0, len(ids), text)]
    longest = max((last - start for start, _, last, _ in windows), default=0)
    if longest * len(ends) * longest.bit_length() > _MAX_COST:
        raise RewardError(
            f"{len(ends)} steps of {len(ids)} tokens: {longest} of them have to be decoded together, which "
            "would take too long: reward fewer steps"
        )
    found: list[int] = []
    before = 0
    remaining = iter(ends)
    end = next(remaining, None)
    for start, first, last, added in windows:
        while end is not None and end <= before + len(added):
            head = added[: end - before]
            skipped = len(decode(ids[start:first]))
            low, high = first, last  # the text is incomplete after `low` tokens, complete after `high`
            while high - low > 1:
                middle = (low + high) // 2
                is_complete = decode(ids[start:middle])[skipped:].startswith(head)
                low, high = (low, middle) if is_complete else (middle, high)
            found.append(high)
            end = next(remaining, None)
        before += len(added)
    if end is not None:
        raise RewardError(f"a step ends at {end}, and the completion has {len(text)} characters")
    return found


def _windows(ids: list[int], decode: Decode, *, size: int) -> list[tuple[int, int, int, str]]:
    """(start, first, last, text) of each window: the text that tokens first..last add to that of
    start..first."""
    windows: list[tuple[int, int, int, str]] = []
    start = first = 0
    while first < len(ids):
        before = decode(ids[start:first])
        last, num_added = first, size
        while True:
            last = min(last + num_added, len(ids))
            whole = decode(ids[start:last])
            # A window without text is no context: its next token would be decoded like a first one.
            if last == len(ids) or (len(whole) > len(before) and not whole.endswith(_REPLACEMENT)):
                break
            num_added = last - first  # doubles, so that the work is linear in the number of tokens
        windows.append((start, first, last, whole[len(before) :]))
        start, first = first, last
    return windows
