"""The facts that `areal-like doctor` collects about a machine: plain data, collected in `gathering.py` and
evaluated in `checks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class BoundAddress:
    """An address that a daemon of the job will listen on."""

    setting: str
    address: str
    error: str = ""
    """Why it cannot be bound; empty: it can."""
    needs_keys: bool = False
    """True if other machines can reach it and the job has no keys."""


@dataclass(frozen=True, kw_only=True)
class Name:
    """A host that the job's settings name for others to connect to."""

    setting: str
    host: str
    addresses: tuple[str, ...] = ()
    """What it resolves to; empty: it does not."""
    is_loopback: bool = False


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A directory that the job writes into."""

    setting: str
    path: str
    free_bytes: int
    needed_bytes: int
    """Estimate for the whole run; 0: not known."""
    file_system: str = ""
    is_network: bool = False
    error: str = ""
    """Why it cannot be written, or has no locks."""
    is_ledger: bool = False
    reserved_bytes: int = 0
    """Bytes that must stay free on this disk in addition to `needed_bytes`: `buffer.min_free_bytes`."""


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
    python: str = ""
    torch: str = ""
    cuda: str = ""
    """CUDA version that torch was built for; empty: a build for CPUs."""
    transformers: str = ""
    sglang: str = ""
    nccl: str = ""
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class SecretFile:
    """A file that only its owner may read."""

    path: str
    mode: int | None
    """Permission bits; None: there is no such file."""
    is_needed: bool = True
    is_mine: bool = True


@dataclass(frozen=True, kw_only=True)
class RemoteClock:
    """The clock of another machine, compared with this one's."""

    of: str
    ahead_s: float | None
    """How far it is ahead; None: no response."""
    uncertain_s: float = 0.5


@dataclass(frozen=True, kw_only=True)
class ProcessLimits:
    """Limits of this process and machine."""

    max_files: int
    """Hard limit of open files."""
    max_locked_bytes: int | None
    """None: no limit."""
    shm_bytes: int | None
    """Size of /dev/shm; None: there is none."""
    rdma: tuple[str, ...] = ()
    """Active RDMA ports, as `mlx5_0/1`."""
    rdma_down: tuple[str, ...] = ()
    interfaces: tuple[str, ...] = ()
    """Network interfaces."""
    named_interfaces: dict[str, str] = field(default_factory=dict)
    """NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, where they are set."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All facts."""

    bound: tuple[BoundAddress, ...] = ()
    names: tuple[Name, ...] = ()
    disks: tuple[Disk, ...] = ()
    gpus: GpuFacts = field(default_factory=GpuFacts)
    versions: tuple[Versions, ...] = ()
    secrets: tuple[SecretFile, ...] = ()
    clocks: tuple[RemoteClock, ...] = ()
    limits: ProcessLimits = field(
        default_factory=lambda: ProcessLimits(max_files=1 << 20, max_locked_bytes=None, shm_bytes=None)
    )
    model_error: str = ""
    """Why `model.path` cannot be used here."""
    uses_gpus: bool = False
    num_hosts: int = 1
    spans_machines: bool = False
    """True if the settings name addresses that are not loopback."""
