"""Every number and every reply is a score or a counted error, and never an exception."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cohort.actors.records import Completion, Group, Prompt, ScoreMeta
from cohort.learner.advantages import group_advantages
from cohort.learner.config import AlgorithmConfig
from cohort.rewards.base import combine, out_of_range, score_group
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.result_json import from_json, to_json
from cohort.rewards.results import MAX_SCORE
from cohort.rewards.specs import RewardSpec
from cohort.rewards.worker import RewardWorker

IDS = ("c0", "c1", "c2")
# Sends its own reply to the call in progress, which it finds on the stack, then the right one.
FORGER = """
import json, struct, sys

def body(kind, call):
    fine = {"values": [1, 1, 1], "errors": [], "parts": {}, "extra": {}, "metrics": {}, "broke": 0}
    text = json.dumps({**call, **fine})
    if kind == "deep":
        return text.replace('"parts": {}', '"parts": ' + "[" * 100000 + "]" * 100000).encode()
    if kind == "deep_frame":
        return b"[" * 100000
    if kind == "digits":
        return text.replace("[1, 1, 1]", "[1, 1, " + "7" * 400 + "]").encode()
    if kind == "more_digits":
        return text.replace("[1, 1, 1]", "[1, 1, " + "7" * 5000 + "]").encode()
    if kind == "nan":
        return text.replace("[1, 1, 1]", "[1, 1, NaN]").encode()
    if kind == "short":
        return text.replace("[1, 1, 1]", "[1, 1]").encode()
    if kind == "bytes":
        return bytes(range(256)) * 4
    if kind == "errors":
        return text.replace('"errors": []', '"errors": [[[], {}, 3], ["c0", "died", 5]]').encode()
    if kind == "stranger":
        return text.replace('"errors": []', '"errors": [["c9", "died", "x"]]').encode()
    if kind == "failed":
        return text.replace('"broke": 0', '"failed": {"a": 1}').encode()
    if kind == "name":
        return text.replace('"parts": {}', '"parts": {"' + "n" * 500 + '": [1, 1, 1]}').encode()
    if kind == "other_call":
        return text.replace(call["call"], "00" * 16).encode()
    raise AssertionError(kind)

def forge(completions, kind):
    frame = sys._getframe()
    while "connection" not in frame.f_locals:
        frame = frame.f_back
    connection, call = frame.f_locals["connection"], frame.f_locals["call"]
    connection.settimeout(None)
    if kind[0] == "giant":
        connection.sendall(struct.pack(">Q", 1 << 60) + b"x" * 100)
    elif kind[0] == "length":
        connection.sendall(b"\\xff" * 8)
    elif kind[0] != "none":
        reply = body(kind[0], call)
        connection.sendall(struct.pack(">Q", len(reply)) + reply)
    return [1.0] * len(completions)
