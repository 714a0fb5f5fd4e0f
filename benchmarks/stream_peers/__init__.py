"""The systems of `benchmarks/stream.py`: our buffer, Redis Streams, Ray's queue, TransferQueue, bare ZeroMQ.

Each consists of a server, producers and a consumer in separate processes. Producers and consumer get a
`load.Plan` and print a `load.Tally`.
"""
