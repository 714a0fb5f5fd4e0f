"""A keyed job whose samples are made by external agents, which have `agent.token` and no other key."""

from __future__ import annotations

import json
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from areal_like.client.areal_like_client import (
    ClaimedSession,
    ClientError,
    JobOverError,
    RefusedError,
    claim,
    claim_group,
)
from launch.audit.run import audit_run
from tests.support.keys import make_keys
from tests.support.launching import ROOT, TEST_LIMIT_S, areal_like, finish, launcher, wait_until

pytestmark = [pytest.mark.timeout(TEST_LIMIT_S), pytest.mark.slow]
NUM_STEPS, NUM_AGENTS = 2, 12
JOB = (
    *("--config", str(ROOT / "configs" / "jobs" / "tools.yaml")),
    "name=x",
    "task={name: external}",
    "model.warm_start_steps=0",
    f"trainer.num_steps={NUM_STEPS}",
    "trainer.groups_per_step=4",
    "sampling.group_size=4",
    "eval.num_prompts=4",
    "rollout.max_running=16",
    "rollout.queue_samples=8",
)


def ask(session: ClaimedSession, content: str) -> Any:
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0}
    request = urllib.request.Request(
        f"{session.base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {session.api_key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def work(url: str, token: str, stopping: threading.Event, done: list[str], *, claims_groups: bool) -> None:
    """One agent: samples until the end of the job."""
    while not stopping.is_set():
        try:
            done += make_group(url, token) if claims_groups else make_one(url, token)
        except JobOverError:
            return
        except (ClientError, OSError):  # the server has gone, or a sample is not wanted any more
            stopping.wait(0.2)


def make_one(url: str, token: str) -> list[str]:
    if (session := claim(url, token=token, wait_s=1)) is None:
        return []
    answer = ask(session, f"{session.example['index'] % 100}+1")
    session.reward(float(len(answer["choices"][0]["message"]["content"]) % 2), metrics={"alone": 1})
    session.end()
    return [session.id]


def make_group(url: str, token: str) -> list[str]:
    if (group := claim_group(url, token=token, wait_s=1)) is None:
        return []
    answers = [ask(session, f"{group.example['index'] % 100}+1") for session in group.sessions]
    lengths = [len(answer["choices"][0]["message"]["content"]) for answer in answers]
    ranked = sorted(zip(lengths, group.sessions, strict=True), key=lambda one: one[0])
    over = group.rank([session for _, session in ranked])
    unmade = {*over, *group.end()}
    return [session.id for session in group.sessions if session.id not in unmade]


@pytest.mark.long
def test_agents_from_outside_make_all_samples(tmp_path: Path, cache: dict[str, str]) -> None:
    tokens = make_keys(tmp_path / "keys")
    run = tmp_path / "runs" / "x"
    endpoint = run / "endpoints" / "rollout-0.json"
    stopping, done = threading.Event(), list[str]()
    with launcher(*JOB, f"security.keys={tmp_path}/keys", cwd=tmp_path, environment=cache) as process:
        wait_until(
            lambda: endpoint.exists() and "sessions" in json.loads(endpoint.read_text()),
            what="the address of sessions",
            process=process,
            run_root=run,
        )
        url = json.loads(endpoint.read_text())["sessions"]
        assert f"sessions for agents at {url}" in areal_like("status", str(run), cwd=tmp_path).stdout
        for token in ("", "x", tokens["monitor"], tokens["rollout"]):
            with pytest.raises(RefusedError, match=r"40[13]"):
                claim(url, token=token)
        agents = [
            threading.Thread(
                target=work,
                args=(url, tokens["agent"], stopping, done),
                kwargs={"claims_groups": number % 3 == 0},
                daemon=True,
            )
            for number in range(NUM_AGENTS)
        ]
        for agent in agents:
            agent.start()
        code, out, err = finish(process, run)
        stopping.set()
        for agent in agents:
            agent.join()
    assert (code, err) == (0, ""), out + err
    audit = audit_run(run)
    assert audit.is_clean, "\n".join(audit.lines())
    assert len(done) == len(set(done)) >= 4 * 4 * NUM_STEPS
