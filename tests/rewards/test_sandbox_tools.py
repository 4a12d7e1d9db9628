"""Tools in the real sandbox: the folder lives as long as its episode, and nothing else does."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from episode_table import call, results, spec_of
from test_sandbox import alive, gone

from cohort.rewards.environments.base import EnvironmentFailed, EnvironmentLoadError
from cohort.rewards.environments.sandbox_tools import UNDONE, SandboxTools
from cohort.rewards.environments.tools import ToolError
from cohort.rewards.environments.worker import try_environment
from tests import needs
from tests.open_files import open_files

pytestmark = [pytest.mark.slow, needs.bubblewrap]

LIMITS = {"seconds": 2.0, "memory_mb": 128, "folder_mb": 4, "processes": 20}


@pytest.fixture
def tools() -> Iterator[SandboxTools]:
    made = SandboxTools(**LIMITS)
    yield made
    made.close()


def mark() -> str:
    return str(uuid.uuid4().int % 10**9 + 10**9)


def test_files_are_kept_from_call_to_call(tools: SandboxTools) -> None:
    assert tools.bash("pwd; ls -A; echo hi > a; mkdir -p d; ln -s ../a d/b; chmod 0 a") == "/tmp"
    assert tools.python("print(open('d/b').read())") == "hi"
    assert tools.write_file("deep/er/x.py", "def f(): return 'f'\n") == "20 characters written"
    assert tools.python("from deep.er import x; print(x.f())") == "f"
    assert tools.read_file("d/b") == "hi"
    assert [line.split()[-1] for line in tools.list_files().splitlines()[1:]] == [
        "a",
        "d/",
        "deep/",
    ]
    assert tools.bash("exit 3") == "[exit code 3]"
    assert tools.bash("echo out; echo err >&2") == "out\nerr"
    assert tools.bash("read x; echo $?") == "1"
    assert tools.python("") == "[no output]"
    # Variables and processes are not.
    assert "NameError" in tools.python("x")
    sleeping = mark()
    tools.bash(f"sleep {sleeping} & disown; setsid sleep {sleeping} &")
    assert gone(sleeping)


WRONG = {
    "a file that is not there": lambda tools: tools.read_file("nowhere"),
    "a folder": lambda tools: tools.read_file("."),
    "no folder": lambda tools: tools.list_files("nowhere"),
    "not to be written": lambda tools: tools.write_file("/usr/x", "x"),
    "an argument that is too long": lambda tools: tools.read_file("x" * 200_000),
    "NUL and half a letter": lambda tools: tools.read_file("x\0\ud800"),
    "an option": lambda tools: tools.list_files("--version"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_is_the_models_own_error(tools: SandboxTools, what: str) -> None:
    with pytest.raises(ToolError):
        WRONG[what](tools)


BAD = {
    "memory": ("python", "x = [b'x' * 10**6 for _ in range(1000)]", "128 MiB|MemoryError"),
    "time": ("bash", "sleep {mark}", "after 2 s"),
    "ten megabytes": ("python", "print('x' * 10**7)", "1048576 bytes of output"),
    "forks": ("bash", ":(){{ :|:& }};: ; sleep {mark}", "after 2 s|20 processes|exit code"),
    "a full folder": ("bash", "head -c 9M /dev/urandom > a", "more than 4 MiB"),
    "a million files": (
        "python", "for i in range(10**6): open(str(i), 'w')", "No space|stopped|kept",
    ),
    "large files without content": (
        "bash", "for i in 1 2 3 4 5 6 7 8 9; do truncate -s 3M f$i; done; echo fine", "fine",
    ),
    "its own parent": ("bash", "kill -9 $PPID", "ended the shell"),
    "a forged archive": (
        "bash", "for fd in /proc/$PPID/fd/*; do echo ../../x > $fd; done; exit 0", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_call_beyond_a_limit_harms_nothing(tools: SandboxTools, what: str) -> None:
    tools.write_file("a", "before")
    name, code, words = BAD[what]
    sleeping, before = mark(), open_files(sockets=False)
    began = time.monotonic()
    try:
        answer = getattr(tools, name)(code.format(mark=sleeping))
    except ToolError as error:
        answer = str(error)
        assert UNDONE in answer
        assert tools.read_file("a") == "before"
    assert re.search(words, answer), answer
    assert time.monotonic() - began < 15
    assert gone(sleeping)
    assert tools.bash("echo still here") == "still here"
    assert not open_files(sockets=False) - before


LEAVING = """
import os
for i in range(900):
    open(str(i), "w").close()
if os.fork() == 0:
    os.setsid()
    # Until the folder is being packed.
    while not any(os.path.exists(f"/proc/{pid}") and open(f"/proc/{pid}/comm").read() == "tar\\n"
                  for pid in range(3, 30)):
        pass
    for i in range(900):
        os.remove(str(i))
