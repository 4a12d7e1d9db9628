"""How the tests are divided when two run at a time (`pytest -n 2`)."""

from __future__ import annotations

from typing import Any

import pytest

# Nothing of theirs is in the way of tests that look for what a run has left behind.
BESIDE = ("test_learner.py", "test_reward_actor.py", "test_served_models.py", "test_extensions.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole runs one after the other; beside them the rest of the real stack, then all others."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            if not file.startswith("tests/system/"):
                return nodeid
            return "beside" if file.endswith(BESIDE) else "runs"

    return Groups(config, log)
