"""Reward code as its users wrote it: lazy modules, packages, process pools, factories, names."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cohort.rewards.base import RewardLoadError, load_function, per_completion, score_group
from cohort.rewards.results import RewardResult
from cohort.rewards.specs import RewardSpec
from cohort.rewards.worker import RewardWorker
from tests.rewards.test_reward_worker import make_group


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    """Modules and folders that a test imports from do not reach the next one."""
    modules, path = dict(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.path[:] = path


def write(folder: Path, **files: str) -> Path:
    """Files by name; returns the folder."""
    for name, text in files.items():
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def values(path: str, options: dict[str, Any] | None = None, **columns: Any) -> Any:
    result = score_group(load_function(path, options), "f", make_group("a", "bb", **columns))
    assert result.errors == (), result.errors[0].message
    return result.values


LENGTHS = "def reward(completions):\n    return [len(text) for text in completions]\n"

LAZY = """
import importlib
def __getattr__(name):
    if name == "reward":
        return importlib.import_module("lazily_imported").reward
    if name == "broken":
        import no_such_module_anywhere
    raise AttributeError(name)
def __dir__():
    return ["reward"]
"""


def test_a_module_that_makes_its_names_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, lazy_rewards=LAZY, lazily_imported=LENGTHS)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert values("lazy_rewards:reward") == (1.0, 2.0)
    with pytest.raises(RewardLoadError, match="did you mean reward"):
        load_function("lazy_rewards:rewards")
    with pytest.raises(RewardLoadError, match="No module named 'no_such_module_anywhere'"):
        load_function("lazy_rewards:broken")


def test_a_name_inside_a_class(tmp_path: Path) -> None:
    text = "class All:\n    @staticmethod\n    def reward(completions):\n        return [3, 4]\n"
    write(tmp_path, inside=text)
    assert values(f"{tmp_path}/inside.py:All.reward") == (3.0, 4.0)
    with pytest.raises(RewardLoadError, match="no 'rewar' in"):
        load_function(f"{tmp_path}/inside.py:All.rewar")


# Packages and names


def test_relative_imports_of_a_package(tmp_path: Path) -> None:
    reward = "from .util import scale\nfrom ..constants import TEN\n" + LENGTHS.replace(
        "len(text)", "scale(len(text)) * TEN"
    )
    files = {
        "mine/constants": "TEN = 10\n",
        "mine/judges/util": "def scale(x):\n    return 2 * x\n",
        "mine/judges/my": reward,
    }
    write(tmp_path, **files)
    # Without __init__.py, and then with it.
    assert values(f"{tmp_path}/mine/judges/my.py:reward") == (20.0, 40.0)
    other = tmp_path / "other"
    write(other, **files)
    for folder in ("mine", "mine/judges"):
        (other / folder / "__init__.py").touch()
    function = load_function(f"{other}/mine/judges/my.py:reward")
    assert function.__module__ == "mine.judges.my"
    assert score_group(function, "f", make_group("a", "bb")).values == (20.0, 40.0)


def test_a_package_with_the_name_of_another(tmp_path: Path) -> None:
    """`rewards` is this program's own; the user's has a right to be called that too."""
    write(
        tmp_path,
        **{"rewards/__init__": "FACTOR = 5\n"},
        **{"rewards/util": "from . import FACTOR\n"},
        **{"rewards/my": "from .util import FACTOR\n" + LENGTHS.replace("len", "FACTOR * len")},
    )
    assert values(f"{tmp_path}/rewards/my.py:reward") == (5.0, 10.0)
    import cohort.rewards.answer

    assert str(tmp_path) not in str(cohort.rewards.answer.__file__)


@pytest.mark.parametrize("name", ["my", "json", "rewards", "with-dash", "v1.0"])
def test_files_of_one_name_in_different_folders(tmp_path: Path, name: str) -> None:
    for folder, factor in (("a", 1), ("b", 2), ("c.d", 3)):
        file = tmp_path / folder / f"{name}.py"
        file.parent.mkdir()
        file.write_text(LENGTHS.replace("len", f"{factor} * len"))
    for folder, factor in (("a", 1), ("b", 2), ("c.d", 3), ("a", 1)):
        assert values(f"{tmp_path}/{folder}/{name}.py:reward") == (factor, 2.0 * factor)


def test_a_neighbour_that_would_be_another_module_is_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(
            tmp_path / folder,
            util=f"FACTOR = {len(folder)}\n",
            **{f"score_{folder}": "from util import FACTOR\n" + LENGTHS},
        )
    assert values(f"{tmp_path}/a/score_a.py:reward") == (1.0, 2.0)
    with pytest.raises(RewardLoadError, match=r"imports util, which would be .*/a/util.py here"):
        load_function(f"{tmp_path}/b/score_b.py:reward")


POOLS = """
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

def one(text):
    return float(len(text)), os.getpid(), __file__

def run(method, texts):
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(one, texts))

