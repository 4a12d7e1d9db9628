"""Ray in one process: actors, calls and references with Ray's semantics, in virtual time.

`LocalRay.install` puts it in the place of the functions of the `ray` module that the product uses.
What is kept of the real thing:

- `remote(Class).options(...).remote(...)` makes an actor; its calls return references at once;
- references among the arguments of a call arrive as values, references inside lists as references;
- async methods run beside one another, the methods of other actors (and of classes that say
  `serial = True`) one after the other, except those in a concurrency group of their own;
- an exception in a method is a RayTaskError that is also of its own type;
- a dead actor fails every call with a RayActorError, the ones in progress as well; what it had
  stored stays; one with `max_restarts` comes back, without its state, and fails calls meanwhile;
- a frozen actor (SIGSTOP) does nothing at all, in none of its tasks, until it is thawed;
- an object may be lost: who reads it gets ObjectLostError.

Tests watch and interfere through hooks: `on(event)` is called for every event, may kill or freeze
actors, raise in the place of a method that is about to run, or set `event.reply` to answer for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import itertools
import traceback
import types
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    RayError,
    RayTaskError,
)

import cohort.actors.witness
from cohort.actors.watch import Look

NODE = "0" * 56
# Above those of any real process.
FIRST_PID = 1 << 40
FUNCTIONS = (
    *("kill", "get", "put", "remote", "nodes", "init", "shutdown", "wait"),
    *("cluster_resources", "available_resources"),
)
SPAWN_S = 0.5
RESTART_S = 2.0
_NOTHING = object()
_actor: contextvars.ContextVar[Actor | None] = contextvars.ContextVar("actor", default=None)


@dataclass
class Event:
    """Something that happened. kind: `call` (a method is about to run), `done` (it has returned),
    `dead`, `frozen`, or what a stand-in reports (`step`, `update`, ...). actor: its name."""

    kind: str
    actor: str
    what: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    time: float = 0.0
    reply: Any = _NOTHING

    def __str__(self) -> str:
        return f"{self.time:9.2f} {self.kind} {self.actor} {self.what} {self.detail}"


class Ref:
    """A reference to a value that exists, or will."""

    def __init__(self, maker: str, method: str) -> None:
        self.maker = maker
        self.method = method
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._value: Any = None
        self._error: BaseException | None = None

    def settle(self, value: Any = None, error: BaseException | None = None) -> None:
        """Give it its value or its error, once."""
        if not self._done.done():
            self._value, self._error = value, error
            self._done.set_result(None)

    def lose(self) -> None:
        """Forget the value: every reader gets ObjectLostError."""
        lost = ObjectLostError("0" * 56, "", "")
        if self._done.done():
            self._value, self._error = None, lost
        else:
            self.settle(error=lost)

    def value(self) -> Any:
        """The value of a reference that is settled (`ray.get`)."""
        if not self._done.done():
            raise AssertionError(f"{self} is not there yet")
        if self._error is not None:
            # Raised by every reader: without what the readers before have added to it.
            self._error.__context__ = None
            raise self._error.with_traceback(None) from None
        return self._value

    async def _wait(self) -> Any:
        await asyncio.shield(self._done)
        return self.value()

    def __await__(self) -> Iterator[Any]:
        return self._wait().__await__()

    def __repr__(self) -> str:
        return f"<what {self.maker} returned from {self.method}>"


class Actor:
    """One actor: its object, its calls in progress, and whether it lives."""

    def __init__(self, ray: LocalRay, make: Callable[[], Any], options: dict[str, Any]) -> None:
        self.ray = ray
        self.options = options
        self.restarts_left = int(options.get("max_restarts", 0))
        self.name = f"actor-{next(ray.numbers)}"
        wanted = options.get("scheduling_strategy")
        self.node = ray.next_node() if wanted is None else str(wanted.node_id)
        self.instance: Any = None
        self.death: RayError | None = None
        self.thawed = asyncio.Event()
        self.thawed.set()
        self._make = make
        self._calls: set[Callable[[BaseException], None]] = set()
        self._life = 0
        self._turn = asyncio.Lock()
        self._ready: asyncio.Future[None]
        self._begin(SPAWN_S)

    def _begin(self, after_s: float) -> None:
        self._ready = asyncio.get_running_loop().create_future()
        self._turn = asyncio.Lock()
        self.run(self._construct(self._ready, after_s))

    async def _construct(self, ready: asyncio.Future[None], after_s: float) -> None:
        await asyncio.sleep(after_s)
        try:
            self.instance = self._make()
        except Exception as error:  # noqa: BLE001 - the constructor's own
            text = "".join(traceback.format_exception(error))
            self.end(ActorDiedError(RayTaskError("__init__", text, error)), restart=False)
            return
        self.name = self.ray.name(self.instance, self)
        self.death = None
        ready.set_result(None)

    def run(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task of this actor: it stops while the actor is frozen, and for ever when it dies."""
        token = _actor.set(self)
        try:
            return asyncio.get_running_loop().create_task(work)
        finally:
            _actor.reset(token)

    def call(self, method: str, args: tuple[Any, ...], kwargs: Any, returns: int) -> Any:
        refs = [Ref(self.name, method) for _ in range(returns)]

        def settle(value: Any = None, error: BaseException | None = None) -> None:
            self._calls.discard(fail)
            if error is not None or returns == 1:
                for ref in refs:
                    ref.settle(value, error)
            else:
                for ref, part in zip(refs, value, strict=True):
                    ref.settle(part)
                if value[-1] is not None:
                    self.ray.emit("stored", self.name, method, ref=refs[-1])

        def fail(error: BaseException) -> None:
            settle(error=error)

        if self.ray.unwinding:
            # The dead say nothing.
            pass
        elif self.death is not None:
            fail(self.death)
        else:
            self._calls.add(fail)
            self.run(self._execute(method, args, kwargs, settle, self._ready))
        return refs[0] if returns == 1 else refs

    async def _execute(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: Any,
        settle: Callable[..., None],
        ready: asyncio.Future[None],
    ) -> None:
        try:
            args = tuple([await a if isinstance(a, Ref) else a for a in args])
        except RayError as error:
            settle(error=error)
            return
        await ready
        try:
            settle(await self._answer(method, args, kwargs))
        except Exception as error:  # noqa: BLE001 - travels to whoever asked
            settle(error=task_error(method, error))

    async def _answer(self, method: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        event = self.ray.emit("call", self.name, method, args=args)
        if event.reply is not _NOTHING:
            return event.reply
        if method == "__ray_ready__":
            return True
        function = getattr(self.instance, method)
        if inspect.iscoroutinefunction(function) and not _serial(self.instance):
            answer = await function(*args, **kwargs)
        else:
            in_a_group = hasattr(function, "__ray_concurrency_group__")
            async with contextlib.nullcontext() if in_a_group else self._turn:
                answer = function(*args, **kwargs)
                if inspect.isawaitable(answer):
                    answer = await answer
        done = self.ray.emit("done", self.name, method, args=args, answer=answer)
        return answer if done.reply is _NOTHING else done.reply

    def end(self, error: RayError, restart: bool = True) -> None:
        """End the process now: its tasks stop where they are, its calls fail."""
        self._life += 1
        self.thawed.set()
        self.instance = None
        self.death = error
        for fail in list(self._calls):
            fail(error)
        self.ray.emit("dead", self.name)
        if restart and self.restarts_left != 0:
            self.restarts_left -= 1
            self.death = ActorUnavailableError("The actor is restarting.", b"0" * 16)
            self._begin(RESTART_S)

    @property
    def life(self) -> int:
        return self._life


class Handle:
    """What `remote` returns; attributes are methods to be called with `.remote`."""

    def __init__(self, actor: Actor) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Method:
        if method.startswith("_") and method != "__ray_ready__":
            raise AttributeError(method)
        return Method(self._actor, method)

    # Not through __getattr__, which does not see names like this one inside of a class.
    @property
    def __ray_ready__(self) -> Method:
        return Method(self._actor, "__ray_ready__")


@dataclass(frozen=True)
class Method:
    """A method of an actor, with the number of its returns."""

    actor: Actor
    name: str
    returns: int = 1

    def options(self, num_returns: int = 1, **_: Any) -> Method:
        return Method(self.actor, self.name, num_returns)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        return self.actor.call(self.name, args, kwargs, self.returns)


class _Class:
    def __init__(self, ray: LocalRay, cls: type, options: dict[str, Any]) -> None:
        self._ray = ray
        self._cls = cls
        self._options = options

    def options(self, **options: Any) -> _Class:
        return _Class(self._ray, self._cls, {**self._options, **options})

    def remote(self, *args: Any, **kwargs: Any) -> Handle:
        cls = self._ray.stand_ins.get(self._cls.__name__, self._cls)
        actor = Actor(self._ray, lambda: cls(*args, **kwargs), self._options)
        self._ray.actors.append(actor)
        return Handle(actor)


class LocalRay:
    """The `ray` module of one simulated cluster.

    stand_ins: name of a class of the product -> the class to make instead. events: all of them, in
    order. hooks: called with every event.
    """

    def __init__(self, stand_ins: dict[str, type] | None = None) -> None:
        self._initialized = False
        self.stand_ins = stand_ins or {}
        self.actors: list[Actor] = []
        # Whether what runs is the end of a task of a process that is dead.
        self.unwinding = False
        # Of environments, made by the stand-ins.
        self.processes: list[Any] = []
        self.events: list[Event] = []
        self.hooks: list[Callable[[Event], None]] = []
        self.node_names = [NODE]
        self.free: dict[str, float] | None = None
        self.requested: list[list[dict[str, float]]] = []
        # How many times longer than usual an actor takes, by name.
        self.slow: dict[str, float] = {}
        # What the ranks of a learner share, by the port of their rendezvous.
        self.gangs: dict[int, Any] = {}
        self.numbers = itertools.count()
        self._names: dict[str, int] = {}

    @contextlib.contextmanager
    def install(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        """Replace the functions of the `ray` module, and have tasks know their actor."""
        import ray

        for name in FUNCTIONS:
            patch.setattr(ray, name, getattr(self, name))
        patch.setattr("ray.autoscaler.sdk.request_resources", self.request_resources)
        patch.setattr(ray, "is_initialized", lambda: self._initialized)
        patch.setattr(ray, "get_runtime_context", lambda: _Context(_actor.get()))
        patch.setattr(ray, "ObjectRef", Ref)
        patch.setattr(cohort.actors.witness, "look_at", self.look_at)
        asyncio.get_running_loop().set_task_factory(_new_task)
        yield

    def remote(self, *cls: type, **options: Any) -> Any:
        return _Class(self, cls[0], {}) if cls else lambda one: _Class(self, one, options)

    def init(self, *_: Any, **__: Any) -> None:
        self._initialized = True

    def shutdown(self) -> None:
        for actor in self.actors:
            if actor.death is None:
                actor.end(ActorDiedError(), restart=False)

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "NodeID": name, "Resources": {}} for name in self.node_names]

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 16.0 * len(self.node_names), "memory": float(64 << 30)}

    def available_resources(self) -> dict[str, float]:
        return self.cluster_resources() if self.free is None else self.free

    def request_resources(self, bundles: list[dict[str, float]]) -> None:
        self.requested.append(bundles)

    def next_node(self) -> str:
        return self.node_names[len(self.actors) % len(self.node_names)]

    def get(self, refs: Any, timeout: float | None = None) -> Any:  # noqa: ARG002
        return [ref.value() for ref in refs] if isinstance(refs, list) else refs.value()

    def wait(self, refs: list[Ref], **_: Any) -> tuple[list[Ref], list[Ref]]:
        done = [ref for ref in refs if ref._done.done()]
        return done, [ref for ref in refs if ref not in done]

    def put(self, value: Any) -> Ref:
        actor = _actor.get()
        ref = Ref("driver" if actor is None else actor.name, "put")
        ref.settle(value)
        return ref

    def kill(
        self, target: Handle | str, error: RayError | None = None, no_restart: bool = True
    ) -> None:
        """End an actor by handle (as `ray.kill`), or by name (as a crash)."""
        actor = target._actor if isinstance(target, Handle) else self.find(target)
        if actor.death is None or isinstance(target, Handle):
            gone = error or ActorDiedError()
            actor.end(gone, restart=isinstance(target, str) or not no_restart)

    def freeze(self, name: str) -> None:
        """Stop an actor as SIGSTOP does."""
        self.find(name).thawed.clear()
        self.emit("frozen", name)

    def thaw(self, name: str) -> None:
        self.find(name).thawed.set()

    def find(self, name: str) -> Actor:
        """The newest actor of this name (`rollout-0`, `learner-1`, `reward-0`)."""
        return next(actor for actor in reversed(self.actors) if actor.name == name)

    def living(self, start: str) -> list[str]:
        """The names that begin so, of actors that live and are not frozen."""
        return [
            actor.name
            for actor in self.actors
            if actor.name.startswith(start) and actor.death is None and actor.thawed.is_set()
        ]

    def pid_of(self, actor: Actor) -> int:
        """A process id that only this actor has."""
        return FIRST_PID + self.actors.index(actor)

    def look_at(self, pids: Sequence[int]) -> Look | None:
        """What /proc would show of the processes of actors: one computes unless it is stopped."""
        alive = [a for a in (self.actors[pid - FIRST_PID] for pid in pids) if a.death is None]
        now = asyncio.get_running_loop().time()
        stopped = any(not actor.thawed.is_set() for actor in alive)
        return Look(tuple(pids), 0.0 if stopped else now, stopped, not stopped) if alive else None

    def slowness(self, name: str) -> float:
        return self.slow.get(name, 1.0)

    def name(self, instance: Any, actor: Actor) -> str:
        if not actor.name.startswith("actor-"):
            return actor.name
        if hasattr(instance, "name"):
            return str(instance.name)
        kind = str(getattr(instance, "kind", type(instance).__name__.strip("_").lower()))
        number = self._names[kind] = self._names.get(kind, -1) + 1
        return f"{kind}-{number}"

    def emit(self, kind: str, actor: str, what: str = "", **detail: Any) -> Event:
        """Record an event and show it to every hook."""
        event = Event(kind, actor, what, detail, asyncio.get_running_loop().time())
        self.events.append(event)
        for hook in list(self.hooks):
            hook(event)
        return event


