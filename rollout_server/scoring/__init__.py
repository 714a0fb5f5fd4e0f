"""The score server: holds a reward model and scores texts over HTTP, for `task.reward: model`.

    request -> tokens (one thread) -> queue -> batch of similar lengths -> model (one thread) -> response

Read `service.py` first. `directory.py` checks the model's directory before torch is imported, `batching.py`
chooses the texts of one forward pass, `model.py` is the model, `http.py` the HTTP server, `daemon.py`
connects them. The client is `rollout_server/rewards/library/model/`.
"""
