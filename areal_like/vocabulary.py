"""Compares the vocabularies of two tokenizers: a teacher scores token ids, which must mean the same to it."""

from __future__ import annotations

import functools
import hashlib
import json

from areal_like.errors import ConfigError, first_line


def check_vocabulary(path: str, other: str) -> None:
    """Raises ConfigError unless the tokenizers of both models (directories or names) have equal tokens.

    Compared are the texts and ids of all tokens, not the chat templates and the rules for splitting texts.
    """
    if vocabulary_digest(path) == vocabulary_digest(other):
        return
    its, own = (_tokens_of(each) for each in (path, other))
    differing = min(token for token in {*its, *own} if its.get(token) != own.get(token))
    texts = [repr(tokens[differing]) if differing in tokens else "absent" for tokens in (its, own)]
    raise ConfigError(
        f"its tokenizer is not the policy's: {len(its)} and {len(own)} tokens, and token {differing} is "
        f"{texts[0]} there and {texts[1]} here: name a model with the same tokenizer"
    )


@functools.cache
def vocabulary_digest(path: str) -> str:
    """SHA-256 of all (id, text) of a model's tokenizer. Raises ConfigError if there is none."""
    return hashlib.sha256(json.dumps(sorted(_tokens_of(path).items())).encode()).hexdigest()


@functools.cache
def _tokens_of(path: str) -> dict[int, str]:
    """Id -> text."""
    from transformers import AutoTokenizer

    try:
        vocabulary = AutoTokenizer.from_pretrained(path, trust_remote_code=False).get_vocab()
    except Exception as error:  # for a broken file, tokenizers raises plain exceptions
        raise ConfigError(f"transformers cannot load a tokenizer from it ({first_line(error)})") from error
    return {token: text for text, token in vocabulary.items()}
