"""Messages to token ids and sampled token ids to replies.

`PromptRenderer` makes the prompt of a single-turn sample, a `ChatRenderer` the prompts of a conversation.
"""
