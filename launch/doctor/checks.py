"""The checks of `areal-like doctor`: pure functions from facts to findings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from launch.doctor.facts import Disk, Facts, Versions

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


def findings(facts: Facts) -> list[Finding]:
    """All findings, in the order of the checks."""
    return [finding for check in CHECKS for finding in check(facts)]


def check_ports(facts: Facts) -> Iterator[Finding]:
    """Checks that addresses can be bound, and are not reachable without keys."""
    for bound in facts.bound:
        what = f"{bound.setting} {bound.address}"
        if bound.error:
            yield _error(what, bound.error, f"end what uses it, or change {bound.setting}")
        elif bound.needs_keys:
            yield _error(
                what,
                "other machines can reach it, and the job has no keys",
                "areal-like keys init DIR, then security.keys=DIR",
            )
        else:
            yield _ok(what, "free")


def check_names(facts: Facts) -> Iterator[Finding]:
    """Checks that hosts that peers connect to resolve, and to the right kind of address."""
    for name in facts.names:
        what = f"{name.setting} {name.host}"
        if not name.addresses:
            yield _error(what, "does not resolve here", "use an address, or a name that every machine knows")
        elif name.is_loopback and facts.spans_machines:
            yield _warning(
                what,
                "is loopback, while other settings name other machines",
                f"set {name.setting} to an address of this machine that the others reach",
            )
        else:
            yield _ok(what, ", ".join(name.addresses))


def check_clocks(facts: Facts) -> Iterator[Finding]:
    """Checks that clocks agree: logs, traces and the age of keys and weights depend on it."""
    for clock in facts.clocks:
        what = f"clock of {clock.of}"
        if clock.ahead_s is None:
            remedy = "is the buffer running there, with keys and TLS as given here?"
            yield _warning(what, "no response", remedy)
            continue
        apart_s = max(0.0, abs(clock.ahead_s) - clock.uncertain_s)
        found = f"{abs(clock.ahead_s):.1f} s {'ahead' if clock.ahead_s > 0 else 'behind'}"
        if apart_s > CLOCK_ERROR_S:
            yield _error(what, found, "synchronize both clocks (chrony, systemd-timesyncd)")
        elif apart_s > CLOCK_WARNING_S:
            yield _warning(what, found, "synchronize both clocks: logs and traces are merged by time")
        else:
            yield _ok(what, f"agrees within {apart_s + clock.uncertain_s:.1f} s")


def check_disks(facts: Facts) -> Iterator[Finding]:
    """Checks that directories are writable and have space, and that the ledger is on a local disk."""
    for disk in facts.disks:
        what = f"{disk.setting} {disk.path}"
        if disk.error:
            yield _error(what, disk.error, f"choose another directory for {disk.setting}")
            continue
        if disk.is_network and disk.is_ledger:
            yield _warning(
                what,
                f"the ledger would be on {disk.file_system}: SQLite's WAL is unsafe on it",
                "set buffer.ledger_dir to a directory on a local disk",
            )
        yield _space(disk, what)


def _space(disk: Disk, what: str) -> Finding:
    free = f"{gigabytes(disk.free_bytes)} free"
    needed_bytes = disk.needed_bytes + disk.reserved_bytes
    if not needed_bytes:
        return _ok(what, free)
    found = f"{free}, about {gigabytes(needed_bytes)} needed"
    if disk.reserved_bytes:
        found += f", of which buffer.min_free_bytes keeps {gigabytes(disk.reserved_bytes)} free"
    if disk.free_bytes < needed_bytes:
        remedy = f"free some, choose another {disk.setting}, or keep fewer (trainer.keep_checkpoints)"
        return _error(what, found, remedy)
    if disk.free_bytes < 2 * needed_bytes:
        return _warning(what, found, "watch it: other runs may fill it")
    return _ok(what, found)


def check_model(facts: Facts) -> Iterator[Finding]:
    """Checks that the model can be read."""
    if facts.model_error:
        yield _error("model.path", facts.model_error, "set model.path to a directory with config.json")


def check_versions(facts: Facts) -> Iterator[Finding]:
    """Checks that the versions of packages are compatible with one another and with the driver."""
    for each in facts.versions:
        if each.error:
            yield _error(f"Python of the {each.of}", each.error, "make setup; for SGLang see the guide")
            continue
        if each.of == "trainer":  # SGLang has its own requirements, which pip has checked
            yield _version("torch", each.torch, TORCH)
            yield _version("transformers", each.transformers, TRANSFORMERS)
        elif each.sglang:
            yield _ok("sglang", each.sglang)
        else:
            yield _error("sglang", "not installed", "set rollout.sglang.python, or run `make sglang`")
        if facts.uses_gpus:
            yield from _cuda(facts, each)
    engine = next((each.nccl for each in facts.versions if each.of == "engine"), "")
    trainer = next((each.nccl for each in facts.versions if each.of == "trainer"), "")
    if engine and trainer and facts.uses_gpus:
        if engine != trainer:
            yield _error(
                "NCCL",
                f"{trainer} in the trainer, {engine} in SGLang",
                "use a torch with the same NCCL in both (requirements-gpu.txt): ranks of two versions refuse "
                "each other",
            )
        else:
            yield _ok("NCCL", f"{trainer} in both")


def _cuda(facts: Facts, each: Versions) -> Iterator[Finding]:
    what = f"CUDA of the {each.of}'s torch"
    if not each.cuda:
        yield _error(
            what, f"torch {each.torch} is built for CPUs", "make setup REQUIREMENTS=requirements-gpu.txt"
        )
        return
    major = int(each.cuda.split(".")[0])
    needed = LEAST_DRIVER.get(major)
    driver = re.match(r"\d+", facts.gpus.driver)
    if needed is None or driver is None:
        yield _ok(what, each.cuda)
    elif int(driver[0]) < needed:
        yield _error(
            what,
            f"{each.cuda} needs driver {needed} or newer, this is {facts.gpus.driver}",
            "update the driver, or use a torch for an older CUDA",
        )
    else:
        yield _ok(what, f"{each.cuda}, driver {facts.gpus.driver}")


def check_gpus(facts: Facts) -> Iterator[Finding]:
    """Checks that the GPUs that the job wants exist and are free."""
    gpus = facts.gpus
    if not gpus.wanted:
        return
    if gpus.error:
        yield _error(
            "GPUs", gpus.error, "install the driver, or use trainer.device=cpu and engine_device=cpu"
        )
        return
    found = {gpu.index: gpu for gpu in gpus.found}
    for index, roles in sorted(gpus.wanted.items()):
        what = f"GPU {index} for {roles}"
        gpu = found.get(index)
        if gpu is None:
            hidden = f" (CUDA_VISIBLE_DEVICES={gpus.visible})" if gpus.visible is not None else ""
            yield _error(
                what, f"{len(found)} GPUs are visible{hidden}", "use fewer ranks or servers, or other GPUs"
            )
        elif gpu.used_mb > USED_GPU_MB and not gpus.may_share:
            yield _warning(
                what,
                f"{gpu.name}, {gpu.used_mb} of {gpu.total_mb} MB in use",
                "end what uses it (nvidia-smi)",
            )
        else:
            yield _ok(what, f"{gpu.name}, {gpu.total_mb - gpu.used_mb} MB free")


def check_network(facts: Facts) -> Iterator[Finding]:
    """Checks the interfaces for NCCL and gloo."""
    limits = facts.limits
    for variable, value in limits.named_interfaces.items():
        wanted = [name.strip("^=") for name in value.split(",")]
        unknown = [name for name in wanted if not any(each.startswith(name) for each in limits.interfaces)]
        if unknown:
            have = ", ".join(limits.interfaces)
            yield _error(f"{variable}={value}", f"there is no interface {unknown[0]}", f"choose among {have}")
        else:
            yield _ok(f"{variable}={value}", "exists")
    if facts.uses_gpus and facts.num_hosts > 1:
        if limits.rdma:
            yield _ok("RDMA", ", ".join(limits.rdma))
            if limits.max_locked_bytes is not None:
                yield _warning(
                    "locked memory",
                    f"limited to {gigabytes(limits.max_locked_bytes)}",
                    "ulimit -l unlimited (LimitMEMLOCK=infinity): RDMA registers its buffers",
                )
        else:
            down = f" ({', '.join(limits.rdma_down)} down)" if limits.rdma_down else ""
            yield _warning("RDMA", f"no active port{down}", "NCCL uses TCP, which is slower between machines")


def check_limits(facts: Facts) -> Iterator[Finding]:
    """Checks the limits of open files and shared memory."""
    limits = facts.limits
    if limits.max_files < MANY_FILES:
        yield _warning(
            "open files", f"at most {limits.max_files}", f"ulimit -Hn {MANY_FILES} or more (LimitNOFILE)"
        )
    else:
        yield _ok("open files", f"at most {limits.max_files}")
    if facts.uses_gpus and limits.shm_bytes is not None:
        if limits.shm_bytes < SMALL_SHM_BYTES:
            yield _warning(
                "/dev/shm",
                gigabytes(limits.shm_bytes),
                "docker run --shm-size=8g (an emptyDir with medium Memory)",
            )
        else:
            yield _ok("/dev/shm", gigabytes(limits.shm_bytes))


def check_secrets(facts: Facts) -> Iterator[Finding]:
    """Checks that files of keys exist, and that other users cannot read them."""
    for file in facts.secrets:
        if file.mode is None:
            if file.is_needed:
                yield _error(file.path, "there is no such file", "areal-like keys init DIR, or copy it here")
        elif not file.is_mine:
            yield _error(file.path, "belongs to another user", f"chown it to the daemons' user: {file.path}")
        elif file.mode & 0o077:
            yield _error(
                file.path, f"mode {file.mode:03o}: other users can read it", f"chmod go= {file.path}"
            )
        else:
            yield _ok(file.path, f"mode {file.mode:03o}")


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    check_ports,
    check_names,
    check_clocks,
    check_disks,
    check_model,
    check_versions,
    check_gpus,
    check_network,
    check_limits,
    check_secrets,
)


def gigabytes(num_bytes: int) -> str:
    """A size as text: `1.5 TB`, `2.0 GB`, `30 MB`."""
    if num_bytes >= 1e12:
        return f"{num_bytes / 1e12:.1f} TB"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.0f} MB"


def _version(package: str, found: str, bounds: tuple[tuple[int, int], tuple[int, int]]) -> Finding:
    (first, last), numbers = bounds, tuple(map(int, re.findall(r"\d+", found)[:2]))
    wanted = f"{first[0]}.{first[1]} or newer, below {last[0]}.{last[1]}"
    if not found:
        return _error(package, "not installed", f"install {package} {wanted}")
    if not first <= numbers < last:
        return _error(package, found, f"install {package} {wanted}")
    return _ok(package, found)


def _ok(what: str, found: str) -> Finding:
    return Finding(level=Level.OK, what=what, found=found)


def _warning(what: str, found: str, remedy: str) -> Finding:
    return Finding(level=Level.WARNING, what=what, found=found, remedy=remedy)


def _error(what: str, found: str, remedy: str) -> Finding:
    return Finding(level=Level.ERROR, what=what, found=found, remedy=remedy)
