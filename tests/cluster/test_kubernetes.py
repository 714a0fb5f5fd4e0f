"""The Kubernetes manifests: they build, are valid, and the pods that they describe run a job to its end."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from areal_like.client.areal_like_client import claim
from areal_like.config import Config
from areal_like.runtime.command_line import load_config
from tests.cluster.kubelet import Cluster, Pod
from tests.support.keys import new_keys
from tests.support.launching import areal_like, num_steps_done
from tests.support.reward_models import write_reward_model

KUSTOMIZE = next(
    (words for words in (["kubectl", "kustomize"], ["kustomize", "build"]) if shutil.which(words[0])), []
)
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not KUSTOMIZE, reason="neither kubectl nor kustomize is installed"),
]
MANIFESTS = Path(__file__).parents[2] / "launch" / "deploy" / "kubernetes"
OVERLAYS = ("base", "gpu", "autoscale", "podmonitor", "reward-model", "router")
WORKLOADS = ("StatefulSet", "Deployment", "Job")
SMALL = {
    "model": {"path": "/runs/model", "warm_start_steps": 0},
    "task": {"_target_": "tests.support.rollout_tasks.SlowChecksum"},
    "sampling": {"group_size": 4, "max_new_tokens": 6},
    "trainer": {"groups_per_step": 16, "checkpoint_interval": 5, "num_steps": 25},
    "rollout": {"max_running": 8, "queue_samples": 4},
}


def built(overlay: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [*KUSTOMIZE, str(MANIFESTS / overlay)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def job_of(documents: list[dict[str, Any]]) -> tuple[str, str]:
    """(name of the ConfigMap, text of job.yaml)"""
    (config_map,) = [one for one in documents if one["kind"] == "ConfigMap"]
    return config_map["metadata"]["name"], config_map["data"]["job.yaml"]


def workloads(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Role -> its workload."""
    return {
        one["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: one
        for one in documents
        if one["kind"] in WORKLOADS
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests_are_valid(overlay: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    documents = built(overlay)
    assert {one["kind"] for one in documents} >= {"StatefulSet", "Deployment", "Job", "PodDisruptionBudget"}
    for document in documents:
        if document["kind"] != "PodMonitor":  # Prometheus' operator defines it
            validate.validate(document, "1.32", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pods_have_valid_settings(overlay: str, tmp_path: Path) -> None:
    """Each command's settings pass the checks that its daemon makes, and agree with what surrounds them."""
    documents = built(overlay)
    config_map, text = job_of(documents)
    (tmp_path / "job.yaml").write_text(text)
    found: dict[str, Config] = {}
    for role, workload in workloads(documents).items():
        spec = workload["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        words = [
            word.replace("$(POD_IP)", "10.1.2.3").replace("$(JOB_COMPLETION_INDEX)", "1")
            for word in container["command"]
        ]
        found[role] = load_config(
            ["--config", str(tmp_path / "job.yaml"), *[word for word in words if "=" in word]]
        )
        assert spec["terminationGracePeriodSeconds"] > found[role].daemon.drain_timeout_s
        assert {port["name"]: port["containerPort"] for port in container["ports"]}["http"] == 8080
        assert {"configMap": {"name": config_map}, "name": "job"} in spec["volumes"]
        secret = next(one["secret"] for one in spec["volumes"] if one["name"] == "secret")
        files = {"public.json", f"{role}.secret"}
        files |= {"scorer.token"} if (overlay, role) == ("reward-model", "rollout") else set()
        assert {item["key"] for item in secret["items"]} == files
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts >= {found[role].runs_dir, found[role].security.keys}
    assert found["buffer"].daemon.http_port == 8080 and found["buffer"].buffer.host == "10.1.2.3"
    trainer, job = found["trainer"].trainer, workloads(documents)["trainer"]["spec"]
    assert job["completions"] == job["parallelism"] == trainer.num_hosts
    (container,) = job["template"]["spec"]["containers"]
    gpus = container["resources"]["limits"].get("nvidia.com/gpu", 0)
    assert gpus * trainer.num_hosts == (trainer.world_size if trainer.device == "cuda" else 0)


@pytest.fixture
def pods(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Pod]]:
    """Starts pods by their role: of `base`, or of the overlay that is the fixture's parameter."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    overlay = getattr(request, "param", "base")
    documents = built(overlay)
    name, text = job_of(documents)
    new_keys(tmp_path / "keys")
    settings = yaml.safe_load(text)
    if overlay == "router":  # conversations need a chat template, which the toy model lacks
        settings["model"]["renderer"] = "rollout_server.rendering.tiny.TinyRenderer"
    for section, values in SMALL.items():
        if section != "task" or overlay == "base":
            settings[section] = settings.get(section, {}) | values
    cluster = Cluster(
        tmp_path,
        secrets={"areal-keys": {file.name: file.read_bytes() for file in (tmp_path / "keys").iterdir()}},
        config_maps={name: {"job.yaml": yaml.safe_dump(settings)}},
    )
    roles = workloads(documents)
    started: list[Pod] = []

    def start(role: str, name: str) -> Pod:
        host_name = f"areal-{role}-0.areal-{role}" if role in ("buffer", "trainer") else name
        started.append(Pod(cluster, roles[role], name=name, host_name=host_name))
        started[-1].start()
        return started[-1]

    yield start
    for pod in started:
        if pod.process is not None and pod.process.poll() is None:
            pod.kill()


def wait_for(condition: Callable[[], bool], what: str, pods: list[Pod], *, seconds: float = 90) -> None:
    end_s = time.monotonic() + seconds
    while not condition():
        outputs = "\n".join(f"--- {pod.name}\n{pod.output()[-1500:]}" for pod in pods)
        assert time.monotonic() < end_s, f"not within {seconds:.0f} s: {what}\n{outputs}"
        time.sleep(0.2)


def test_pods_run_a_job_to_its_end(pods: Callable[..., Pod], tmp_path: Path) -> None:
    """A server is deleted, and the buffer is lost and comes back under its name with another address."""
    root = tmp_path / "claims" / "areal-runs" / "first"
    buffer = pods("buffer", "areal-buffer-0")
    servers = [pods("rollout", f"areal-rollout-6d5f-{suffix}") for suffix in ("x2x2x", "b7b7b")]
    trainer = pods("trainer", "areal-trainer-0-w4kls")
    every = [buffer, *servers, trainer]
    for pod in every:
        wait_for(lambda: pod.probe("readinessProbe") == 200, f"{pod.name} to be ready", every)  # noqa: B023
        assert pod.probe("livenessProbe") == 200
    wait_for(lambda: num_steps_done(root) >= 3, "three steps", every)
    shown = areal_like("status", "--buffer", f"{buffer.address}:8080", "--keys", "keys", cwd=tmp_path)
    assert shown.returncode == 0 and servers[0].name in shown.stdout, shown
    assert buffer.probe("readinessProbe", path="/status", host="127.0.0.1:8080") == 401, "forwarded, no token"

    assert servers[0].delete() == 75
    servers[0] = pods("rollout", "areal-rollout-6d5f-9k9k9")
    buffer.kill()
    buffer = pods("buffer", "areal-buffer-0-again")
    every = [buffer, *servers, trainer]
    done = num_steps_done(root)
    wait_for(lambda: num_steps_done(root) >= done + 3, "steps with the second buffer", every)

    assert trainer.delete() == 75, "drained, so the Job starts another pod"
    trainer = pods("trainer", "areal-trainer-0-r8vbn")
    assert trainer.process is not None
    assert trainer.process.wait(timeout=120) == 0, trainer.output()[-2000:]
    assert json.loads((root / "summary.json").read_text())["finished"]
    for pod in (buffer, *servers):
        assert pod.process is not None and pod.process.wait(timeout=60) == 0, pod.output()[-2000:]
    # The ledger is on the buffer's own volume; in its pod /ledger is that volume.
    ledger = root / "ledger"
    target = tmp_path / "claims" / str(ledger.readlink()).lstrip("/")
    ledger.unlink()
    ledger.symlink_to(target)
    audit = areal_like("audit", str(root), cwd=tmp_path)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def started(pods: Callable[..., Pod], *roles: str) -> list[Pod]:
    """One pod of each role, all of them ready."""
    every = [pods(role, f"areal-{role}-0") for role in roles]
    for pod in every:
        wait_for(lambda: pod.probe("readinessProbe") == 200, f"{pod.name} to be ready", every)  # noqa: B023
    return every


@pytest.mark.parametrize("pods", ["reward-model"], indirect=True)
def test_score_servers_are_pods(pods: Callable[..., Pod], tmp_path: Path) -> None:
    runs = tmp_path / "claims" / "areal-runs"
    write_reward_model(runs / "reward-model")
    rows = [{"question": f"{row:03}=", "answer": f"{row:03}"} for row in range(40)]
    (runs / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (buffer,) = started(pods, "buffer")
    rollout, trainer = pods("rollout", "areal-rollout-0"), pods("trainer", "areal-trainer-0")
    (scorer,) = started(pods, "scorer")  # the rollout server waits for it
    every = [buffer, rollout, trainer, scorer]
    wait_for(lambda: num_steps_done(runs / "first") >= 3, "three steps", every)
    scorer.kill()
    again = pods("scorer", "areal-scorer-0")  # at another address
    done = num_steps_done(runs / "first")
    wait_for(lambda: num_steps_done(runs / "first") >= done + 3, "steps with the second scorer", every)
    assert trainer.process is not None and trainer.process.wait(timeout=120) == 0, trainer.output()[-2000:]
    assert again.delete() == 75


@pytest.mark.parametrize("pods", ["router"], indirect=True)
def test_agents_claim_sessions_at_a_router(pods: Callable[..., Pod], tmp_path: Path) -> None:
    *_, router = started(pods, "buffer", "rollout", "router")
    pods("trainer", "areal-trainer-0")  # it is ready when agents have made its first samples
    token = (tmp_path / "keys" / "agent.token").read_text().strip()
    session = claim(f"http://{router.address}:7700", token=token, wait_s=30, restart_s=60)
    assert session is not None and session.base_url.startswith("http://areal-router:7700/")
