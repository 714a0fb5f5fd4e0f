"""The reward `model` with a real SGLang that serves a reward model (docs/reference/rewards.md)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from areal_like.chat.scored_text import scored_tokens
from areal_like.errors import RewardError
from rollout_server.policy.engines.sglang import launch_with_key
from rollout_server.policy.engines.sglang.process import find_python
from rollout_server.rewards.library import make_rewards
from rollout_server.rewards.time_limit import begin_reward
from rollout_server.tasks.base import Completion, Example, Score
from tests.sglang.conftest import START_S
from tests.support.engine_harness import TOLERANCE
from tests.support.judge_server import run_closed
from tests.support.launching import ROOT, wait_until
from tests.support.ports import free_port
from tests.support.reward_models import write_reward_model

pytestmark = pytest.mark.long
CONTEXT = 256
PROMPTS: Sequence[Any] = ("1+1=", [{"role": "user", "content": "What is 1+1?"}])
TEXTS = ("2", "", "3" * 40, "It is 2.", "<|im_end|>", "1+1=2, and 2+2=4.")
PAGE = (ROOT / "docs" / "reference" / "rewards.md").read_text()
ON_A_CPU = (
    "--device cpu --dtype float32 --attention-backend torch_native --disable-cuda-graph "
    "--disable-overlap-schedule --max-total-tokens 4096 --max-running-requests 32 --host 127.0.0.1"
)


@contextlib.contextmanager
def serving(path: str, key_file: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The command of the page, on this CPU and with a key: its URL and process."""
    (words,) = re.findall(r"`python -m sglang\.launch_server ([^`]*)`", PAGE)
    port = free_port()
    options = [*shlex.split(words.replace("DIR", path)), *ON_A_CPU.split(), "--port", str(port)]
    tied = [sys.executable, "-m", "areal_like.runtime.tied_exec", find_python("")]
    process = subprocess.Popen(
        [*tied, launch_with_key.__file__, str(key_file), *options],
        cwd=ROOT,
        env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"

    def is_well() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=30):
            return True
        return False

    try:
        wait_until(is_well, what="SGLang", process=process, timeout_s=START_S)
        yield url, process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def asked(texts: Sequence[str], *, prompt: Any, **settings: Any) -> list[Score | BaseException]:
    """The scores of completions that are asked for at the same time."""
    rewards = make_rewards({"name": "model", "api": "classify", **settings})
    rewards.check()
    example = Example(prompt=prompt, answer="")

    async def one(text: str) -> Score:
        begin_reward(120.0)
        scoring = rewards.score(example, Completion(text))
        assert not isinstance(scoring, Score)
        return await scoring

    async def body() -> list[Score | BaseException]:
        return await asyncio.gather(*map(one, texts), return_exceptions=True)

    return list(run_closed(rewards, body))


def add_zero_bias(path: Path) -> None:
    """Adds the bias that the head of SGLang 0.5.23 has for these models, and leaves at a random value."""
    weights = load_file(path / "model.safetensors")
    assert "score.bias" not in weights
    save_file(weights | {"score.bias": torch.zeros(1)}, path / "model.safetensors", {"format": "pt"})


@torch.inference_mode()
def scores_of_transformers(path: str, prompt: Any) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = []
    for text in TEXTS:
        ids = scored_tokens(tokenizer, prompt, text, pad_token_id=model.config.pad_token_id)
        found.append(float(model(input_ids=torch.tensor([ids])).logits[0, 0]))
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_scores_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    path = write_reward_model(tmp_path / "rm", kind=kind, context=CONTEXT)
    if kind != "llama":
        add_zero_bias(tmp_path / "rm")
    key_file = tmp_path / "key"
    key_file.write_text("a key of the tests\n")
    key_file.chmod(0o600)
    with serving(path, key_file) as (url, process):
        settings = {"url": url, "tokenizer": path, "api_key_file": str(key_file)}
        for prompt in PROMPTS:
            want = scores_of_transformers(path, prompt)
            scores = asked(TEXTS, prompt=prompt, **settings)
            assert all(isinstance(score, Score) for score in scores), scores
            got = [score.value for score in scores if isinstance(score, Score)]
            print(kind, want, got)
            assert max(want) - min(want) > 0.5
            assert got == pytest.approx(want, abs=TOLERANCE)
            metrics = {name for score in scores if isinstance(score, Score) for name in score.metrics}
            (identity,) = (name for name in metrics if "scorer/" in name)
            assert not identity.endswith("unknown")
        long, right = asked(["2" * CONTEXT, TEXTS[0]], prompt=PROMPTS[0], **settings)
        assert type(long) is RewardError and "HTTP status 400" in str(long), long
        assert isinstance(right, Score) and process.poll() is None
