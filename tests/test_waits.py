"""Every wait of the product has a deadline, or an owner who is known to end it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("actors", "cluster", "learner", "rewards")
# Methods that wait, whatever they belong to; those of the second row only without arguments, which
# `str.join(parts)` and `dict.get(key)` have.
WAITING = {"acquire", "communicate", "select", "wait", "wait_for", "waitpid"}
WAITING_WITHOUT_ARGUMENTS = {"get", "join"}
FUNCTIONS = {"asyncio.gather", "ray.get", "ray.wait"}
# Of these the second argument is the deadline; of other waits it may be the first one.
DEADLINE_SECOND = {"asyncio.wait_for"}
NO_DEADLINE_BY_PLACE = {"asyncio.gather", "asyncio.wait", "ray.get", "ray.wait", "os.waitpid"}

# Waits without a deadline of their own: "file function call" and who ends them. One line each.
OWNERS: dict[str, str] = {
    "actors/engine.py Engine._answer asyncio.wait": "the pool's limit; the engine's death",
    "actors/engine.py _finished get": "the pool's limit of the call, in Engine._answer",
    "actors/fleet.py Fleet.start asyncio.gather": "the limits of Slot.within",
    "actors/rollout.py RolloutActor.collect asyncio.gather": "the pool: group_timeout_s, a beat",
    "actors/rollout.py RolloutActor.submit wait_for": "the pool's limit; the update",
    "cluster/commands/check/rollout.py generate asyncio.gather": "the pool's limits",
    "cluster/commands/warmup.py _groups asyncio.gather": "the limits of environments",
    "cluster/evaluation.py HeldOut.score asyncio.gather": "the pools' limits",
    "cluster/journal/actor.py JournalActor.put_group ray.get": "Journal: the limit of its call",
    "cluster/launch.py _connect asyncio.wait": "Ray's limit of its own start",
    "cluster/launch.py _together asyncio.wait": "start_timeout_s of each part",
    "cluster/ray_watch.py _look asyncio.gather": "CONNECT_S of each look",
    "cluster/ray_watch.py unless_ray_dies asyncio.wait": "LEAVE_S where it is cancelled",
    "cluster/run_dir.py RunDir.release join": "its event is set; it only sleeps and touches",
    "cluster/saving.py _settle asyncio.wait": "Gang.write: step_timeout_s",
    "cluster/session.py Session.generate asyncio.gather": "the pool's limits",
    "cluster/session.py Session.score asyncio.gather": "the reward pool's limits",
    "cluster/signals.py unless_stopped asyncio.wait": "the work's own limits; the signal",
    "cluster/signals.py unless_stopped wait": "cancelled when the work is done",
    "cluster/stream.py GroupStream._score asyncio.gather": "the reward pool's limits",
    "cluster/stream.py GroupStream.again asyncio.gather": "the pools' limits",
    "cluster/stream.py GroupStream.take asyncio.gather": "the pools' limits of each group",
    "learner/gang.py Gang._frozen remote": "the end of the call that is watched",
    "learner/gang.py Gang._until_one_is_frozen asyncio.wait": "the end of the call that is watched",
    "learner/gang.py _answer_of remote": "FROZEN_S, where it is called",
    "learner/kept.py KeptCopies._until_unread asyncio.wait": "Gang.write: step_timeout_s",
    "rewards/adapters.py _gathered asyncio.gather": "the parent: timeout_s",
    "rewards/bounded.py Bounded.close os.waitpid": "killed the line before",
    "rewards/bounded.py _exactly select": "its parent's death closes the pipe",
    "rewards/endpoint.py Endpoint._ask_all asyncio.gather": "cancelled the line before",
    "rewards/environments/adapters/mcp.py _Session._hold wait": "the end of the episode",
    "rewards/environments/host.py Host._close asyncio.wait": "the worker: step_timeout_s",
    "rewards/pool.py RewardPool._idle_worker wait_for": "a call's limit frees a worker",
    "rewards/reaper.py main select": "the program's end, or its worker's",
}


@dataclass(frozen=True)
class Wait:
    """A call that waits. key: where, as in OWNERS."""

    key: str
    line: int
    bounded: bool


def waits(source: str, file: str) -> Iterator[Wait]:
    """The waits of a file."""
    yield from _in(ast.parse(source), file, [], False)


def _in(node: ast.AST, file: str, names: list[str], bounded: bool) -> Iterator[Wait]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        # What is defined within a deadline need not run within it.
        names, bounded = [*names, node.name], False
    if isinstance(node, ast.AsyncWith):
        bounded = bounded or any(_is_deadline(item.context_expr) for item in node.items)
    if isinstance(node, ast.Call) and (what := _waits(node)):
        key = f"{file} {'.'.join(names)} {what}"
        yield Wait(key, node.lineno, bounded or _has_deadline(node, what))
    if isinstance(node, ast.Await) and _is_remote(node.value):
        # A call to an actor, whose answer may never come.
        yield Wait(f"{file} {'.'.join(names)} remote", node.lineno, bounded)
    for child in ast.iter_child_nodes(node):
        yield from _in(child, file, names, bounded)


def _waits(call: ast.Call) -> str:
    """What a call that waits is called; empty for others."""
    what = ast.unparse(call.func)
    if what in FUNCTIONS:
        return what
    if not isinstance(call.func, ast.Attribute):
        return ""
    name, bare = call.func.attr, not call.args and not call.keywords
    if name not in WAITING and not (bare and name in WAITING_WITHOUT_ARGUMENTS):
        return ""
    return what if what.startswith(("asyncio.", "os.")) else name


def _has_deadline(call: ast.Call, what: str) -> bool:
    named = [word.value for word in call.keywords if word.arg in ("timeout", "timeout_s")]
    if what in DEADLINE_SECOND:
        named += call.args[1:2]
    elif what == "os.waitpid":
        return len(call.args) == 2 and ast.unparse(call.args[1]) == "os.WNOHANG"
    elif what not in NO_DEADLINE_BY_PLACE and what not in ("acquire", "communicate", "wait_for"):
        named += call.args[:1]
    return any(_is_time(value) for value in named)


def _is_time(value: ast.expr) -> bool:
    """Whether this can be a time and is never None."""
    if isinstance(value, ast.IfExp):
        return _is_time(value.body) and _is_time(value.orelse)
    return not (isinstance(value, ast.Constant) and value.value is None)


def _is_deadline(expression: ast.expr) -> bool:
    return (
        isinstance(expression, ast.Call)
        and ast.unparse(expression.func) in ("asyncio.timeout", "asyncio.timeout_at")
        and all(map(_is_time, expression.args))
    )


def _is_remote(value: ast.expr) -> bool:
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr == "remote"
    )


FOUND = [
    wait
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*.py"))
    for wait in waits(file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix())
]


def test_every_wait_has_a_deadline_or_an_owner() -> None:
    missing = [f"{w.key} (line {w.line})" for w in FOUND if not w.bounded and w.key not in OWNERS]
    assert missing == [], "give each a deadline, or say in OWNERS who ends it"


def test_every_owner_has_its_wait() -> None:
    assert sorted(OWNERS) == list(OWNERS), "OWNERS is sorted, so that it can be merged"
    assert set(OWNERS) - {wait.key for wait in FOUND if not wait.bounded} == set()


def test_waits_are_found_all_over_the_product() -> None:
    assert {wait.key.partition("/")[0] for wait in FOUND} == set(FOLDERS)
    assert sum(wait.bounded for wait in FOUND) > 20


@pytest.mark.parametrize(
    ("line", "bounded"),
    [
        ("ray.get(ref)", False),
        ("ray.get(ref, timeout=5)", True),
        ("ray.get(ref, timeout=None)", False),
        ("ray.wait([ref], timeout=left)", True),
        ("asyncio.wait(tasks)", False),
        ("asyncio.wait(tasks, timeout=1 if some else None)", False),
        ("asyncio.wait(tasks, timeout=1)", True),
        ("asyncio.wait_for(task, 3)", True),
        ("asyncio.wait_for(task, None)", False),
        ("asyncio.gather(a, b)", False),
        ("event.wait()", False),
        ("event.wait(3)", True),
        ("thread.join()", False),
        ("queue.get()", False),
        ("queue.get(timeout=2)", None),
        ("process.communicate(timeout=9)", True),
        ("process.communicate(text)", False),
        ("lock.acquire()", False),
        ("selector.select()", False),
        ("selector.select(0)", True),
        ("os.waitpid(pid, 0)", False),
        ("os.waitpid(pid, os.WNOHANG)", True),
        ("', '.join(parts)", None),
        ("found.get(key)", None),
    ],
)
def test_what_is_a_wait_and_what_a_deadline(line: str, bounded: bool | None) -> None:
    found = [wait.bounded for wait in waits(f"def f():\n    {line}\n", "a.py")]
    assert found == ([] if bounded is None else [bounded])


def test_a_deadline_around_counts_and_an_actors_answer_needs_one() -> None:
    text = """
class A:
    async def f(self):
        async with asyncio.timeout(3):
            await actor.ask.remote()
            async def g():
                await actor.ask.remote()
        async with asyncio.timeout(None):
            await asyncio.gather(a, b)
"""
    assert list(waits(text, "a.py")) == [
        Wait("a.py A.f remote", 5, True),
        Wait("a.py A.f.g remote", 7, False),
        Wait("a.py A.f asyncio.gather", 9, False),
    ]
