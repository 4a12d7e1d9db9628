"""The filter of system calls, read as the kernel reads it."""

from __future__ import annotations

import errno
import struct

import pytest

from cohort.rewards.seccomp import ALLOW, ARCHITECTURE, ERROR, KILL, refused_calls

REFUSED, MISSING = ERROR | errno.EPERM, ERROR | errno.ENOSYS
NO_FAMILY = ERROR | errno.EAFNOSUPPORT
# Name -> (number on x86_64, on aarch64), arguments, answer.
CALLS = {
    "read": ((0, 63), (), ALLOW),
    "ptrace": ((101, 117), (), REFUSED),
    "clone of a process": ((56, 220), (17,), ALLOW),
    "clone with a namespace": ((56, 220), (0x10000011,), REFUSED),
    "clone3": ((435, 435), (), MISSING),
    "splice": ((275, 76), (), MISSING),
    "vmsplice": ((278, 75), (), MISSING),
    "sendfile": ((40, 71), (), MISSING),
    "inotify_init1": ((294, 26), (), MISSING),
    "mmap of a process's own": ((9, 222), (0, 4096, 3, 0x22), ALLOW),
    "mmap of a file": ((9, 222), (0, 4096, 3, 0x01, 3), ALLOW),
    "mmap that is shared": ((9, 222), (0, 4096, 3, 0x21), REFUSED),
    "mmap that is shared, validated": ((9, 222), (0, 4096, 3, 0x23), REFUSED),
    "setsockopt of SO_RCVBUF": ((54, 208), (3, 1, 8), ALLOW),
    "setsockopt of SO_SNDBUF": ((54, 208), (3, 1, 7), REFUSED),
    "setsockopt of SO_SNDBUF, with high bits": ((54, 208), (3, 1, 7 | 1 << 40), REFUSED),
    "setsockopt of SO_SNDBUFFORCE": ((54, 208), (3, 1, 32), REFUSED),
    "socket of AF_UNIX": ((41, 198), (1, 1), ALLOW),
    "socket of AF_INET": ((41, 198), (2, 1), NO_FAMILY),
    "socketpair of AF_UNIX": ((53, 199), (1, 1), ALLOW),
    "socketpair of AF_TIPC": ((53, 199), (30, 1), NO_FAMILY),
}


def answer(machine: str, number: int, arguments: tuple[int, ...], on: str = "") -> int:
    program = list(struct.iter_unpack("=HBBI", refused_calls(machine) or b""))
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=IIQ6Q", number, ARCHITECTURE[on or machine], 0, *padded)
    at = loaded = 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            (loaded,) = struct.unpack_from("=I", data, value)
        else:
            found = {0x15: loaded == value, 0x35: loaded >= value, 0x45: loaded & value}[code]
            at += if_true if found else if_false


@pytest.mark.parametrize("call", CALLS)
def test_each_machine_has_the_same_filter(call: str) -> None:
    numbers, arguments, expected = CALLS[call]
    for machine, number in zip(("x86_64", "aarch64"), numbers, strict=True):
        assert answer(machine, number, arguments) == expected, machine


def test_other_numbers_of_the_same_calls() -> None:
    assert answer("x86_64", 41 | 0x40000000, (1,)) == REFUSED
    assert answer("x86_64", 0, (), on="aarch64") == KILL
    assert refused_calls("riscv64") is None
