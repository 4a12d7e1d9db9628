"""The reward worker with functions that hang, die, send forged replies and print much."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cohort.actors.records import Completion, Failure, Group, Prompt, ScoredGroup, ScoreMeta
from cohort.rewards.base import RewardLoadError
from cohort.rewards.environment import scrubbed_environment
from cohort.rewards.specs import RewardSpec
from cohort.rewards.worker import RewardWorker, longest_score_s

pytestmark = pytest.mark.slow

HOSTILE = Path(__file__).parent / "hostile_rewards.py"
MakeWorker = Callable[..., RewardWorker]


def make_group(*texts: str, **columns: Any) -> Group:
    completions = tuple(
        Completion(
            id=f"c{i}",
            prompt_id="p",
            token_ids=np.arange(3),
            logprobs=np.zeros(3, dtype=np.float32),
            finish_reason="stop",
            seed=i,
            weight_versions=(0, 0),
            text=text,
        )
        for i, text in enumerate(texts)
    )
    return Group("g", Prompt("p", (1,), "Q", columns), completions)


@pytest.fixture
def make_worker() -> Iterator[MakeWorker]:
    workers: list[RewardWorker] = []

    def make(
        *names: str, timeout_s: float = 20, whole_group: bool | None = None, **weights: float
    ) -> RewardWorker:
        specs = [
            RewardSpec(name, f"{HOSTILE}:{name}", weights.get(name, 1.0), whole_group=whole_group)
            for name in names
        ]
        workers.append(RewardWorker(specs, timeout_s))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def score(worker: RewardWorker, group: Group) -> ScoredGroup:
    meta, scored = worker.score(group)
    assert isinstance(meta, ScoreMeta), meta
    assert scored is not None
    assert scored.group is group
    assert (meta.group_id, meta.totals, meta.by_function, meta.errors) == (
        group.id,
        scored.totals,
        scored.by_function,
        scored.errors,
    )
    return scored


def causes(scored: ScoredGroup) -> list[tuple[str, str, str]]:
    return [(error.function, error.completion_id, error.cause) for error in scored.errors]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_gone(pid: int, seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return gone(pid)


# Scores


def test_weighted_total_over_functions(make_worker: MakeWorker) -> None:
    worker = make_worker("length", "none_for_odd", none_for_odd=10.0)
    scored = score(worker, make_group("a", "bb", "ccc"))
    assert scored.by_function == {"length": (1.0, 2.0, 3.0), "none_for_odd": (1.0, None, 1.0)}
    assert scored.totals == (11.0, 2.0, 13.0)
    assert scored.errors == ()
    assert scored.latency_s > 0


def test_one_child_serves_all_groups(make_worker: MakeWorker) -> None:
    worker = make_worker("count_calls", "process_id")
    child = worker.pids()[1]
    for call in (1, 2, 3):
        scored = score(worker, make_group("a"))
        assert scored.by_function == {"count_calls": (call,), "process_id": (child,)}
    assert child != os.getpid()


def test_an_event_loop_serves_all_groups(make_worker: MakeWorker) -> None:
    worker = make_worker("async_with_a_lock")
    for _ in range(2):
        assert score(worker, make_group("a", "b")).totals == (2.0, 2.0)


def test_functions_do_not_see_each_others_changes(make_worker: MakeWorker) -> None:
    group = make_group("a", "b", tags=["x"])
    worker = make_worker("change_columns", "length")
    for _ in range(2):
        assert score(worker, group).by_function["change_columns"] == (1.0, 1.0)
    assert group.prompt.columns == {"tags": ["x"]}


def test_the_child_is_light_and_alarms_work_in_it(make_worker: MakeWorker) -> None:
    started = time.monotonic()
    worker = make_worker("heavy_modules", "alarm_works")
    assert time.monotonic() - started < 5
    scored = score(worker, make_group("a"))
    assert scored.by_function == {"heavy_modules": (0.0,), "alarm_works": (1.0,)}


def test_secrets_stay_out_of_the_child(
    make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = ["WANDB_API_KEY", "HF_TOKEN", "my_secret", "AWS_ACCESS_KEY_ID", "DATABASE_URL"]
    plain = ["TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "HF_HOME"]
    for name in secrets + plain:
        monkeypatch.setenv(name, "1")
    worker = make_worker("variable_is_set")
    found = [score(worker, make_group("a", variable=name)).totals[0] for name in secrets + plain]
    assert found == [0.0] * len(secrets) + [1.0] * len(plain)
    assert scrubbed_environment({"A_TOKEN": "1", "PATH": "2"}) == {"PATH": "2"}


def test_secrets_that_a_function_names_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "1")
    monkeypatch.setenv("OTHER_API_KEY", "1")
    path = f"{HOSTILE}:variable_is_set"
    worker = RewardWorker([RewardSpec("f", path, secrets=("JUDGE_API_KEY",))], 20)
    assert score(worker, make_group("a", variable="JUDGE_API_KEY")).totals == (1.0,)
    assert score(worker, make_group("a", variable="OTHER_API_KEY")).totals == (0.0,)
    worker.close()
    monkeypatch.delenv("JUDGE_API_KEY")
    with pytest.raises(RewardLoadError, match="JUDGE_API_KEY: not set in the environment of"):
        RewardWorker([RewardSpec("f", path, secrets=("JUDGE_API_KEY",))], 20)


def test_options_columns_and_logs_travel_through_the_child() -> None:
    spec = RewardSpec("f", f"{HOSTILE}:logs", options={"scale": 3}, columns={"truth": "answer"})
    worker = RewardWorker([spec], 20)
    meta, scored = worker.score(make_group("a", "bb", answer=2))
    assert isinstance(meta, ScoreMeta)
    assert scored is not None
    assert scored.totals == (6.0, 6.0)
    assert scored.extra == {"f/size": (1, 2)}
    assert meta.metrics == {"f/longest": (2.0,)}
    assert meta.parts == scored.parts == {}
    assert len(meta.sample_s) == 2
    worker.close()


# Mistakes


def test_mistakes_are_errors_of_their_function_and_completion(make_worker: MakeWorker) -> None:
    worker = make_worker("length", "nan_for_first")
    scored = score(worker, make_group("a", "b"))
    assert scored.by_function == {"length": (1.0, 1.0), "nan_for_first": (None, 1.0)}
    assert scored.totals == (None, 2.0)
    assert causes(scored) == [("nan_for_first", "c0", "wrong_type")]


@pytest.mark.parametrize(
    ("function", "cause", "words"),
    [
        ("too_short", "wrong_length", "1 values for 2 completions"),
        ("raises", "raised", "no such answer"),
    ],
)
def test_mistakes_do_not_cost_the_child(
    make_worker: MakeWorker, function: str, cause: str, words: str
) -> None:
    worker = make_worker(function, "length")
    child = worker.pids()[1]
    scored = score(worker, make_group("a", "b"))
    assert causes(scored) == [(function, "c0", cause), (function, "c1", cause)]
    assert words in scored.errors[0].message
    assert scored.by_function["length"] == (1.0, 1.0)
    assert scored.totals == (None, None)
    assert worker.pids()[1] == child


# Hangs


@pytest.mark.parametrize("function", ["hang", "hang_in_c", "async_hang"])
def test_a_hang_is_ended_and_the_next_group_is_scored(
    make_worker: MakeWorker, function: str
) -> None:
    worker = make_worker("length", function, timeout_s=0.5)
    child = worker.pids()[1]
    assert child is not None
    started = time.monotonic()
    scored = score(worker, make_group("hang", "a"))
    assert time.monotonic() - started < 4
    # It costs the completion that hangs, not the rest of its group.
    assert causes(scored) == [(function, "c0", "timeout")]
    assert "0.5 s (rewards.timeout_s)" in scored.errors[0].message
    assert scored.by_function == {"length": (4.0, 1.0), function: (None, 1.0)}
    assert scored.totals == (None, 2.0)
    assert gone(child)
    assert score(worker, make_group("a", "b")).totals == (2.0, 2.0)
    assert worker.pids()[1] != child


def test_functions_after_a_hang_still_score_the_group(make_worker: MakeWorker) -> None:
    worker = make_worker("hang", "length", timeout_s=0.5)
    scored = score(worker, make_group("hang", "a"))
    assert scored.by_function == {"hang": (None, 1.0), "length": (4.0, 1.0)}
    assert scored.totals == (None, 2.0)
    # Both waited for the group's deadline, the first one for its own too.
    assert scored.sample_s[0] > 1 > scored.sample_s[1] > 0.5


def test_a_function_that_compares_is_never_called_with_part_of_a_group() -> None:
    spec = RewardSpec("hang", f"{HOSTILE}:hang", whole_group=True)
    worker = RewardWorker([spec], 0.5)
    scored = score(worker, make_group("hang", "a", "b"))
    assert causes(scored) == [("hang", f"c{i}", "timeout") for i in range(3)]
    worker.close()


def test_completions_scored_as_they_come_score_as_their_group(make_worker: MakeWorker) -> None:
    """In another order, and more than one at a time; nothing is asked twice."""
    names = ("length", "logs", "raise_for_bad", "count_calls")
    group = make_group("a", "bb", "bad", "dddd", truth=3)
    whole = score(make_worker(*names), group)
    worker = make_worker(*names, whole_group=False)
    singles = [replace(group, completions=(c,)) for c in group.completions]
    scored_parts = []
    for parts in ((singles[2],), (singles[3], singles[0]), (singles[1],)):
        failure, part = worker.score_part(*parts)
        assert failure is None
        scored_parts.append(part)
    meta, scored = worker.score(group, *scored_parts)
    assert isinstance(meta, ScoreMeta)
    assert scored is not None
    assert meta.by_function.pop("count_calls") == (2, 3, 1, 2)
    assert whole.by_function.pop("count_calls") == (1, 1, 1, 1)
    assert scored.by_function == whole.by_function
    assert causes(scored) == causes(whole) == [("raise_for_bad", "c2", "raised")]
    assert scored.parts == whole.parts
    assert scored.extra == whole.extra
    assert scored.extra["logs/size"] == (1, 2, 3, 4)
    assert meta.metrics == {"logs/longest": (3.0, 4.0, 2.0)}
    assert len(scored.sample_s) == 4
    # Without one of them, the group is scored as a whole.
    meta, _ = worker.score(group, *scored_parts[1:])
    assert isinstance(meta, ScoreMeta)
    assert meta.by_function["count_calls"] == (4, 4, 4, 4)


def test_a_function_that_compares_waits_for_its_group() -> None:
    specs = [
        RewardSpec("count_calls", f"{HOSTILE}:count_calls", whole_group=True),
        RewardSpec("length", f"{HOSTILE}:length", whole_group=False),
        RewardSpec("other", f"{HOSTILE}:length", sources=("elsewhere",), whole_group=False),
    ]
    worker = RewardWorker(specs, 20)
    group = make_group("a", "bb")
    scored_parts = [
        worker.score_part(replace(group, completions=(c,)))[1] for c in group.completions
    ]
    meta, _ = worker.score(group, *scored_parts)
    assert isinstance(meta, ScoreMeta)
    assert meta.by_function == {"count_calls": (1, 1), "length": (1, 2), "other": (None, None)}
    worker.close()


def test_a_hang_in_one_of_several_completions_costs_only_its_own(make_worker: MakeWorker) -> None:
    worker = make_worker("hang", timeout_s=0.5, whole_group=False)
    group = make_group("a", "hang", "c")
    first, second, third = (replace(group, completions=(c,)) for c in group.completions)
    scored_parts = [worker.score_part(second, first)[1], worker.score_part(third)[1]]
    _, scored = worker.score(group, *scored_parts)
    assert scored is not None
    assert causes(scored) == [("hang", "c1", "timeout")]
    assert scored.totals == (1.0, None, 1.0)


def test_a_raise_costs_only_its_completion_but_its_parts_stay_in_place(
    make_worker: MakeWorker,
) -> None:
    scored = score(make_worker("raise_for_bad"), make_group("a", "bad", "ccc"))
    assert causes(scored) == [("raise_for_bad", "c1", "raised")]
    assert scored.totals == (1.0, None, 3.0)
    assert scored.parts == {"raise_for_bad/half": (0.5, None, 1.5)}
    assert scored.extra == {"raise_for_bad/shown": ("A", None, "CCC")}


def test_a_group_that_hangs_throughout_ends_in_bound(make_worker: MakeWorker) -> None:
    worker = make_worker("hang", timeout_s=1)
    started = time.monotonic()
    scored = score(worker, make_group("hang", "hang"))
    # 1 s together and 1 s each; three new children.
    assert 3 <= time.monotonic() - started < 7
    assert causes(scored) == [("hang", f"c{i}", "timeout") for i in range(2)]
    assert longest_score_s(1, 1, 2) > 7


def test_many_hanging_completions_end_in_bound_with_every_worker_alive() -> None:
    """Ten groups of one on two workers; tests/system has 100 on four, on Ray."""
    waiting = [make_group("hang") for _ in range(10)]
    spec, found, alive = RewardSpec("hang", f"{HOSTILE}:hang"), [], []

    def work() -> None:
        # A child belongs to the thread that started it.
        worker = RewardWorker([spec], 0.2)
        while True:
            try:
                group = waiting.pop()
            except IndexError:
                break
            found.extend(score(worker, group).errors)
        alive.append(score(worker, make_group("a")).totals)
        worker.close()

    started = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 30
    assert [error.cause for error in found] == ["timeout"] * 10
    assert alive == [(1.0,), (1.0,)]


def test_the_processes_a_hanging_function_started_go_with_it(
    make_worker: MakeWorker, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    worker = make_worker("hang_with_helper", timeout_s=1)
    scored = score(worker, make_group("a", pid_file=str(pid_file)))
    assert causes(scored) == [("hang_with_helper", "c0", "timeout")]
    assert wait_until_gone(int(pid_file.read_text()))


def test_a_stopped_child_does_not_block_a_large_group(make_worker: MakeWorker) -> None:
    worker = make_worker("length", timeout_s=0.5)
    child = worker.pids()[1]
    assert child is not None
    os.kill(child, signal.SIGSTOP)
    started = time.monotonic()
    # Larger than a socket's buffer: the worker cannot even hand it over.
    scored = score(worker, make_group("x" * 20_000_000))
    assert time.monotonic() - started < 4
    assert causes(scored) == [("length", "c0", "timeout")]
    assert score(worker, make_group("x" * 20_000_000)).totals == (20_000_000.0,)


# Deaths


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("exit_hard", "exited with code 3"),
        ("die_with_heir", "exited with code 4"),
        ("segfault", "was killed by SIGSEGV"),
        ("terminate", "was killed by SIGTERM"),
        ("interrupt", "its process"),
        ("close_everything", "its process"),
        ("forge_reply", "its process"),
    ],
)
def test_a_death_is_reported_and_the_child_replaced(
    make_worker: MakeWorker, function: str, words: str
) -> None:
    worker = make_worker(function, timeout_s=20)
    child = worker.pids()[1]
    assert child is not None
    started = time.monotonic()
    scored = score(worker, make_group("die", "a"))
    assert time.monotonic() - started < 5
    assert causes(scored) == [(function, "c0", "died")]
    assert words in scored.errors[0].message
    assert scored.totals == (None, 1.0)
    assert gone(child)
    assert score(worker, make_group("a", "b")).totals == (1.0, 1.0)


def test_a_memory_bomb_is_an_error_that_names_the_key() -> None:
    specs = [RewardSpec(name, f"{HOSTILE}:{name}") for name in ("length", "memory_bomb")]
    worker = RewardWorker(specs, 20, memory_bytes=1 << 29)
    child = worker.pids()[1]
    assert child is not None
    scored = score(worker, make_group("bomb", "a"))
    assert causes(scored) == [("memory_bomb", "c0", "raised")]
    assert "MemoryError" in scored.errors[0].message
    assert "rewards.memory_gb" in scored.errors[0].message
    assert scored.totals == (None, 2.0)
    assert worker.pids()[1] == child
    worker.close()


def test_a_huge_result_costs_the_child_and_not_the_worker(make_worker: MakeWorker) -> None:
    worker = make_worker("log_bomb")
    scored = score(worker, make_group("bomb", "a"))
    assert causes(scored) == [("log_bomb", "c0", "raised")]
    assert "more than 64 names" in scored.errors[0].message
    assert max(len(text) for text in scored.extra["log_bomb/text"] if text) == 2000


def test_a_child_killed_between_groups_costs_nothing(make_worker: MakeWorker) -> None:
    worker = make_worker("length")
    child = worker.pids()[1]
    assert child is not None
    os.kill(child, signal.SIGKILL)
    # A zombie is waitable only once its last thread has ended.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert score(worker, make_group("abc")).totals == (3.0,)


def test_an_alarm_left_behind_does_not_hit_the_next_group(make_worker: MakeWorker) -> None:
    worker = make_worker("leave_an_alarm", "process_id")
    child = worker.pids()[1]
    score(worker, make_group("a"))
    time.sleep(0.3)
    assert score(worker, make_group("a")).by_function["process_id"] == (child,)


def test_huge_output_is_harmless(
    make_worker: MakeWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = make_worker("print_much", timeout_s=10)
    assert score(worker, make_group("a")).totals == (1.0,)
    child = worker.pids()[1]
    for descriptor in (1, 2):
        # Not kept anywhere either: a file of it would fill the disk.
        assert os.readlink(f"/proc/{child}/fd/{descriptor}") == os.devnull
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


# Starting and ending


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def other(): pass\n", "no 'reward' in"),
        ("import no_such_module_anywhere\n", "No module named 'no_such_module_anywhere'"),
        ("reward = 3\n", "of type int, not a function"),
        ("import os\nos.write(2, b'last words')\nos._exit(5)\n", "exited with code 5: last words"),
    ],
)
def test_a_function_that_cannot_be_loaded_says_why(tmp_path: Path, source: str, words: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(RewardLoadError) as raised:
        RewardWorker([RewardSpec("reward", f"{file}:reward")], 5)
    assert str(file) in str(raised.value)
    assert words in str(raised.value)
    assert not children()


def test_a_module_that_hangs_on_import_is_given_up(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text("import time\ntime.sleep(60)\ndef reward(): pass\n")
    with pytest.raises(RewardLoadError, match=r"slow.py:reward was not ready after 1 s"):
        RewardWorker([RewardSpec("reward", f"{file}:reward")], 5, start_timeout_s=1)
    assert not children()


def test_a_child_that_cannot_be_replaced_is_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "fading.py"
    file.write_text(HOSTILE.read_text())
    worker = RewardWorker([RewardSpec("exit_hard", f"{file}:exit_hard")], 5)
    file.unlink()
    meta, scored = worker.score(make_group("die"))
    assert isinstance(meta, Failure)
    assert scored is None
    assert meta.kind == "infra"
    assert "no file" in meta.message
    file.write_text(HOSTILE.read_text())
    assert score(worker, make_group("a")).totals == (1.0,)
    worker.close()


def test_a_group_that_cannot_be_pickled_is_a_failure(make_worker: MakeWorker) -> None:
    meta, scored = make_worker("length").score(make_group("a", check=lambda: None))
    assert isinstance(meta, Failure)
    assert (meta.kind, scored) == ("data", None)


def test_close_ends_the_child(make_worker: MakeWorker) -> None:
    worker = make_worker("length")
    child = worker.pids()[1]
    assert child is not None
    worker.close()
    worker.close()
    assert gone(child)
    assert worker.pids() == (os.getpid(), None)
    assert str(os.getpid()) in worker.ping()


def children() -> list[psutil.Process]:
    """Reward children of this process; other tests may have started children of other kinds."""
    children = psutil.Process().children()
    return [child for child in children if "cohort.rewards.child" in " ".join(child.cmdline())]
