"""The journal on the real stack: an overlapped run that was killed, continued and replayed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from cohort.cluster.journal.history import read_history
from tests.system.conftest import Cohort
from tests.system.runs import rollouts, rows

pytestmark = [pytest.mark.system, pytest.mark.slow]
STEPS = 12


@pytest.mark.exhaustive
def test_an_overlapped_run_that_was_killed_goes_on_with_its_groups_and_is_replayed(
    cohort: Cohort,
) -> None:
    """kill -9 some steps behind the checkpoint. What was scored is trained, in the same order; and
    the steps before and after the kill lead to the same weights when they are trained again."""
    run = cohort.folder / "overlapped"
    keys: dict[str, object] = {
        "run__dir": run, "run__checkpoint_every": 4, "run__keep_journal": "true",
        "actors__max_staleness": 2, "run__steps": STEPS,
    }  # fmt: skip
    process = cohort.start(**keys)
    deadline = time.monotonic() + 240
    # The checkpoint is written while training goes on.
    saved = run / "checkpoints" / "step-4"
    while not (saved.is_dir() and max(steps_of(run), default=0) >= 7) and process.poll() is None:
        assert time.monotonic() < deadline, (cohort.folder / "out.log").read_text()
        time.sleep(0.02)
    process.kill()
    process.wait()
    there = read_history(run / "journal")
    assert max(there.steps) < STEPS - 1, "it was killed too late"
    assert saved.is_dir()

    resumed = cohort.train(**keys, run__resume="true")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "which are not generated again" in resumed.stdout
    assert "other weights" not in resumed.stdout
    assert [row["step"] for row in rows(run)] == list(range(STEPS))
    after = read_history(run / "journal")
    for step, record in there.steps.items():
        assert after.steps[step].groups == record.groups
    journaled = {name: place for groups in there.groups.values() for name, place in groups.items()}
    trained = {name: place for step in after.steps.values() for name, place in step.groups}
    assert all(trained[name] == place for name, place in journaled.items())
    samples = [sample for step in range(STEPS) for sample in rollouts(run, step)]
    assert len({sample["completion_id"] for sample in samples}) == len(samples) == 16 * STEPS

    # A replay needs no engine, nor its package.
    (cohort.folder / "vllm.py").write_text("raise ImportError('vLLM is not there')\n")
    again = cohort.run(str(Path(sys.executable).parent / "cohort"), "replay", str(run))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{STEPS} steps: {STEPS} equal, 0 different, 0 not recorded" in again.stdout


def steps_of(run: Path) -> list[int]:
    """The steps that the journal of a run in progress holds."""
    return list(read_history(run / "journal").steps)
