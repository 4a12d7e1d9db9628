"""Cohort as it is installed: the wheel's contents, its types, and its name beside a user's own."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import cohort

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("actors", "cluster", "learner", "rewards")
HEAVY = "torch.*,transformers.*,ray.*,deepspeed.*,vllm.*,numpy.*"
# What a user writes with each public name, after its import: every line that mypy must speak of
# ends with what it says.
PUBLIC = {
    "load_config": """
config = load_config("run.yaml", ["run.steps=10"])
reveal_type(config.run.steps)  #: Revealed type is "int"
reveal_type(config.actors.temperature)  #: Revealed type is "float"
config.run.stepz  #: "RunConfig" has no attribute "stepz"
load_config(3)  #: Argument 1 to "load_config" has incompatible type "int"
""",
    "CohortError": """
try:
    pass
except CohortError as error:
    reveal_type(error.exit_code)  #: Revealed type is "int"
    error.code  #: "CohortError" has no attribute "code"
""",
    "evaluate": """
from cohort import Config

def greedy(config: Config) -> None:
    reveal_type(evaluate(config).greedy_solved)  #: Revealed type is "float"
    evaluate(config, 3)  #: Argument 2 to "evaluate" has incompatible type "int"
""",
    "launch": """
from cohort import Config

async def loop(config: Config) -> None:
    async with launch(config) as c:
        scored = await c.score(await c.generate(c.prompts(0)))
        reveal_type(scored.mean_reward)  #: Revealed type is "float"
        result = await c.learner.step(scored)
        reveal_type(result.loss)  #: Revealed type is "float"
        await c.learner.step(c.prompts(0))  #: Argument 1 to "step" of "Learner" has incompatible
""",
    "train": """
from cohort import Config

def run(config: Config) -> None:
    reveal_type(train(config))  #: Revealed type is "int"
    train("run.yaml")  #: Argument 1 to "train" has incompatible type "str"; expected "Config"
""",
    "Config": """
def keys(config: Config) -> None:
    reveal_type(config.actors.temperature)  #: Revealed type is "float"
    config.actors.temprature  #: "ActorsConfig" has no attribute "temprature"
""",
    "Group": """
import ray
from cohort import Config, launch

def first(group: Group) -> str:
    reveal_type(group.prompt.id)  #: Revealed type is "str"
    return group.completions[0].text

async def every(config: Config) -> None:
    async with launch(config) as c:
        for scored in await c.score(await c.generate(c.prompts(0))):
            await scored.ref  #: Incompatible types in "await"
            assert isinstance(scored.ref, ray.ObjectRef)
            first((await scored.ref).group)
""",
    "Agent": """
class Solver(Agent):
    async def run(self, row, base_url, api_key):
        return 1.0

async def play(agent: Agent) -> None:
    await agent.run({}, "url", "key", "seed", "policy")  #: Argument 4 to "run" of "Agent" has inco
""",
    "Env": """
from cohort import Reply, Step

class Guess(Env):
    async def step(self, reply: Reply) -> Step:
        reveal_type(await self.reset({}, 0))  #: Revealed type is "typing.Sequence[
        return Step("No.")

class Wrong(Env):
    async def step(self, reply: Reply) -> str:  #: Return type "Coroutine[Any, Any, str]" of "step"
        return "No."
""",
    "Reply": """
def length(reply: Reply) -> int:
    reveal_type(reply.text)  #: Revealed type is "str"
    reveal_type(reply.tool_calls[0].name)  #: Revealed type is "str"
    reply.tokens  #: "Reply" has no attribute "tokens"
    return len(reply.token_ids)
""",
    "Step": """
def answers() -> list[Step]:
    return [
        Step("Higher.", reward=-0.1),
        Step([{"role": "user", "content": "Right."}], reward=1.0, done=True),
        Step(done="yes"),  #: Argument "done" to "Step" has incompatible type "str"
    ]
""",
    "Prompt": """
def tokens(prompt: Prompt) -> int:
    return prompt.token_ids  #: Incompatible return value type
""",
    "Task": """
class Sums:
    def train_size(self) -> int:
        return 100

def rows(task: Task) -> None:
    reveal_type(task.train_size())  #: Revealed type is "int"
    task.train_row("first")  #: Argument 1 to "train_row" of "Task" has incompatible type "str"

