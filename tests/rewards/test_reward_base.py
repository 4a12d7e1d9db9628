"""Loading reward functions, what they receive, and what may be returned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cohort.actors.records import Completion, Group, Prompt, RewardError
from cohort.rewards.addition import AdditionTask
from cohort.rewards.base import RewardLoadError, combine, load_function, resolve_path, score_group
from cohort.rewards.config import RewardsConfig
from cohort.rewards.loading import BUILT_IN, load_attribute
from cohort.rewards.result_json import from_json, to_json
from cohort.rewards.results import _warn_once
from cohort.rewards.specs import reward_specs
from tests.shown import ROOT


def make_group(content: Any = "Q", n: int = 3, **columns: Any) -> Group:
    completions = tuple(
        Completion(
            id=f"c{i}",
            prompt_id="p",
            token_ids=np.array([i, i + 1], dtype=np.int64),
            logprobs=np.zeros(2, dtype=np.float32),
            finish_reason="stop",
            seed=i,
            weight_versions=(0, 0),
            text=f"text {i}",
        )
        for i in range(n)
    )
    return Group("g", Prompt("p", (1, 2), content, columns), completions)


# What a function receives


def test_string_prompts_give_string_completions_and_repeated_columns() -> None:
    seen: dict[str, Any] = {}

    def reward(**arguments: Any) -> list[float]:
        seen.update(arguments)
        return [0.0] * 3

    score_group(reward, "reward", make_group("Q", answer=7, level="easy"))
    # As in TRL, functions that log are among the arguments.
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen.pop("trainer_state").global_step == 0
    assert seen == {
        "prompts": ["Q", "Q", "Q"],
        "completions": ["text 0", "text 1", "text 2"],
        "completion_ids": [[0, 1], [1, 2], [2, 3]],
        "answer": [7, 7, 7],
        "level": ["easy", "easy", "easy"],
    }


def test_message_prompts_give_message_completions() -> None:
    messages = [{"role": "user", "content": "Q"}]

    def reward(prompts: Any, completions: Any) -> list[bool]:
        return [
            prompt == messages and completion == [{"role": "assistant", "content": f"text {i}"}]
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]

    assert score_group(reward, "reward", make_group(messages)).values == (1.0, 1.0, 1.0)


def test_only_named_arguments_are_passed() -> None:
    def reward(completion_ids: list[list[int]], answer: list[int], scale: int = 10) -> list[int]:
        return [scale * ids[0] + a for ids, a in zip(completion_ids, answer, strict=True)]

    assert score_group(reward, "reward", make_group(answer=1, unused=2)).values == (1.0, 11.0, 21.0)


def test_missing_column_is_named() -> None:
    def reward(completions: list[str], solution: list[str]) -> list[float]:
        return [0.0] * len(completions + solution)

    result = score_group(reward, "reward", make_group(answer=1))
    assert result.errors[0].cause == "raised"
    assert "no column solution; their columns: answer" in result.errors[0].message


# What a function returns


@pytest.mark.parametrize(
    ("returned", "values"),
    [
        ([1, 0.5, True], (1.0, 0.5, 1.0)),
        ((None, None, None), (None, None, None)),
        ([None, 2, None], (None, 2.0, None)),
        (np.array([1, 2, 3]), (1.0, 2.0, 3.0)),
        ([np.float32(0.5), np.int64(2), np.bool_(False)], (0.5, 2.0, 0.0)),
    ],
)
def test_values(returned: Any, values: tuple[float | None, ...]) -> None:
    result = score_group(lambda: returned, "reward", make_group())
    assert result.values == values
    assert result.errors == ()
    assert all(value is None or type(value) is float for value in result.values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "1.0", [1.0], 10**400, 1j, object()])
def test_a_bad_value_fails_only_its_completion(bad: Any) -> None:
    result = score_group(lambda: [1.0, bad, None], "reward", make_group())
    assert result.values == (1.0, None, None)
    (error,) = result.errors
    assert (error.function, error.completion_id, error.cause) == ("reward", "c1", "wrong_type")


@pytest.mark.parametrize(
    ("returned", "cause"),
    [
        ([1.0, 1.0], "wrong_length"),
        ([], "wrong_length"),
        ([1.0] * 4, "wrong_length"),
        (1.0, "wrong_type"),
        (None, "wrong_type"),
        ("abc", "wrong_type"),
        ({0: 1.0, 1: 1.0, 2: 1.0}, "wrong_type"),
    ],
)
def test_a_bad_result_fails_every_completion(returned: Any, cause: str) -> None:
    result = score_group(lambda: returned, "reward", make_group())
    assert result.values == (None, None, None)
    assert [error.completion_id for error in result.errors] == ["c0", "c1", "c2"]
    assert {error.cause for error in result.errors} == {cause}


@pytest.mark.parametrize("error", [ValueError("no such key"), SystemExit("no such key")])
def test_an_exception_is_an_error_with_its_traceback(error: BaseException) -> None:
    def broken_reward() -> list[float]:
        raise error

    result = score_group(broken_reward, "reward", make_group())
    assert result.values == (None, None, None)
    assert {item.cause for item in result.errors} == {"raised"}
    assert "broken_reward" in result.errors[0].message
    assert result.errors[0].message.endswith("no such key")


def test_messages_are_bounded() -> None:
    def reward() -> list[float]:
        raise ValueError("x" * 10_000_000)

    assert len(score_group(reward, "reward", make_group()).errors[0].message) <= 2000


def test_async_function() -> None:
    async def reward(completions: list[str]) -> list[float]:
        return [float(len(completion)) for completion in completions]

    assert score_group(reward, "reward", make_group()).values == (6.0, 6.0, 6.0)


# Parts and logs


def test_a_dict_of_lists_gives_values_and_parts() -> None:
    result = score_group(
        lambda: {
            "score": np.array([1.0, 0.0, 0.5]),
            "format": [True, False, None],
            "found": ["a", None, 3],
            "late": [0.5, float("nan"), 1],
        },
        "reward",
        make_group(),
    )
    assert result.errors == ()
    assert result.values == (1.0, 0.0, 0.5)
    assert result.parts == {"format": (1.0, 0.0, None), "late": (0.5, None, 1.0)}
    assert result.extra == {"found": ("a", None, 3.0)}


def test_a_list_of_dicts_gives_values_and_parts() -> None:
    results = [{"score": 1.0, "acc": True, "pred": "7"}, None, {"score": None, "acc": False}]
    result = score_group(lambda: results, "reward", make_group())
    assert result.values == (1.0, None, None)
    assert result.parts == {"acc": (1.0, None, 0.0)}
    assert result.extra == {"pred": ("7", None, None)}
    assert results[0] == {"score": 1.0, "acc": True, "pred": "7"}


def test_exceptions_in_the_list_fail_their_completions_only() -> None:
    result = score_group(
        lambda: [1.0, TimeoutError("too slow"), ValueError("no score")], "f", make_group()
    )
    assert result.values == (1.0, None, None)
    assert [(e.completion_id, e.cause) for e in result.errors] == [
        ("c1", "timeout"),
        ("c2", "raised"),
    ]
    assert "too slow" in result.errors[0].message
    # The call gave an answer: nothing is gained by scoring one by one.
    assert not result.broke


@pytest.mark.parametrize(
    ("result", "cause", "words"),
    [
        ({"score": [1.0, 1.0]}, "wrong_length", "returned 2 values for 3"),
        ({"score": [1.0] * 3, "part": [1.0]}, "wrong_length", "part: 1 values for 3"),
        ({"score": [1.0] * 3, "part": 1.0}, "wrong_length", "part: None values"),
        ({"score": 1.0}, "wrong_type", "a float, not a list"),
        ({"reward": [1.0] * 3}, "wrong_type", "without 'score'"),
        ([{"acc": 1.0}, 1.0, 1.0], "wrong_type", "without 'score'"),
    ],
)
def test_dicts_that_are_wrong(result: Any, cause: str, words: str) -> None:
    scored = score_group(lambda: result, "reward", make_group())
    assert (scored.errors[0].cause, scored.values[0]) == (cause, None)
    assert words in scored.errors[0].message


def test_log_extra_and_log_metric() -> None:
    def reward(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("solution", ["x" * 5000, None, {1: 2}])
        for index in range(3):  # adds up, as in TRL
            log_extra("index", [index])
            log_metric("tries", np.float32(index))
        return [1.0] * len(completions)

    result = score_group(reward, "reward", make_group())
    assert result.errors == ()
    assert result.extra == {"solution": ("x" * 2000, None, "{1: 2}"), "index": (0, 1, 2)}
    assert result.metrics == {"tries": (0.0, 1.0, 2.0)}


@pytest.mark.parametrize(
    ("parts", "kept", "words"),
    [
        ({5: 2, "a": 1}, ["a"], "the name must be a text"),
        ({"": 2, "a": 1}, ["a"], "the name must be a text"),
        ({"x" * 101: 2, "a": "text"}, ["a"], "1 to 100 characters"),
        ({"\ud800": 2, "a": 1}, ["a"], "half a surrogate"),
        ({f"n{i}": i for i in range(100)}, [f"n{i}" for i in range(63)], "more than 64 names"),
        ({f"n{i}": "text" for i in range(100)}, [f"n{i}" for i in range(63)], "64 names"),
    ],
)
def test_a_name_that_cannot_be_logged_costs_no_score(
    parts: dict[Any, Any], kept: list[str], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    columns = {"score": [1.0] * 3, **{name: [part] * 3 for name, part in parts.items()}}
    for returned in ([{"score": 1.0, **parts}] * 3, columns):

        def reward(log_extra: Any, returned: Any = returned) -> Any:
            log_extra("logged", ["x"] * 3)
            return returned

        result = score_group(reward, "reward", make_group())
        # As it comes from the reward's process.
        result = from_json("reward", json.loads(json.dumps(to_json(result))), 3)
        assert (result.values, result.errors) == ((1.0,) * 3, ())
        assert sorted([*result.parts, *result.extra]) == sorted([*kept, "logged"])
    assert words in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda log: log.log_extra("a", [1]), "log_extra a: 1 values for 3 completions"),
        (lambda log: log.log_metric("a", float("nan")), "not a finite number"),
        (lambda log: log.log_metric("a", "1"), "not a finite number"),
        (lambda log: log.log_metric(None, 1), "the name must be a text"),
        (lambda log: [log.log_metric(f"m{i}", 1) for i in range(65)], "more than 64 names"),
    ],
)
def test_logs_that_are_wrong_fail_loudly(call: Any, words: str) -> None:
    def reward(log_extra: Any, log_metric: Any) -> list[float]:
        call(SimpleNamespace(log_extra=log_extra, log_metric=log_metric))
        return [1.0] * 3

    result = score_group(reward, "reward", make_group())
    assert result.values == (None,) * 3
    assert words in result.errors[0].message


@pytest.mark.parametrize(
    "reply",
    [
        {},
        [],
        {"values": [1.0], "errors": [], "parts": {}, "extra": {}, "metrics": {}, "broke": False},
        {"values": ["x", 1, 1], "errors": [], "parts": {}, "extra": {}, "metrics": {}, "broke": 0},
        {"values": [1] * 3, "errors": [1], "parts": {}, "extra": {}, "metrics": {}, "broke": 0},
        {"values": [1] * 3, "errors": [], "parts": 3, "extra": {}, "metrics": {}, "broke": 0},
        {
            "values": [1] * 3,
            "errors": [],
            "parts": {"a": [1]},
            "extra": {},
            "metrics": {},
            "broke": 0,
        },
    ],
)
def test_a_forged_reply_is_refused(reply: Any) -> None:
    with pytest.raises(ValueError, match="a garbled reply"):
        from_json("f", reply, 3)


def test_a_result_survives_json() -> None:
    def reward(log_extra: Any, log_metric: Any) -> dict[str, Any]:
        log_extra("shown", ["a", None, 1])
        log_metric("tries", 2)
        return {"score": [1.0, None, "x"], "part": [1, None, 0.5]}

    result = score_group(reward, "f", make_group())
    assert from_json("f", json.loads(json.dumps(to_json(result))), 3) == result


# Options and columns


def test_options_are_given_and_win_over_columns(tmp_path: Path) -> None:
    file = tmp_path / "scaled.py"
    file.write_text(
        "def reward(completions, answer, scale=1, **kwargs):\n"
        "    return [scale * value for value in answer]\n"
        "class Reward:\n"
        "    def __init__(self, base, step=1):\n"
        "        self.value, self.step = base, step\n"
        "    def __call__(self, completions):\n"
        "        self.value += self.step\n"
        "        return [self.value] * len(completions)\n"
        "class Broken(Reward):\n"
        "    def __init__(self):\n"
        "        raise OSError('no sandbox here')\n"
    )
    function = load_function(f"{file}:reward", {"scale": 3})
    assert score_group(function, "f", make_group(answer=2, scale=100)).values == (6.0,) * 3
    renamed = score_group(function, "f", make_group(gold=5), columns={"answer": "gold"})
    assert renamed.values == (15.0,) * 3
    lost = score_group(function, "f", make_group(gold=5), columns={"answer": "golden"})
    assert "no column golden; their columns: gold" in lost.errors[0].message
    one = load_function(f"{file}:Reward", {"base": 5})
    assert score_group(one, "f", make_group()).values == (6.0,) * 3
    assert score_group(one, "f", make_group()).values == (7.0,) * 3
    for path, options, words in [
        ("Reward", {}, "option 'base' is required"),
        ("Reward", {"base": 1, "stepp": 2}, "unknown option 'stepp'; did you mean step?"),
        ("Broken", {}, "cannot be constructed:.*no sandbox here"),
        ("reward", {"prompts": 1}, "unknown option 'prompts'"),
    ]:
        with pytest.raises(RewardLoadError, match=f"(?s){words}"):
            load_function(f"{file}:{path}", options)


# Totals

IDS = ("a", "b")


def error(function: str, completion_id: str) -> RewardError:
    return RewardError(function, completion_id, "raised", "")


@pytest.mark.parametrize(
    ("by_function", "weights", "errors", "totals"),
    [
        ({"f": (1.0, 0.0)}, {"f": 2.0}, [], (2.0, 0.0)),
        ({"f": (1.0, 0.0), "g": (0.5, 1.0)}, {"f": 1.0, "g": 2.0}, [], (2.0, 2.0)),
        # None is left out of the sum; a sample without any value has no total.
        ({"f": (None, 1.0), "g": (0.5, None)}, {"f": 1.0, "g": 1.0}, [], (0.5, 1.0)),
        ({"f": (None, 1.0), "g": (None, 1.0)}, {"f": 1.0, "g": -1.0}, [], (None, 0.0)),
        # A failure takes the total away even where another function gave a value.
        ({"f": (1.0, 1.0), "g": (None, 1.0)}, {"f": 1.0, "g": 1.0}, [error("g", "a")], (None, 2.0)),
        # Weight 0 is only watched.
        ({"f": (None, 1.0), "g": (0.5, 0.5)}, {"f": 1.0, "g": 0.0}, [], (None, 1.0)),
        ({"f": (1.0, 1.0), "g": (None, 1.0)}, {"f": 1.0, "g": 0.0}, [error("g", "a")], (1.0, 1.0)),
    ],
)
def test_combine(by_function: Any, weights: Any, errors: Any, totals: Any) -> None:
    assert combine(IDS, by_function, weights, errors) == totals


# Loading


def test_load_from_module_and_from_file(tmp_path: Path) -> None:
    assert load_function("cohort.rewards.answer:exact_number").__name__ == "exact_number"
    (tmp_path / "neighbour_of_reward.py").write_text("VALUE = 3.0\n")
    file = tmp_path / "my_reward.py"
    file.write_text(
        "from neighbour_of_reward import VALUE\n"
        "def reward(completions):\n    return [VALUE] * len(completions)\n"
    )
    path = resolve_path("my_reward.py:reward", tmp_path)
    assert path == f"{file}:reward"
    assert load_function(path)(["a", "b"]) == [3.0, 3.0]


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_reward_loads_by_its_short_name(name: str) -> None:
    module, _, attribute = BUILT_IN[name].partition(":")
    found = load_attribute(f"{module}:{attribute}")
    assert callable(found)
    [spec] = reward_specs(AdditionTask(0), RewardsConfig(functions=[name]))
    # What the metrics are called, as with the path.
    assert (spec.name, spec.path) == (attribute, BUILT_IN[name])


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "did you mean maths, or cohort.rewards.maths:MathAnswer?"),
        ({"rewards.py": ""}, "did you mean maths"),
        ({"rewards/__init__.py": "", "rewards/maths.py": "MathAnswer = len"}, "theirs"),
    ],
)
def test_paths_below_rewards_are_the_users(
    tmp_path: Path, files: dict[str, str], words: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = (
        "import sys; from cohort.rewards.loading import load_function\n"
        f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]; sys.path.insert(0, '')\n"
        "try:\n    print('theirs', load_function('rewards.maths:MathAnswer'))\n"
        "except Exception as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert words in done.stdout


def test_resolve_path_leaves_modules_and_absolute_files(tmp_path: Path) -> None:
    assert resolve_path("a.b:c", tmp_path) == "a.b:c"
    assert resolve_path("/x/y.py:c", tmp_path) == "/x/y.py:c"
    assert resolve_path("sub/y.py:c", tmp_path) == f"{tmp_path}/sub/y.py:c"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("cohort.rewards.answer", "must be module:name"),
        ("cohort.rewards.answer.exact_number", "did you mean cohort.rewards.answer:exact_number?"),
        (":f", "must be module:name"),
        ("no_such_module_anywhere:f", "no module named 'no_such_module_anywhere'"),
        ("mathss", "did you mean maths?"),
        ("nothing_like_it", "there are boxed_answer, code, exact_number"),
        ("cohort.rewards.answer:exact_numbr", "did you mean exact_number?"),
        ("cohort.rewards.answer:zzz", "it has"),
        ("cohort.rewards.answer:MAX_CHARACTERS", "of type int, not a function"),
        ("cohort.rewards.results:RewardResult", "a class, not a function"),
        ("/no/such/file.py:f", "no file /no/such/file.py"),
    ],
)
def test_load_errors(path: str, words: str) -> None:
    with pytest.raises(RewardLoadError) as raised:
        load_function(path)
    assert path in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize("line", ["import no_such_module_anywhere", "1 / 0", "def broken("])
def test_a_file_that_does_not_import(tmp_path: Path, line: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(line + "\n")
    with pytest.raises(RewardLoadError, match=r"importing .*broken.py failed") as raised:
        load_function(f"{file}:f")
    assert "Error" in str(raised.value).splitlines()[-1]
