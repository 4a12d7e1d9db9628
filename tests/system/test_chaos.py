"""A short campaign of faults on a real run: nothing is lost, nothing is done twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.system.conftest import Cohort

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import chaos

pytestmark = [pytest.mark.system, pytest.mark.slow]
# On two busy cores, on which a start takes twice as long as usual.
RECOVERY_S = 150


def test_a_supervised_run_goes_on_through_faults_of_three_kinds(cohort: Cohort) -> None:
    keys = cohort.arguments("train", rewards__functions=f"[{cohort.folder}/judge.py:digits]")[3:]
    keys = [key for key in keys if not key.startswith("run.steps=")]
    run = chaos.campaign(
        cohort.folder / "chaos", iter(chaos.SHORT), 1, 0, [*keys, "run.checkpoint_every=5"]
    )
    assert [fault.kind for fault in run.faults] == list(chaos.SHORT)
    assert (run.lost, run.doubled, run.failed) == (0, 0, 0), run
    assert all(fault.regained_s < RECOVERY_S for fault in run.faults), run.faults
    assert run.steps > run.faults[-1].steps
