"""Model-written programs in the sandbox: right ones score, hostile ones harm nothing."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from cohort.rewards.base import RewardLoadError
from cohort.rewards.code import CodeTests
from cohort.rewards.sandbox import Sandbox, SandboxError, SandboxLimits
from cohort.rewards.specs import RewardSpec
from cohort.rewards.worker import RewardWorker
from tests import needs
from tests.open_files import open_files

pytestmark = pytest.mark.slow

SUM = [{"input": "3 4\n", "output": "7"}, {"input": "1 1\n", "output": "2\n"}]
ADD = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]


@pytest.fixture(scope="module", params=[pytest.param("bwrap", marks=needs.bubblewrap), "none"])
def code_tests(request: pytest.FixtureRequest) -> CodeTests:
    return CodeTests(sandbox=request.param, seconds=1, memory_mb=256)


def score(code_tests: CodeTests, code: str, tests: Any = None) -> Any:
    return code_tests([f"Here:\n```python\n{code}\n```\n"], [SUM if tests is None else tests])[0]


@pytest.mark.parametrize(
    ("code", "tests", "passed"),
    [
        ("print(sum(map(int, input().split())))", SUM, 1.0),
        ("a, b = map(int, input().split())\nprint(a * b)", SUM, 0.0),
        ("print(7)", SUM, 0.5),
        ("print('7  ')\nprint()", SUM[:1], 1.0),
        ("print(7); raise SystemExit(1)", SUM[:1], 0.0),
        ("def add(a, b):\n    return a + b", ADD, 1.0),
        ("def add(a, b):\n    return 3", ADD, 0.5),
        ("def add(a, b):\n    return 3", ADD[0], 1.0),
        ("def add(a, b):", ADD, 0.0),
        # leaving before the tests are over
        ("raise SystemExit(0)", ADD, 0.0),
        ("import os; os._exit(0)", ADD, 0.0),
        ("import sys; sys.exit = lambda *_: None; quit()", ADD, 0.0),
        ("import atexit, os\natexit.register(os._exit, 0)", ADD, 0.0),
        ("print('7' * 10000)", SUM, 0.0),
        ("print(*range(100))", SUM, 0.0),
        ("print('٧')", SUM, 0.0),
    ],
)
def test_tests_decide(code_tests: CodeTests, code: str, tests: Any, passed: float) -> None:
    found = score(code_tests, code, tests)
    # Without score="share" it ends at the first failure, so that the share is a lower bound.
    assert found["score"] == float(passed == 1.0)
    assert found["passed"] <= passed
    share = CodeTests(sandbox="none", seconds=2, score="share")
    assert score(share, code, tests) == {"score": passed, "passed": passed}


@pytest.mark.parametrize(
    "text", ["", "print(7)", "```python\nprint(7)", "```python\n```", "x" * 10**6, "```" * 10**5]
)
def test_no_code_scores_nothing(code_tests: CodeTests, text: str) -> None:
    assert code_tests([text], [SUM]) == [{"score": 0.0, "passed": 0.0}]


def test_no_tests_and_wrong_tests(code_tests: CodeTests) -> None:
    assert code_tests(["```python\nx\n```"], [None]) == [None]
    for tests in ([], "", [{"input": "1"}], [3], {"input": 1, "output": "1"}):
        with pytest.raises(ValueError, match="test"):
            code_tests(["```python\nx\n```"], [tests])


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor n in range(1, 32):\n"
        "    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
        "while True: print('x' * 1000)",
        "import sys\nwhile True: print('x' * 1000, file=sys.stderr)",
        "x = []\nwhile True: x.append(b'x' * 10_000_000)",
        "x = 10 ** 10 ** 10",
        "def f(): f()\nimport sys; sys.setrecursionlimit(10**9); f()",
        "open('big', 'wb').write(b'x' * 100_000_000)",
    ],
)
def test_bombs_end_in_bound(code_tests: CodeTests, code: str) -> None:
    started = time.monotonic()
    assert score(code_tests, code)["score"] == 0.0
    assert time.monotonic() - started < 5


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox("bwrap", SandboxLimits(seconds=5, memory_bytes=256 << 20))


@needs.bubblewrap
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("open('/tmp/a', 'w').write('x'); print(open('/tmp/a').read() * 3)", "xxx"),
        ("import os; print(os.getpid() < 10, os.listdir('/tmp'))", "True []"),
        ("open('/usr/x', 'w')", "Read-only file system"),
        ("open('x', 'w')", "Read-only file system"),
        ("open('/dev/shm/x', 'w')", "Read-only file system"),
        ("open('/x', 'w')", "Read-only file system"),
        ("open('/etc/passwd')", "No such file"),
        ("import os; os.listdir('/root')", "No such file"),
        ("import os; os.listdir('/home')", "No such file"),
        (
            "import socket; socket.create_connection(('1.1.1.1', 53), 2)",
            "Address family not supported",
        ),
        (
            "import socket; socket.create_connection(('127.0.0.1', 22), 2)",
            "Address family not supported",
        ),
        ("import os\nfor _ in range(7): os.fork()", "Resource temporarily unavailable"),
        ("import os; os.kill(-1, 9)", "No such process"),
        ("print(open('/proc/1/environ').read().strip() or 'nothing')", "nothing"),
        ("for i in range(99): open(f'/tmp/{i}', 'wb').write(b'x' * 10**6)", "No space left"),
    ],
)
def test_the_sandbox_is_closed(sandbox: Sandbox, code: str, words: str) -> None:
    outcome = sandbox.run(["/usr/bin/python3", "-I", "main.py"], {"main.py": code})
    assert outcome.stopped == ""
    assert words in (outcome.stdout + outcome.stderr).decode()
    assert not Path("/tmp/a").exists()


@needs.bubblewrap
def test_secrets_and_leftovers(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    code = (
        "import os, subprocess\n"
        "subprocess.Popen(['sleep', '77'], start_new_session=True)\n"
        "print(dict(os.environ), [open(f'/proc/{p}/environ').read()\n"
        "    for p in os.listdir('/proc') if p.isdigit() and p != '1'])"
    )
    outcome = sandbox.run(["/usr/bin/python3", "-I", "main.py"], {"main.py": code})
    assert outcome.returncode == 0, outcome.stderr
    assert b"hunter2" not in outcome.stdout
    assert outcome.seconds < 4
    deadline = time.monotonic() + 3
    while _sleeping() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _sleeping()


def _sleeping() -> bool:
    import psutil

    return any(p.info["cmdline"] == ["sleep", "77"] for p in psutil.process_iter(["cmdline"]))


def test_without_a_sandbox_it_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match=r"bwrap is not installed .*sandbox: none"):
        CodeTests()
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(SandboxError, match="No permissions to create new namespace"):
        CodeTests()
    # As a user sees it, before anything starts.
    with pytest.raises(RewardLoadError, match=r"(?s)CodeTests.*sandbox: none"):
        RewardWorker([RewardSpec("code", "cohort.rewards.code:CodeTests")], 5)
    assert CodeTests(sandbox="none")


@needs.bubblewrap
def test_a_sandbox_that_breaks_later_is_an_error_not_a_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code_tests = CodeTests(seconds=2)
    monkeypatch.setattr(code_tests._sandbox, "_bwrap", shutil.which("false"))
    found = score(code_tests, "print(7)")
    assert isinstance(found, SandboxError)
    assert "could not start" in str(found)


@pytest.mark.parametrize(
    "options",
    [{"sandbox": "docker"}, {"score": "some"}, {"seconds": 0}, {"max_tests": 0}, {"parallel": 0}],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        CodeTests(**{"sandbox": "none", **options})


def test_no_descriptor_is_left_open(code_tests: CodeTests) -> None:
    before = open_files(sockets=False)
    for _ in range(3):
        score(code_tests, "print(7)", SUM[:1])
    assert not open_files(sockets=False) - before
