"""The embedded engine: continuous batching in torch behind SGLang's HTTP API, as a process of its own.

transformers' own continuous batching was looked at first. It reports log-probs, but its paged cache and per-request Python objects cost
more a step than a tiny model's whole forward, its requests cannot be interrupted with what they have, and nothing ties its
cache or its tokens to a version of the weights. Here the whole step is a few array operations over dense rows.

    scheduler.py   who runs in which row: a pure state machine
    models/        forward passes over KV rows: hand-written for the Llama family, transformers' own modules for all others
    cache.py       KV rows, and the prefixes that groups share
    sampling.py    one batched sampler, reproducible by request
    core.py        one step: admit, prefill, decode, sample, finish; swapping weights between two steps
    loop.py        the thread that steps, and its commands
    updates.py     receiving weights beside decoding
    protocol.py    requests checked, answers shaped
    server.py      HTTP
"""