"""
KINDS = (
    "deep",
    "deep_frame",
    "digits",
    "more_digits",
    "nan",
    "short",
    "bytes",
    "errors",
    "stranger",
    "failed",
    "name",
    "other_call",
    "giant",
    "length",
)


def make_group(n: int = 3, **columns: Any) -> Group:
    completions = tuple(
        Completion(f"c{i}", "p", np.arange(2), np.zeros(2, np.float32), "stop", i, (0, 0), f"t{i}")
        for i in range(n)
    )
    return Group("g", Prompt("p", (1,), "Q", columns), completions)


def value_of(returned: Any) -> tuple[float | None, str | None]:
    """The value of an entry, and what its error says, after the way through JSON."""
    result = score_group(lambda: [returned, 1.0, 1.0], "f", make_group())
    result = from_json("f", json.loads(json.dumps(to_json(result))), 3, set(IDS))
    assert result.values[1:] == (1.0, 1.0)
    errors = [error for error in result.errors if error.completion_id == "c0"]
    assert len(errors) == len(result.errors) == (result.values[0] is None and returned is not None)
    return result.values[0], errors[0].message if errors else None


@pytest.mark.parametrize(
    ("returned", "value"),
    [
        (True, 1.0),
        (np.bool_(False), 0.0),
        (np.float16(0.5), 0.5),
        (np.int8(-3), -3.0),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(2, dtype=torch.int64), 2.0),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (Decimal("0.25"), 0.25),
        (Fraction(1, 4), 0.25),
        (5e-324, 5e-324),
        (-0.0, 0.0),
        (MAX_SCORE, MAX_SCORE),
        (None, None),
    ],
    ids=repr,
)
def test_numbers_of_every_kind(returned: Any, value: float | None) -> None:
    assert value_of(returned) == (value, None)


@pytest.mark.parametrize(
    "returned",
    [
        1e200,
        -1e200,
        1e39,
        10**400,
        -(10**400),
        Fraction(10**400, 3),
        Decimal("1e400"),
        np.longdouble("1e400"),
        np.float64(1e300),
        torch.tensor(1e300, dtype=torch.float64),
    ],
    ids=lambda value: type(value).__name__,
)
def test_out_of_range(returned: Any) -> None:
    value, message = value_of(returned)
    assert value is None
    assert message is not None
    assert "out of range" in message or "not a finite number" in message


@pytest.mark.parametrize(
    "returned",
    [
        math.nan,
        math.inf,
        -math.inf,
        Decimal("NaN"),
        Decimal("sNaN"),
        Decimal("Infinity"),
        1 + 2j,
        np.complex64(1),
        "1.0",
        "\ud800",
        b"1",
        [1.0],
        (1.0,),
        np.ones(1),
        torch.ones(1),
        {"value": 1.0},
        np.timedelta64(1, "s"),
        np.datetime64("2026-01-01"),
        float,
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_number(returned: Any) -> None:
    value, message = value_of(returned)
    assert value is None
    assert message


@pytest.mark.parametrize("error", [SystemExit(2), StopIteration(), RecursionError()], ids=repr)
def test_whatever_is_raised_is_an_error(error: BaseException) -> None:
    def reward() -> list[float]:
        raise error

    result = score_group(reward, "f", make_group())
    assert [item.cause for item in result.errors] == ["raised"] * 3


def test_words_that_no_file_can_hold() -> None:
    def reward(log_extra: Any) -> list[Any]:
        log_extra("shown", ["\ud800"] * 3)
        return [1.0, ValueError("\udfff"), {"score": 1.0, "part": "\ud83d"}]

    result = score_group(reward, "f", make_group())
    result = from_json("f", json.loads(json.dumps(to_json(result))), 3)
    written = json.dumps(to_json(result), ensure_ascii=False)
    assert "\\udfff" in written.encode().decode()

    def bad_name(log_metric: Any) -> list[float]:
        log_metric("\ud800", 1)
        return [1.0] * 3

    assert "half a surrogate" in score_group(bad_name, "f", make_group()).errors[0].message


@pytest.mark.parametrize(
    "values", [np.full(3, 0.5), (0.5,) * 3, torch.full((3,), 0.5), [torch.tensor(0.5)] * 3]
)
def test_lists_of_every_kind(values: Any) -> None:
    assert score_group(lambda: values, "f", make_group()).values == (0.5,) * 3


def test_generators_and_series() -> None:
    pandas = pytest.importorskip("pandas")
    series = pandas.Series([0.5] * 3, index=[7, 8, 9])
    assert score_group(lambda: series, "f", make_group()).values == (0.5,) * 3
    made = score_group(lambda completions: (0.5 for _ in completions), "f", make_group())
    assert made.values == (0.5,) * 3
    endless = score_group(lambda: iter(int, 1), "f", make_group())
    assert endless.errors[0].cause == "wrong_length"


def test_a_weighted_sum_out_of_range_is_a_counted_error() -> None:
    by_function = {"a": (1e30, 1.0, 1e30), "b": (1e30, 1.0, -1e30)}
    weights = {"a": 1.0, "b": 1.0}
    errors = out_of_range(IDS, by_function, weights)
    assert [error.completion_id for error in errors] == ["c0"]
    assert "out of range" in errors[0].message
    assert combine(IDS, by_function, weights, errors) == (None, 2.0, 0.0)
    for weight in (1e300, -1e300, math.inf, math.nan):
        heavy = {"a": weight, "b": 0.0}
        errors = out_of_range(IDS, by_function, heavy)
        assert {error.completion_id for error in errors} == set(IDS)
        assert combine(IDS, by_function, heavy, errors) == (None,) * 3


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, "nan", "inf"])
def test_a_weight_that_is_not_finite_is_refused(weight: Any) -> None:
    with pytest.raises(ValidationError, match="finite"):
        RewardFunctionConfig(path="m:f", weight=weight)


def test_the_largest_scores_have_advantages() -> None:
    found = group_advantages([MAX_SCORE, -MAX_SCORE, 0.0, None], AlgorithmConfig())
    assert np.allclose(np.float32([value or 0.0 for value in found]), [1.2247, -1.2247, 0, 0], 1e-3)


@pytest.fixture(scope="module")
def forger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardWorker]:
    file = tmp_path_factory.mktemp("forger") / "forger.py"
    file.write_text(FORGER)
    worker = RewardWorker([RewardSpec("forge", f"{file}:forge", whole_group=True)], 20)
    yield worker
    worker.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_forged_reply_is_a_counted_error(forger: RewardWorker, kind: str) -> None:
    limit = sys.get_int_max_str_digits()
    meta, scored = forger.score(make_group(kind=kind))
    assert isinstance(meta, ScoreMeta), meta
    assert meta.totals == (None,) * 3
    assert [error.cause for error in meta.errors] == ["died"] * 3
    json.dumps(asdict(meta), allow_nan=False)
    assert scored is not None
    # The next group is not harmed.
    meta, _ = forger.score(make_group(kind="none"))
    assert isinstance(meta, ScoreMeta)
    assert meta.totals == (1.0,) * 3
    assert sys.get_int_max_str_digits() == limit


LEAVES = """
import os, subprocess, sys, time

