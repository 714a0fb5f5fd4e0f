"""Starts programs with limits, watches them, and kills all processes that they leave behind.

    python -I -S supervisor.py '{"memory_mb": ..., ...}' COMMAND...
    python -I -S supervisor.py '{"memory_mb": ..., "serves": true}'

Its exit code is the command's, or 128 + n after signal n. With `serves` it runs one command after another,
in the same namespaces and with the same files. Its stdin is then a SOCK_SEQPACKET socket, and each packet one
JSON object:

    sandbox -> supervisor   {"command": [...], "directory": path, "timeout_s": s}   with the command's stdin,
                                                                          stdout and stderr (SCM_RIGHTS)
    sandbox -> supervisor   {}                                            the command has to end
    supervisor -> sandbox   {"exit_code": n, "problem": text}             nothing of the command is left

It ends when the socket is closed, or after `lifetime_s`.

It runs between a sandbox and the program. It imports only the standard library, of Python 3.9 or later,
because this repository does not exist inside bwrap or a container, where the text of this file is passed to
`python -c`. Kernel limits (rlimits) are set in the child before it becomes the program. RLIMIT_NPROC counts
all processes of a user and is not enforced for root, so the processes are also counted here, 20 times a
second. The sandbox gives this process a real-time priority if it may: among thousands of processes that fork,
an ordinary one would hardly run. So it reads only its descendants, and not all processes of the machine,
where the kernel lists them. As a subreaper, it inherits daemons whose parents have ended, and finds them
among its descendants.

A system call filter (seccomp) prevents the program from escaping these limits. It forbids memory that belongs
to no process (memfd_create, System V segments), new namespaces, in which the program could mount memory file
systems, and signals to this process, which would then stop counting. It also forbids what namespaces do not
separate: the kernel keyrings of the server's user, which would expose the server's secrets and let programs
leave data for later ones, and sockets of families other than unix and internet, which reach the host of a
virtual machine (vsock) or the kernel (netlink). The program has no capabilities.
"""

from __future__ import annotations

import _socket  # `socket` takes 10 ms to import
import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_CHILD_SUBREAPER = 36
_WATCH_INTERVAL_S = 0.05
_LATER_INTERVAL_S = 0.5
"""Interval outside a namespace for a program that has run for `_LONG_S`, such as a server of tools: a kernel
without lists of children has all processes of the machine read each time."""
_LONG_S = 15.0
_KILL_TIMEOUT_S = 5.0
_EXTRA_TIME_S = 2.0
"""The sandbox ends a program at its time limit. If the sandbox was killed, this process does so after this
extra time. (`extra_s` in the limits is another one: a container's commands are ended only from here.)"""
_MAX_FILES = 65536
"""Limit in a namespace: an empty file takes about a KiB of kernel memory, which no other limit covers."""
_PAGE_BYTES = resource.getpagesize()
_MIB = 1 << 20
_MAX_PACKET_BYTES = 1 << 18
"""More than the kernel sends in one packet by default."""

_CALLS: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "memfd_create": 319, "memfd_secret": 447, "shmget": 29, "msgget": 68, "semget": 64,
            "unshare": 272, "setns": 308, "clone": 56, "clone3": 435, "io_uring_setup": 425,
            "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297,
            "pidfd_open": 434, "prlimit64": 302, "sched_setscheduler": 144, "sched_setparam": 142,
            "sched_setaffinity": 203, "sched_setattr": 314, "ptrace": 101, "process_vm_readv": 310,
            "process_vm_writev": 311, "pidfd_getfd": 438,
            "add_key": 248, "request_key": 249, "keyctl": 250, "socket": 41, "socketpair": 53,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "memfd_create": 279, "memfd_secret": 447, "shmget": 194, "msgget": 186, "semget": 190,
            "unshare": 97, "setns": 268, "clone": 220, "clone3": 435, "io_uring_setup": 425,
            "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
            "pidfd_open": 434, "prlimit64": 261, "sched_setscheduler": 119, "sched_setparam": 118,
            "sched_setaffinity": 122, "sched_setattr": 274, "ptrace": 117, "process_vm_readv": 270,
            "process_vm_writev": 271, "pidfd_getfd": 438,
            "add_key": 217, "request_key": 218, "keyctl": 219, "socket": 198, "socketpair": 199,
        },
    ),
}  # fmt: skip
"""Machine -> its AUDIT_ARCH and system call numbers. On other machines there is no filter."""
_REFUSED = (
    "memfd_create", "memfd_secret", "shmget", "msgget", "semget", "unshare", "setns",
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "add_key", "request_key", "keyctl",
)  # fmt: skip
"""Forbidden calls: memory outside all limits, other namespaces, other processes (bwrap's own process in the
namespace has neither limits nor a filter), and keyrings."""
_ABSENT = ("clone3", "io_uring_setup")
"""Calls whose arguments the filter cannot see; instead of clone3 the C library then uses clone."""
_ON_PROCESS = (
    "kill", "tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open",
    "prlimit64", "sched_setscheduler", "sched_setparam", "sched_setaffinity", "sched_setattr",
)  # fmt: skip
"""Calls whose first argument is a process."""
_CLONE_NEW = 0x7E020080
"""Flags of clone that create namespaces."""
_FAMILIES = (1, 2, 10)
"""Socket families that the program may use: AF_UNIX, AF_INET, AF_INET6."""
_KEYCTL_JOIN_SESSION_KEYRING = 1


