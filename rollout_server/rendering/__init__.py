"""Converts messages to token ids, and sampled token ids to replies.

`PromptRenderer` renders the prompt of a single-turn sample, a `ChatRenderer` the prompts of a conversation.
"""
