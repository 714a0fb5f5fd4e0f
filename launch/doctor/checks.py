"""The checks of `areal-like doctor`: pure functions from what was found on a machine to findings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from areal_like.hosts import is_loopback

TORCH = ((2, 11), (2, 15))
TRANSFORMERS = ((5, 17), (6, 0))
"""First version that works and first version that is not supported, as in pyproject.toml."""
LEAST_DRIVER = {12: 525, 13: 580}
"""Major version of CUDA -> first Linux driver branch that runs it (NVIDIA's compatibility table)."""
MANY_FILES = 4096
SMALL_SHM_BYTES = 1 << 30
"""Docker gives 64 MB by default; NCCL's transport between the GPUs of a machine uses more."""
USED_GPU_MB = 1024
CLOCK_WARNING_S, CLOCK_ERROR_S = 2.0, 300.0


class Level(StrEnum):
    """The severity of a finding."""

    OK = "ok"
    """Nothing to do."""
    WARNING = "warning"
    """The job starts, and may be slow or unsafe."""
    ERROR = "error"
    """The job does not start, or fails later."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table."""

    level: Level
    what: str
    found: str
    remedy: str = ""
    """What to do about it."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that the driver shows."""

    index: int
    name: str
    total_mb: int
    used_mb: int


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """GPUs of this machine, and those that the job wants."""

    wanted: dict[int, str] = field(default_factory=dict)
    """Index -> the roles that use it."""
    found: tuple[Gpu, ...] = ()
    driver: str = ""
    error: str = ""
    """Why the driver could not be queried."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    may_share: bool = False
    """True if `--mem-fraction-static` bounds an engine's memory."""


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of one Python environment; empty: not installed."""

    of: str
    """`trainer`, or `engine` for the environment of SGLang."""
    torch: str = ""
    cuda: str = ""
    """CUDA version that torch was built for; empty: a build for CPUs."""
    transformers: str = ""
    sglang: str = ""
    nccl: str = ""
    flash_linear_attention: str = ""
    causal_conv1d: str = ""
    error: str = ""


def check_port(setting: str, address: str, *, problem: str = "", needs_keys: bool = False) -> Finding:
    """An address that a daemon will listen on can be bound, and is not reachable without keys.

    `problem`: why it cannot be bound. `needs_keys`: other machines can reach it, and the job has no keys.
    """
    what = f"{setting} {address}"
    if problem:
        return error(what, problem, f"stop the process that uses it, or change {setting}")
    if needs_keys:
        return error(
            what,
            "other machines can reach it, and the job has no keys",
            "areal-like keys init DIR, then security.keys=DIR",
        )
    return ok(what, "free")


def check_name(setting: str, host: str, addresses: Sequence[str], *, spans_machines: bool) -> Finding:
    """A host that peers connect to resolves, and to the right kind of address.

    `spans_machines`: the settings name addresses that are not loopback.
    """
    what = f"{setting} {host}"
    if not addresses:
        return error(what, "does not resolve here", "use an address, or a name that every machine knows")
    if spans_machines and all(map(is_loopback, addresses)):
        return warning(
            what,
            "is loopback, while other settings name other machines",
            f"set {setting} to an address of this machine that the others reach",
        )
    return ok(what, ", ".join(addresses))


def check_clock(of: str, ahead_s: float | None, *, uncertain_s: float) -> Finding:
    """Another machine's clock agrees with this one's: logs, traces and the age of keys and weights depend on
    it.

    `ahead_s`: how far it is ahead; None: no response.
    """
    what = f"clock of {of}"
    if ahead_s is None:
        return warning(what, "no response", "is the buffer running there, with keys and TLS as given here?")
    apart_s = max(0.0, abs(ahead_s) - uncertain_s)
    found = f"{abs(ahead_s):.1f} s {'ahead' if ahead_s > 0 else 'behind'}"
    if apart_s > CLOCK_ERROR_S:
        return error(what, found, "synchronize both clocks (chrony, systemd-timesyncd)")
    if apart_s > CLOCK_WARNING_S:
        return warning(what, found, "synchronize both clocks: logs and traces are merged by time")
    return ok(what, f"agrees within {apart_s + uncertain_s:.1f} s")


def check_space(
    setting: str, path: object, free_bytes: int, needed_bytes: int, *, reserved_bytes: int = 0
) -> Finding:
    """A directory has space for the whole run.

    `needed_bytes`: estimate; 0: not known. `reserved_bytes`: bytes that must stay free in addition to them:
    `buffer.min_free_bytes`.
    """
    what, free = f"{setting} {path}", f"{gigabytes(free_bytes)} free"
    needed_bytes += reserved_bytes
    if not needed_bytes:
        return ok(what, free)
    found = f"{free}, about {gigabytes(needed_bytes)} needed"
    if reserved_bytes:
        found += f", of which buffer.min_free_bytes keeps {gigabytes(reserved_bytes)} free"
    if free_bytes < needed_bytes:
        remedy = f"free some, choose another {setting}, or keep fewer (trainer.keep_checkpoints)"
        return error(what, found, remedy)
    if free_bytes < 2 * needed_bytes:
        return warning(what, found, "watch it: other runs may fill it")
    return ok(what, found)


def check_versions(versions: Sequence[Versions], gpus: GpuFacts) -> Iterator[Finding]:
    """Versions of packages are compatible with one another and, if the job wants GPUs, with the driver."""
    for each in versions:
        if each.error:
            yield error(f"Python of the {each.of}", each.error, "make setup; for SGLang see the guide")
            continue
        if each.of == "trainer":  # SGLang has its own requirements, which pip has checked
            yield _version("torch", each.torch, TORCH)
            yield _version("transformers", each.transformers, TRANSFORMERS)
        elif each.sglang:
            yield ok("sglang", each.sglang)
        else:
            yield error("sglang", "not installed", "set rollout.sglang.python, or run `make sglang`")
        if gpus.wanted:
            yield _cuda(each, gpus.driver)
    nccl = {each.of: each.nccl for each in versions if each.nccl}
    if gpus.wanted and len(nccl) == 2:
        if nccl["engine"] != nccl["trainer"]:
            yield error(
                "NCCL",
                f"{nccl['trainer']} in the trainer, {nccl['engine']} in SGLang",
                "use a torch with the same NCCL in both (requirements-gpu.txt): ranks of two versions refuse "
                "each other",
            )
        else:
            yield ok("NCCL", f"{nccl['trainer']} in both")


def check_linear_attention(trainer: Versions, *, attention: str) -> Iterator[Finding]:
    """The kernels of a model with linear attention are installed, for a trainer on GPUs.

    `attention`: `trainer.attention`, not `rectangles`; with `varlen` the trainer needs both packages.
    """
    if trainer.flash_linear_attention:
        yield ok("flash-linear-attention", trainer.flash_linear_attention)
    else:
        yield error(
            "flash-linear-attention",
            "not installed, and the model has linear attention",
            "pip install flash-linear-attention causal-conv1d, or set trainer.attention=rectangles, which is "
            "much slower",
        )
    if trainer.causal_conv1d:
        yield ok("causal-conv1d", trainer.causal_conv1d)
    elif attention == "varlen":
        yield error(
            "causal-conv1d",
            "not installed, and trainer.attention=varlen needs it for linear attention",
            "pip install causal-conv1d, or set trainer.attention=auto",
        )
    else:
        yield warning(
            "causal-conv1d",
            "not installed: linear attention pads its sequences",
            "pip install causal-conv1d",
        )


def _version(package: str, found: str, bounds: tuple[tuple[int, int], tuple[int, int]]) -> Finding:
    (first, last), numbers = bounds, tuple(map(int, re.findall(r"\d+", found)[:2]))
    if found and first <= numbers < last:
        return ok(package, found)
    wanted = f"{first[0]}.{first[1]} or newer, below {last[0]}.{last[1]}"
    return error(package, found or "not installed", f"install {package} {wanted}")


def _cuda(each: Versions, driver: str) -> Finding:
    what = f"CUDA of the {each.of}'s torch"
    if not each.cuda:
        return error(
            what, f"torch {each.torch} is built for CPUs", "make setup REQUIREMENTS=requirements-gpu.txt"
        )
    needed, branch = LEAST_DRIVER.get(int(each.cuda.split(".")[0])), re.match(r"\d+", driver)
    if needed is None or branch is None:
        return ok(what, each.cuda)
    if int(branch[0]) < needed:
        return error(
            what,
            f"{each.cuda} needs driver {needed} or newer, this is {driver}",
            "update the driver, or use a torch for an older CUDA",
        )
    return ok(what, f"{each.cuda}, driver {driver}")


def check_gpus(gpus: GpuFacts) -> Iterator[Finding]:
    """The GPUs that the job wants exist and are free."""
    if gpus.wanted and gpus.error:
        yield error("GPUs", gpus.error, "install the driver, or use trainer.device=cpu and engine_device=cpu")
        return
    found = {gpu.index: gpu for gpu in gpus.found}
    for index, roles in sorted(gpus.wanted.items()):
        what = f"GPU {index} for {roles}"
        gpu = found.get(index)
        if gpu is None:
            hidden = f" (CUDA_VISIBLE_DEVICES={gpus.visible})" if gpus.visible is not None else ""
            yield error(
                what, f"{len(found)} GPUs are visible{hidden}", "use fewer ranks or servers, or other GPUs"
            )
        elif gpu.used_mb > USED_GPU_MB and not gpus.may_share:
            in_use = f"{gpu.name}, {gpu.used_mb} of {gpu.total_mb} MB in use"
            yield warning(what, in_use, "stop the process that uses it (nvidia-smi)")
        else:
            yield ok(what, f"{gpu.name}, {gpu.total_mb - gpu.used_mb} MB free")


def check_interfaces(named: Mapping[str, str], interfaces: Sequence[str]) -> Iterator[Finding]:
    """The network interfaces that variables of NCCL and gloo name exist. `named`: variable -> its value."""
    for variable, value in named.items():
        wanted = [name.strip("^=") for name in value.split(",")]
        unknown = [name for name in wanted if not any(each.startswith(name) for each in interfaces)]
        if unknown:
            remedy = f"choose among {', '.join(interfaces)}"
            yield error(f"{variable}={value}", f"there is no interface {unknown[0]}", remedy)
        else:
            yield ok(f"{variable}={value}", "exists")


def check_rdma(
    active: Sequence[str], down: Sequence[str], *, max_locked_bytes: int | None
) -> Iterator[Finding]:
    """NCCL can use RDMA between machines. The ports are named as `mlx5_0/1`.

    `max_locked_bytes`: limit of locked memory; None: no limit.
    """
    if not active:
        ports = f" ({', '.join(down)} down)" if down else ""
        yield warning("RDMA", f"no active port{ports}", "NCCL uses TCP, which is slower between machines")
        return
    yield ok("RDMA", ", ".join(active))
    if max_locked_bytes is not None:
        yield warning(
            "locked memory",
            f"limited to {gigabytes(max_locked_bytes)}",
            "ulimit -l unlimited (LimitMEMLOCK=infinity): RDMA registers its buffers",
        )


def check_open_files(limit: int) -> Finding:
    """A daemon may open many files. `limit`: the hard limit."""
    found = f"at most {limit}"
    if limit < MANY_FILES:
        return warning("open files", found, f"ulimit -Hn {MANY_FILES} or more (LimitNOFILE)")
    return ok("open files", found)


def check_shared_memory(num_bytes: int) -> Finding:
    """/dev/shm is large enough for NCCL."""
    found = gigabytes(num_bytes)
    if num_bytes < SMALL_SHM_BYTES:
        return warning("/dev/shm", found, "docker run --shm-size=8g (an emptyDir with medium Memory)")
    return ok("/dev/shm", found)


def check_secret(path: str, mode: int | None, *, is_mine: bool = True) -> Finding:
    """Other users cannot read a file of keys. `mode`: its permission bits; None: there is no such file."""
    if mode is None:
        return error(path, "there is no such file", "areal-like keys init DIR, or copy it here")
    if not is_mine:
        return error(path, "belongs to another user", f"chown it to the daemons' user: {path}")
    if mode & 0o077:
        return error(path, f"mode {mode:03o}: other users can read it", f"chmod go= {path}")
    return ok(path, f"mode {mode:03o}")


def gigabytes(num_bytes: int) -> str:
    """A size as text: `1.5 TB`, `2.0 GB`, `30 MB`."""
    if num_bytes >= 1e12:
        return f"{num_bytes / 1e12:.1f} TB"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"


def ok(what: str, found: str) -> Finding:
    """A finding that needs no remedy."""
    return Finding(level=Level.OK, what=what, found=found)


def warning(what: str, found: str, remedy: str) -> Finding:
    """The job starts, and may be slow or unsafe."""
    return Finding(level=Level.WARNING, what=what, found=found, remedy=remedy)


def error(what: str, found: str, remedy: str) -> Finding:
    """The job does not start, or fails later."""
    return Finding(level=Level.ERROR, what=what, found=found, remedy=remedy)
