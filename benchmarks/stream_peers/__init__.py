"""The systems of `benchmarks/stream.py`: our buffer, Redis Streams, Ray's queue, TransferQueue, bare ZeroMQ.

Each is a server, producers and a consumer in processes of their own. Producers and consumer get a `load.Plan`
and print a `load.Tally`.
"""
