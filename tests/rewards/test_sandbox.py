"""The sandbox's bounds hold for a program with all that it starts, and nothing of it is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cohort.rewards.sandbox import ProgramResult, Sandbox, SandboxLimits
from cohort.rewards.usage import ControlGroup, descendants, look
from tests import needs

pytestmark = pytest.mark.slow

MIB = 1 << 20
Run = Callable[..., ProgramResult]


def can_group() -> bool:
    try:
        ControlGroup(MIB, 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(params=["group", "look"])
def grouped(request: pytest.FixtureRequest) -> bool:
    if request.param == "group" and not can_group():
        pytest.skip("no control group can be made here")
    return bool(request.param == "group")


@pytest.fixture(params=[pytest.param("bwrap", marks=needs.bubblewrap), "none"])
def run(request: pytest.FixtureRequest, grouped: bool) -> Run:
    def run_program(code: str, **limits: Any) -> ProgramResult:
        bounds = SandboxLimits(**{"seconds": 20, "memory_bytes": 256 * MIB, **limits})
        sandbox = Sandbox(request.param, bounds, control_groups=grouped)
        python = "/usr/bin/python3" if request.param == "bwrap" else sys.executable
        return sandbox.run([python, "-I", "-B", "main.py"], {"main.py": code})

    return run_program


def alive(mark: str) -> list[int]:
    """Processes with this word in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def gone(mark: str, seconds: float = 3) -> bool:
    deadline = time.monotonic() + seconds
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(mark)


FIVE = """
import os, time
read, write = os.pipe()
for _ in range(5):
    if os.fork() == 0:
        held = [os.urandom(1) * 10_000_000 for _ in range(8)]
        os.write(write, b"x")
        time.sleep(30)
        os._exit(0)
got = b""
while len(got) < 5:
    got += os.read(read, 5)
print("all of it", flush=True)
os.killpg(0, 9)
"""


def test_five_processes_share_one_bound(run: Run) -> None:
    """Each stays below 120 MiB, and together they would hold 400."""
    outcome = run(FIVE, memory_bytes=120 * MIB, seconds=30)
    assert (outcome.stdout, outcome.stopped) == (b"", "memory")
    assert run(FIVE, memory_bytes=600 * MIB, seconds=30).stdout == b"all of it\n"


def test_pages_that_processes_share_count_once(run: Run) -> None:
    code = """
import os, time
held = b"x" * 100_000_000
for _ in range(4):
    if os.fork() == 0:
        time.sleep(0.5)
        os._exit(0)
for _ in range(4):
    os.wait()
print(len(held))
"""
    outcome = run(code, memory_bytes=200 * MIB)
    assert (outcome.stopped, outcome.stdout) == ("", b"100000000\n"), outcome.stderr


def test_memory_is_bounded_after_the_output_is_closed(run: Run) -> None:
    """Otherwise nobody would be looking any more."""
    mark = uuid.uuid4().hex
    code = f"""
import os, time
os.close(1), os.close(2)
for _ in range(4):
    if os.fork() == 0:
        break
held = [b"x" * 10_000_000 for _ in range(9)]
time.sleep(60)  # {mark}
"""
    began = time.monotonic()
    outcome = run(code, memory_bytes=128 * MIB, seconds=3)
    assert outcome.stopped in ("memory", "time")
    assert outcome.returncode is None
    assert time.monotonic() - began < 15
    assert gone(mark)


@pytest.mark.parametrize(
    "leaving",
    [
        "subprocess.Popen(command, start_new_session=True)",
        "os.fork() or (os.setsid(), os.fork() and os._exit(0), os.execv(command[0], command))",
        "subprocess.Popen(['/bin/sh', '-c', ' '.join(command) + ' & exit'], env={}, cwd='/')",
        "[subprocess.Popen(command, start_new_session=True, env={}) for _ in range(8)]",
    ],
)
@pytest.mark.parametrize("ending", ["os._exit(3)", "time.sleep(60)"])
def test_nothing_that_a_program_started_is_left(run: Run, leaving: str, ending: str) -> None:
    mark = str(uuid.uuid4().int % 10**9 + 10**9)
    code = f"import os, subprocess, time\ncommand = ['/bin/sleep', '{mark}']\n{leaving}\n{ending}\n"
    run(code, seconds=0.5)
    assert gone(mark)


