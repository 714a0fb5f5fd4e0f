"""Helpers of engine tests: tiny models, a real engine process, transformers as reference, rank 0 of a push.

The conformance suite uses an engine only through `Engine`, so that it also runs against a real SGLang.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging as transformers_logging

from areal_like.weights.buckets import checksum, cut_buckets, flatten, spec_of, unflatten
from areal_like.weights.hf_layout import hf_tensors
from areal_like.weights.weight_group import WeightGroup
from areal_like.wire.messages.weights import FormGroup
from rollout_server.engine.core import EngineCore
from rollout_server.policy.client import EmbeddedClient, EngineClient
from rollout_server.policy.generation import Generation, Sampling
from rollout_server.policy.sglang_client import SglangClient
from tests.support import warm_start
from tests.support.waiting import HANG_LIMIT_S

transformers_logging.disable_progress_bar()

VOCAB = 100
EOS = 2
CONTEXT = 2048
API_KEY = "a key of the tests"
TOLERANCE = 1e-4
"""Of log-probs in float32."""
KINDS = ("llama", "qwen2", "qwen3", "gpt2", "qwen3_moe")

Models = tuple[Path, Path]
"""Directories of two models of one architecture with different weights."""


def store_tied_head(path: Path) -> None:
    """Adds the head of a model that ties it to its embedding to the file of its weights."""
    tensors = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def save_model(path: Path, kind: str, *, seed: int = 0) -> Path:
    """Writes a tiny random model.

    The initial spread is wide, so that wrong KV or positions change log-probs visibly.
    """
    torch.manual_seed(seed)
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
        "initializer_range": 0.15,
    }
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    if kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(**common, **sizes, num_key_value_heads=4, tie_word_embeddings=True)
        )
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(
            Qwen2Config(**common, **sizes, num_key_value_heads=2, tie_word_embeddings=True)
        )
    elif kind == "qwen3":
        model = Qwen3ForCausalLM(
            Qwen3Config(**common, **sizes, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False)
        )
    elif kind == "qwen3_moe":
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common, **sizes, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
                num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True,
            )
        )  # fmt: skip
    else:
        model = GPT2LMHeadModel(GPT2Config(**common, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4))
    # Also change biases and norms: at their initial values, zero and one, they would hide mistakes.
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        assert name
    model.save_pretrained(path)
    return path


def save_models(directory: Path, kind: str) -> Models:
    """Writes two tiny models of one architecture."""
    return (
        save_model(directory / f"{kind}-0", kind, seed=0),
        save_model(directory / f"{kind}-1", kind, seed=1),
    )


def load_model(path: Path | str) -> Any:
    """The reference model, float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def weights_of(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a push by name, tied ones once."""
    model = load_model(path)
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    return {tensor.name: tensor.whole_in(parameters[tensor.param]) for tensor in hf_tensors(model)}


@torch.inference_mode()
def swap(core: EngineCore, path: Path | str, *, recompute: bool, version: str = "1") -> None:
    """Changes the weights to the model's, as the engine's thread does it."""
    shadow = core.take_shadow_weights()
    for name, tensor in weights_of(path).items():
        shadow.named[name].copy_(tensor)
    core.swap_weights(shadow, version=version, recompute=recompute)


@torch.inference_mode()
def reference_logprobs(
    model: Any, prompt: Sequence[int], output: Sequence[int], *, temperature: float = 1.0
) -> NDArray[np.float32]:
    """float32[len(output)]: transformers' log-prob of each output token."""
    logits_TV = model(input_ids=torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1].float()
    logprobs_TV = torch.log_softmax(logits_TV / (temperature or 1.0), -1)
    chosen: NDArray[np.float32] = logprobs_TV.gather(1, torch.tensor([list(map(int, output))]).T)[
        :, 0
    ].numpy()
    return chosen


@torch.inference_mode()
def reference_greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The greedy continuation, by full forward passes without a cache."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def error_of(model: Any, prompt: Sequence[int], generation: Generation, *, temperature: float = 1.0) -> float:
    """Largest difference between the engine's log-probs and the reference's."""
    want = reference_logprobs(model, prompt, generation.output_ids.tolist(), temperature=temperature)
    return float(np.abs(want - generation.logprobs).max())


@dataclass(frozen=True)
class Engine:
    """A running engine that holds `path` as version 0."""

    url: str
    path: Path
    kind: str = "embedded"
    """`embedded` | `sglang`."""
    pid: int = 0
    api_key: str = API_KEY

    @property
    def headers(self) -> dict[str, str]:
        """For requests that are made without a client."""
        return {"Authorization": f"Bearer {self.api_key}"}

    def client(self, **options: Any) -> EngineClient:
        if self.kind == "sglang":
            return SglangClient(self.url, vocab_size=VOCAB, api_key=self.api_key, **options)
        return EmbeddedClient(self.url, api_key=self.api_key, **options)


@contextlib.contextmanager
def running_engine(path: Path, **options: Any) -> Iterator[Engine]:
    """Runs the embedded engine as a process; ends it with SIGTERM and checks that it exits with 0."""
    with engine_process(path, **options) as (process, url):
        yield Engine(url=url, path=path, pid=process.pid)
        assert process.poll() is None, "the engine died during the test"
        process.terminate()
        assert process.wait() == 0


@contextlib.contextmanager
def engine_process(path: Path, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Starts an engine with API_KEY, which may load all models beside its own.

    Yields the process and its URL, once it answers.
    """
    port_file = path.parent / f"port-{time.monotonic_ns()}"
    settings = {
        "api_key_file": key_file(path.parent),
        "weights_from": path.parent,
        "port": 0,
        "port_file": port_file,
        "context_length": CONTEXT,
        "weight_version": 0,
        "max_running_requests": 16,
        **options,
    }
    command = [
        sys.executable,
        "-m",
        "rollout_server.engine",
        "--model-path",
        str(path),
        "--log-level",
        "WARNING",
    ]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    process = warm_start.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not port_file.exists():
            assert process.poll() is None, "the engine ended before it was ready"
            time.sleep(0.02)
        yield process, f"http://127.0.0.1:{int(port_file.read_text())}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def key_file(directory: Path) -> Path:
    """Writes API_KEY to a file that only its owner can read."""
    file = directory / "engine.key"
    file.touch(mode=0o600)
    file.write_text(API_KEY + "\n")
    return file


def form_group(name: str, *, port: int, timeout_s: float, world_size: int = 2) -> FormGroup:
    """The message for an engine of one rank to join a group of this machine."""
    return FormGroup(
        epoch=1,
        group_name=name,
        master_address="127.0.0.1",
        master_port=port,
        rank=1,
        world_size=world_size,
        backend="gloo",
        timeout_s=timeout_s,
        secret="",
    )


class Pusher:
    """Rank 0 of a weight group with one engine."""

    def __init__(
        self, engine: Engine, client: EngineClient, *, timeout_s: float = HANG_LIMIT_S, name: str = "trainer"
    ) -> None:
        self.engine, self.client, self.timeout_s, self.name = engine, client, timeout_s, name
        self.group: WeightGroup | None = None

    async def __aenter__(self) -> Pusher:
        self.group = WeightGroup.create(world_size=2, group_name=self.name, timeout_s=self.timeout_s)
        await asyncio.gather(
            self.client.init_weights_group(
                form_group(self.name, port=self.group.port, timeout_s=self.timeout_s)
            ),
            asyncio.to_thread(self.group.connect),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.destroy_weights_group(group_name=self.name)
        assert self.group is not None
        self.group.close()

    async def send(
        self,
        tensors: Mapping[str, Tensor],
        *,
        version: int | None,
        flattened: bool = True,
        bucket_bytes: int = 8192,
        dtype: str | None = None,
        wrong_checksum: bool = False,
    ) -> None:
        """Sends all buckets into the open update."""
        assert self.group is not None
        buckets = cut_buckets(
            [spec_of(n, t, dtype=dtype) for n, t in tensors.items()], bucket_bytes=bucket_bytes
        )
        for i, bucket in enumerate(buckets):
            flat = flatten(bucket, tensors)
            stated = (checksum(flat) ^ wrong_checksum) if flattened else None
            pieces = [flat] if flattened else [t.clone() for t in unflatten(bucket, flat).values()]
            last = {"weight_version": version} if i == len(buckets) - 1 and version is not None else {}
            receiving = asyncio.ensure_future(
                self.client.update_weights_from_distributed(
                    type(bucket)(tensors=bucket.tensors, checksum=stated), group_name=self.name,
                    timeout_s=self.timeout_s, flattened=flattened, **last,
                )
            )  # fmt: skip
            for piece in pieces:
                await asyncio.to_thread(self.group.broadcast, piece)
            await receiving

    async def push(
        self, tensors: Mapping[str, Tensor], *, version: int, running: str = "recompute", **options: Any
    ) -> None:
        """Pushes a whole update.

        SGLang loads in place, so it is paused; the embedded engine continues to decode.
        """
        if not isinstance(self.client, SglangClient):
            await self.client.begin_weight_update()
            await self.send(tensors, version=version, **options)
            await self.client.end_weight_update(
                weight_version=version, running=running, timeout_s=self.timeout_s
            )
            return
        await self.client.pause("retract" if running == "recompute" else "in_place")
        await self.client.begin_weight_update()
        await self.send(tensors, version=None, **options)
        await self.client.end_weight_update(timeout_s=self.timeout_s)
        if running == "recompute":
            await self.client.flush_cache()
        await self.client.set_weight_version(version)
        await self.client.resume()


class PieceTokenizer:
    """Texts of the tiny models' tokens: letters, two letters at a time, and bytes of characters that have two
    bytes, so that a text has several spellings and some characters need two tokens."""

    pieces = tuple(
        bytes([0xC3]) if i % 10 == 8 else bytes([0xA9 + i // 30]) if i % 10 == 9
        else "abcd"[i % 4].encode() * (1 + i % 3 // 2)
        for i in range(VOCAB)
    )  # fmt: skip

    def text_of(self, tokens: Sequence[int]) -> str:
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")

    def token_of(self, text: str) -> int | None:
        return None

    def first_stop(self, tokens: Sequence[int], stops: Sequence[str]) -> int | None:
        """Number of tokens up to the end of the first stop text."""
        return next(
            (
                end
                for end in range(1, len(tokens) + 1)
                if any(stop in self.text_of(tokens[:end]) for stop in stops)
            ),
            None,
        )


async def sample(
    client: EngineClient,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    timeout_s: float = math.inf,
    **options: Any,
) -> Generation:
    """One generation of `num_tokens` tokens, unless `options` or the time limit end it earlier."""
    sampling = Sampling(**{"max_new_tokens": num_tokens, "ignore_eos": True, **options})
    return await client.generate(prompt, sampling=sampling, timeout_s=timeout_s)
