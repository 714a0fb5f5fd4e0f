"""Looks at this machine for `areal-like doctor` and checks what it finds, without importing torch.

No daemon is started, and nothing is written or left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path

from areal_like.automatic_settings import dtype_choice
from areal_like.config import Config
from areal_like.config.gpus import engine_gpus, trainer_gpus
from areal_like.errors import ConfigError
from areal_like.hosts import is_loopback
from areal_like.ledger_place import file_system_of, is_network, wanted_place
from areal_like.paths import BUILT_MODELS, cache_dir, model_path
from areal_like.security.binding import require_loopback_or_keys
from areal_like.shards import all_shards
from areal_like.wire.addresses import buffer_host, buffer_port
from areal_like.wire.sockets import bound_socket
from launch.doctor.checks import (
    Finding,
    Gpu,
    GpuFacts,
    Level,
    Versions,
    check_clock,
    check_gpus,
    check_interfaces,
    check_linear_attention,
    check_name,
    check_open_files,
    check_port,
    check_rdma,
    check_secret,
    check_shared_memory,
    check_space,
    check_versions,
    error,
    ok,
    warning,
)
from launch.observation.reach import RunningJob

_BYTES_PER_PARAMETER = 12
"""Bytes per parameter in a checkpoint: master weights and Adam's two moments in float32."""
_BYTES_PER_TICKET = 220
"""Bytes in the ledger's rows for a ticket of four samples (docs/reference/ledger.md)."""
_BYTES_PER_TOKEN = 16
"""Bytes in a segment for a sampled token: its id, log-prob and version, and a margin."""
ROLES = ("buffer", "trainer", "rollout")
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, re, pathlib
def version(*names):
    for name in names:
        try: return m.version(name)
        except m.PackageNotFoundError: pass
    return ""
spec = u.find_spec("torch")
text = (pathlib.Path(spec.origin).parent / "version.py").read_text() if spec and spec.origin else ""
cuda = re.search(r"^cuda\\b[^=]*= '([0-9.]+)'", text, re.M)
print(json.dumps({"torch": version("torch"),
    "cuda": cuda[1] if cuda else "", "transformers": version("transformers"), "sglang": version("sglang"),
    "nccl": version("nvidia-nccl-cu13", "nvidia-nccl-cu12"),
    "flash_linear_attention": version("flash-linear-attention"), "causal_conv1d": version("causal-conv1d")}))