def spawn(completions):
    return scored(run("spawn", completions))

def forkserver(completions):
    return scored(run("forkserver", completions))

def fork(completions):
    return scored(run("fork", completions))

def pool(completions):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return scored(pool.map(one, completions))

def scored(found):
    assert os.getpid() not in {pid for _, pid, _ in found}
    assert {file for _, _, file in found} == {__file__}
    return [score for score, _, _ in found]
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["pooled", "json", "package"])
def test_process_pools_of_any_start_method(tmp_path: Path, place: str) -> None:
    """A child of the pool imports the reward file: by its own name, a made-up one, a dotted one."""
    file = tmp_path / ("rewards/judge.py" if place == "package" else f"{place}.py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(POOLS)
    if place == "package":
        (file.parent / "__init__.py").touch()
    names = ("spawn", "forkserver", "fork", "pool")
    worker = RewardWorker([RewardSpec(name, f"{file}:{name}") for name in names], 60)
    meta, _ = worker.score(make_group("a", "bb"))
    worker.close()
    assert meta.errors == (), meta.errors[0].message  # type: ignore[union-attr]
    assert meta.by_function == dict.fromkeys(names, (1.0, 2.0))  # type: ignore[union-attr]


# Kinds of functions

KINDS = """
import functools

def scaled(completions, scale):
    return [scale * len(text) for text in completions]

double = functools.partial(scaled, scale=2)

class Scorer:
    def __init__(self, scale=1):
        self.scale = scale
    def __call__(self, completions, **columns):
        return scaled(completions, self.scale)
    def method(self, completions, **columns):
        return scaled(completions, self.scale)
    async def awaited(self, completions):
        return scaled(completions, self.scale)

instance = Scorer(3)
method = Scorer(4).method
awaited = Scorer(5).awaited

def get_reward(scale, offset=0):
    def reward(completions, **columns):
        return [offset + scale * len(text) for text in completions]
    return reward

def get_with_keywords(**options):
    return functools.partial(scaled, **{"scale": options.get("scale", 7)})

def by_place(completions, answer=0, /, **columns):
    assert "completions" not in columns
    return [len(text) + a for text, a in zip(completions, answer)]

constant = max
"""


@pytest.mark.parametrize(
    ("name", "options", "factor"),
    [
        ("double", {}, 2),
        ("scaled", {"scale": 9}, 9),
        ("Scorer", {"scale": 2}, 2),
        ("instance", {}, 3),
        ("method", {}, 4),
        ("awaited", {}, 5),
        ("get_reward", {"scale": 6}, 6),
        ("get_with_keywords", {}, 7),
        ("get_with_keywords", {"scale": 8}, 8),
    ],
)
def test_kinds_of_functions(
    tmp_path: Path, name: str, options: dict[str, Any], factor: int
) -> None:
    write(tmp_path, kinds=KINDS)
    assert values(f"{tmp_path}/kinds.py:{name}", options, answer=1) == (factor, 2.0 * factor)


def test_arguments_by_place(tmp_path: Path) -> None:
    write(tmp_path, kinds=KINDS)
    assert values(f"{tmp_path}/kinds.py:by_place", answer=10, other=1) == (11.0, 12.0)


def test_a_function_without_a_signature_is_refused(tmp_path: Path) -> None:
    write(tmp_path, kinds=KINDS)
    with pytest.raises(RewardLoadError, match="does not say which arguments it takes"):
        load_function(f"{tmp_path}/kinds.py:constant")


@pytest.mark.parametrize("name", ["self", "scale"])
def test_a_column_with_the_name_of_a_bound_argument(tmp_path: Path, name: str) -> None:
    write(tmp_path, kinds=KINDS)

    def open_ended(scale: int, completions: list[str], **_: Any) -> list[float]:
        return [float(scale)] * len(completions)

    def plain(completions: list[str], **columns: Any) -> list[float]:
        return [float(columns[name][0])] * len(completions)

    group = make_group("a", **{name: 5})
    assert score_group(plain, "f", group).values == (5.0,)
    bound: Any = functools.partial(open_ended, 1)
    if name == "self":
        bound = load_function(f"{tmp_path}/kinds.py:instance")
    result: RewardResult = score_group(bound, "f", group)
    assert f"the column {name} has the name of an argument" in result.errors[0].message
    if name == "self":
        method = load_function(f"{tmp_path}/kinds.py:method")
        assert "the column self has" in score_group(method, "f", group).errors[0].message


def test_our_own_classes_take_a_column_named_self() -> None:
    function = load_function("cohort.rewards.maths:MathAnswer")
    assert score_group(function, "f", make_group(r"\boxed{7}", answer="7", self=1)).values == (1.0,)


def test_trl_trainer_state() -> None:
    def reward(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        return [trainer_state.global_step + trainer_state.max_steps] * len(completions)

    group = make_group("a")
    object.__setattr__(group, "id", "3:0-17")
    assert score_group(reward, "f", group, max_steps=20).values == (23.0,)

    def unnamed(completions: list[str], **kwargs: Any) -> list[float]:
        return [kwargs["trainer_state"].global_step for _ in completions]

    assert score_group(unnamed, "f", group).values == (3.0,)
    # A column or an option of this name is a person's own.
    group.prompt.columns["trainer_state"] = SimpleNamespace(global_step=7)
    assert score_group(lambda **_: [_["trainer_state"][0].global_step], "f", group).values == (7.0,)
    optional = functools.partial(reward, trainer_state=SimpleNamespace(global_step=1, max_steps=1))
    assert score_group(optional, "f", group).values == (2.0,)
    del group.prompt.columns["trainer_state"]

    def needs_more(environments: Any) -> list[float]:
        return [float(len(environments))]

    assert "there are no environments here" in score_group(needs_more, "f", group).errors[0].message


def test_a_function_of_verls_under_the_wrong_kind_says_so() -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str) -> float:
        return float(data_source == solution_str == ground_truth)

    result = score_group(compute_score, "f", make_group("a"))
    assert "set kind: verl on it" in result.errors[0].message


# Who may be called as completions come

COMPARE = """
from cohort.rewards.base import per_completion

def compare(completions, **_):
    sizes = [len(text) for text in completions]
    return [size - sum(sizes) / len(sizes) for size in sizes]

@per_completion
def alone(completions, **_):
    return [float(len(completions))] * len(completions)

@per_completion
class Alone:
    def __call__(self, completions):
        return alone(completions)

def make(flag):
    return alone

def mistaken(completions):
    if len(completions) > 1 and "bad" in completions:
        raise ValueError("bad")
    if completions == ["bad"]:
        raise ValueError("bad")
    return compare(completions)
"""


def both_ways(worker: RewardWorker, *texts: str) -> Any:
    """The scores of a group whose completions were scored as they came."""
    from dataclasses import replace

    group = make_group(*texts)
    singles = [worker.score_part(replace(group, completions=(c,)))[1] for c in group.completions]
    meta, _ = worker.score(group, *(single for single in singles if single is not None))
    return meta


def test_functions_get_the_whole_group_unless_they_say_otherwise(tmp_path: Path) -> None:
    write(tmp_path, compare=COMPARE)
    path = f"{tmp_path}/compare.py"
    specs = [
        RewardSpec("compare", f"{path}:compare"),
        RewardSpec("told", f"{path}:compare", whole_group=False),
        RewardSpec("alone", f"{path}:alone"),
        RewardSpec("kept", f"{path}:alone", whole_group=True),
        RewardSpec("partial", f"{path}:alone", options={"more": 1}),
        RewardSpec("Alone", f"{path}:Alone"),
        RewardSpec("made", f"{path}:make", options={"flag": 1}),
        RewardSpec("ours", "cohort.rewards.format:number_only"),
    ]
    worker = RewardWorker(specs, 20)
    meta = both_ways(worker, "a", "bb")
    assert meta.by_function == {
        "compare": (-0.5, 0.5),
        "told": (0.0, 0.0),
        "alone": (1.0, 1.0),
        "kept": (2.0, 2.0),
        "partial": (1.0, 1.0),
        "Alone": (1.0, 1.0),
        "made": (1.0, 1.0),
        "ours": (0.0, 0.0),
    }
    assert worker.streams == (False, True, True, False, True, True, True, True)
    assert [spec.whole_group for spec in worker.specs] == [
        *(None, False, False, True, False, False, False, False)
    ]
    worker.close()


def test_every_built_in_function_scores_completions_as_they_come() -> None:
    for path in (
        *("cohort.rewards.answer:exact_number", "cohort.rewards.answer:boxed_answer"),
        *("cohort.rewards.answer:tagged_answer", "cohort.rewards.format:number_only"),
        *(
            "cohort.rewards.format:tagged_think_answer",
            "cohort.rewards.language:language_consistency",
        ),
        *("cohort.rewards.length:soft_overlong", "cohort.rewards.length:repetition"),
        *("cohort.rewards.reasoning_gym:score", "cohort.rewards.travel.reward:itinerary"),
        "cohort.rewards.maths:MathAnswer",
    ):
        function: Any = load_function(path)
        assert function.per_completion, path
    assert per_completion(lambda completions: completions).per_completion  # type: ignore[attr-defined]


def test_after_a_mistake_the_others_are_still_compared_with_each_other(tmp_path: Path) -> None:
    write(tmp_path, compare=COMPARE)
    worker = RewardWorker([RewardSpec("f", f"{tmp_path}/compare.py:mistaken")], 20)
    meta = both_ways(worker, "a", "bad", "bb", "ccc")
    worker.close()
    assert [error.completion_id for error in meta.errors] == ["c1"]
    assert meta.totals == (-1.0, None, 0.0, 1.0)
