"""The attacks that worked on an earlier release, as tests that the attacker loses while a job goes on.

`keyed` is test_keyed.py, which attacks a job with keys, `unkeyed` is test_unkeyed.py, which attacks one
without; the launcher has started both. A job without keys listens on loopback only and does not defend itself
against everything (docs/guides/security.md), so some attacks are tested with keys only. Further tests of the
same attacks, on a single daemon:

    registration   tests/buffer/test_registration.py     flood    tests/chaos/test_flood.py, test_stops.py
    failures       tests/buffer/test_failures.py         access   tests/areal_like/test_http_access.py
    intruder       tests/rollout_server/engine/          browser  tests/areal_like/test_http_browser.py
                   test_weight_intruder.py                        (in Chromium)
    engine         tests/rollout_server/engine/test_http.py

    number  attack                                  on a whole job     on a single daemon
    1       140 messages of 4 MB, then leave        keyed, unkeyed     flood
    2       learn the job's fingerprints            keyed              registration
    3       hello with addresses of the attacker    keyed              registration
    4       hello as another rank of the trainer    keyed              registration
    5       forged samples                          keyed
    6       20 failed samples                       keyed, unkeyed     failures
    7, 8    hello under a name that is taken        keyed, unkeyed     registration
    9       names of 3 MB                           keyed, unkeyed     registration
    10      forged pushes of weights                keyed
    11-14   the engine's HTTP API                   keyed, unkeyed     engine
    15      writing into a push's rendezvous                           intruder
    16      HTTP bodies of 300 MB                   keyed, unkeyed     access
    17, 18  web page, rebound name                  keyed, unkeyed     access, browser

test_keyed.py also has a scan of all ports, a replayed connection, a frame that is sent again with another
key, and keys in roles that they do not have. Revoked and renewed keys: tests/buffer/test_keyed_buffer.py and
tests/jobs/test_keyed_job.py.
"""
