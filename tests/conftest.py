"""How the tests are divided when two run at a time (`pytest -n 2`); the fast harness's fixtures."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.harness.world import World

# Whole runs that are killed, or that look for what a run has left behind: one after another.
RUNS = (
    "test_bad_input.py",
    "test_chaos.py",
    "test_check.py",
    "test_examples.py",
    "test_nodes.py",
    "test_replay.py",
    "test_submit.py",
    "test_train.py",
    "test_warmup.py",
)
ALL_CORES = os.sched_getaffinity(0)
# Its fixtures build and install a wheel: once.
ONCE = "tests/test_package.py"
# The documents' commands, in their order: one finds what those before it have made.
COMMANDS = ("test_readme.py",)


def pytest_configure(config: pytest.Config) -> None:
    """Take signals as in a terminal, also where the tests were started in the background (SIGINT is
    ignored) or to outlive their terminal (SIGHUP is): what they start inherits that."""
    for number, action in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, action)
    # Otherwise files with one long test would come last, when one process has nothing left to do.
    config.option.loadscopereorder = False
    use_own_cores()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real stack first; the many short tests then fill both processes to the end."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/system/"))


def use_own_cores() -> None:
    """Give each of several test processes cores of its own, and so to all that it starts.

    Two engines that share the same cores spend most of their time waiting for each other's threads.
    """
    worker, count = (os.environ.get(f"PYTEST_XDIST_WORKER{name}", "") for name in ("", "_COUNT"))
    cores = sorted(os.sched_getaffinity(0))
    if worker and (share := len(cores) // int(count)):
        first = int(worker.removeprefix("gw")) * share
        os.sched_setaffinity(0, cores[first : first + share])


@pytest.fixture
def all_cores() -> Iterator[None]:
    """For what needs more cores than a test process has when two run at a time."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    yield
    os.sched_setaffinity(0, own)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole runs one after the other, the documents' commands likewise; beside them the parts of
    the real stack, file by file, then all others."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if not file.startswith("tests/system/"):
                return ONCE if file == ONCE else nodeid
            if file.endswith(COMMANDS):
                return "commands"
            return "runs" if file.endswith(RUNS) else file

    return Groups(config, log)


def pytest_collection_finish() -> None:
    """Leave what is imported and collected by now out of every later garbage collection: there are
    a million objects, which each one would visit, and copy in every forked process."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that is small enough to build in a second."""
    from tests.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path) -> Callable[..., World]:
    """Makes a World (see tests/harness/world.py): `world(run__steps=5)`, `world("b")` for another
    run directory."""
    from tests.harness.world import World

    def make(name: str = "run", **overrides: Any) -> World:
        return World(tmp_path / name, tiny_model, **overrides)

    return make
