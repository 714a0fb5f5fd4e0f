r"""The coding task with a context of 32,768 tokens and random weights: the protocol, not the skill.

    python -m benchmarks.coding_protocol runs/coding-random
    areal-like run name=coding-32k model.path=runs/coding-random task=coding \
        model.renderer=benchmarks.coding_protocol.RandomCaller rollout.max_context=32768 \
        trainer.tokens_per_microbatch=32768 sampling.max_new_tokens=32 sampling.group_size=2 \
        episode.max_turns=64 trainer.groups_per_step=2 trainer.num_steps=2 rollout.max_episodes=4 \
        rollout.max_running=4 eval.num_prompts=1 buffer.retain_trajectories=true
    areal-like samples coding-32k --limit 4 --full

The model is a tiny Llama with random weights and one token for each character. Whatever it samples is read as
a call of a tool, chosen by the sampled tokens; after `NUM_TURNS` turns it is read as the last reply. So real
conversations of many turns go through sandbox, engine, buffer and trainer.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

from rollout_server.environments.base import ToolCall
from rollout_server.rendering.base import ParsedReply, ToolSchema
from rollout_server.rendering.tiny import TinyRenderer

CONTEXT_TOKENS = 32_768
NUM_TURNS = (8, 24)
"""Fewest and most turns of an episode, by what the first reply samples."""
_FILE = re.compile(r"[\w/]+\.(?:py|md)")


class RandomCaller(TinyRenderer):
    """Reads any reply as a call: `model.renderer=benchmarks.coding_protocol.RandomCaller`."""

    def parse(
        self, completion_ids: Sequence[int], *, prompt_ids: Sequence[int], tools: Sequence[ToolSchema] = ()
    ) -> ParsedReply:
        said = self.decode([i for i in completion_ids if i not in self._hidden_ids])
        number = zlib.crc32(said.encode(errors="replace"))
        begin = self.decode(list(prompt_ids)[:4000])
        turn = self.decode(list(prompt_ids)).count("<assistant>")
        least, most = NUM_TURNS
        if turn >= least + zlib.crc32(begin.encode()) % (most - least):
            return ParsedReply(text=said)
        files = sorted(set(_FILE.findall(begin.partition("files:")[2].partition("<assistant>")[0])))
        path = files[number % len(files)] if files else "README.md"
        name, arguments = (
            ("read", {"path": path}),
            ("run_tests", {}),
            ("edit", {"path": path, "old": "", "new": said}),
            ("edit", {"path": path, "old": said, "new": ""}),
            ("rm", {}),
        )[number // 7 % 5]
        return ParsedReply(text="", tool_calls=(ToolCall(id="", name=name, arguments=json.dumps(arguments)),))


def save_model(folder: Path) -> None:
    """Writes the model with random weights, and its tokenizer."""
    from trainer.models.tiny import untrained_model
    from trainer.models.tiny_chat import chat_tokenizer

    tokenizer = chat_tokenizer()
    tokenizer.model_max_length = CONTEXT_TOKENS
    model = untrained_model(
        tokenizer, seed=0, hidden_size=64, num_layers=2, context_tokens=CONTEXT_TOKENS, initializer_range=0.1
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    save_model(Path(sys.argv[1]))
