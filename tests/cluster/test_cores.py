"""Who computes on which cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from cohort.cluster.config import Config, ConfigError
from cohort.cluster.config_file import load_config
from cohort.cluster.cores import CoreShares, share_cores


def config(staleness: int, cores: str = "auto", engines: int = 1, ranks: int = 1) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "actors": {"max_staleness": staleness, "count": engines},
            "learner": {"workers": ranks},
            "cluster": {"cores": cores},
        }
    )


def shares(number: int, one_machine: bool = True, **keys: object) -> CoreShares:
    return share_cores(config(**keys), "cpu", tuple(range(number)), one_machine)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", range(1, 40))
@pytest.mark.parametrize(("engines", "ranks"), [(1, 1), (2, 1), (1, 2), (3, 2), (4, 4)])
@pytest.mark.parametrize("cores", ["auto", "own"])
def test_own_cores_are_all_cores_and_nobody_shares_one(
    number: int, engines: int, ranks: int, cores: str
) -> None:
    found = shares(number, staleness=1, cores=cores, engines=engines, ranks=ranks)
    least = engines + ranks if cores == "own" else 2 * (engines + ranks)
    assert found.own == (number >= least)
    if found.own:
        assert found.engines + found.learner == tuple(range(number))
        assert len(found.engines) >= engines
        assert len(found.learner) >= ranks
        # An engine has what a rank has, or one or two less.
        assert 0 <= len(found.learner) // ranks - len(found.engines) // engines <= engines + ranks


def test_one_after_the_other_uses_all_and_so_do_two_cores_and_several_machines() -> None:
    assert not shares(16, staleness=0).own
    assert not shares(2, staleness=2).own
    assert not shares(16, staleness=2, one_machine=False).own
    assert not shares(16, staleness=2, cores="shared").own
    assert shares(2, staleness=2, cores="own") == CoreShares((0,), (1,))
    assert not share_cores(config(2), "cuda", tuple(range(16)), True).own


def test_own_cores_without_overlap_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: m}\n")
    with pytest.raises(ConfigError, match=r"cluster\.cores=own: with actors\.max_staleness=0"):
        load_config(file, ["cluster.cores=own"])
    load_config(file, ["cluster.cores=own", "actors.max_staleness=1"])
