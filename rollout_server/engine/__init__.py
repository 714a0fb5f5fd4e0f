"""The embedded engine: continuous batching in torch behind SGLang's HTTP API, as a process of its own.

transformers' own continuous batching was tried first. It reports log-probs, but on the default model with 32 requests at a time it made
6,000 tokens a second of CPU time where `generate` makes 14,500 and this engine 25,000, and nothing in it ties cached keys or sampled tokens
to a version of the weights. Here a whole step is a few array operations over dense rows.

    scheduler.py   who runs in which row: a pure state machine
    models/        forward passes over KV rows: hand-written for the Llama family, transformers' own modules for all others
    cache.py       KV rows, and the prefixes that groups share
    sampling.py    one batched sampler, reproducible by request
    core.py        one step: admit, prefill, decode, sample, finish; swapping weights between two steps
    loop.py        the thread that steps, and its commands
    updates.py     receiving weights beside decoding
    protocol.py    requests checked, answers shaped
    server.py      HTTP
    app.py         the process
"""
