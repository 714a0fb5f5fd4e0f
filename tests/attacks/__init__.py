"""The attacks that worked on an earlier release, as tests that the attacker loses while a job goes on.

`here` is `test_keyed.py` for a job with keys and `test_unkeyed.py` for one without; both attack a job that the
launcher has started. A job without keys listens on loopback only and does not defend itself against everything
(docs/guides/security.md), so some attacks are tested with keys only.

    number  attack                                    with keys    without keys
    1       140 messages of 4 MB, then leave          here         here, tests/chaos/test_flood.py, test_stops.py
    2       learn the job's fingerprints              here         tests/buffer/test_registration.py
    3       hello with addresses of the attacker      here         tests/buffer/test_registration.py (not loopback)
    4       hello as another rank of the trainer      here         tests/buffer/test_registration.py
    5       forged samples                            here         -
    6       20 failed samples                         here         here, tests/buffer/test_failures.py
    7, 8    hello under a name that is taken          here         here, tests/buffer/test_registration.py
    9       names of 3 MB                             here         here, tests/buffer/test_registration.py
    10      forged pushes of weights                  here         -
    11-14   the engine's HTTP API                     here         here, tests/rollout_server/engine/test_http.py
    15      writing into the rendezvous of a push     tests/rollout_server/engine/test_weight_intruder.py (both)
    16      HTTP body of 300 MB                       here         here, tests/areal_like/test_http_access.py
    17, 18  web page, rebound name                    here         here, tests/areal_like/test_http_browser.py

Further attacks on a job with keys: a scan of all ports, a replayed connection, a frame sent with another key,
and keys in roles that they do not have. Revoked and rotated keys are in tests/buffer/test_keyed_buffer.py and
tests/jobs/test_keyed_job.py.
"""
