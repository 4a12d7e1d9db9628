"""What a run that is resumed is compared with, what is refused, and that the rest goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

import cohort.cluster.commands.train
import cohort.cluster.launch
from cohort.cluster.config import ConfigError, all_keys
from cohort.cluster.config_file import load_config
from cohort.cluster.continuing import (
    HARMLESS,
    NOT_COMPARED,
    RATE_KEYS,
    Saved,
    compare,
    differences,
    refused,
    table,
)
from cohort.cluster.errors import RunError
from cohort.cluster.fingerprint import (
    BLOCK_BYTES,
    WHOLE_BYTES,
    ConfigTree,
    Fingerprint,
    code_digests,
    file_digest,
    fingerprint,
    model_digests,
    row_digests,
)
from cohort.learner.checkpoint import CheckpointError
from cohort.learner.optimizer import lr_at
from cohort.rewards.specs import reward_specs
from cohort.rewards.tasks import Row, load_task
from tests.harness.world import World

MakeWorld = Callable[..., World]


def stopped(make: MakeWorld, **overrides: Any) -> World:
    """A run of six steps that was stopped after two."""
    run = make(run__steps=6, **overrides)
    run.on("step", lambda _: run.stop(), nth=2)
    run.train()
    run.forget_hooks()
    assert run.state()["step"] == 2
    return run


def saved_of(run: World) -> Saved:
    return Saved(run.checkpoint(), run.state())


def resume(run: World, **overrides: Any) -> int:
    return run.train(run__resume=True, **overrides)


def rows_file(folder: Path, texts: list[str]) -> Path:
    file = folder / "rows.jsonl"
    rows = [{"prompt": f"What is {text}?", "answer": 1} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def changed_model(run: World, folder: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    shutil.copytree(run.model, folder)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    return folder


# One of each kind that would train other rows, or otherwise, without a word.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"run__seed": 1}, "run.seed"),
    ({"task__group_size": 6}, "task.group_size"),
    ({"task__prompts_per_step": 5}, "task.prompts_per_step"),
    ({"task__options": "{max_operand: 12}"}, "task.options"),
    ({"task__overlong": "drop"}, "task.overlong"),
    ({"actors__temperature": 0.7}, "actors.temperature"),
    ({"actors__max_tokens": 5}, "actors.max_tokens"),
    ({"rewards__functions": "[cohort.rewards.answer:exact_number]"}, "rewards.functions"),
    ({"learner__learning_rate": 2e-4}, "learner.learning_rate"),
    ({"learner__warmup_steps": 9}, "learner.warmup_steps"),
    ({"learner__lr_schedule": "linear"}, "learner.lr_schedule"),
    ({"learner__adam_betas": "[0.8, 0.9]"}, "learner.adam_betas"),
    ({"learner__weight_decay": 0.1}, "learner.weight_decay"),
    ({"algorithm__scale": "none"}, "algorithm.scale"),
    ({"algorithm__preset": "gspo"}, "algorithm.ratio"),
    ({"model__max_length": 512}, "model.max_length"),
]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        pytest.param(*case, marks=[] if n % 3 == 0 else pytest.mark.slow)
        for n, case in enumerate(REFUSED)
    ],
    ids=[key for _, key in REFUSED],
)
def test_what_changes_rows_schedule_or_objective_is_refused_before_anything_starts(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], key: str
) -> None:
    run = stopped(world)
    before = (run.folder / "config.yaml").read_text()
    monkeypatch.setattr(cohort.cluster.launch, "connect", lambda *_: pytest.fail("Ray was started"))
    with pytest.raises(RunError, match="differs from the one that was saved") as caught:
        resume(run, **change)
    text = str(caught.value)
    assert "key" in text and "saved" in text and "now" in text
    assert any(line.split()[0] == key for line in text.splitlines()[1:])
    assert f"run.allow_changed=[{key}" in text or f",{key}" in text
    assert (run.folder / "config.yaml").read_text() == before
    assert not list(run.folder.glob("replaced-*"))
    # With the keys that the message names the run goes on to its end; the older config is kept.
    monkeypatch.undo()
    named = text.rpartition("'run.allow_changed=")[2].rstrip("'")
    assert resume(run, **change, run__allow_changed=named) == 0
    assert [row["step"] for row in run.rows()] == list(range(6))
    assert list(run.folder.glob("replaced-*/config.yaml"))
    # The change belongs to the run from here on.
    assert compare(run.config(**change), saved_of(run), run.state()["fingerprint"]) == ""


def test_a_changed_group_size_adds_up_even_when_a_group_is_lost(world: MakeWorld) -> None:
    run = stopped(world)
    run.on("call", lambda event: setattr(event, "reply", None) or run.ray.kill(event.actor),
           actor="rollout-0", what="submit", nth=1)  # fmt: skip
    changed = {"task__group_size": 6, "run__allow_changed": "[task.group_size]"}
    assert resume(run, **changed) == 0
    counters = run.state()["counters"]
    assert counters["group_size"] == 6
    assert counters["admitted"] == sum(counters[k] for k in ("trained", "filtered", "failed"))
    assert counters["admitted"] == 2 * 16 + 4 * 24


def test_run_steps_may_change_where_nothing_ends_with_the_run(world: MakeWorld) -> None:
    run = stopped(world)
    assert resume(run, run__steps=4) == 0
    assert resume(run, run__steps=8) == 0
    assert [row["step"] for row in run.rows()] == list(range(8))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_run_steps_under_a_schedule_say_how_far_the_learning_rate_would_jump(
    world: MakeWorld, schedule: str
) -> None:
    run = stopped(world, learner__lr_schedule=schedule)
    learner = run.config().learner
    rates = rf"{lr_at(3, learner, 6):.3g} to {lr_at(3, learner, 60):.3g}"
    with pytest.raises(RunError, match=rf"run\.steps +6 +60 +the learning rate.* from {rates}"):
        resume(run, run__steps=60)
    assert resume(run, run__steps=8, run__allow_changed="[run.steps]") == 0
    assert [row["step"] for row in run.rows()] == list(range(8))


def test_steps_may_not_change_before_the_schedule_begins_to_fall(world: MakeWorld) -> None:
    """The learning rate is the same at first, in a warm-up, and another one later."""
    run = stopped(world, learner__lr_schedule="cosine", learner__warmup_steps=5)
    with pytest.raises(RunError, match=r"run\.steps +6 +60 +the learning rate's schedule ends"):
        resume(run, run__steps=60)


HARMLESS_CHANGES = {
    "actors__count": 1,
    "actors__max_staleness": 1,
    "actors__group_timeout_s": 99,
    "rewards__workers": 1,
    "rewards__max_error_rate": 0.5,
    "run__checkpoint_every": 1,
    "run__keep_checkpoints": 5,
    "learner__micro_batch_tokens": 4096,
    "tracking__samples_per_step": 2,
    "cluster__start_timeout_s": 200,
}


def test_harmless_changes_are_shown_and_not_refused(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(world)
    capsys.readouterr()
    assert resume(run, **HARMLESS_CHANGES) == 0
    printed = capsys.readouterr().out
    assert "changed since the checkpoint" in printed
    for key in HARMLESS_CHANGES:
        assert key.replace("__", ".") in printed


def test_an_unchanged_run_says_nothing(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(world)
    capsys.readouterr()
    assert resume(run) == 0
    assert "changed since" not in capsys.readouterr().out


def test_every_key_is_refused_unless_it_is_known_to_be_harmless() -> None:
    harmless = {f"{section}.{name}" for section, names in HARMLESS.items() for name in names}
    assert harmless <= set(all_keys())
    saved = load_config(None, ["model.path=m"]).model_dump(mode="json")
    # Any other value: what is refused does not depend on it, but for the learning rate's keys.
    for key in set(all_keys()) - set(NOT_COMPARED) - set(RATE_KEYS):
        section, _, name = key.partition(".")
        now = {**saved, section: {**saved[section], name: "another"}}
        known = {"rows": {"a": "b"}, "model": {}, "code": {}}
        (found,) = differences({"config": saved, **known}, {"config": now, **known}, 1)
        # The rows are the same here.
        assert bool(found.breaks) != (key in harmless | {"task.data", "task.eval_data"}), key


# Data -------------------------------------------------------------------------------------------

DATASET = {"task__name": "dataset", "task__options": "{chat: true}"}
TEXTS = [f"{n} + {n}" for n in range(40)]


@pytest.mark.parametrize(
    "texts",
    [TEXTS[:-1], [*TEXTS, "one + more"], TEXTS[::-1], [*TEXTS[:-1], "another"]],
    ids=["a row less", "a row more", "another order", "another row"],
)
def test_changed_rows_are_refused_whatever_the_file_is_called(
    world: MakeWorld, tmp_path: Path, texts: list[str]
) -> None:
    file = rows_file(tmp_path, TEXTS)
    run = stopped(world, **DATASET, task__data=file)
    rows_file(tmp_path, texts)
    with pytest.raises(RunError, match=r"(?s)task\.data \(.* rows\).*_changed=\[task\.data\]"):
        resume(run)
    assert resume(run, run__allow_changed="[task.data]") == 0


def test_the_same_rows_from_another_place_are_the_same(world: MakeWorld, tmp_path: Path) -> None:
    file = rows_file(tmp_path, TEXTS)
    run = stopped(world, **DATASET, task__data=file)
    moved = shutil.move(file, tmp_path / "moved.jsonl")
    assert resume(run, task__data=moved) == 0


def test_rows_of_other_tasks_are_known_by_a_sample() -> None:
    class Numbers:
        rewards = ()

        def __init__(self, size: int, twist: int = -1) -> None:
            self.size, self.twist = size, twist

        def train_size(self) -> int:
            return self.size

        def train_row(self, index: int) -> Row:
            return Row(str(index), f"{index} {index >= self.twist >= 0}", {"x": object()})

        eval_size, eval_row = train_size, train_row

    whole = row_digests(Numbers(1000))
    assert whole == row_digests(Numbers(1000))
    assert whole != row_digests(Numbers(1001))
    assert whole != row_digests(Numbers(1000, twist=999))
    assert row_digests(Numbers(1)) != row_digests(Numbers(1, twist=0))


def test_a_mixture_knows_all_rows_of_its_parts(tmp_path: Path) -> None:
    file = rows_file(tmp_path, [f"{n}" for n in range(5000)])
    part = {"name": "dataset", "data": str(file), "options": {"chat": True}}

    def digests() -> dict[str, str]:
        return row_digests(load_task(_task({"tasks": [part, {"name": "addition"}]}), 0))

    before = digests()
    lines = file.read_text().splitlines()
    lines[1234] = lines[1234].replace("1234", "what")
    file.write_text("\n".join(lines))
    after = digests()
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["dataset/data", "dataset/eval_data"]


def _task(options: dict[str, Any]) -> Any:
    from cohort.rewards.config import TaskConfig

    return TaskConfig(name="mixture", options=options)


# Model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer_config.json", lambda data: data.replace(b"assistant", b"robot")),
        ("chat_template.jinja", lambda data: data.replace(b"assistant", b"robot")),
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    ],
)
def test_another_model_is_refused_and_the_same_one_elsewhere_is_not(
    world: MakeWorld, tmp_path: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    run = stopped(world)
    if not (run.model / name).is_file():
        pytest.skip(f"this transformers writes no {name}")
    other = changed_model(run, tmp_path / "other", name, change)
    if (other / name).read_bytes() == (run.model / name).read_bytes():
        pytest.skip(f"the template is not in {name}")
    with pytest.raises(RunError, match=rf"model\.path \({name}\)"):
        resume(run, model__path=other)
    same = shutil.copytree(run.model, tmp_path / "same")
    assert resume(run, model__path=same) == 0


@pytest.mark.parametrize(
    "name", ["additional_chat_templates/tool_use.jinja", "tokenizer.model.v3", "qwen.tiktoken"]
)
def test_every_file_that_decides_tokens_is_known(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("first")
    known = model_digests(str(tmp_path))
    file.write_text("other")
    assert list(known) == [name] and model_digests(str(tmp_path)) != known


def test_a_hub_id_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are fetched one by one, most of them after a run has been fingerprinted."""
    repository = tmp_path / "models--org--name"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert model_digests("org/name") == {}

    def fetch(commit: str, *names: str) -> dict[str, str]:
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        for name in names:
            (repository / "snapshots" / commit / name).write_text("{}")
        return model_digests("org/name")

    def table_of(
        before: dict[str, str], after: dict[str, str], path: str = "org/name"
    ) -> list[str]:
        saved, now = (
            Fingerprint(version=1, config=keys, rows={}, model=model, code={})
            for keys, model in ((given("org/name"), before), (given(path), after))
        )
        return [item.name for item in refused(differences(saved, now, 2), ())]

    def given(path: str) -> ConfigTree:
        return load_config(None, [f"model.path={path}"]).model_dump(mode="json")

    first = fetch("aaa", "config.json", "tokenizer.json")
    whole = fetch("aaa", "model.safetensors", "generation_config.json")
    assert first == whole == {"commit": "aaa"}
    assert table_of(first, whole) == []
    assert table_of(first, fetch("bbb", "config.json")) == ["model.path (commit)"]
    # Checkpoints of before hold the files that were there; without any, only the name is known.
    assert table_of({"config.json": "3 bytes"}, first) == []
    assert table_of(first, {}, "org/other") == ["model.path"]
    assert table_of(first, {"config.json": "3 bytes"}, "a/folder") == ["model.path"]