def main() -> None:
    """Runs the command in sys.argv and exits with its exit code."""
    limits, command = json.loads(sys.argv[1]), sys.argv[2:]
    signals = {signal.SIGCHLD, signal.SIGTERM}
    for number in (*signals, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # the server may ignore the signal, and processes inherit that
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program must not read this process's memory
    if limits["parent"] and os.getppid() != limits["parent"]:
        sys.exit(128 + signal.SIGTERM)  # the parent ended before prctl
    limits["files_before"] = _num_files()  # of others, where /tmp is not the namespace's own
    if limits["serves"]:
        _serve(limits, signals)
        os._exit(0)
    child = os.fork()
    if child == 0:
        _become(command, limits)
    code, problem = _watch(child, limits, signals)
    _kill_descendants(child)
    if problem:
        os.write(2, problem.encode())
    os._exit(code)


def _serve(limits: dict[str, float], signals: set[signal.Signals]) -> None:
    """Runs the commands that come over the socket, until its end."""
    control = _socket.socket(fileno=os.dup(0))  # which no command inherits
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    ends_s = time.monotonic() + limits["lifetime_s"]
    while (left_s := ends_s - time.monotonic()) > 0:
        control.settimeout(left_s)
        try:
            packet, ancillary, _, _ = control.recvmsg(_MAX_PACKET_BYTES, _socket.CMSG_SPACE(12))
        except TimeoutError:
            return
        if not packet:
            return
        descriptors = [number for _, _, data in ancillary for number in struct.unpack("@3i", data)]
        if not descriptors:
            continue  # the command that had to end had ended already
        request = json.loads(packet)
        own = limits | {"timeout_s": request["timeout_s"], "ends_s": ends_s}
        child = os.fork()
        if child == 0:
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            _become(request["command"], own, directory=request["directory"])
        for descriptor in descriptors:
            os.close(descriptor)
        code, problem = _watch(child, own, signals, control=control)
        _kill_descendants(child)
        control.settimeout(_KILL_TIMEOUT_S)
        control.send(json.dumps({"exit_code": code, "problem": problem}).encode())


def _has_message(control: _socket.socket) -> bool:
    """True if the sandbox asks for the end of the command, or has ended."""
    control.settimeout(0)
    try:
        control.recv(_MAX_PACKET_BYTES)
    except BlockingIOError:
        return False
    except OSError:  # the connection was reset
        return True
    return True


def _become(command: list[str], limits: dict[str, float], *, directory: str = "") -> None:
    try:
        if directory:
            os.chdir(directory)
        os.setsid()
        if os.sched_getscheduler(0) != os.SCHED_OTHER:  # some containers refuse the call that follows
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        set_limits(limits)
        leave_keyring()
        drop_capabilities()
        filter_calls()
        os.execvp(command[0], command)
    except (OSError, ValueError) as error:
        os.write(2, f"cannot start {command[0]}: {error}\n".encode())
    os._exit(127)


def set_limits(limits: dict[str, float]) -> None:
    """Sets the limits of this process and of those it starts. A lower existing limit stays."""
    cpu_s = int(limits["timeout_s"]) + 1
    wanted = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: int(limits["memory_mb"] * _MIB),
        resource.RLIMIT_FSIZE: int(limits["file_mb"] * _MIB),
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_RTPRIO: 0,
    }
    # Before Linux 5.14 the count included processes outside the user namespace, which are not visible here.
    release = tuple(int(part) for part in os.uname().release.split(".")[:2] if part.isdigit())
    if release >= (5, 14) or limits["parent"]:
        wanted[resource.RLIMIT_NPROC] = int(limits["max_processes"]) + _num_threads_of_user()
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def leave_keyring() -> None:
    """Gives this process a new, empty session keyring."""
    _, numbers = _CALLS.get(os.uname().machine, (0, {}))
    if numbers:  # a kernel without keyrings needs nothing
        ctypes.CDLL(None, use_errno=True).syscall(numbers["keyctl"], _KEYCTL_JOIN_SESSION_KEYRING, None)


