"""Config values: by the key's type, YAML 1.2, the same on the command line and in a file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
import yaml
from typer.testing import CliRunner

from cohort.cluster.cli import app
from cohort.cluster.config import SECTIONS, Config, ConfigError, all_keys, dump_config
from cohort.cluster.config_file import load_config, parse_config, parse_overrides
from cohort.cluster.values import ValueProblem, core, read_yaml, typed, write_yaml, written

MODEL = "model.path=some/model"
DEFAULTS = load_config(None, [MODEL])


def from_yaml(tmp_path: Path, text: str | bytes, *overrides: str) -> Config:
    file = tmp_path / "config.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return parse_config(file, list(overrides) or [MODEL])


def value_of(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def in_file(tmp_path: Path, key: str, text: str) -> Config:
    section, name = key.split(".")
    given = f"{section}:\n  {name}: {text}\n"
    return from_yaml(tmp_path, given, *(["run={}"] if key == "model.path" else []))


def choices() -> list[tuple[str, Any]]:
    """Every key with every value of its Literal."""
    found = []
    for key in all_keys():
        section, name = key.split(".")
        kind = SECTIONS[section].model_fields[name].annotation
        parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        for part in parts:
            if get_origin(part) is Literal:
                found += [(key, choice) for choice in get_args(part)]
    return found


def bounds() -> list[tuple[str, float, bool]]:
    """Every bound of every key, and whether it may be reached."""
    found = []
    for key in all_keys():
        section, name = key.split(".")
        for rule in SECTIONS[section].model_fields[name].metadata:
            if isinstance(rule, annotated_types.Ge):
                found.append((key, rule.ge, True))
            elif isinstance(rule, annotated_types.Le):
                found.append((key, rule.le, True))
            elif isinstance(rule, annotated_types.Gt):
                found.append((key, rule.gt, False))
            elif isinstance(rule, annotated_types.Lt):
                found.append((key, rule.lt, False))
    return found


@pytest.mark.parametrize("key", [key for key in all_keys() if key != "model.path"])
def test_every_default_can_be_typed_back(tmp_path: Path, key: str) -> None:
    lines = CliRunner().invoke(app, ["keys"]).output.splitlines()
    [shown] = [line for line in lines if line.startswith(f"{key}=")]
    default = value_of(DEFAULTS, key)
    for text in {shown.partition("=")[2], str(default), written(default)}:
        assert load_config(None, [MODEL, f"{key}={text}"]) == DEFAULTS
        assert load_config(None, [MODEL, f"--{key}", text]) == DEFAULTS
        assert in_file(tmp_path, key, text) == DEFAULTS


@pytest.mark.parametrize(("key", "choice"), choices())
def test_every_choice_can_be_typed(tmp_path: Path, key: str, choice: Any) -> None:
    config = parse_config(None, [MODEL, f"{key}={choice}"])
    assert value_of(config, key) == choice
    assert type(value_of(config, key)) is type(choice)
    assert in_file(tmp_path, key, str(choice)) == config
    assert from_yaml(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize(("key", "bound", "reached"), bounds())
def test_every_bound_can_be_typed(tmp_path: Path, key: str, bound: float, reached: bool) -> None:
    if reached:
        assert value_of(parse_config(None, [MODEL, f"{key}={bound}"]), key) == bound
        assert value_of(in_file(tmp_path, key, str(bound)), key) == bound
    else:
        with pytest.raises(ConfigError, match=rf"^{key}: .*\(got {bound}"):
            parse_config(None, [MODEL, f"{key}={bound}"])


@pytest.mark.parametrize(
    "text",
    [
        "/x/run #3", "####", "#3", "a: b", "my: run", "- x", "* x", "&a", "!x", "%d", "@home",
        "`x`",
        "2026-11-26", "12:30:45", "no", "on", "Yes", "010", "1_000", "0x1f", "1e3", "-5", "1.0",
        "true", "inf", ".nan", "café", "日本", "a = b", "x, y", "?", "|", ">", "a\tb", "{x}",
        "[ab]*.json",
        "it's", 'say "hi"', '"a" and "b"', "50 %", "a\\nb", "None!",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["run.dir", "tracking.name", "task.data", "tracking.project"])
def test_texts_of_the_command_line_stay_what_they_are(key: str, text: str) -> None:
    assert parse_overrides([f"{key}={text}"]) == {key: text}
    assert parse_overrides([f"--{key}", text]) == {key: text}
    [found] = parse_overrides([f"{key}={json.dumps(text)}"]).values()
    assert (found, type(found)) == (text, str)


@pytest.mark.parametrize(
    "text",
    ["2026-11-26", "12:30:45", "no", "on", "Yes", "010", "1_000", "0x1f", "1e3", "1.0", "true",
     ".nan", "café", "x=y", "a:b"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["run.dir", "tracking.name", "task.data", "model.path"])
def test_texts_of_a_file_stay_what_they_are(tmp_path: Path, key: str, text: str) -> None:
    assert value_of(in_file(tmp_path, key, text), key) == text


@pytest.mark.parametrize("text", ["None", "null", "~", "", "Null"])
@pytest.mark.parametrize("key", ["model.max_length", "tracking.name", "algorithm.sequence_mask"])
def test_optional_keys_can_be_emptied(tmp_path: Path, key: str, text: str) -> None:
    assert parse_overrides([f"{key}={text}"]) == {key: None}
    assert value_of(in_file(tmp_path, key, text), key) is None
    if key == "tracking.name":
        assert value_of(in_file(tmp_path, key, f"'{text}'"), key) == text
        assert parse_overrides([f"{key}='{text}'"]) == {key: text}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("run.steps", "010", 10),
        ("run.steps", "1_000", 1000),
        ("run.steps", "1e3", 1000),
        ("run.steps", "8.0", 8),
        ("run.steps", "+7", 7),
        ("run.steps", "0x10", 16),
        ("run.steps", "0o17", 15),
        ("learner.zero_stage", "02", 2),
        ("learner.learning_rate", "010", 10.0),
        ("learner.learning_rate", "1", 1.0),
        ("learner.learning_rate", "1_0e-1_0", 1e-9),
        ("learner.learning_rate", "5.e-6", 5e-6),
        ("learner.gradient_clip", "1_000.5", 1000.5),
        ("model.max_length", "4_096", 4096),
        ("run.resume", "true", True),
        ("run.resume", "False", False),
        ("run.resume", "no", False),
        ("run.resume", "on", True),
        ("learner.float8", "off", "off"),
        ("algorithm.scale", "none", "none"),
        ("learner.adam_betas", "(0.9, 0.99)", (0.9, 0.99)),
        ("learner.adam_betas", "[0.5, 1e-1]", (0.5, 0.1)),
        ("learner.adam_betas", "(0.9, 0.99,)", (0.9, 0.99)),
    ],
)
def test_values_by_type(tmp_path: Path, key: str, text: str, value: Any) -> None:
    for config in (parse_config(None, [MODEL, f"{key}={text}"]), in_file(tmp_path, key, text)):
        assert value_of(config, key) == value
        assert type(value_of(config, key)) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("learner.learning_rate", "on"),
        ("learner.learning_rate", "true"),
        ("learner.learning_rate", "2026-11-26"),
        ("learner.learning_rate", "1:30"),
        ("run.steps", "yes"),
        ("run.steps", "1.5"),
        ("run.steps", "1e999999999"),
        ("run.steps", "1" * 5000),
        ("run.steps", "1e-3"),
        ("run.steps", "null"),
        ("run.steps", "None"),
        ("run.steps", ""),
        ("run.resume", "2"),
        ("run.resume", "maybe"),
        ("run.dir", "null"),
        ("run.dir", ""),
        ("learner.zero_stage", "true"),
        ("learner.zero_stage", "4"),
        ("learner.float8", "false"),
        ("learner.float8", "None"),
        ("learner.offload", "Off"),
        ("learner.adam_betas", "0.9"),
        ("learner.adam_betas", "[0.9]"),
        ("task.options", "3"),
        ("tracking.name", "{a: [}"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path: Path, key: str, text: str) -> None:
    if key != "tracking.name":
        with pytest.raises(ConfigError, match=rf"^{key}(\.1)?: "):
            parse_config(None, [MODEL, f"{key}={text}"])
    with pytest.raises(ConfigError, match=key if "{" not in text else "config.yaml"):
        in_file(tmp_path, key, text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("####", "####"),
        ("#", "#"),
        ("a # b", "a # b"),
        ("a: b", "a: b"),
        ("1", 1),
        ("010", 10),
        ("1_000", "1_000"),
        ("1e-3", 1e-3),
        ("true", True),
        ("no", "no"),
        ("None", "None"),
        ("null", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("[1, no, a]", [1, "no", "a"]),
        ("{a: 010, 1: x}", {"a": 10, 1: "x"}),
        ('{answer_after: "####"}', {"answer_after": "####"}),
        ("2026-11-26", "2026-11-26"),
        ("0x1g", "0x1g"),
        ("-.inf", float("-inf")),
    ],
)
def test_options_follow_the_core_schema(text: str, value: Any) -> None:
    [found] = parse_overrides([f"task.options.some-thing={text}"]).items()
    assert found == ("task.options.some-thing", value)
    assert type(found[1]) is type(value)
    config = parse_config(None, [MODEL, f"task.options.deep.er={text}"])
    assert config.task.options == {"deep": {"er": value}}


def test_names_in_mappings_of_texts_are_texts(tmp_path: Path) -> None:
    text = "rewards: {functions: [{path: 'a:b', columns: {1: 2, no: yes}, options: {1: 2}}]}"
    [function] = from_yaml(tmp_path, text).rewards.functions or []
    assert not isinstance(function, str)
    assert (function.columns, function.options) == ({"1": "2", "no": "yes"}, {"1": 2})


def test_flow_values_with_a_comment_sign_are_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"task\.options: cannot read.* # after a space"):
        parse_overrides(["task.options={answer_after: ####}"])


@pytest.mark.parametrize("line", ["answer_after: ####", "answer_after:  #3", "system: #"])
def test_a_file_value_that_is_a_comment_is_not_lost(tmp_path: Path, line: str) -> None:
    text = f"task:\n  options:\n    {line}\n"
    if line.endswith(" #"):
        assert from_yaml(tmp_path, text).task.options == {"system": None}
        return
    with pytest.raises(ConfigError, match=r"task\.options\.answer_after: the value is empty.*#"):
        from_yaml(tmp_path, text)


def test_a_key_left_empty_with_a_remark_is_its_default(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "model:\n  path: m\n  max_length:   # as far as needed\nrun: #x\n")
    assert config.model.max_length is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (['tracking.name={"my": "run"}', "run.steps=x"], "run.steps"),
        (["rewards.functions={a: b}"], "rewards.functions"),
        (["rewards.functions=[{path: a:b, options: 3}]"], "rewards.functions.0.options"),
        (["learner.deepspeed={"], "learner.deepspeed: cannot read"),
        (["run.dir=["], "run.dir: cannot read the value '[': '[' is never closed"),
        (["--tracking.name"], "tracking.name: no value follows --tracking.name"),
        (["--run.steps", "--resume"], "run.steps: no value follows"),
        (["-x"], "'-x' is not key=value"),
        (["--resum"], "resum: unknown key"),
        (["=3"], "unknown key"),
        (["task.options.a=1", "task.options={b: 2}"], "replaces task.options.a"),
        (["rewards.functions=[a:b]", "rewards.functions.0=c:d"], "'functions' is a list"),
        (["task.options.x=[1"], "task.options.x: cannot read"),
        (["task.options.x=" + "[" * 5000], "nested too deeply"),
    ],
)
def test_every_refusal_says_why(tmp_path: Path, arguments: list[str], words: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model: {path: m}\nalgorithm: {}\n")
    result = CliRunner().invoke(app, ["train", str(file), *arguments])
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert result.output.startswith("error: ")


def test_a_mapping_for_a_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^tracking\.name: Input should be a valid string"):
        from_yaml(tmp_path, "tracking: {name: {my: run}}")


def test_parts_and_whole_sections_merge() -> None:
    steps = ["run={dir: a}", "run.steps=3"]
    for overrides in (steps, steps[::-1]):
        config = parse_config(None, [MODEL, *overrides])
        assert (config.run.dir, config.run.steps) == ("a", 3)
    late = parse_config(None, [MODEL, "run.steps=3", "run={steps: 5}"])
    assert late.run.steps == 5
    last = parse_config(None, [MODEL, "run.steps=3", "run={steps: 5}", "run.steps=4"])
    assert last.run.steps == 4
    assert parse_config(None, [MODEL, "task.options={a: 1}", "task.options.b=2"]).task.options == {
        "a": 1,
        "b": 2,
    }


def test_dotted_names_in_a_file_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"write run\.steps as a section, `run:`"):
        from_yaml(tmp_path, "run: {dir: x}\nrun.steps: 3\n")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"run:\n\tsteps: 3\n", "line 2, column 1.*spaces, not tabs"),
        ("run: {dir: caf\u00e9}".encode("latin-1"), r"not UTF-8 text \(line 1, byte 0xe9\)"),
        ("run: {dir: x}".encode("utf-16"), "not UTF-8 text"),
        (b"run: {dir: a\x00b}", "'\\\\x00' is not allowed|line 1"),
        (b"run:\n  dir: my: run\n", "line 2.*quotes"),
        (b"run: &r {dir: x}\nrun: *r\n", "'run' is given twice"),
        (b"task: {options: &a {b: *a}}\n", "holds itself|too deeply"),
        (b"a: !!python/object:os.system {}\n", "python/object"),
        (b"run: {dir: !!binary aGk=}\n", "binary"),
        (b"run: {steps: !!int x}\n", "'x' is no int"),
        (b"a: " + b"[" * 3000, "nested too deeply"),
        (b"- a\n", "must hold sections"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read_say_where(tmp_path: Path, raw: bytes, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        from_yaml(tmp_path, raw)
    assert "config.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        "\ufeffrun:\n  dir: café\n".encode(),
        "run:\r\n  dir: café\r\n".encode(),
        b'run: {dir: "caf\\u00e9"}',
        "run:\n  dir: !!str café\n".encode(),
        "x: &x {dir: café}\n".encode().replace(b"x: &x", b"run: &x"),
    ],
)
def test_any_utf8_file_is_read(tmp_path: Path, raw: bytes) -> None:
    assert from_yaml(tmp_path, raw).run.dir == "café"


def test_explicit_tags_and_merges(tmp_path: Path) -> None:
    text = "task: {options: {a: &a {x: 1, y: 2}, b: {<<: *a, y: !!str 3}, c: !!int 010, d: =}}"
    assert from_yaml(tmp_path, text).task.options == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": "3"},
        "c": 10,
        "d": "=",
    }


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_an_ascii_locale_changes_nothing(tmp_path: Path) -> None:
    """A file, a path and an argument with é; the message is UTF-8 too."""
    file = tmp_path / "é.yaml"
    file.write_text("model: {path: m}\ntracking: {name: é}\n", encoding="utf-8")
    arguments = ["-m", "cohort.cluster.cli", "train", str(file), "run.dir=ü", "learner.workers=3"]
    done = subprocess.run(
        [sys.executable, *arguments, "task.oé=1"],
        env={**os.environ, **ASCII},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.decode() == "error: task.oé: unknown key; task has " + ", ".join(
        SECTIONS["task"].model_fields
    ) + "\n"  # fmt: skip
    code = (
        "import sys; from pathlib import Path; from cohort.cluster.config_file import load_config\n"
        f"print(ascii(load_config(Path({str(tmp_path)!r}) / '\\u00e9.yaml'.encode().decode("
        "'ascii', 'surrogateescape')).tracking.name))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **ASCII},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.stdout.strip() == r"'\xe9'", found.stderr


ALPHABET = (
    "ab 01.,:;#-_/\\'\"{}[]()<>|!&*%@`?=~+\t\n\r\x00\x07\x85\xa0\u2028\ufeffé日😀\ud800eExXoO"
)


def texts(seed: int, count: int) -> list[str]:
    random_ = random.Random(seed)
    words = [
        "null",
        "None",
        "true",
        "no",
        "1e3",
        "010",
        "~",
        ".nan",
        "<<",
        "=",
        "2026-11-26",
        "1:30",
    ]
    made = ["".join(random_.choices(ALPHABET, k=random_.randint(0, 12))) for _ in range(count)]
    return [*words, *[word + " " for word in words], "x " * 200, *made]


@pytest.mark.slow
def test_every_text_survives_a_dump(tmp_path: Path) -> None:
    for place, text in enumerate(texts(0, 3000)):
        tree = {text: 1, "a": text, "b": [text, {"c": text}]}
        again = typed(read_yaml(write_yaml(tree)), dict[str, Any])
        assert again == tree, ascii(text)
        assert type(again["a"]) is str
        if place % 100:
            continue
        config = DEFAULTS.model_copy(
            update={
                "tracking": DEFAULTS.tracking.model_copy(update={"name": text}),
                "task": DEFAULTS.task.model_copy(update={"options": tree}),
            }
        )
        raw = dump_config(config).encode("utf-8")
        assert from_yaml(tmp_path, raw) == config


def test_every_text_can_be_typed_in_quotes() -> None:
    for text in texts(1, 1000):
        quoted = write_yaml([text]).strip().removeprefix("- ")
        if not quoted.startswith('"'):
            continue
        for key in ("tracking.name", "task.options.x"):
            assert parse_overrides([f"{key}={quoted}"]) == {key: text}, ascii(text)


def test_values_of_a_dump_keep_their_types(tmp_path: Path) -> None:
    options = {"i": 3, "f": 1e-9, "g": 1e22, "n": None, "b": True, "l": [1.0, [2]], 4: {"k": {}}}
    options |= {"inf": float("inf"), "deep": {1: {2.5: "x", True: "y", None: "z"}}}
    given = {str(key): value for key, value in options.items()}
    tree = {"model": {"path": "some/model"}, "task": {"options": given}}
    config = Config.model_validate(tree)
    again = from_yaml(tmp_path, dump_config(config))
    assert again == config
    assert repr(again.task.options) == repr(config.task.options)


def test_yaml_1_1_readers_read_a_dump_the_same() -> None:
    config = load_config(None, [MODEL, "learner.float8=off", "tracking.name=2026-11-26"])
    assert yaml.safe_load(dump_config(config)) == config.model_dump(mode="json")


@pytest.mark.parametrize(
    "text", ["0b1", "1__0", "0o8", "--1", "1e", ".e3", "+", ".", "1,0", "tRue"]
)
def test_what_is_no_number_is_a_text(text: str) -> None:
    assert core(text) == text


def test_a_problem_without_words_is_still_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ConfigError

    monkeypatch.setattr("cohort.cluster.cli.load_config", fail)
    result = CliRunner().invoke(app, ["train", "x.yaml"])
    assert (result.exit_code, result.output) == (2, "error: ConfigError()\n")


def test_a_report_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "absent" / "x.json"):
        result = CliRunner().invoke(app, ["eval", "x.yaml", "--output", str(output)])
        assert (result.exit_code, result.output[:15]) == (2, "error: --output")


def test_reading_is_bounded() -> None:
    with pytest.raises(ValueProblem, match="too deeply"):
        typed(read_yaml("[" * 200 + "]" * 200), Any)