rows(Sums())  #: Argument 1 to "rows" has incompatible type "Sums"; expected "Task"
""",
}


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    given = [str(part) for part in command]
    return subprocess.run(given, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy without network; the links in cohort/ are followed."""
    copy = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", copy / "src", ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    done = run(sys.executable, "-m", "pip", "wheel", *offline, "-w", copy / "out", copy)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = (copy / "out").iterdir()
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel installed; the other packages are this one's."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, check=True)
    python = folder / "bin" / "python"
    offline = ("--no-index", "--no-deps", "--disable-pip-version-check")
    done = run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Python of an environment with a checkout installed by `pip install -e`."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("src", "cohort", *PACKAGES):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "environment", check=True)
    python = tmp_path / "environment" / "bin" / "python"
    [packages] = (tmp_path / "environment").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    done = run(
        sys.executable, "-m", "pip", "--python", python, "install", *offline,
        "--ignore-installed", "-e", tmp_path / "clone",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def test_an_editable_install_shows_its_types_and_no_other_name(
    checkout: Path, tmp_path: Path
) -> None:
    """Type checkers and editors follow paths, not the hooks of imports."""
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "mypy.ini").write_text(f"[mypy]\n[mypy-{HEAVY}]\nfollow_imports = skip\n")
    (folder / "load_config.py").write_text(
        f"from cohort import load_config\n{PUBLIC['load_config']}"
    )
    done = run(
        sys.executable, "-m", "mypy", "--python-executable", checkout, "load_config.py",
        cwd=folder, env=environment(),
    )  # fmt: skip
    assert 'Revealed type is "int"' in done.stdout and "has no attribute" in done.stdout
    code = "import cohort; print(cohort.__file__)"
    found = run(checkout, "-c", code, cwd=folder, env=environment()).stdout
    assert Path(found.strip()) == tmp_path / "clone" / "src" / "cohort" / "__init__.py"
    for name in (*PACKAGES, "tests"):
        assert run(checkout, "-c", f"import {name}", cwd=folder, env=environment()).returncode == 1


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder with modules that have the names of our packages."""
    for name in PACKAGES:
        place = tmp_path / name / "__init__.py" if name == "cluster" else tmp_path / f"{name}.py"
        place.parent.mkdir(exist_ok=True)
        place.write_text(f"OWN = {name!r}\n")
    score = "def score(completions, **_):\n    return [1.0 for _ in completions]\n"
    (tmp_path / "rewards.py").write_text(f"OWN = 'rewards'\n\n\n{score}")
    return tmp_path


def environment() -> dict[str, str]:
    """Of a shell that knows nothing of this checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_the_wheel_holds_cohort_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name.split("/")[0] for name in names} == {
        "cohort",
        next(name.split("/")[0] for name in names if "dist-info" in name),
    }
    ours = {
        f"cohort/{file.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    parts = ("page.html", "page.css", "charts.js", "page.js")
    assert ours >= {f"cohort/cluster/observe/report/{name}" for name in parts}
    assert len(ours) > 100
    found = {name for name in names if name.startswith("cohort/")}
    assert found == ours | {"cohort/__init__.py", "cohort/py.typed"}


@pytest.fixture(scope="session")
def told(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str]]:
    """What mypy says of a user's scripts: script -> line -> messages."""
    folder = tmp_path_factory.mktemp("scripts")
    # Their types say nothing of ours, and take mypy a minute to read.
    (folder / "mypy.ini").write_text(f"[mypy]\n[mypy-{HEAVY}]\nfollow_imports = skip\n")
    for name, body in PUBLIC.items():
        (folder / f"{name}.py").write_text(f"from cohort import {name}\n{body}")
    done = run(
        sys.executable, "-m", "mypy", "--python-executable", installed / "python",
        *(f"{name}.py" for name in PUBLIC), cwd=folder, env=environment(),
    )  # fmt: skip
    found: dict[str, dict[int, str]] = {name: {} for name in PUBLIC}
    for line in done.stdout.splitlines()[:-1]:
        match = re.fullmatch(r"(\w+)\.py:(\d+): \w+: (.*)", line)
        assert match, done.stdout
        lines = found[match[1]]
        lines[int(match[2])] = lines.get(int(match[2]), "") + match[3]
    return found


def test_every_public_name_is_shown() -> None:
    assert sorted(PUBLIC) == sorted(cohort.__all__)
    for name in cohort.__all__:
        assert "Example:\n" in (inspect.getdoc(getattr(cohort, name)) or ""), name


@pytest.mark.parametrize("name", cohort.__all__)
def test_type_checkers_see_the_public_names(told: dict[str, dict[int, str]], name: str) -> None:
    lines = f"from cohort import {name}\n{PUBLIC[name]}".splitlines()
    expected = {
        number: line.split("#: ")[1] for number, line in enumerate(lines, 1) if "#: " in line
    }
    assert set(told[name]) == set(expected), told[name]
    for number, words in expected.items():
        assert told[name][number].startswith(words)


def test_a_script_uses_cohort_beside_its_own_modules(installed: Path, own: Path) -> None:
    (own / "script.py").write_text(
        "import actors, cluster, learner, rewards\n"
        "import cohort.rewards.base\n"
        "from cohort.cluster.config_file import load_config\n"
        "print(actors.OWN, cluster.OWN, learner.OWN, rewards.OWN)\n"
        "print(cohort.rewards.base.__name__, load_config(None, ['model.path=x']).model.path)\n"
    )
    done = run(installed / "python", "script.py", cwd=own, env=environment())
    assert done.stdout.split() == [*PACKAGES, "cohort.rewards.base", "x"], done.stderr


def test_the_command_runs_in_a_folder_with_such_modules(
    installed: Path, own: Path, tiny_model: Path
) -> None:
    for name in ("actors", "learner", "cluster/__init__"):
        (own / f"{name}.py").write_text("raise RuntimeError('a module of the user')\n")
    done = run(installed / "cohort", "keys", cwd=own, env=environment())
    assert done.stdout.startswith("run.dir=runs/default"), done.stderr
    (own / "run.yaml").write_text(f"model: {{path: {tiny_model}}}\nactors: {{max_tokens: 16}}\n")
    both = "rewards.functions=[{path: rewards.py:score}, {path: rewards:score, weight: 0}]"
    given = ("run.yaml", "--no-generate", both)
    done = run(installed / "cohort", "check", *given, cwd=own, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This run can start" in done.stdout