def test_large_files_are_known_by_blocks_and_both_ends(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    size = WHOLE_BYTES + 12345
    file.write_bytes(bytes(size))
    known = file_digest(file)
    for place in (0, size - 1, BLOCK_BYTES - 1):
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"x")
        assert file_digest(file) != known
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"\0")
    assert file_digest(file) == known
    file.write_bytes(bytes(size + 1))
    assert file_digest(file) != known


# Code, shape, older checkpoints -------------------------------------------------------------------

REWARD = "def {name}(completions, **kwargs):\n    return [float(len(c) % 3) for c in completions]\n"


def test_changed_reward_code_is_said(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(REWARD.format(name="score"))
    config = load_config(None, [f"model.path={tmp_path}", f"rewards.functions=[{file}:score]"])
    task = load_task(config.task, 0)
    specs = reward_specs(task, config.rewards)
    before = fingerprint(config, str(tmp_path), task, specs)
    file.write_text(REWARD.format(name="score") + "# another\n")
    found = differences(before, fingerprint(config, str(tmp_path), task, specs), 1)
    assert [item.key for item in found] == ["rewards.functions"] and str(file) in found[0].what
    assert refused(found, []) == []
    assert "mine.py" in table(found)


def test_a_users_module_is_known_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rewards:score` is the user's own; what is in cohort changes with the version."""
    (tmp_path / "rewards.py").write_text(REWARD.format(name="score"))
    monkeypatch.syspath_prepend(tmp_path)
    paths = ["rewards:score", "cohort.rewards.answer:exact_number"]
    config = load_config(None, ["model.path=x", f"rewards.functions={paths}"])
    specs = reward_specs(load_task(config.task, 0), config.rewards)
    assert list(code_digests(config, specs)) == ["rewards.functions: rewards:score"]


def test_a_learner_of_another_shape_is_refused_before_anything_starts(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(world)
    monkeypatch.setattr(cohort.cluster.launch, "connect", lambda *_: pytest.fail("Ray was started"))
    # Without ZeRO the state cannot be divided anew.
    with pytest.raises(CheckpointError, match=r"learner\.zero_stage=1.*learner\.zero_stage=0"):
        resume(run, learner__zero_stage=0)
    with pytest.raises(CheckpointError, match=r"model\.dtype=float32.*model\.dtype=bfloat16"):
        resume(run, model__dtype="bfloat16")


@pytest.mark.parametrize(("workers", "stage"), [(2, 1), (1, 3), (4, 2)])
def test_a_run_goes_on_with_another_number_of_ranks_or_zero_stage_and_says_so(
    world: MakeWorld, capsys: pytest.CaptureFixture[str], workers: int, stage: int
) -> None:
    run = stopped(world)
    assert resume(run, learner__workers=workers, learner__zero_stage=stage) == 0
    said = "saved by 1 rank(s) under ZeRO-1, and is divided anew among "
    assert f"{said}{workers} under ZeRO-{stage}" in capsys.readouterr().out
    assert run.state()["step"] == 6


def test_checkpoints_without_a_fingerprint_are_gone_on_from_with_a_note(
    world: MakeWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(world)
    checkpoint = run.checkpoint()
    state = json.loads((checkpoint / "state.json").read_text())
    del state["fingerprint"]
    text = json.dumps(state, indent=1)
    (checkpoint / "state.json").write_text(text)
    sizes = json.loads((checkpoint / "manifest.json").read_text())
    if "state.json" in sizes:
        sizes["state.json"] = len(text)
        (checkpoint / "manifest.json").write_text(json.dumps(sizes))
    assert resume(run, run__seed=7) == 0
    assert "holds no fingerprint" in capsys.readouterr().out
    assert run.state()["fingerprint"]["config"]["run"]["seed"] == 7


def test_a_key_that_a_newer_version_has_is_compared_with_its_default(world: MakeWorld) -> None:
    run = stopped(world)
    saved = run.state()["fingerprint"]
    now = json.loads(json.dumps(saved))
    for name in ("entropy_coef", "updates_per_step"):
        del saved["config"]["algorithm"][name]
    del saved["config"]["learner"]["adam_betas"]
    saved["config"]["algorithm"]["updates_per_step"] = 1
    assert differences(saved, now, 2) == []
    now["config"]["algorithm"]["entropy_coef"] = 0.01
    assert [item.key for item in differences(saved, now, 2)] == ["algorithm.entropy_coef"]


def test_allow_changed_takes_names_of_keys_only() -> None:
    with pytest.raises(ConfigError, match=r"no key run\.stepz; did you mean run\.steps"):
        load_config(None, ["model.path=m", "run.allow_changed=[run.stepz]"])