@dataclass(frozen=True)
class _Context:
    actor: Actor | None

    def get_node_id(self) -> str:
        return NODE if self.actor is None else self.actor.node

    def get_actor_id(self) -> str | None:
        return None if self.actor is None else self.actor.name


def current_ray() -> LocalRay:
    """The cluster of the actor whose task this is."""
    actor = _actor.get()
    assert actor is not None, "no actor's task"
    return actor.ray


def current_actor() -> Actor:
    """The actor whose task this is."""
    actor = _actor.get()
    assert actor is not None, "no actor's task"
    return actor


def task_error(method: str, error: Exception) -> Exception:
    """An exception of a method, as Ray hands it to the caller."""
    text = "".join(traceback.format_exception(error))
    return RayTaskError(method, text, error).as_instanceof_cause()


def _serial(instance: Any) -> bool:
    return bool(getattr(instance, "serial", False))


def _new_task(loop: Any, work: Any, context: Any = None) -> asyncio.Task[Any]:
    actor = _actor.get() if context is None else context.get(_actor)
    if actor is None:
        return asyncio.Task(work, loop=loop, context=context)
    task = asyncio.Task(_in_life(work, actor, actor.life), loop=loop, context=context)
    # A task that is cancelled before it began leaves its coroutine untouched.
    task.add_done_callback(lambda _: work.close())
    # Those of the dead never end; nobody needs to be told.
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    return task


