"""Forward passes over KV rows. `load` picks the fast path of the Llama family or transformers' own modules, and proves it right."""
