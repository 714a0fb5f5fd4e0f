"""Tiny reward models, and a score server in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from areal_like.config import from_mapping
from areal_like.http.access import Reason
from areal_like.runtime.metrics import Metrics
from areal_like.security.keyring import Keyring
from rollout_server.scoring.directory import checked_directory
from rollout_server.scoring.http import ScorePlane, ScoreRoutes
from rollout_server.scoring.model import RewardModel
from rollout_server.scoring.service import ScoreService
from trainer.models.tiny_chat import chat_tokenizer

CONTEXT = 64


def write_reward_model(
    out_dir: Path, *, kind: str = "llama", seed: int = 0, num_labels: int = 1, context: int = CONTEXT
) -> str:
    """Writes a decoder with a head of `num_labels` outputs, and the character tokenizer; returns the path.

    `kind`: a model type of transformers with the settings of Llama.
    """
    tokenizer = chat_tokenizer()
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=context,
        num_labels=num_labels,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return str(out_dir)


def write_scored_task(directory: Path) -> list[str]:
    """Writes a reward model and rows; returns the settings of a job in this directory that is scored by it,
    also while its score server is started again."""
    write_reward_model(directory / "rm")
    rows = [{"question": f"{row:03}=", "answer": f"{row:03}"} for row in range(40)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "task={name: data, train: rows.jsonl, reward: {name: model, transform: sigmoid}}",
        "scorer.path=rm",
        "sampling.max_new_tokens=4",
        "rollout.reward_timeout_s=150",
        "eval.num_prompts=0",
    ]


class StuckModel:
    """Scores nothing until it is released; then each text is scored by its number of tokens."""

    def __init__(self, model: RewardModel) -> None:
        self.tokenizer, self.pad_token_id = model.tokenizer, model.pad_token_id
        self.vocab_size, self.max_length, self.survives_errors = model.vocab_size, model.max_length, True
        self.began, self.may_go_on = threading.Event(), threading.Event()
        self.answers: list[float | Exception] = []
        """Taken first: a score of every text of a batch, or an error."""

    def scores(self, texts: Sequence[Sequence[int]]) -> list[float]:
        self.began.set()
        self.may_go_on.wait()
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return [answer] * len(texts)
        return [float(len(text)) for text in texts]

    def forget(self) -> None:
        pass


class ScoreServer:
    """The score server's HTTP plane around a model."""

    def __init__(self, model: Any, *, identity: str = "abc", **settings: Any) -> None:
        """`settings`: of `ScoreService`, of the section `scorer`, and `keyring`."""
        self.metrics = Metrics()
        self.refused: list[Reason] = []
        self.url = ""
        self._model, self._identity = model, identity
        self._keyring: Keyring | None = settings.pop("keyring", None)
        self._security = settings.pop("security", {})
        limits = {"max_length": model.max_length, "max_batch_tokens": 256, "max_waiting": 64}
        self._limits = {name: settings.pop(name, value) for name, value in limits.items()}
        self._scorer = settings

    @contextlib.contextmanager
    def serving(self) -> Iterator[ScoreServer]:
        """Serves until the end of the block."""
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()

        async def start() -> tuple[ScorePlane, ScoreService, asyncio.Task[None]]:
            service = ScoreService(self._model, self.metrics, identity=self._identity, **self._limits)
            routes = ScoreRoutes(
                service=service,
                tokenizer=self._model.tokenizer,
                pad_token_id=self._model.pad_token_id,
                path="/models/tiny",
            )
            plane = ScorePlane(
                config=from_mapping({"scorer": self._scorer, "security": self._security}),
                routes=routes,
                keyring=self._keyring,
                index=0,
                on_refused=self.refused.append,
            )
            plane.start()
            return plane, service, asyncio.create_task(service.run())

        async def stop(plane: ScorePlane, service: ScoreService, running: asyncio.Task[None]) -> None:
            running.cancel()
            await service.close()
            await plane.close()

        parts = asyncio.run_coroutine_threadsafe(start(), loop).result()
        self.url = parts[0].url
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(stop(*parts), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def request(
        self, method: str, path: str, body: Any = None, *, token: str = "", raw: bytes | None = None
    ) -> tuple[int, Any]:
        """(status, JSON or text) of the response. `raw`: the body as it is sent."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        content = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request(method, path, body=content, headers=headers)
            response = connection.getresponse()
            text = response.read().decode()
            return response.status, json.loads(text) if text.startswith(("{", "[")) else text
        finally:
            connection.close()

    def number(self, name: str, **labels: str) -> float:
        """The value of a metric."""
        return self.metrics.registry.get_sample_value(f"areal_{name}", labels) or 0.0


def loaded(path: str) -> RewardModel:
    """The model of a directory, on the CPU."""
    return RewardModel(checked_directory(path), device="cpu")