async def _in_life(work: Any, actor: Actor, life: int) -> Any:
    return await _gated(work, actor, life)


@types.coroutine
def _gated(work: Any, actor: Actor, life: int) -> Any:
    """Drive a coroutine of an actor: not while it is frozen, and never again once it is dead."""
    send, sent = work.send, None
    try:
        while True:
            while actor.life == life and not actor.thawed.is_set():
                yield from actor.thawed.wait().__await__()
            if actor.life != life:
                if sent is None:
                    actor.ray.unwinding = True
                    work.close()  # it may not have begun, and then never will
                    actor.ray.unwinding = False
                yield from asyncio.get_running_loop().create_future()
            try:
                waiting_for = send(sent)
            except StopIteration as stop:
                return stop.value
            try:
                sent, send = (yield waiting_for), work.send
            except BaseException as error:
                if actor.life != life:
                    raise
                sent, send = error, work.throw
    finally:
        actor.ray.unwinding = actor.life != life
        _unwind(work)
        actor.ray.unwinding = False


def _unwind(work: Any) -> None:
    """End a coroutine that was stopped somewhere, whatever it would still like to await."""
    for _ in range(20):
        try:
            work.throw(asyncio.CancelledError())
        except BaseException:  # noqa: BLE001 - of a process that is dead
            return
