"""The embedded inference engine: a process with continuous batching in torch behind SGLang's HTTP API.

transformers' own continuous batching was tried first. It reports log-probs, but on the default model with 32
requests at a time it generated 6,000 tokens per second of CPU time, where `generate` reaches 14,500 and this
engine 25,000. It also records no weight version for cached keys or sampled tokens. In this engine a whole
step is a few array operations over dense rows.

    scheduler.py     which sequence runs in which row: a pure state machine
    rows.py          per-row state of the running sequences, as arrays
    models/          forward passes over KV rows: hand-written (Llama family) or transformers' own
    cache.py         KV rows, and the prompts that the samples of a group share
    kept_prefixes.py KV kept for the next turns of conversations: a radix tree
    contexts.py      filling rows: what is copied, and what is computed
    sampling.py      one batched sampler, reproducible by request
    core.py          one step: admit, prefill, decode, sample, finish; swapping weights between two steps
    loop.py          the thread that runs the steps, and commands between them
    weights/         receiving new weights while decoding continues
    metrics.py       Prometheus series
    http/            request bodies, response formats, endpoints, the server process
"""
