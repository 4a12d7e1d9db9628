"""What a campaign of faults concludes from a run's records, on records made by hand."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import chaos


def recorded(run_dir: Path, steps: range, **more: Any) -> None:
    """Write down steps of two completions each, as a run does."""
    (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
    metrics = run_dir / "metrics.jsonl"
    with metrics.open("w") as file:
        for step in range(steps.stop):
            total = {"samples/admitted": 2 * step + 2, "samples/failed": 0}
            row = {"step": step, "time/step": 1.0} | total | more
            file.write(json.dumps(row) + "\n")
    for step in steps:
        rows = [{"completion_id": f"{step}:{n}", "group_id": f"{step}:p"} for n in range(2)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run_dir / "rollouts" / f"step-{step:06d}.jsonl").write_text(text)


def trial(run_dir: Path) -> Any:
    made: Any = SimpleNamespace(run_dir=run_dir)
    made.steps = lambda: chaos.Trial.steps(made)
    return made


def test_steps_are_seen_once_and_again_after_a_run_was_cut_back(tmp_path: Path) -> None:
    now = [0.0]
    watch = chaos.Watch(trial(tmp_path), lambda: now[0])
    watch.look()
    assert watch.furthest == 0
    for at, steps in enumerate((2, 4, 4, 1, 3, 5)):
        now[0] = float(at)
        recorded(tmp_path, range(steps))
        watch.look()
    assert watch.seen == [
        *((0.0, 0), (0.0, 1), (1.0, 2), (1.0, 3)),
        *((4.0, 1), (4.0, 2), (5.0, 3), (5.0, 4)),
    ]
    assert watch.furthest == 5


def test_a_step_that_is_being_written_is_not_seen(tmp_path: Path) -> None:
    recorded(tmp_path, range(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert trial(tmp_path).steps() == [0, 1]


def test_what_a_record_lacks_and_has_twice_is_counted(tmp_path: Path) -> None:
    recorded(tmp_path, range(4))
    made = trial(tmp_path)
    watch = chaos.Watch(made)
    watch.look()
    whole = chaos.outcome(made, watch, [])
    assert (whole.steps, whole.lost, whole.doubled, whole.failed) == (4, 0, 0, 0)
    file = tmp_path / "rollouts" / "step-000002.jsonl"
    line = file.read_text().splitlines()[0] + "\n"
    file.write_text(line)
    assert chaos.outcome(made, watch, []).lost == 1
    file.write_text(3 * line)
    assert (chaos.outcome(made, watch, []).lost, chaos.outcome(made, watch, []).doubled) == (1, 2)
    (tmp_path / "rollouts" / "step-000003.jsonl").unlink()
    assert chaos.outcome(made, watch, []).lost == 3


def test_steps_with_other_prompts_are_counted(tmp_path: Path) -> None:
    for name in ("one", "other"):
        recorded(tmp_path / name, range(3))
    assert chaos.differing(tmp_path / "one", tmp_path / "other", 3) == 0
    text = json.dumps({"completion_id": "1:0", "group_id": "1:q"}) + "\n"
    (tmp_path / "one" / "rollouts" / "step-000001.jsonl").write_text(text)
    assert chaos.differing(tmp_path / "one", tmp_path / "other", 3) == 1


def test_every_kind_comes_equally_often_and_a_seed_repeats_its_order() -> None:
    kinds = list(chaos.KINDS)
    drawn = list(islice(chaos.order(kinds, 3), 3 * len(kinds)))
    assert set(Counter(drawn).values()) == {3}
    assert drawn == list(islice(chaos.order(kinds, 3), len(drawn)))
    assert drawn != list(islice(chaos.order(kinds, 4), len(drawn)))


def test_time_counts_that_went_into_steps_of_the_final_record() -> None:
    alone = chaos.Outcome(steps=101, wall_s=100, step_s=1, lost=0, doubled=0, failed=0)
    faulty = chaos.Outcome(steps=91, wall_s=120, step_s=1, lost=0, doubled=0, failed=0)
    assert chaos.effective(alone, alone) == 1
    assert chaos.effective(faulty, alone) == 0.75


def test_a_process_with_a_lower_number_than_its_parent_is_found() -> None:
    parents = {7: 30_000, 8: 7, 9: 1, 30_000: 20_000, 20_000: 1}
    assert chaos.with_descendants({20_000}, parents) == {20_000, 30_000, 7, 8}
    assert chaos.with_descendants(set(), parents) == set()


def test_an_engine_is_known_with_and_without_its_name() -> None:
    def titled(title: str) -> Any:
        made: Any = SimpleNamespace(processes=lambda: [("it", title)])
        return made

    unnamed = "python3.11 -c from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=6)"
    tracker = "python3.11 -c from multiprocessing.resource_tracker import main;main(69)"
    for title, found in (("VLLM::EngineCore", "it"), (unnamed, "it"), (tracker, None)):
        assert chaos.Trial.victim(titled(title), chaos.KINDS["engine killed"]) == found
    train = "python -m cohort.cluster.cli train a.yaml"
    for kind, title, found in (
        ("driver killed", train, "it"),
        ("driver killed", f"{train} --supervise", None),
        ("pre-empted", f"{train} --supervise", "it"),
        ("pre-empted", train, None),
    ):
        assert chaos.Trial.victim(titled(title), chaos.KINDS[kind]) == found