# A few seconds more than any test: nothing may be left for long, whatever fails.
SLEEP = "import time; time.sleep(60)"

def daemon(completions, how):
    code = {
        "session": SLEEP,
        "twice": "import os; os.fork() and os._exit(0); os.setsid(); " + SLEEP,
        "no_marker": SLEEP,
        "closed": "import os; os.fork() and os._exit(0); os.closerange(0, 64); " + SLEEP,
    }[how[0]]
    environment = {} if how[0] == "no_marker" else None
    started = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, start_new_session=True
    )
    if how[0] in ("twice", "closed"):
        started.wait()
    if len(how) > 1 and completions[0] == "t0" and len(completions) > 1:
        time.sleep(60)
    return [1.0] * len(completions)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["session", "twice", "no_marker", "closed"])
@pytest.mark.parametrize("ending", ["close", "timeout"])
def test_nothing_that_a_function_starts_outlives_it(tmp_path: Path, how: str, ending: str) -> None:
    psutil = pytest.importorskip("psutil")
    file = tmp_path / "leaves.py"
    file.write_text(LEAVES)
    timeout_s = 1.0 if ending == "timeout" else 20.0
    worker = RewardWorker([RewardSpec("f", f"{file}:daemon", whole_group=True)], timeout_s)
    child = psutil.Process(worker.pids()[1])
    try:
        meta, _ = worker.score(make_group(1, how=how))
        assert meta.totals == (1.0,)  # type: ignore[union-attr]
        left = child.children(recursive=True)
        assert [process.status() == psutil.STATUS_ZOMBIE for process in left] == [False]
        if ending == "timeout":
            child.suspend()
            meta, _ = worker.score(make_group(1, how=how))
            assert [error.cause for error in meta.errors] == ["timeout"]  # type: ignore[union-attr]
    finally:
        worker.close()
    for process in left:
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
