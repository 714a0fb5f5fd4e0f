"""The tokens in which the steps of a completion end, with tokenizers of several kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from areal_like.errors import RewardError
from rollout_server.rewards.step_tokens import tokens_of_ends

Decode = Callable[[Sequence[int]], str]
EOS, THINK = 256 + 6, 256 + 7
MERGES = ("st", "ne", "\n\n", "e\n", "é!", "\u20ac1")
"""Tokens of several bytes, two of which hold the end of one step and the beginning of another."""


def byte_tokenizer() -> Tokenizer:
    """Tokens 0 to 255 are bytes; then MERGES and two special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    shown = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    vocabulary = {shown[byte]: byte for byte in range(256)}
    for text in MERGES:
        vocabulary["".join(shown[byte] for byte in text.encode())] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=shown[0]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<think>", special=True)])
    return tokenizer


BYTES: Decode = byte_tokenizer().decode


def until_whole(ids: Sequence[int], end: int, decode: Decode) -> int:
    """The number of tokens after which the first `end` characters are those of the whole text."""
    head = decode(ids)[:end]
    return next(n for n in range(len(ids) + 1) if decode(ids[:n]).startswith(head))


def test_a_token_in_two_steps_is_the_earlier_ones() -> None:
    at = 256 + MERGES.index("e\n")
    ids = [*b"On", at, *b"Two", EOS]
    assert BYTES(ids) == "One\nTwo"
    # "One" ends within "e\n"; "One\n" ends with it; the end of the text comes before <eos>.
    for ends, want in (([3], [3]), ([4], [3]), ([3, 4, 7], [3, 3, 6]), ([2, 3], [2, 3])):
        assert tokens_of_ends(ids, ends, text="One\nTwo", decode=BYTES) == want


def test_a_character_of_several_tokens_ends_with_the_last() -> None:
    ids = [*"a\u20acb".encode(), THINK, *"\U0001f600".encode()]
    assert tokens_of_ends(ids, [1, 2, 3, 4], text="a\u20acb\U0001f600", decode=BYTES) == [1, 4, 5, 10]
    joined = [256 + MERGES.index("é!"), *b"?"]  # é is whole in a token that goes on
    assert tokens_of_ends(joined, [1, 3], text="é!?", decode=BYTES) == [1, 2]


def test_tokens_without_text_belong_to_the_next_step() -> None:
    ids = [THINK, *b"a", THINK, THINK, *b"b", EOS, EOS]
    assert tokens_of_ends(ids, [1, 2], text="ab", decode=BYTES) == [2, 5]


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, 263), st.sampled_from([*b"ab \n", EOS])), max_size=200),
    seed=st.randoms(use_true_random=False),
)
def test_any_sampled_tokens_have_places(ids: list[int], seed: object) -> None:
    """Random tokens are mostly broken characters. The windows find what whole prefixes give."""
    text = BYTES(ids)
    ends = sorted(seed.sample(range(1, len(text) + 1), min(len(text), 8)))  # type: ignore[attr-defined]
    assert tokens_of_ends(ids, ends, text=text, decode=BYTES) == [until_whole(ids, e, BYTES) for e in ends]


def test_a_space_that_only_a_first_token_loses() -> None:
    """As with Llama 2: a word has a space before it, except at the beginning; bytes are a fallback."""
    words = {f"\u2581w{n}": n for n in range(90)} | {f"<0x{byte:02X}>": 90 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0x00>"))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(content=" ", left=1, right=0)])
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    # Windows of special tokens alone, and a character of three bytes across the end of a window.
    ids = (
        [346] * 70 + [*range(60)] + [346] * 150 + [90 + byte for byte in "\u20ac".encode()] + [*range(60, 90)]
    )
    text = tokenizer.decode(ids)
    assert text == " ".join(f"w{n}" for n in range(60)) + "\u20ac " + " ".join(f"w{n}" for n in range(60, 90))
    ends = [2, 3, text.index("\u20ac"), text.index("\u20ac") + 1, len(text)]
    assert tokens_of_ends(ids, ends, text=text, decode=tokenizer.decode) == [
        71,
        72,
        130,
        283,
        len(ids),
    ]


def test_a_tokenizer_that_removes_spaces() -> None:
    """What a token adds depends on the tokens after it: all tokens are decoded together."""
    words = {"it": 0, "'s": 1, "so": 2, ".": 3, " ": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    ids = [0, 1, 2, 3] * 40
    text = tokenizer.decode(ids)
    assert text.startswith("it's so. it's so.")
    ends = [text.index(".") + 1, len(text) - 1, len(text)]
    assert tokens_of_ends(ids, ends, text=text, decode=tokenizer.decode) == [4, 159, 160]


def test_a_text_that_is_not_of_the_tokens() -> None:
    with pytest.raises(RewardError, match="not that of its tokens"):
        tokens_of_ends([*b"abc"], [1], text="ab", decode=BYTES)
    with pytest.raises(RewardError, match="a step ends at 9, and the completion has 3 characters"):
        tokens_of_ends([*b"abc"], [1, 9], text="abc", decode=BYTES)


def test_work_is_bounded() -> None:
    ids = [0, 1, 2, 3] * 1000
    text = "changed"

    def decode(tokens: Sequence[int]) -> str:
        return text if len(tokens) == len(ids) else "x" * len(tokens)

    with pytest.raises(RewardError, match="reward fewer steps"):
        tokens_of_ends(ids, range(1, 4000), text=text, decode=decode)


@pytest.mark.parametrize("ids", [[0xF0] * 4096, [*b"a", *[EOS] * 4096, *b"b"]], ids=["broken", "special"])
def test_a_long_run_without_a_character(ids: list[int]) -> None:
    """A policy that repeats half a character, or a special token, does not hold up the server."""
    num_decoded = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal num_decoded
        num_decoded += len(tokens)
        return BYTES(tokens)

    text = BYTES(ids)
    assert tokens_of_ends(ids, [len(text)], text=text, decode=decode) == [len(ids)]
    assert num_decoded < 20 * len(ids)
    broken = [0xF0] * 4096
    with pytest.raises(RewardError, match="reward fewer steps"):
        tokens_of_ends(broken, range(1, 4096), text=BYTES(broken), decode=decode)
