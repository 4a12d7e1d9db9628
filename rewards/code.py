"""Rewards for programs: the completion's last code block is run against tests, in a sandbox."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from cohort.rewards.base import per_completion
from cohort.rewards.extract import final_parts, last_code
from cohort.rewards.sandbox import PATH, ProgramResult, Sandbox, SandboxError, SandboxLimits

# Reads the nonce before the program runs; a program that leaves early never prints it.
HARNESS = """\
import sys
nonce = sys.stdin.readline()
out = sys.stdout
space = {"__name__": "program"}
for part in ("program.py", "test.py"):
    with open(part, encoding="utf-8") as file:
        exec(compile(file.read(), part, "exec"), space)
out.write("\\n" + nonce)
out.flush()
"""


@per_completion
class CodeTests:
    """Runs the last Python block of a completion's final part against the tests of its row.

    The column `tests` is a list whose entries are

    - {"input": text, "output": text}: the program is run with `input` on stdin, and must end with
      exit code 0 and print `output`; whitespace at the end of lines and of the text does not count;
    - text: Python code with asserts that is run after the program in the same process. A program
      written to cheat can influence such tests, so prefer the other kind.

    One text instead of a list is one test. The score is 1.0 when every test passes, else 0.0. The
    fraction of tests that pass is logged as the part `passed`. A completion without a code block
    scores 0. None where the row has no tests.

    Keep seconds * tests * group size / parallel below rewards.timeout_s.

    Args:
        sandbox: "bwrap", or "none" to run the model's code as this user, with its files and
            network.
        seconds: For one test, with all processes that it starts.
        memory_mb: MiB for one test, with all processes that it starts.
        max_tests: So many tests of a row are run, from the first on.
        parallel: Programs that run at a time.
        score: "all", or "share": the score is the fraction of tests that pass.

    Raises:
        SandboxError: There is no sandbox on this machine.
    """

    def __init__(
        self,
        sandbox: Literal["bwrap", "none"] = "bwrap",
        seconds: float = 5.0,
        memory_mb: int = 512,
        max_tests: int = 20,
        parallel: int = 2,
        score: Literal["all", "share"] = "all",
    ) -> None:
        if score not in ("all", "share"):
            raise ValueError(f"score must be 'all' or 'share', got {score!r}")
        for name, value in (("seconds", seconds), ("memory_mb", memory_mb)):
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name, value in (("max_tests", max_tests), ("parallel", parallel)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        limits = SandboxLimits(seconds=seconds, memory_bytes=memory_mb << 20)
        try:
            self._sandbox = Sandbox(sandbox, limits)
        except SandboxError as error:
            raise SandboxError(
                f"{error}, or set sandbox: none in the options of this reward function to run the "
                "code without isolation"
            ) from error
        self._python = _interpreter(sandbox)
        self._max_tests = max_tests
        self._parallel = parallel
        self._all = score == "all"

    def __call__(
        self,
        completions: Sequence[object],
        tests: Sequence[object],
        prompts: Sequence[object] | None = None,
        prefills: Sequence[str] | None = None,
        **_: object,
    ) -> list[dict[str, float] | SandboxError | None]:
        programs = [last_code(text or "") for text in final_parts(completions, prefills, prompts)]
        with ThreadPoolExecutor(self._parallel) as pool:
            return list(pool.map(self._score, programs, tests))

    def _score(self, program: str | None, tests: object) -> dict[str, float] | SandboxError | None:
        if tests is None:
            return None
        cases = _cases(tests)[: self._max_tests]
        if program is None:
            return {"score": 0.0, "passed": 0.0}
        try:
            return self._run_cases(program, cases)
        except SandboxError as error:
            return error

    def _run_cases(self, program: str, cases: list[object]) -> dict[str, float]:
        passed = 0
        for case in cases:
            good = self._passes(program, case)
            passed += good
            if self._all and not good:
                break
        fraction = passed / len(cases)
        return {"score": float(fraction == 1.0) if self._all else fraction, "passed": fraction}

    def _passes(self, program: str, case: Any) -> bool:
        if isinstance(case, str):
            nonce = secrets.token_hex(16)
            files = {"main.py": HARNESS, "program.py": program, "test.py": case}
            outcome = self._run(files, nonce + "\n")
            lines = outcome.stdout.decode(errors="replace").rstrip("\n").rsplit("\n", 1)
            return outcome.returncode == 0 and lines[-1] == nonce
        outcome = self._run({"main.py": program}, case["input"])
        printed = outcome.stdout.decode(errors="replace")
        return outcome.returncode == 0 and _lines(printed) == _lines(case["output"])

    def _run(self, files: dict[str, str], stdin: str) -> ProgramResult:
        return self._sandbox.run([self._python, "-I", "-B", "main.py"], files, stdin)


def _cases(tests: Any) -> list[object]:
    """The tests as a list; raises ValueError for anything that is not one."""
    cases = [tests] if isinstance(tests, (str, dict)) else list(tests)
    for case in cases:
        if isinstance(case, str) and case.strip():
            continue
        if isinstance(case, dict) and all(
            isinstance(case.get(k), str) for k in ("input", "output")
        ):
            continue
        raise ValueError("a test must be Python code, or have the texts 'input' and 'output'")
    if not cases:
        raise ValueError("the list of tests is empty")
    return cases


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _interpreter(sandbox: str) -> str:
    """A Python that the sandbox can see: only /usr is mounted there."""
    if sandbox == "none":
        return sys.executable
    found = shutil.which("python3", path=PATH)
    if found is None or not os.path.realpath(found).startswith("/usr/"):
        raise SandboxError("no python3 in /usr/bin or /usr/local/bin: the sandbox has only /usr")
    return found
