"""Forward passes over KV rows.

`loading.load` picks the fast path of the Llama family or transformers' own modules, and checks at start that
its log-probs are those of transformers.
"""
