"""What `benchmarks/stream.py` measures: one file each for the buffer of this repository, Redis Streams, Ray's
queue, TransferQueue, and bare ZeroMQ.

A peer is a server, producers and a consumer in processes of their own, which agree on `load.Plan` and report
a `load.Tally`.
"""