"""


def test_what_a_call_leaves_running_does_not_write_to_the_folder(tools: SandboxTools) -> None:
    assert tools.python(LEAVING) == "[no output]"
    assert tools.bash("ls | wc -l") == "900"


ESCAPES = {
    "open('/etc/passwd')": "No such file",
    "import os; os.listdir('/root')": "No such file",
    "open('/usr/x', 'w')": "Read-only file system",
    "open('/work/x', 'w')": "Read-only file system",
    "import socket; socket.create_connection(('1.1.1.1', 53), 2)": "Address family not supported",
    "import socket; socket.create_connection(('127.0.0.1', 22), 2)": "Address family not supported",
    "import subprocess as s; s.run(['unshare', '-Ur', 'true'], check=True)": "not permitted",
    "import os; os.symlink('/etc', 'e'); print('shadow' in os.listdir('e'))": "False",
    "import os; print(sorted(os.environ))": "'HOME', 'LANG'",
    "import os; print(os.getpid() < 20, os.getppid())": "True",
}


@pytest.mark.parametrize("code", ESCAPES)
def test_there_is_no_way_out(
    tools: SandboxTools, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    answer = tools.python(code)
    assert ESCAPES[code] in answer
    assert "hunter2" not in answer and "HF_TOKEN" not in answer
    # What it has left is unpacked in the next sandbox, and nowhere else.
    name = mark()
    tools.bash(f"mkdir {name}; ln -s / {name}/out; mkfifo pipe; touch -- -rf '$(touch {name}b)'")
    tools.bash(f"touch {name}/out{Path.cwd()}/{name}c")
    assert "pipe" in tools.bash("ls")
    assert not list(Path("/tmp").glob(f"{name}*"))


def test_folders_are_each_episodes_own(tools: SandboxTools) -> None:
    other = SandboxTools(**LIMITS)
    tools.write_file("a", "mine")
    with pytest.raises(ToolError, match="No such file"):
        other.read_file("a")
    other.close()


def test_a_program_ends_with_its_episode() -> None:
    tools, sleeping = SandboxTools(**{**LIMITS, "seconds": 60.0}), mark()
    said: list[str] = []

    def run() -> None:
        try:
            tools.bash(f"sleep {sleeping}")
        except (ToolError, EnvironmentFailed) as error:
            said.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 10
    while not alive(sleeping):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    began, before = time.monotonic(), open_files(sockets=False)
    tools.close()
    thread.join()
    assert time.monotonic() - began < 3
    assert gone(sleeping)
    assert "the episode has ended" in said[0]
    assert before - open_files(sockets=False)
    assert not open_files(sockets=False) - before
    with pytest.raises(EnvironmentFailed, match="the episode has ended"):
        tools.bash("true")


def test_a_program_ends_with_its_process() -> None:
    sleeping = mark()
    caller = (
        "from cohort.rewards.environments.sandbox_tools import SandboxTools\n"
        f"SandboxTools(seconds=60).bash('sleep {sleeping}')"
    )
    process = subprocess.Popen([sys.executable, "-c", caller], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 20
    while not alive(sleeping):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(sleeping)


def test_so_many_at_once_and_the_others_wait() -> None:
    """Three calls of half a second, one at a time; a fourth does not wait so long."""
    made = [SandboxTools(at_once=1, wait_s=30) for _ in range(3)]
    hasty = SandboxTools(at_once=1, wait_s=0.2)
    began = time.monotonic()
    threads = [threading.Thread(target=one.bash, args=("sleep 0.5",)) for one in made]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    with pytest.raises(EnvironmentFailed, match=r"no place for a sandbox was free within 0\.2 s"):
        hasty.bash("true")
    for thread in threads:
        thread.join()
    assert time.monotonic() - began > 1.5
    assert hasty.bash("echo now") == "now"
    for one in (*made, hasty):
        one.close()


def test_an_episode_with_files_of_its_row(at_table: Any) -> None:
    async def body(table: Any) -> None:
        said = [
            call("python", code="print(open('n.txt').read()); open('out', 'w').write('42')"),
            call("bash", command="cat out; sleep 60") + call("read_file", path="out"),
            "Done.",
        ]
        made, other = await asyncio.gather(
            table.play(said, max_tokens=400, files={"n.txt": "7"}),
            table.play([call("list_files"), "Done."], 1, max_tokens=400),
        )
        assert results(made) == ["7", f"error: stopped after 2 s; {UNDONE}", "42"]
        assert made.end.metrics["tool_errors"] == 1
        assert results(other) == ["total 0"]

    at_table("sandbox", body, options=LIMITS, step_timeout_s=30)


def test_without_bubblewrap_nothing_starts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(tiny_model, "sandbox", step_timeout_s=30)
    try_environment(spec)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentLoadError, match=r"bwrap is not installed \(package bubblewrap"):
        try_environment(spec)


@pytest.mark.parametrize("options", [{"seconds": 0}, {"memory_mb": -1}, {"at_once": 0}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        SandboxTools(**options)
