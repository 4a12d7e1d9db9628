"""What the documents show is run: the cheap commands and the snippets here, the others where
`tests/shown.py` sends them."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from typer.testing import CliRunner

from cohort.cluster.cli import app
from cohort.cluster.config import all_keys
from cohort.cluster.config_file import load_config
from cohort.rewards.adapters import load_reward
from cohort.rewards.specs import reward_specs
from cohort.rewards.tasks import load_task
from tests.shown import DOCUMENTS, ROOT, Shown, blocks, commands, environment, scratch_copy

if TYPE_CHECKING:
    from cohort.cluster.config import Config
    from tests.harness.world import World

PACKAGES = ("actors", "learner", "rewards", "cluster")
FOLDERS = (*PACKAGES, "deploy", "docs", "examples", "benchmarks", "tests")
EXAMPLES = ROOT / "tests" / "system" / "test_examples.py"
# What the snippets name and a reader has: a reward in verl's form.
VERL = (
    "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n    return 1.0\n"
)


def test_the_readme_is_short_and_begins_with_its_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    first_screen = lines[:25]
    assert any(line.startswith("make train") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)


@pytest.mark.parametrize("command", commands(), ids=str)
def test_each_command_is_run_somewhere(command: Shown) -> None:
    # Raises when nothing runs commands of its kind; those that are run nowhere need machines.
    assert command.where in ("fast", "stack", "cluster", "examples", "elsewhere")
    assert command.where != "elsewhere" or command.document == "deploy/README.md"


def test_every_document_for_users_is_read() -> None:
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} < set(DOCUMENTS)


@pytest.mark.parametrize("command", [c for c in commands() if c.where == "examples"], ids=str)
def test_an_example_that_is_shown_is_run(command: Shown) -> None:
    assert Path(command.words[1]).name in EXAMPLES.read_text()


def test_a_command_that_nothing_runs_is_an_error() -> None:
    with pytest.raises(LookupError, match="`cohort fly --high`, and no test runs such"):
        Shown("README.md", "cohort fly --high").where  # noqa: B018


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scratch_copy(tmp_path_factory.mktemp("scratch") / "cohort")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands() if c.where == "fast"], ids=str)
def test_a_cheap_command_does_what_the_document_says(
    command: Shown, scratch: Path, world: Callable[..., World]
) -> None:
    if command.kind == "cohort report":
        run = world()
        run.folder = scratch / command.words[2]
        run.train()
    # All of these tests are run anyway.
    more = " -k test_manifests" if command.kind == ".venv/bin/pytest" else ""
    done = subprocess.run(
        command.text + more,
        shell=True,
        cwd=scratch,
        env=environment(scratch),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if command.kind == "cohort report":
        assert (scratch / command.words[2] / "report.html").stat().st_size > 10_000
    if command.kind == "cohort keys":
        assert "run.steps=" in done.stdout


@pytest.mark.parametrize(
    "command", [c for c in commands() if ".yaml" in c.text and c.words[0] == "cohort"], ids=str
)
def test_configs_and_overrides_in_the_documents_are_valid(command: Shown) -> None:
    [config] = [word for word in command.words if word.endswith(".yaml")]
    overrides = [word for word in command.words if re.match(r"[a-z]+\.[a-z_]+=", word)]
    load_config(ROOT / config, overrides)


def test_keys_named_in_the_documents_exist() -> None:
    known = set(all_keys())
    sections = {key.split(".")[0] for key in known}
    text = "\n".join((ROOT / document).read_text() for document in DOCUMENTS)
    # Alone, or with a value after it.
    named = {name for name, _ in re.findall(r"`([a-z]+\.[a-z_0-9]+)([=:][^`]*)?`", text)}
    keys = {name for name in named if name.split(".")[0] in sections and not name.endswith(".py")}
    assert len(keys) > 30
    assert not keys - known


def test_files_that_the_documents_link_to_exist() -> None:
    for document in DOCUMENTS:
        folder = (ROOT / document).parent
        links = re.findall(r"\]\(([^)#\s]*)(#[^)\s]+)?\)", (ROOT / document).read_text())
        for link, anchor in links:
            if link.startswith("http"):
                continue
            target = folder / link if link else ROOT / document
            assert target.exists(), f"{document} links to {link}"
            assert not anchor or anchor[1:] in anchors(target), (
                f"{document} links to {link}{anchor}"
            )


def test_files_that_the_documents_name_exist() -> None:
    made = {"tests/exhaustive.passed"}  # by `make exhaustive`
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        named = set(re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`", text)) - made
        assert not [path for path in named if not (ROOT / path).exists()], document


def test_the_terminals_picture_can_be_made_from_a_run(world: Callable[..., World]) -> None:
    run = world()
    run.train()
    path = ROOT / "docs" / "images" / "make.py"
    spec = importlib.util.spec_from_file_location("make_images", path)
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    svg = make.terminal(run.folder, "[   0.0 s] starting Ray\n[   4.9 s] starting engines\n")
    assert "starting&#160;Ray&#160;5s" in svg
    assert re.search(r"reward&#160;-?[\d.]+&#160;\(avg10", svg)
    assert "@font-face" not in svg  # nothing is fetched


def anchors(document: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@cache
def messages() -> str:
    """Every text in the product's code, with `…` where an f-string has a value."""

    def texts(tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value

    files = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    files.append(ROOT / "deploy" / "models" / "smollm2.py")
    found = [text for path in files for text in texts(ast.parse(path.read_text()))]
    return "\n".join([*found, (ROOT / "Makefile").read_text()])


def test_messages_that_the_troubleshooting_page_quotes_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.+)`$", page, re.M)
    assert len(quoted) > 25
    assert len(quoted) == page.count("\n### ")
    assert not [message for message in quoted if message not in messages()]


def test_the_code_that_the_readme_quotes_is_in_the_files_that_it_links_to() -> None:
    section = (ROOT / "README.md").read_text().partition("## The algorithm")[2]
    links, _, table = section.partition("| formula | code |")
    quoted = re.findall(r"\| `(.+)` \|$", table.partition("\n\n")[0], re.M)
    code = "\n".join((ROOT / path).read_text() for path in re.findall(r"\]\((.+?\.py)\)", links))
    assert len(quoted) == 3
    assert not [line for line in quoted if line not in code]


def test_cohort_keys_lists_every_key_with_its_meaning() -> None:
    result = CliRunner().invoke(app, ["keys"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split("=")[0] for line in lines[0::2]] == all_keys()
    assert all(line.startswith("    ") and len(line) > 12 for line in lines[1::2])


def test_the_example_of_a_reward_finds_itself_in_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Config] = []
    monkeypatch.setattr("cohort.train", lambda config: seen.append(config) or 0, raising=False)
    monkeypatch.chdir(ROOT)
    for name in ("a, b", "a: b", "a [b]", "a #b", "a'b"):
        script = tmp_path / name / "custom_reward.py"
        script.parent.mkdir()
        shutil.copy(ROOT / "examples" / "custom_reward.py", script)
        monkeypatch.setattr("sys.argv", [str(script)])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(script), run_name="__main__")
        spec, _ = reward_specs(load_task(seen[-1].task, seed=0), seen[-1].rewards)
        assert spec.path == f"{script}:near"
        assert callable(load_reward(spec.path, spec.kind, spec.options))


def snippets(language: str) -> list[Any]:
    found = [(document, text) for document in DOCUMENTS for text in blocks(document, language)]
    return [
        pytest.param(text, id=f"{document}-{number}")
        for number, (document, text) in enumerate(found)
    ]


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the snippets name, as the README describes them."""
    [near], [exact] = blocks("README.md", "python"), blocks("docs/rewards-and-data.md", "python")
    (tmp_path / "my_rewards.py").write_text(near + exact)
    (tmp_path / "my_verl_reward.py").write_text(VERL)
    text = (ROOT / "README.md").read_text()
    [row] = re.findall(r"rows\.jsonl +# (\{.*\})", text)
    content = json.loads(row)["prompt"][0]["content"]
    rows = [json.loads(row)] + [
        {"prompt": [{"role": "user", "content": content.replace("2 +", f"{n} +")}], "answer": n + 2}
        for n in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in [json.loads(row), *rows])
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", snippets("yaml"))
def test_a_yaml_snippet_loads_with_its_task_and_its_rewards(
    text: str, reader: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    def of_the_hub(name: str, config: str | None, split: str) -> Dataset:
        assert (name, config) == ("openai/gsm8k", "main")
        rows = [{"question": f"{split}: {n} + 1?", "answer": f"So\n#### {n + 1}"} for n in range(9)]
        return Dataset.from_list(rows)

    monkeypatch.setattr("datasets.load_dataset", of_the_hub)
    content = yaml.safe_load(text) | {"model": {"path": str(tiny_model)}}
    (reader / "config.yaml").write_text(yaml.safe_dump(content))
    config = load_config(reader / "config.yaml", [])
    if config.task.name == "dataset" and config.rewards.functions is None:
        config = config.model_copy(
            update={
                "rewards": config.rewards.model_copy(update={"functions": ["my_rewards.py:exact"]})
            }
        )
    task = load_task(config.task, seed=0)
    assert task.train_size() > 0
    for spec in reward_specs(task, config.rewards):
        assert callable(load_reward(spec.path, spec.kind, spec.options))


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(
    ("name", "scores"), [("near", [1.0, 0.9, 0.0]), ("exact", [1.0, 0.0, 0.0])]
)
def test_the_documents_rewards_score_as_they_say(name: str, scores: list[float]) -> None:
    function = load_reward(f"my_rewards.py:{name}", "trl", {})
    texts = (" 4", "5", "no idea")
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    assert function(completions=completions, answer=[4] * 3, prompts=["2 + 2?"] * 3) == scores


@pytest.mark.parametrize("text", blocks("docs/python-api.md", "python"))
def test_the_python_api_has_what_the_page_shows(text: str) -> None:
    import cohort

    names = {
        node.attr
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "cohort"
    }
    assert names
    assert not [name for name in names if not hasattr(cohort, name)]


def test_the_loop_of_the_python_api_is_the_example_that_is_run() -> None:
    _, loop = blocks("docs/python-api.md", "python")
    example = (ROOT / "examples" / "grpo_loop.py").read_text()
    calls = re.findall(r"\bc\.[a-z.]+\(|scored\.\w+|result\.\w+", loop)
    assert len(calls) >= 8
    assert calls == re.findall(r"\bc\.[a-z.]+\(|scored\.\w+|result\.\w+", example)
