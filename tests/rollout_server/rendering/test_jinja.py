"""The bridge of the chat template with a byte-level BPE tokenizer, and replies in other shapes."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from rollout_server.environments.base import Message
from rollout_server.rendering.jinja import JinjaRenderer
from tests.support.chat_models import APPENDING, MARKERS, SPECIAL, chat_tokenizer, options_of

CORPUS = ["the number is 12, and the sum of 37 and 85 is 122.\n", "héllo wörld \n\n  add(1, 2)"] * 20


def bpe_renderer(template: str, *, takes_space: bool = False) -> JinjaRenderer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400, initial_alphabet=ByteLevel.alphabet(), show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=takes_space) for token in SPECIAL]
    )
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = template
    return JinjaRenderer(fast, **options_of(fast))


@pytest.mark.parametrize("takes_space", [False, True])
@pytest.mark.parametrize("heard", ["the sum", " 12", "\n\n  wörld", ""])
def test_bridges_are_the_tokens_of_the_whole(takes_space: bool, heard: str) -> None:
    renderer = bpe_renderer(APPENDING, takes_space=takes_space)
    messages: list[Message] = [{"role": "user", "content": "héllo"}]
    prompt = renderer.render(messages)
    reply: Message = {"role": "assistant", "content": "the number is 12 "}
    completion = renderer.tokenizer("the number is 12 <|end|>")["input_ids"]
    new: list[Message] = [{"role": "tool", "content": heard}, {"role": "user", "content": "and"}]
    whole = renderer.render([*messages, reply, *new])
    tail = renderer.bridge(prompt, completion, [*messages, reply], new)
    assert tail is not None and [*prompt, *completion, *tail] == whole
    # A turn that was cut gets its end-of-turn token.
    tail = renderer.bridge(prompt, completion[:-1], [*messages, reply], new)
    assert tail is not None and [*prompt, *completion[:-1], *tail] == whole


def test_the_end_of_a_turn_is_that_of_the_template() -> None:
    """As in base models, whose files name the end of a document."""
    tokenizer = chat_tokenizer(APPENDING, special=(*SPECIAL, "<|endoftext|>"), eos="<|endoftext|>")
    renderer = JinjaRenderer(tokenizer, **options_of(tokenizer))
    assert {renderer.decode([i]) for i in renderer.stop_token_ids} == {"<|end|>", "<|endoftext|>"}
    messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for said in ("b<|end|>", "b<|endoftext|>"):
        completion = tokenizer(said)["input_ids"]
        tail = renderer.bridge(renderer.render(messages[:1]), completion, messages, messages[:1])
        assert renderer.decode(tail or []) == "\n<|user|>a<|end|>\n<|assistant|>"


def test_an_eos_behind_the_whole_list_is_no_part_of_a_turn() -> None:
    """As in Phi-3, whose template ends a list without generation prompt with an EOS."""
    template = APPENDING.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    tokenizer = chat_tokenizer(template, special=(*SPECIAL, "<|endoftext|>"), eos="<|endoftext|>")
    renderer = JinjaRenderer(tokenizer, **options_of(tokenizer))
    messages: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    prompt, completion = renderer.render(messages[:1]), tokenizer("b<|end|>")["input_ids"]
    assert renderer.decode(renderer.render(messages, add_generation_prompt=False)).endswith("<|endoftext|>")
    for said in (completion, completion[:-1]):
        tail = renderer.bridge(prompt, said, messages, messages[:1])
        assert tail is not None
        assert [*prompt, *said, *tail] == renderer.render([*messages, messages[0]])


@pytest.mark.parametrize(
    ("said", "prefilled", "text", "reasoning", "num_calls"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, "yes", "hm", 0),
        ("\nhm\n</think>\n\nyes", True, "yes", "hm", 0),
        ("hm, no end", True, "", "hm, no end", 0),
        ("<think><tool_call>{}</tool_call></think>yes", False, "yes", "<tool_call>{}</tool_call>", 0),
        ("a <tool_call>{}</tool_call> b <tool_call>{}</tool_call>", False, "a  b", "", 2),
        (" no <think>thought</think> ", False, " no <think>thought</think> ", "", 0),
        ("", False, "", "", 0),
    ],
)
def test_replies_are_split(said: str, prefilled: bool, text: str, reasoning: str, num_calls: int) -> None:
    tokenizer = chat_tokenizer(APPENDING)
    renderer = JinjaRenderer(tokenizer, **options_of(tokenizer))
    prompt = tokenizer("<|user|>a<|end|>\n<|assistant|>" + "<think>\n" * prefilled)["input_ids"]
    completion = tokenizer(said + "<|end|>")["input_ids"]
    parsed = renderer.parse(completion, prompt_ids=prompt)
    assert (parsed.text, parsed.reasoning, len(parsed.tool_calls)) == (text, reasoning, num_calls)


def test_special_tokens_of_a_reply_are_in_its_raw_text_only() -> None:
    tokenizer = chat_tokenizer(APPENDING, special=(*SPECIAL, *MARKERS))
    renderer = JinjaRenderer(tokenizer, **options_of(tokenizer))
    completion = tokenizer("a<|user|>b<tool_call>x</tool_call><|end|>")["input_ids"]
    parsed = renderer.parse(completion, prompt_ids=[])
    assert (parsed.text, len(parsed.tool_calls)) == ("ab", 1)
    assert renderer.decode(completion) == "a<|user|>b<tool_call>x</tool_call><|end|>"
