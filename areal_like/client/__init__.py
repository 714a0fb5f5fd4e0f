"""The client for agents outside of a job, also a package of its own (`pip install ./areal_like/client`).

`areal_like_client.py` needs nothing but the standard library, and can be copied as one file.
"""