@pytest.mark.parametrize("mode", [pytest.param("bwrap", marks=needs.bubblewrap), "none"])
def test_nothing_is_left_when_the_scoring_process_is_killed(mode: str, grouped: bool) -> None:
    mark = str(uuid.uuid4().int % 10**9 + 10**9)
    started = f"subprocess.Popen(['/bin/sleep', '{mark}'], start_new_session=True)"
    program = f"import subprocess\n{started}.wait()"
    caller = (
        "import sys; from cohort.rewards.sandbox import *\n"
        f"sandbox = Sandbox({mode!r}, SandboxLimits(seconds=60), control_groups={grouped})\n"
        f"sandbox.run(['/usr/bin/python3', '-I', 'main.py'], {{'main.py': {program!r}}})"
    )
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=root)
    deadline = time.monotonic() + 20
    while not alive(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(mark)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(mark)
    # Its control group goes with the next sandbox.
    Sandbox("none")
    left = Path("/sys/fs/cgroup").glob(f"**/cohort-test-{process.pid}-*")
    assert list(left) == []


def test_many_processes_end_a_program(run: Run) -> None:
    mark = str(uuid.uuid4().int % 10**9 + 10**9)
    code = f"""
import os, time
for _ in range(300):
    if os.fork() == 0:
        os.execv('/bin/sleep', ['/bin/sleep', '{mark}'])
print("all of them", flush=True)
time.sleep(1)
"""
    outcome = run(code, processes=20)
    assert outcome.stopped == "processes" or b"Resource temporarily" in outcome.stderr
    assert gone(mark)


def test_a_fork_bomb_is_bounded(run: Run) -> None:
    """Of at most 512 processes, so that a sandbox that fails here does no harm."""
    mark = str(uuid.uuid4().int % 10**9 + 10**9)
    code = f"""
import os, time
for _ in range(9):
    try:
        os.fork()
    except OSError:
        pass
os.execv('/bin/sleep', ['/bin/sleep', '{mark}'])
"""
    began = time.monotonic()
    assert run(code, seconds=2).returncode is None
    assert time.monotonic() - began < 15
    assert gone(mark)


@pytest.mark.parametrize(
    ("code", "code_in_bwrap", "code_in_none"),
    [
        ("raise SystemExit(7)", 7, 7),
        ("import os; os.kill(os.getpid(), 15)", 143, -15),
        ("import os; os.kill(os.getpid(), 9)", 137, -9),
        ("import ctypes; ctypes.string_at(0)", 139, -11),
        ("x = '\ud800'", 0, 0),
    ],
)
def test_the_way_a_program_ended(
    run: Run, code: str, code_in_bwrap: int, code_in_none: int
) -> None:
    assert run(code).returncode in (code_in_bwrap, code_in_none)


def test_descriptors_and_files_are_bounded(run: Run) -> None:
    outcome = run("held = [open('main.py') for _ in range(1000)]")
    assert b"Too many open files" in outcome.stderr


@pytest.fixture(scope="module")
def closed() -> Sandbox:
    return Sandbox("bwrap", SandboxLimits(seconds=20, memory_bytes=256 * MIB))


C = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"


@needs.bubblewrap
@pytest.mark.parametrize(
    "call",
    [
        "libc.unshare(0x10000000)",
        "libc.unshare(0x20000)",
        "libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)",
        "libc.syscall(56, 0x20000000 | 17, 0, 0, 0, 0)",
        "libc.syscall(435, (ctypes.c_uint64 * 11)(0x10000000), 88)",
        "libc.syscall(272 | 0x40000000, 0x10000000)",
        "libc.memfd_create(b'x', 0)",
        "libc.shmget(0, 1 << 20, 0o1600)",
        "libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0)",
        "libc.syscall(425, 8, ctypes.create_string_buffer(120))",
        "libc.ptrace(0, 0, 0, 0)",
        "libc.syscall(250, 0, -3, 1, 0, 0)",
        "libc.mmap(None, 4096, 3, 0x21, -1, 0)",
        "libc.mmap(None, 4096, 3, 1, os.open('/dev/zero', os.O_RDWR), 0)",
        "libc.socket(2, 1, 0)",
        "libc.setsockopt(libc.socket(1, 1, 0), 1, 7, ctypes.byref(ctypes.c_int(1 << 24)), 4)",
        "libc.sendfile(1, 0, None, 1)",
        "libc.vmsplice(1, None, 0, 0)",
        "libc.inotify_init1(0)",
    ],
)
def test_calls_that_lead_out_or_hide_memory_are_refused(closed: Sandbox, call: str) -> None:
    if os.uname().machine != "x86_64" and "syscall" in call:
        pytest.skip("numbers of x86_64")
    code = f"{C}print({call}, ctypes.get_errno())"
    outcome = closed.run(["/usr/bin/python3", "-I", "main.py"], {"main.py": code})
    refused = errno.EPERM, errno.ENOSYS, errno.ENODEV, errno.EAFNOSUPPORT
    assert outcome.stdout.decode() in [f"-1 {number}\n" for number in refused], outcome.stderr


@needs.bubblewrap
def test_no_user_namespace_by_a_tool_either(closed: Sandbox) -> None:
    outcome = closed.run(["/usr/bin/unshare", "-Ur", "/usr/bin/true"], {"x": ""})
    assert outcome.returncode == 1
    assert b"Operation not permitted" in outcome.stderr


@needs.bubblewrap
def test_threads_and_processes_work_under_the_filter(closed: Sandbox) -> None:
    code = """
import subprocess, threading
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    print(sum(pool.map(abs, range(-4, 0))))
print(subprocess.run(["echo", "hi"], capture_output=True, text=True).stdout)
"""
    outcome = closed.run(["/usr/bin/python3", "-I", "main.py"], {"main.py": code})
    assert outcome.stdout == b"10\nhi\n\n", outcome.stderr


@needs.bubblewrap
def test_what_programs_do_without_the_refused_calls(closed: Sandbox) -> None:
    code = """
import asyncio, multiprocessing, os, shutil, socket
async def add():
    await asyncio.sleep(0)
    return 1
print(asyncio.run(add()))
ours, theirs = multiprocessing.Pipe()
if os.fork() == 0:
    theirs.send("sent")
    os._exit(0)
print(ours.recv())
shutil.copyfile("main.py", "/tmp/copy")
print(os.path.getsize("/tmp/copy") > 100, open("/dev/zero", "rb").read(2))
"""
    outcome = closed.run(["/usr/bin/python3", "-I", "main.py"], {"main.py": code})
    assert outcome.stdout == b"1\nsent\nTrue b'\\x00\\x00'\n", outcome.stderr


SENT = "try:\n        while a.send(b'x' * 100_000): pass\n    except BlockingIOError: pass\n"


@needs.bubblewrap
@pytest.mark.parametrize(
    "code",
    [
        # Connections that nobody accepts, and messages of senders that are closed.
        "l = socket.socket(1, 1); l.bind('\\0x'); l.listen(4096)\nfor _ in range(1500):\n"
        "    a = socket.socket(1, 1); a.connect('\\0x'); a.setblocking(False)\n"
        f"    {SENT}    a.close()\n",
        "[os.fork() for _ in range(3)]\nheld = []\nfor _ in range(50):\n"
        "    a, b = socket.socketpair(); held += [a, b]; a.setblocking(False)\n"
        f"    {SENT}",
    ],
)
def test_what_sockets_hold_is_bounded(code: str) -> None:
    bounds = SandboxLimits(seconds=20, memory_bytes=128 * MIB)
    sandbox = Sandbox("bwrap", bounds, control_groups=False)
    code = f"import os, socket, time\n{code}time.sleep(1)"
    outcome = sandbox.run(["/usr/bin/python3", "-I", "main.py"], {"main.py": code})
    assert outcome.stopped == "memory", outcome.stderr


def test_a_look_finds_every_descendant(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import subprocess; subprocess.Popen(['sh', '-c', 'sleep 30 & sleep 30']).wait()"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline = time.monotonic() + 10
        while len(descendants(process.pid, 99)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        listed = descendants(process.pid, 99)
        assert len(listed) == 4
        assert listed[0] == process.pid
        assert len(descendants(process.pid, 1)) == 2
        # A kernel that does not list children.
        monkeypatch.setattr("cohort.rewards.usage.LISTS_CHILDREN", Path("/nowhere"))
        assert sorted(descendants(process.pid, 99)) == sorted(listed)
        found = look(process.pid, 0, 99)
        assert found.processes == 4
        assert MIB < found.memory_bytes < 100 * MIB
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
