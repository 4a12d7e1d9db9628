"""The system calls that a sandboxed program is refused, as a filter for `bwrap --seccomp`.

Refused is what could leave the sandbox or hold memory that no limit of it counts: namespaces,
mounts, files and segments in memory without a process, keys, tracing, and what the kernel runs on a
program's behalf. Of sockets only those between the program's own processes are left, with buffers
of the usual size, which `cohort.rewards.usage.look` counts.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Sequence

Instruction = tuple[int, int, int, int]

# Calls that have the same number everywhere.
COMMON = {
    "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431,
    "fsmount": 432, "fspick": 433, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
REFUSED = {
    "x86_64": {
        "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155,
        "memfd_create": 319, "shmget": 29, "msgget": 68, "add_key": 248, "request_key": 249,
        "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "ptrace": 101,
        "process_vm_readv": 310, "process_vm_writev": 311,
    },
    "aarch64": {
        "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41,
        "memfd_create": 279, "shmget": 194, "msgget": 186, "add_key": 217, "request_key": 218,
        "keyctl": 219, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "ptrace": 117,
        "process_vm_readv": 270, "process_vm_writev": 271,
    },
}  # fmt: skip
# Calls that a program finds missing, as in an older kernel, and does without. The first four can
# keep a page that its process has given back; the others make queues of thousands of events.
MISSING = {
    "x86_64": {
        "splice": 275, "tee": 276, "vmsplice": 278, "sendfile": 40, "inotify_init": 253,
        "inotify_init1": 294, "fanotify_init": 300,
    },
    "aarch64": {
        "splice": 76, "tee": 77, "vmsplice": 75, "sendfile": 71, "inotify_init1": 26,
        "fanotify_init": 262,
    },
}  # fmt: skip
# Calls that are refused with some arguments.
PARTLY = {
    "x86_64": {"clone": 56, "mmap": 9, "setsockopt": 54, "socket": 41, "socketpair": 53},
    "aarch64": {"clone": 220, "mmap": 222, "setsockopt": 208, "socket": 198, "socketpair": 199},
}
ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CLONE3 = 435
# CLONE_NEWTIME to CLONE_NEWNET: the flags of clone that make a namespace, without NEWTIME's bit,
# which means an exit signal there.
NEW_NAMESPACES = 0x7E020000
MAP_SHARED, MAP_ANONYMOUS = 0x01, 0x20
AF_UNIX, SO_SNDBUF, SO_SNDBUFFORCE = 1, 7, 32
X32 = 0x40000000

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data


def refused_calls(machine: str | None = None) -> bytes | None:
    """The filter as a program of classic BPF.

    Args:
        machine: As `platform.machine` names it; by default this one.

    Returns:
        The program; None for a machine that it is not written for.
    """
    machine = machine or platform.machine()
    if machine not in REFUSED:
        return None
    refuse = ERROR | errno.EPERM
    program = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, ARCHITECTURE[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    if machine == "x86_64":
        # The same calls under other numbers.
        program += [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, refuse)]
    for number in (COMMON | REFUSED[machine]).values():
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, refuse)]
    # clone3's flags are in memory, which a filter cannot read: the C library falls back to clone.
    for number in (CLONE3, *MISSING[machine].values()):
        program += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | errno.ENOSYS)]
    partly = PARTLY[machine]
    program += _when(partly["clone"], 0, [(ANY_BIT, 0, 1, NEW_NAMESPACES)], refuse)
    # Pages that stay when they are unmapped, as long as one page of the mapping is left.
    shared = [(ANY_BIT, 0, 2, MAP_ANONYMOUS), (ANY_BIT, 0, 1, MAP_SHARED)]
    program += _when(partly["mmap"], 3, shared, refuse)
    larger = [(EQUAL, 1, 0, SO_SNDBUF), (EQUAL, 0, 1, SO_SNDBUFFORCE)]
    program += _when(partly["setsockopt"], 2, larger, refuse)
    # Buffers of other families grow by themselves.
    for name in ("socket", "socketpair"):
        other = [(EQUAL, 1, 0, AF_UNIX)]
        program += _when(partly[name], 0, other, ERROR | errno.EAFNOSUPPORT)
    program += [(RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _when(
    number: int, argument: int, tests: Sequence[Instruction], answer: int
) -> list[Instruction]:
    """Give an answer to a call if its argument passes tests, which otherwise jump over it."""
    body = [(LOAD, 0, 0, FIRST_ARGUMENT + 8 * argument), *tests]
    body += [(RETURN, 0, 0, answer), (LOAD, 0, 0, NUMBER)]
    return [(EQUAL, 0, len(body), number), *body]