def drop_capabilities() -> None:
    """Drops capabilities permanently, so that even root cannot mount, or change what belongs to others."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))


def filter_calls() -> None:
    """Installs the system call filter for this process and those it starts. Its parent is the supervisor.

    Call `drop_capabilities` first, as the kernel requires.
    """
    arch, numbers = _CALLS.get(os.uname().machine, (0, {}))
    if not numbers:
        return
    code = _filter(arch, numbers, supervisor=os.getppid())
    size = len(code) // 8
    program = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: the number of instructions, and where they are.
    fprog = ctypes.create_string_buffer(struct.pack("@HP", size, ctypes.addressof(program)))
    # A kernel without seccomp has no filter.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_SECCOMP, 2, fprog, 0, 0)


def _filter(arch: int, numbers: dict[str, int], *, supervisor: int) -> bytes:
    """Returns the filter in classic BPF: 8 bytes per instruction (linux/seccomp.h, linux/bpf_common.h)."""
    load, jump_if_equal, jump_if_any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, absent = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    no_family = 0x50000 | errno.EAFNOSUPPORT
    call_at, arch_at, argument_at = 0, 4, 16  # offsets in struct seccomp_data; lower half of the argument

    def op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value & 0xFFFFFFFF)

    parts = [op(load, arch_at), op(jump_if_equal, arch, 1), op(give, absent), op(load, call_at)]
    if arch == _CALLS["x86_64"][0]:  # its x32 variant has other numbers
        parts += [op(jump_if_any_bit, 1 << 30, 0, 1), op(give, absent)]
    for names, outcome in ((_REFUSED, refuse), (_ABSENT, absent)):
        for name in names:
            parts += [op(jump_if_equal, numbers[name], 0, 1), op(give, outcome)]
    parts += [op(jump_if_equal, numbers["clone"], 0, 4), op(load, argument_at)]
    parts += [op(jump_if_any_bit, _CLONE_NEW, 0, 1), op(give, refuse), op(give, allow)]
    for name in ("socket", "socketpair"):
        parts += [op(jump_if_equal, numbers[name], 0, 3 + len(_FAMILIES)), op(load, argument_at)]
        for number, family in enumerate(_FAMILIES):
            parts.append(op(jump_if_equal, family, len(_FAMILIES) - number))
        parts += [op(give, no_family), op(give, allow)]
    for name in _ON_PROCESS:
        # The supervisor, its group, and all processes (-1).
        targets = (supervisor, -supervisor, -1)
        parts += [op(jump_if_equal, numbers[name], 0, 2 + 2 * len(targets)), op(load, argument_at)]
        for target in targets:
            parts += [op(jump_if_equal, target, 0, 1), op(give, refuse)]
        parts.append(op(give, allow))
    return b"".join([*parts, op(give, allow)])


def _watch(
    child: int,
    limits: dict[str, float],
    signals: set[signal.Signals],
    *,
    control: _socket.socket | None = None,
) -> tuple[int, str]:
    """Waits for the child. Returns its exit code, and a line why it has to be killed ("" if it ended on its
    own)."""
    code, problem = _watched(child, limits, signals, control)
    return code, f"\n[killed: {problem}]\n" if problem else ""


def _watched(
    child: int, limits: dict[str, float], signals: set[signal.Signals], control: _socket.socket | None
) -> tuple[int, str]:
    started = time.monotonic()
    running_now = listed_descendants if _lists_children() else descendants
    extra_s = limits.get("extra_s", _EXTRA_TIME_S)
    deadline = min(started + limits["timeout_s"] + extra_s, limits.get("ends_s", float("inf")))
    while True:
        is_long = limits["parent"] and time.monotonic() > started + _LONG_S
        received = signal.sigtimedwait(signals, _LATER_INTERVAL_S if is_long else _WATCH_INTERVAL_S)
        code = _reap(child)
        if code is not None:
            return code, ""
        is_asked = received is not None and received.si_signo == signal.SIGTERM
        is_asked = is_asked or (control is not None and _has_message(control))
        if is_asked or time.monotonic() > deadline:
            return 128 + signal.SIGKILL, ""
        running = running_now(os.getpid())
        num_threads = sum(threads for threads, _ in running.values())
        resident_mb = sum(resident for _, resident in running.values()) / _MIB
        if num_threads > limits["max_processes"]:
            return 128 + signal.SIGKILL, f"more than {limits['max_processes']} processes"
        if resident_mb > 2 * limits["memory_mb"]:
            return 128 + signal.SIGKILL, f"more than {2 * limits['memory_mb']} MiB in all processes"
        if not limits["parent"] and _num_files() > limits["files_before"] + _MAX_FILES:
            return 128 + signal.SIGKILL, f"more than {_MAX_FILES} files"


def _num_files() -> int:
    """Returns the number of files in the namespace's own file systems, which have limits only in bytes."""
    found = 0
    for path in ("/tmp", "/dev/shm"):
        with contextlib.suppress(OSError):
            use = os.statvfs(path)
            found += use.f_files - use.f_ffree
    return found