"""
"""Reads versions from metadata: importing torch would take seconds and memory."""


def findings(config: Config, roles: Sequence[str], *, job: RunningJob | None = None) -> Iterator[Finding]:
    """Checks this machine for these roles. `job`: a running job, to compare its clock."""
    yield from _bound(config, roles)
    yield from _names(config, roles)
    if job is not None:
        yield from (_clock(job, address) for address in job.buffers)
    yield from _disks(config, roles)
    if config.model.path not in BUILT_MODELS:
        try:
            model_path(config)
        except ConfigError as problem:
            yield error("model.path", str(problem), "set model.path to a directory with config.json")
    yield from _dtype(config)
    gpus = _gpus(config, roles)
    versions = list(_versions(config, roles))
    yield from check_versions(versions, gpus)
    uses_kernels = config.trainer.attention != "rectangles" and config.model.dtype != "float32"
    needs_kernels = uses_kernels and _has_linear_attention(config.model.path)
    if "trainer" in roles and trainer_gpus(config) and needs_kernels:
        trainer = next(each for each in versions if each.of == "trainer")
        yield from check_linear_attention(trainer, attention=config.trainer.attention)
    yield from check_gpus(gpus)
    yield from _limits(uses_gpus=bool(gpus.wanted), num_hosts=config.trainer.num_hosts)
    yield from _secrets(config, roles)


def _bound(config: Config, roles: Sequence[str]) -> Iterator[Finding]:
    http_host, http_port = config.daemon.http_host, config.daemon.http_port
    num_daemons = 0
    if "buffer" in roles:
        for shard in all_shards(config.buffer.num_shards):
            yield _try(config, "buffer.host", buffer_host(config, shard), buffer_port(config, shard))
            num_daemons += 1
    if "rollout" in roles:
        yield _try(config, "rollout.host", config.rollout.host, 0)
        if config.sessions.port:
            for index in range(config.rollout.num_servers):
                yield _try(config, "sessions.host", config.sessions.host, config.sessions.port + index)
        num_daemons += config.rollout.num_servers
    if "trainer" in roles:
        # A trainer uses one port of the range; other trainers may have taken all of them.
        tried = [_try(config, "weights.host", config.weights.host, port) for port in config.weights.ports]
        yield next((each for each in tried if each.level is not Level.ERROR), tried[0])
        num_daemons += max(1, config.trainer.world_size // config.trainer.num_hosts)
    for index in range(num_daemons if http_port else 1):
        yield _try(config, "daemon.http_host", http_host, http_port + index if http_port else 0)


def _try(config: Config, setting: str, host: str, port: int) -> Finding:
    address = f"{host}:{port}" if port else f"{host} (any port)"
    needs_keys, reason = False, ""
    try:
        require_loopback_or_keys(config.security, host, setting=setting)
    except ConfigError:
        needs_keys = True
    try:
        bound_socket(host, port).close()
    except OSError as problem:
        reason = problem.strerror or str(problem)
    return check_port(setting, address, problem=reason, needs_keys=needs_keys)


def _named_hosts(config: Config, roles: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(setting, host) of the addresses that peers connect to."""
    for shard in all_shards(config.buffer.num_shards):
        host = config.buffer.advertise_host.replace("{shard}", str(shard.index))
        yield ("buffer.advertise_host", host) if host else ("buffer.host", buffer_host(config, shard))
    if "rollout" in roles:
        advertised = config.rollout.advertise_host
        yield ("rollout.advertise_host", advertised) if advertised else ("rollout.host", config.rollout.host)
    if "trainer" in roles:
        yield "weights.host", config.weights.host
        yield "trainer.rendezvous", config.trainer.rendezvous.rpartition(":")[0].strip("[]")
    yield "daemon.advertise_host", config.daemon.advertise_host


def _names(config: Config, roles: Sequence[str]) -> Iterator[Finding]:
    hosts = [(setting, host) for setting, host in _named_hosts(config, roles) if host]
    spans_machines = any(not is_loopback(host) for _, host in hosts)
    for setting, host in hosts:
        try:
            found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        yield check_name(setting, host, addresses, spans_machines=spans_machines)


