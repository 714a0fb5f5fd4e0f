"""Forward passes over KV rows.

`loading.load` picks the fast path (Llama family) or transformers' own modules, and checks at start that the
log-probs equal those of transformers.
"""