def _reap(child: int) -> int | None:
    """Reaps processes that have ended; returns the child's exit code if it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            ended = os.waitstatus_to_exitcode(status)
            code = 128 - ended if ended < 0 else ended


def _kill_descendants(child: int) -> None:
    """Kills all descendants of this process, including those in other sessions."""
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while True:
        # The kernel signals a process group atomically, so no fork escapes; other processes are found one by
        # one.
        for kill, pid in [(os.killpg, child), *((os.kill, pid) for pid in descendants(os.getpid()))]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        _reap(child)
        if not descendants(os.getpid()) or time.monotonic() > deadline:
            return
        time.sleep(0.001)


def descendants(root: int) -> dict[int, tuple[int, int]]:
    """Returns pid -> (threads, resident bytes) of all descendants of `root` that have not ended."""
    children: dict[int, list[int]] = {}
    use: dict[int, tuple[int, int]] = {}
    for pid, fields in _processes():
        children.setdefault(int(fields[1]), []).append(pid)
        if fields[0] not in ("Z", "X"):
            use[pid] = (int(fields[17]), int(fields[21]) * _PAGE_BYTES)
    found: dict[int, tuple[int, int]] = {}
    unseen = list(children.get(root, ()))
    while unseen:
        pid = unseen.pop()
        unseen += children.get(pid, ())
        if pid in use:
            found[pid] = use[pid]
    return found


def _lists_children() -> bool:
    """True if this kernel lists a process's children (CONFIG_PROC_CHILDREN)."""
    return os.path.exists(f"/proc/{os.getpid()}/task/{os.getpid()}/children")  # noqa: PTH110


def listed_descendants(root: int) -> dict[int, tuple[int, int]]:
    """As `descendants`, by the kernel's lists of children: it reads no process that is not a descendant.

    The list of a process whose children end in the meantime may lack some of them, until the next call.
    """
    found: dict[int, tuple[int, int]] = {}
    unseen = [root]
    while unseen:
        parent = unseen.pop()
        for pid in _children(parent):
            unseen.append(pid)
            fields = _stat(pid)
            if fields and fields[0] not in ("Z", "X"):
                found[pid] = (int(fields[17]), int(fields[21]) * _PAGE_BYTES)
    return found


def _children(pid: int) -> list[int]:
    """Returns the children of all threads of a process; empty if it has ended."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:  # noqa: PTH123
                found += map(int, file.read().split())
    return found


def _num_threads_of_user() -> int:
    user, total = os.getuid(), 0
    for pid, fields in _processes():
        with contextlib.suppress(OSError):  # it has just ended
            if os.stat(f"/proc/{pid}").st_uid == user:  # noqa: PTH116, pathlib takes 10 ms to import
                total += int(fields[17])
    return total


def _processes() -> list[tuple[int, list[str]]]:
    """Returns (pid, fields of its stat after the name: state, ppid, ...) of all visible processes."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit() and (fields := _stat(int(name))):
            found.append((int(name), fields))
    return found


def _stat(pid: int) -> list[str]:
    """Returns the fields of a process's stat after the name; empty if it has ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


if __name__ == "__main__":
    main()
