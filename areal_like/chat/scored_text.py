"""The tokens that a reward model reads: of a prompt with a completion, in training and when it is served.

    messages   the tokenizer's chat template over the whole conversation, without a generation prompt
    texts      prompt and completion joined as they are, with the tokens that the tokenizer adds to any text
               (BOS) and the EOS, which tells a finished answer from its beginning

These are the tokens that TRL's RewardTrainer makes of such rows. The score is read at the last of them. In
transformers it is read at the last token that is not `pad_token_id`: where a model's padding token is also
its EOS, tokens at the end of a sequence do not count, so they are left out here, and "the last token" means
the same everywhere. Nothing is cut: a text that is too long is refused, because the score of a cut answer
says nothing about the answer.

A special token's text in a completion, or in any message, is plain text (`plain_text`): otherwise a policy
could end its turn in the reward model's template, and write more turns. Only at the end of a completion that
is a text may the EOS be written out, as rows of files have it.

Imports neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from areal_like.chat.messages import cannot_render, parsed_messages
from areal_like.chat.plain_text import encoded, has_special, mark_for, with_marks, without_marks
from areal_like.data.row_format import Message, conversation
from areal_like.errors import ConfigError


def scored_tokens(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    completion: str | Sequence[Message],
    *,
    pad_token_id: int | None = None,
    longest: int = 0,
    vocab_size: int = 0,
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens of a prompt with a completion; a reward model's score of them is that at the last one.

    `tokenizer`: of transformers, the reward model's own. `prompt`, `completion`: two texts are joined as they
    are. If one of them is a list of messages, a text is one message: of the user, and of the assistant.
    A tokenizer without a chat template joins the contents of messages by line feeds. `pad_token_id`: that of
    the model's config.json. `longest`: most tokens; 0: no limit. `vocab_size`: every token must be below it;
    0: not checked. `tools`: function schemas for the template; `template_kwargs`: its other arguments.

    Raises ConfigError if the template cannot render the messages, and if the tokens are more than `longest`
    or fewer than two, which no model is asked to score.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        eos = tokenizer.eos_token
        while eos and completion.endswith(eos):
            completion = completion.removesuffix(eos)
        text = prompt + completion
        plain: Sequence[int] = range(len(prompt), len(text)) if has_special(tokenizer, text) else ()
        tokens = encoded(tokenizer, text, plain, add_special_tokens=True)
        if tokenizer.eos_token_id is not None and tokens[-1:] != [tokenizer.eos_token_id]:
            tokens.append(tokenizer.eos_token_id)
    else:
        before = prompt if isinstance(prompt, str) else list(prompt)
        after = completion if isinstance(completion, str) else list(completion)
        messages = conversation(before, after).messages
        text, plain = _rendered(tokenizer, messages, tools, template_kwargs or {})
        # The template has written BOS and EOS itself, if it has one.
        tokens = encoded(tokenizer, text, plain, add_special_tokens=not tokenizer.chat_template)
    while tokens and tokens[-1] == pad_token_id:
        tokens.pop()
    if len(tokens) < 2:
        raise ConfigError(f"the text has {len(tokens)} tokens, and a reward model scores at least 2")
    if longest and len(tokens) > longest:
        raise ConfigError(f"the text has {len(tokens)} tokens, and the limit is {longest}")
    if vocab_size and max(tokens) >= vocab_size:
        raise ConfigError(f"token id {max(tokens)}: the model's vocabulary has {vocab_size}")
    return tokens


def _rendered(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    template_kwargs: Mapping[str, Any],
) -> tuple[str, Sequence[int]]:
    """(the text of a conversation, the places in it where a message has a special token's text)"""
    if not tokenizer.chat_template:
        text = "\n".join(str(message["content"]) for message in messages)
        return text, range(len(text)) if has_special(tokenizer, text) else ()
    parsed = parsed_messages(messages)
    mark = ""
    if has_special(tokenizer, parsed):
        mark = mark_for(parsed, list(tools), template_kwargs, tokenizer.chat_template)
        parsed = with_marks(tokenizer, parsed, mark)
    try:
        text = tokenizer.apply_chat_template(
            parsed,
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=False,
            **template_kwargs,
        )
    except Exception as error:  # a template may raise anything
        raise cannot_render(error) from error
    return without_marks(str(text), mark) if mark else (str(text), ())