def _disks(config: Config, roles: Sequence[str]) -> Iterator[Finding]:
    runs = Path(config.runs_dir).expanduser().resolve()
    trainer, buffer = config.trainer, config.buffer
    if "trainer" in roles:
        kept = min(trainer.keep_checkpoints + 1, 1 + trainer.num_steps // trainer.checkpoint_interval)
        yield from _disk("runs_dir", runs, kept * _checkpoint_bytes(config))
    if "buffer" in roles and buffer.durability != "none":
        tickets = trainer.num_steps * trainer.groups_per_step
        group_tokens = config.sampling.group_size * config.sampling.max_new_tokens
        held_steps = trainer.num_steps if buffer.retain_trajectories else trainer.checkpoint_interval
        held = min(held_steps + config.staleness_cap, trainer.num_steps) * trainer.groups_per_step
        rows = tickets * _BYTES_PER_TICKET * max(1, config.sampling.group_size // 4)
        setting = "buffer.ledger_dir" if buffer.ledger_dir else "runs_dir"
        place = wanted_place(config).parent
        needed = rows + held * group_tokens * _BYTES_PER_TOKEN
        yield from _disk(setting, place, needed, is_ledger=True, reserved_bytes=buffer.min_free_bytes)


def _disk(
    setting: str, path: Path, needed_bytes: int, *, is_ledger: bool = False, reserved_bytes: int = 0
) -> Iterator[Finding]:
    existing = next(each for each in (path, *path.parents) if each.exists())
    try:
        free_bytes = shutil.disk_usage(existing).free
        with tempfile.TemporaryFile(dir=existing) as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        reason = f"cannot write or lock a file in {existing}: {problem.strerror or problem}"
        yield error(f"{setting} {path}", reason, f"choose another directory for {setting}")
        return
    if is_ledger and is_network(kind := file_system_of(existing)):
        yield warning(
            f"{setting} {path}",
            f"the ledger would be on {kind}: SQLite's WAL is unsafe on it",
            "set buffer.ledger_dir to a directory on a local disk",
        )
    yield check_space(setting, path, free_bytes, needed_bytes, reserved_bytes=reserved_bytes)


def _checkpoint_bytes(config: Config) -> int:
    """Estimated size of one checkpoint; 0 if the weights are not on this machine."""
    folder = Path(config.model.path).expanduser()
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with contextlib.suppress(OSError, ValueError):
        facts = json.loads((folder / "config.json").read_text())
        per_parameter = 4 if "32" in str(facts.get("dtype") or facts.get("torch_dtype") or "bf16") else 2
        return num_bytes // per_parameter * _BYTES_PER_PARAMETER + num_bytes
    return 0


def _dtype(config: Config) -> Iterator[Finding]:
    """What `model.dtype=auto` is here, for a model whose size is known without a download."""
    path = config.model.path
    is_here = path in BUILT_MODELS or (Path(path).expanduser() / "config.json").is_file()
    with contextlib.suppress(ConfigError):
        if is_here and (choice := dtype_choice(config)):
            yield ok("model.dtype", choice)


def _has_linear_attention(model: str) -> bool:
    """False if the model's config.json is not on this machine."""
    file = Path(model).expanduser() / "config.json"
    try:
        if not file.is_file():
            # Imported here: it takes half a second, which only a model of the hub needs.
            from huggingface_hub import try_to_load_from_cache

            file = Path(str(try_to_load_from_cache(model, "config.json")))
        facts = json.loads(file.read_text())
        return any("linear_num_value_heads" in part for part in (facts, facts.get("text_config") or {}))
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _secrets(config: Config, roles: Sequence[str]) -> Iterator[Finding]:
    security = config.security
    if security.keys:
        folder = Path(security.keys).expanduser()
        identity = [security.identity] if security.identity else list(roles)
        for path in (folder, *(folder / f"{name}.secret" for name in identity)):
            yield _secret(path)
        if (folder / "operator.token").exists():
            yield _secret(folder / "operator.token")
        if not (folder / "public.json").exists():
            yield check_secret(str(folder / "public.json"), None)
    if security.tls_private_key:
        yield _secret(Path(security.tls_private_key).expanduser())


def _secret(path: Path) -> Finding:
    try:
        found = path.stat()
    except OSError:
        return check_secret(str(path), None)
    is_mine = found.st_uid == os.geteuid() or os.geteuid() == 0
    return check_secret(str(path), found.st_mode & 0o777, is_mine=is_mine)


def _clock(job: RunningJob, address: str) -> Finding:
    """Compares this clock with the Date header of a buffer, which has a resolution of one second."""
    host, _, port = address.rpartition(":")
    connection = job.operator.connection(host.strip("[]"), int(port), timeout_s=5.0)
    before_s = time.time()
    try:
        connection.request("GET", "/livez")
        date = connection.getresponse().getheader("Date") or ""
        after_s = time.time()
        ahead_s = parsedate_to_datetime(date).timestamp() + 0.5 - (before_s + after_s) / 2
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        return check_clock(address, None, uncertain_s=0.0)
    finally:
        connection.close()
    # uvicorn renews the header about once a second, so it may be a second old.
    return check_clock(address, ahead_s, uncertain_s=1.5 + (after_s - before_s) / 2)


def _limits(*, uses_gpus: bool, num_hosts: int) -> Iterator[Finding]:
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    variables = {name: os.environ[name] for name in names if os.environ.get(name)}
    yield from check_interfaces(variables, [name for _, name in socket.if_nameindex()])
    if uses_gpus and num_hosts > 1:
        ports: dict[bool, list[str]] = {True: [], False: []}
        for state in sorted(Path("/sys/class/infiniband").glob("*/ports/*/state")):
            with contextlib.suppress(OSError):
                ports["ACTIVE" in state.read_text()].append(f"{state.parts[-4]}/{state.parts[-2]}")
        locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        limit = None if locked == resource.RLIM_INFINITY else locked
        yield from check_rdma(ports[True], ports[False], max_locked_bytes=limit)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    shm = Path("/dev/shm")
    if uses_gpus and shm.is_dir():
        yield check_shared_memory(shutil.disk_usage(shm).total)


def _gpus(config: Config, roles: Sequence[str]) -> GpuFacts:
    wanted: dict[int, list[str]] = {}
    if "trainer" in roles:
        for index in list(trainer_gpus(config))[
            : max(1, config.trainer.world_size // config.trainer.num_hosts)
        ]:
            wanted.setdefault(index, []).append("the trainer")
    if "rollout" in roles:
        for server in range(config.rollout.num_servers):
            for index in engine_gpus(config.rollout, index=server):
                wanted.setdefault(index, []).append(f"rollout-{server}")
    named = {index: " and ".join(names) for index, names in wanted.items()}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    may_share = "--mem-fraction-static" in config.rollout.sglang.args
    if not named:
        return GpuFacts()
    table, reason = driver_table()
    if reason:
        return GpuFacts(wanted=named, error=reason, visible=visible)
    return gpus_from(table, wanted=named, visible=visible, may_share=may_share)


def driver_table() -> tuple[str, str]:
    """(nvidia-smi's table of GPUs with index, name, total and used MB, driver; why there is none)"""
    query = "--query-gpu=index,name,memory.total,memory.used,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except FileNotFoundError:
        return "", "nvidia-smi is not installed"
    except (OSError, subprocess.SubprocessError) as problem:
        return "", f"nvidia-smi fails: {problem}"
    return done.stdout, ""


def gpus_from(table: str, *, wanted: dict[int, str], visible: str | None, may_share: bool) -> GpuFacts:
    """The facts in nvidia-smi's table, with the device numbers that CUDA_VISIBLE_DEVICES gives."""
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.count(",") >= 4]
    by_number = {row[0]: row for row in rows}
    order = [row[0] for row in rows]
    if visible is not None and all(each.strip().isdecimal() for each in visible.split(",")):
        order = [each.strip() for each in visible.split(",") if each.strip() in by_number]
    elif visible == "":
        order = []
    found = tuple(
        Gpu(index=index, name=row[1], total_mb=_int(row[2]), used_mb=_int(row[3]))
        for index, row in enumerate(by_number[number] for number in order)
    )
    return GpuFacts(
        wanted=wanted,
        found=found,
        driver=rows[0][4] if rows else "",
        error="" if rows else "the driver shows no GPU",
        visible=visible,
        may_share=may_share,
    )


def _int(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _versions(config: Config, roles: Sequence[str]) -> Iterator[Versions]:
    if "trainer" in roles or config.rollout.engine == "embedded":
        yield versions_of("trainer", sys.executable)
    if "rollout" in roles and config.rollout.engine == "sglang" and not config.rollout.sglang.url:
        built = str(cache_dir() / "sglang/bin/python")
        given = config.rollout.sglang.python
        probes = (versions_of("engine", python) for python in ([given] if given else [sys.executable, built]))
        first = next(probes)
        yield first if first.sglang or first.error else next((each for each in probes if each.sglang), first)


def versions_of(of: str, python: str) -> Versions:
    """The versions in the environment of an interpreter; `of`: `trainer` or `engine`."""
    try:
        done = subprocess.run(
            [str(Path(python).expanduser()), "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return Versions(of=of, **json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError) as problem:
        return Versions(of=of, error=f"{python} does not run: {problem}")
