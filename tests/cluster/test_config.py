"""The config: strict, explained, and the same through YAML and overrides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from cohort.cluster.config import Config, ConfigError, all_keys, compact, dump_config, expand
from cohort.cluster.config_file import load_config, parse_overrides
from cohort.learner.presets import PRESETS, Preset

MODEL = "model.path=some/model"


def from_yaml(tmp_path: Path, text: str, *overrides: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_config(file, [MODEL, *overrides])


def error_of(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_yaml(tmp_path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("learner.learning_rat", "learner.learning_rate"),
        ("actors.max_token", "actors.max_tokens"),
        ("task.groupsize", "task.group_size"),
        ("algorithm.clip_hi", "algorithm.clip_high"),
        # right name, wrong section
        ("actors.learning_rate", "learner.learning_rate"),
        ("group_size", "task.group_size"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, given: str, meant: str) -> None:
    section, _, leaf = given.rpartition(".")
    text = f"{section}:\n  {leaf}: 1\n" if section else f"{leaf}: 1\n"
    expected = f"{given}: unknown key; did you mean {meant}?"
    assert error_of(tmp_path, text) == expected
    assert error_of(tmp_path, "", f"{given}=1") == expected


def test_unknown_section_names_the_nearest(tmp_path: Path) -> None:
    assert (
        error_of(tmp_path, "lerner: {workers: 1}") == "lerner: unknown key; did you mean learner?"
    )
    assert (
        error_of(tmp_path, "", "lerner.workers=1") == "lerner: unknown key; did you mean learner?"
    )


def test_hopeless_key_lists_what_there_is(tmp_path: Path) -> None:
    message = error_of(tmp_path, "", "algorithm.beta=0.1")
    assert message.startswith("algorithm.beta: unknown key; algorithm has preset, baseline")


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    lines = error_of(tmp_path, "run: {steps: 0}\nactors: {cuont: 1}").splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("run.steps: Input should be greater than or equal to 1 (got 0)")
    assert lines[1] == "actors.cuont: unknown key; did you mean actors.count?"


def test_mistake_in_a_reward_function_is_one_line(tmp_path: Path) -> None:
    message = error_of(tmp_path, "rewards:\n  functions:\n    - {path: 'a:b', wieght: 2}\n")
    assert message == "rewards.functions.0.wieght: unknown key"


@pytest.mark.parametrize("text", ["run: 3", "run: [1]"])
def test_section_given_as_value(tmp_path: Path, text: str) -> None:
    assert error_of(tmp_path, text).startswith("run: a section of keys, not a value")


def test_key_given_twice_is_an_error(tmp_path: Path) -> None:
    assert "'seed' is given twice" in error_of(tmp_path, "run:\n  seed: 1\n  seed: 2\n")
    assert "'run' is given twice" in error_of(tmp_path, "run: {seed: 1}\nrun: {steps: 2}\n")


def test_empty_sections_are_defaults(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "run:\nactors:\nalgorithm:\n")
    assert config == load_config(None, [MODEL])


@pytest.mark.parametrize("text", ["", "model:\n", "model: {}\n"])
def test_missing_model(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"^model\.path: required, and not given$"):
        load_config(file)


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", "just text\n", "? [a]\n: 3\n"])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    assert "config.yaml" in error_of(tmp_path, text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file at .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


def test_preset_sets_keys(tmp_path: Path) -> None:
    algorithm = from_yaml(tmp_path, "algorithm: {preset: dr_grpo}").algorithm
    assert (algorithm.scale, algorithm.aggregation) == ("none", "constant")
    assert algorithm.clip_high == 0.2
    assert load_config(None, [MODEL, "algorithm.preset=dr_grpo"]).algorithm == algorithm


def test_explicit_keys_win_over_the_preset(tmp_path: Path) -> None:
    in_file = "algorithm: {clip_high: 0.5, preset: dr_grpo}"
    algorithm = from_yaml(tmp_path, in_file, "algorithm.scale=group").algorithm
    assert algorithm.clip_high == 0.5
    assert algorithm.scale == "group"
    assert algorithm.aggregation == "constant"


@pytest.mark.parametrize("preset", get_args(Preset))
def test_every_preset_is_a_config(preset: str) -> None:
    config = load_config(None, [MODEL, f"algorithm.preset={preset}"])
    for key, value in PRESETS[preset].items():
        assert getattr(config.algorithm, key) == value
    assert set(PRESETS) == set(get_args(Preset))


def test_r1_sets_its_published_group_and_learning_rate(tmp_path: Path) -> None:
    config = load_config(None, [MODEL, "algorithm.preset=r1"])
    assert (config.task.group_size, config.learner.learning_rate) == (16, 3e-6)
    algorithm = config.algorithm
    assert (algorithm.kl_coef, algorithm.reference_refresh_steps) == (0.001, 400)
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip) == (10, 10, 10)
    given = from_yaml(tmp_path, "algorithm: {preset: r1}\ntask: {group_size: 4}\nlearner:")
    assert (given.task.group_size, given.learner.learning_rate) == (4, 3e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.anchor=engine"], "twice.*algorithm.correction=off"),
        (["algorithm.kl_estimator=k1"], "k1 in the loss"),
        (["algorithm.kl_in=reward"], "algorithm.kl_estimator=k3 in the reward"),
        (["algorithm.reference_refresh_steps=5"], "kl_coef=0"),
        (["algorithm.preset=cispo", "algorithm.ratio=sequence"], "defined on tokens"),
        (["algorithm.preset=gspo", "algorithm.credit=turn"], "algorithm.credit=episode"),
        (
            ["algorithm.dynamic_sampling_rounds=2", "algorithm.drop_zero_variance=false"],
            "drop_zero_variance=true",
        ),
        (["algorithm.sequence_mask=[1.01, 0.99]"], "algorithm.sequence_mask"),
        (["algorithm.updates_per_step=9", "algorithm.update_on=share"], "updates_per_step=9"),
        (["algorithm.dual_clip=0.5"], "algorithm.dual_clip"),
        (["learner.offload=all"], "learner.offload=all needs learner.zero_stage=3"),
        (["model.dtype=float16", "learner.zero_stage=0"], "needs learner.zero_stage=1 or more"),
        (
            ["model.dtype=float16", "learner.float8=rowwise"],
            "needs model.dtype=bfloat16 or float32",
        ),
        (["learner.deepspeed={fp16: {enabled: true}}"], "learner.deepspeed.fp16: decided by"),
        (["learner.deepspeed={zero_optimization: {stage: 3}}"], "use learner.zero_stage"),
        (["actors.top_p=0.9"], "actors.top_p: unknown key; refused in training"),
        (["actors.repetition_penalty=1.1"], "refused in training"),
    ],
)
def test_algorithms_that_cannot_be_right_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [MODEL, *overrides])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run.steps=3"], {"run.steps": 3}),
        (["--run.steps=3"], {"run.steps": 3}),
        (["--run.steps", "3"], {"run.steps": 3}),
        (["--learner.micro-batch-tokens", "64"], {"learner.micro_batch_tokens": 64}),
        (["--resume"], {"run.resume": True}),
        (["--resume", "run.steps=3"], {"run.resume": True, "run.steps": 3}),
        (["--resume", "--run.steps", "3"], {"run.resume": True, "run.steps": 3}),
        (["--run.resume", "false"], {"run.resume": False}),
        (["run.dir=/a=b"], {"run.dir": "/a=b"}),
        (["run.steps=3", "run.steps=4"], {"run.steps": 4}),
        (["model.max_length=null"], {"model.max_length": None}),
        (["learner.adam_betas=[0.9, 0.95]"], {"learner.adam_betas": [0.9, 0.95]}),
        (["learner.learning_rate=1e-6"], {"learner.learning_rate": 1e-6}),
        (["algorithm.clip_low=-.5E+1"], {"algorithm.clip_low": -5.0}),
        (['tracking.name="1e3"'], {"tracking.name": "1e3"}),
        (["tracking.name=1e3-run"], {"tracking.name": "1e3-run"}),
        (["tracking.name=nan"], {"tracking.name": "nan"}),
    ],
)
def test_overrides(arguments: list[str], expected: dict[str, Any]) -> None:
    found = parse_overrides(arguments)
    assert found == expected
    assert [type(value) for value in found.values()] == [type(v) for v in expected.values()]


def test_override_without_a_value() -> None:
    with pytest.raises(ConfigError, match=r"'run\.steps' is not key=value"):
        parse_overrides(["run.steps"])


def test_override_that_is_not_yaml() -> None:
    with pytest.raises(ConfigError, match=r"run\.dir: cannot read the value"):
        parse_overrides(["run.dir={"])


def test_override_below_a_value(tmp_path: Path) -> None:
    message = error_of(tmp_path, "run: {dir: a}", "run.dir.x=1")
    assert message == "run.dir.x: 'dir' is a value, not a section"


@pytest.mark.parametrize("written", ["1e-6", "1.0e-6", "0.000001", "1E-06"])
def test_learning_rates_are_numbers(tmp_path: Path, written: str) -> None:
    in_file = from_yaml(tmp_path, f"learner: {{learning_rate: {written}}}")
    assert in_file.learner.learning_rate == 1e-6
    assert in_file == load_config(None, [MODEL, f"learner.learning_rate={written}"])


def test_quoted_numbers_stay_text(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "tracking: {name: '1e3', project: \"12\"}")
    assert (config.tracking.name, config.tracking.project) == ("1e3", "12")


def test_numbers_in_task_options(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "task: {options: {low: 1e-3, word: e5}}")
    assert config.task.options == {"low": 1e-3, "word": "e5"}


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["learner.workers=16"], ["task.prompts_per_step=8", "learner.workers=16"]),
        (["learner.workers=3"], ["task.prompts_per_step=8 must be a multiple"]),
        (["actors.max_concurrent=4"], ["task.group_size=8", "actors.max_concurrent=4"]),
        (["model.max_length=256"], ["actors.max_tokens=256", "model.max_length=256"]),
        (["task.name=dataset"], ["task.data"]),
        (["task.data=rows.jsonl"], ["task.data", "task.name=dataset", "addition"]),
        (["actors.temperature=.inf"], ["actors.temperature: must be finite"]),
        (["learner.learning_rate=.nan"], ["learner.learning_rate"]),
        (["learner.adam_betas=[.nan,0.9]"], ["learner.adam_betas"]),
        (["learner.adam_betas=[0.9,1]"], ["learner.adam_betas", "less than 1"]),
        (["learner.adam_betas=[-1,0.9]"], ["learner.adam_betas"]),
        (["model.lora={rank: 8, alpha: .inf}"], ["model.lora: must be finite"]),
        (["task.options={levels: [1, .nan]}"], ["task.options: must be finite"]),
        (["run.seed=18446744073709551616"], ["run.seed", "less than or equal"]),
    ],
)
def test_contradictions(overrides: list[str], named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [MODEL, *overrides])
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algorithm.preset=rloo", "algorithm.clip_high=0.3"],
        ["rewards.functions=[a:b, {path: 'c.py:d', weight: 0.5}]"],
        ["learner.learning_rate=1e-6", "learner.adam_eps=1e-10", "run.resume=true"],
        ['tracking.name="1e3"', "task.options={low: 1, high: 9}"],
    ],
)
def test_dump_round_trips(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(None, [MODEL, *overrides])
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    for section in Config.model_fields:
        assert f"{section}:" in dump_config(config)


def test_compact_has_the_keys_that_differ_from_their_defaults() -> None:
    assert compact(load_config(None, [MODEL])) == "model      path=some/model"
    given = [MODEL, "run.steps=7", "run.seed=0", "actors.temperature=0.5", "actors.max_tokens=9"]
    assert compact(load_config(None, given)).splitlines() == [
        "run        steps=7",
        "model      path=some/model",
        "actors     max_tokens=9 temperature=0.5",
    ]


def test_the_config_stays_small() -> None:
    keys = all_keys()
    assert len(keys) == len(set(keys))
    assert 50 <= len(keys) <= 118


def test_every_key_has_a_description() -> None:
    def undescribed(model: type[BaseModel], prefix: str) -> list[str]:
        found = []
        for name, info in model.model_fields.items():
            annotation = info.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                found += undescribed(annotation, f"{prefix}{name}.")
            elif not info.description:
                found.append(prefix + name)
        return found

    assert undescribed(Config, "") == []


@pytest.mark.parametrize("key", all_keys())
def test_every_key_rejects_a_typo(tmp_path: Path, key: str) -> None:
    """Each key's own name with a letter doubled is an error that names the key."""
    message = error_of(tmp_path, "", f"{key}{key[-1]}=1")
    assert f"did you mean {key}?" in message


def test_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("STORE", "/store")
    assert expand("~/runs") == Path("/home/someone/runs")
    assert expand("$STORE/runs") == Path("/store/runs")


def test_config_is_light_to_import() -> None:
    code = (
        "import sys, cohort.cluster.config_file; "
        "print([m for m in ('torch', 'vllm', 'deepspeed', 'ray', 'transformers', 'wandb') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
