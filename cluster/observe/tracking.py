"""What a run records: metrics.jsonl (the truth), rollouts/, and Weights & Biases on the side."""

from __future__ import annotations

import errno
import json
import logging
import math
import netrc
import numbers
import os
import secrets
import string
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from cohort.actors.records import ScoredGroup
from cohort.cluster.config import Config
from cohort.cluster.files import replacing, write_atomically
from cohort.learner.aside import Aside

logger = logging.getLogger(__name__)

STEP_KEYS = (
    "step",
    "reward/mean",
    "reward/std",
    "reward/zero_variance_fraction",
    "reward/error_rate",
    "rollout/completion_tokens",
    "rollout/tokens_per_s",
    "rollout/truncated_fraction",
    "learner/loss",
    "learner/grad_norm",
    "learner/entropy",
    "learner/clip_fraction",
    "learner/tokens_per_s",
    "learner/skipped_steps",
    "mismatch/k3_kl",
    "mismatch/logprob_abs_max",
    "async/staleness_mean",
    "async/staleness_max",
    "weights/version",
    "time/step",
    "time/generate",
    "time/reward",
    "time/train",
    "time/sync",
    "time/wait",
    "time/reward_p50",
    "time/reward_p99",
    "time/reward_max",
    "samples/admitted",
    "samples/trained",
    "samples/filtered",
    "samples/failed",
)
"""Keys of every row of metrics.jsonl. `step` counts from 0; `time/*` are seconds of one step.

`time/reward_p50`, `_p99` and `_max` are over the completions of the step: how long the calls took
that judged each. The other times are the step's, and add up to `time/step`.
"""

Mode = Literal["online", "offline", "disabled"]

WANDB_START_S = 60.0
WANDB_FINISH_S = 60.0


def wandb_mode(setting: str, environ: Mapping[str, str]) -> Mode:
    """Where W&B data goes: the setting, and for `auto` what the environment allows.

    auto: $WANDB_MODE when set, else online with credentials (environment or netrc), else offline.
    """
    if setting == "auto":
        setting = environ.get("WANDB_MODE", "")
    if setting == "disabled":
        return "disabled"
    if setting == "offline":
        return "offline"
    return "online" if setting == "online" or _has_key(environ) else "offline"


def _has_key(environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    home = Path(environ.get("HOME", "~")).expanduser()
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    candidates = [environ["NETRC"]] if environ.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in candidates:
        try:
            if netrc.netrc(str(file)).authenticators(host):
                return True
        except FileNotFoundError:
            continue
        except (netrc.NetrcParseError, OSError) as error:
            logger.warning("cannot read %s (%s): no W&B key taken from it", file, error)
    return False


def plain(name: str, value: Any) -> int | float | None:
    """A metric as JSON holds it: int, finite float, or None for NaN, infinities and None.

    Raises ValueError naming the metric when the value is not a number.
    """
    if value is None:
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name} is not a number: {value!r}") from error
    return number if math.isfinite(number) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line torn by a crash is left out.

    Raises ValueError naming the line when any other line is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not JSON: {error}") from error
    return rows


def rollout_rows(step: int, scored_groups: Sequence[ScoredGroup]) -> list[dict[str, Any]]:
    """One row a completion, groups in order: what was asked, answered and scored."""
    rows = []
    for scored in scored_groups:
        group = scored.group
        for i, completion in enumerate(group.completions):
            rows.append(
                {
                    "step": step,
                    "group_id": group.id,
                    "prompt_id": group.prompt.id,
                    "completion_id": completion.id,
                    "prompt": group.prompt.content,
                    "completion": completion.text,
                    "reward": plain("reward", scored.totals[i]),
                    "by_function": {
                        name: plain(name, values[i]) for name, values in scored.by_function.items()
                    },
                    "parts": {name: plain(name, row[i]) for name, row in scored.parts.items()},
                    "extra": {name: row[i] for name, row in scored.extra.items()},
                    "reward_s": scored.sample_s[i] if scored.sample_s else None,
                    "errors": [
                        {"function": e.function, "cause": e.cause, "message": e.message}
                        for e in scored.errors
                        if e.completion_id == completion.id
                    ],
                    "finish_reason": completion.finish_reason,
                    "weight_versions": [int(v) for v in completion.weight_versions],
                    "seed": int(completion.seed),
                    "prompt_tokens": len(group.prompt.token_ids),
                    "tokens": len(completion.token_ids),
                    "token_ids": [int(t) for t in completion.token_ids],
                }
            )
    return rows


@contextmanager
def rollout_writer(
    folder: Path, step: int
) -> Iterator[Callable[[ScoredGroup], list[dict[str, Any]]]]:
    """Write folder/step-NNNNNN.jsonl group by group: the function adds one, returns its rows.

    The file is there when the block has ended, whole, or not at all.
    """
    target = folder / f"step-{step:06d}.jsonl"
    with replacing(target) as file:

        def add(scored: ScoredGroup) -> list[dict[str, Any]]:
            rows = rollout_rows(step, [scored])
            for row in rows:
                text = json.dumps(row, ensure_ascii=False) + "\n"
                # Half a surrogate pair, which a dataset may hold, has no UTF-8; as an escape it
                # is JSON.
                file.write(text.encode("utf-8", "backslashreplace"))
            return rows

        yield add


def write_rollouts(
    folder: Path, step: int, scored_groups: Sequence[ScoredGroup]
) -> list[dict[str, Any]]:
    """Write a step's completions to folder/step-NNNNNN.jsonl, one a line; returns the rows."""
    with rollout_writer(folder, step) as add:
        return [row for scored in scored_groups for row in add(scored)]


def table_rows(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` of a step's rows: the first completion of every group, then the second ..."""
    seen: dict[str, int] = {}
    ranked = []
    for row in rows:
        rank = seen.get(row["group_id"], 0)
        seen[row["group_id"]] = rank + 1
        ranked.append((rank, row))
    return [row for _, row in islice(sorted(ranked, key=lambda item: item[0]), limit)]


class Tracker:
    """Records a run in its directory, and in W&B as far as W&B allows.

    first_step: the first step that will be logged: the number of completed steps in the checkpoint
    the run continues from, 0 for a new run. Rows and rollout files from there on belong to work
    that will be done again, and are moved aside.
    resume_state: what `state()` returned when that checkpoint was saved; None for a new run.
    unwritten: rows that could not be written yet; they are tried again with the next one.

    Raises ValueError when metrics.jsonl is damaged. W&B never raises: its first failure is
    one warning, and the run goes on with metrics.jsonl.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        resume_state: dict[str, Any] | None = None,
        *,
        first_step: int = 0,
        aside: Aside | None = None,
    ) -> None:
        rollouts = run_dir / "rollouts"
        rollouts.mkdir(parents=True, exist_ok=True)
        aside = aside or Aside(run_dir)
        metrics = run_dir / "metrics.jsonl"
        self._last_step = _keep_metrics(metrics, first_step, aside)
        for file in sorted(rollouts.glob("step-*.jsonl")):
            if int(file.stem.removeprefix("step-")) >= first_step:
                aside.move(file)
        # Without a buffer: what could not be written must not be written later by chance.
        self._metrics = metrics.open("ab", buffering=0)
        self.unwritten: list[str] = []
        self._wandb: _Wandb | None = None
        mode = wandb_mode(config.tracking.wandb, os.environ)
        self._wandb_id: str | None = (resume_state or {}).get("wandb_id")
        if mode != "disabled":
            self._wandb_id = _run_id(run_dir / "wandb_id", self._wandb_id)
            self._wandb = _Wandb(run_dir, config, mode, self._wandb_id)

    def describe(self) -> str:
        """One line for people: where W&B data goes."""
        if self._wandb is None:
            return "W&B: disabled"
        return self._wandb.describe()

    def state(self) -> dict[str, Any]:
        """What to keep in a checkpoint, so that a resumed run is the same W&B run."""
        return {"wandb_id": self._wandb_id}

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append one step; on disk when this returns.

        Raises ValueError for missing STEP_KEYS, for values that are not numbers, and for a step
        that is not above the last one; OSError when the file cannot be written.
        """
        missing = [key for key in STEP_KEYS if key not in metrics]
        if missing:
            raise ValueError(f"metrics of a step lack {', '.join(missing)}")
        extra = sorted(set(metrics) - set(STEP_KEYS))
        row = {key: plain(key, metrics[key]) for key in (*STEP_KEYS, *extra)}
        step = row["step"]
        if not isinstance(step, int) or step <= self._last_step:
            raise ValueError(f"step {step} does not follow step {self._last_step}")
        self._last_step = step
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in row.items() if value is not None})
        self.unwritten.append(json.dumps(row) + "\n")
        self._write()

    def _write(self) -> None:
        """Write every row that is not in the file yet, or none of them."""
        size = os.fstat(self._metrics.fileno()).st_size
        text = "".join(self.unwritten).encode()
        try:
            if (written := self._metrics.write(text)) != len(text):
                raise OSError(errno.ENOSPC, f"{written} of {len(text)} bytes were written")
            os.fsync(self._metrics.fileno())
        except OSError:
            os.ftruncate(self._metrics.fileno(), size)
            raise
        self.unwritten.clear()

    def table(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Show rows of `rollout_rows` as a W&B table."""
        if self._wandb is not None and rows:
            self._wandb.table(step, rows)

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run with this exit code and close the files. May be called twice."""
        if not self._metrics.closed:
            try:
                if self.unwritten:
                    self._write()
            except OSError as error:
                logger.warning(
                    "the metrics of the last %d steps could not be written: %s",
                    len(self.unwritten),
                    error,
                )
            self._metrics.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code)


def _keep_metrics(file: Path, first_step: int, aside: Aside) -> int:
    """Leave the rows of steps before `first_step` in the file; returns the last of them, or -1."""
    read_metrics(file)  # raises when it is damaged
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    kept: dict[int, str] = {}
    others = []
    for line in text.splitlines(keepends=True):
        try:
            step = json.loads(line)["step"]
        except json.JSONDecodeError:
            step = first_step  # the last line, torn
        if step < first_step:
            others += [kept[step]] if step in kept else []
            kept[step] = line.rstrip("\n") + "\n"
        else:
            others.append(line)
    if others:
        aside.write(file.name, "".join(others))
    write_atomically(file, "".join(kept.values()))
    return max(kept, default=-1)


def _run_id(file: Path, known: str | None) -> str:
    """The W&B run id, kept in `file`: the checkpoint's, else the file's, else a new one."""
    if known is None and file.exists():
        known = file.read_text(encoding="utf-8").strip() or None
    if known is None:
        known = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
    write_atomically(file, known + "\n")
    return known


class _Wandb:
    """One W&B run that cannot hurt: bounded start and finish, one warning at the first failure."""

    def __init__(self, run_dir: Path, config: Config, mode: Mode, run_id: str) -> None:
        self._mode = mode
        self._run_id = run_id
        self._dir = run_dir
        self._run: Any = None
        self._lock = threading.Lock()
        self._abandoned = False
        if mode == "online" and not _has_key(os.environ):
            # W&B would ask for the key on the terminal.
            self._give_up("start", "tracking.wandb=online, but no WANDB_API_KEY and no netrc entry")
            return
        # In a thread: an unreachable server must not hold up the run longer than this.
        thread = threading.Thread(
            target=self._guard, args=("start", lambda: self._start(config)), daemon=True
        )
        thread.start()
        thread.join(WANDB_START_S)
        if thread.is_alive():
            self._give_up("start", f"no answer in {WANDB_START_S:.0f} s")

    def _start(self, config: Config) -> None:
        import wandb

        # The login speaks before the settings of init count.
        wandb.setup(settings=wandb.Settings(silent=True))
        run = wandb.init(
            project=config.tracking.project,
            name=config.tracking.name or self._dir.resolve().name,
            id=self._run_id,
            resume="allow",
            dir=str(self._dir),
            config=config.model_dump(mode="json"),
            mode=self._mode,
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=WANDB_START_S - 10,
                finish_timeout=WANDB_FINISH_S,
            ),
        )
        # W&B's own step only goes up, and drops what a resumed run logs again; ours is a metric.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        with self._lock:
            late = self._abandoned
            if not late:
                self._run = run
        if late:
            run.finish(exit_code=1)

    def describe(self) -> str:
        if self._run is None:
            return "W&B: not available, metrics.jsonl has everything"
        if self._mode == "offline":
            return f"W&B: offline, upload with `wandb sync {self._dir}/wandb/offline-run-*`"
        return f"W&B: {self._run.url}"

    def log(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            self._guard("log", lambda: self._run.log(row))

    def table(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        if self._run is not None:
            self._guard("log", lambda: self._log_table(step, rows))

    def _log_table(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        import wandb

        functions = sorted({name for row in rows for name in row["by_function"]})
        # No column may be untyped: W&B refuses a table whose first row holds a dict or a list.
        table = wandb.Table(
            columns=["step", "weight_version", "prompt", "completion", "reward"]
            + [f"reward/{name}" for name in functions]
            + ["tokens", "finish_reason"],
            data=[
                [
                    row["step"],
                    row["weight_versions"][-1],
                    _prompt_text(row["prompt"]),
                    row["completion"],
                    row["reward"],
                    *(row["by_function"].get(name) for name in functions),
                    row["tokens"],
                    row["finish_reason"],
                ]
                for row in rows
            ],
            allow_mixed_types=True,
        )
        self._run.log({"step": step, "rollout/samples": table})

    def finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        # The thread's own bound is above W&B's, which keeps what it could not upload on disk.
        thread = threading.Thread(
            target=self._guard, args=("finish", lambda: run.finish(exit_code)), daemon=True
        )
        thread.start()
        thread.join(WANDB_FINISH_S + 10)
        if thread.is_alive():
            self._give_up("finish", f"no answer in {WANDB_FINISH_S + 10:.0f} s")

    def _guard(self, doing: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001  W&B must never stop a run
            self._give_up(doing, f"{type(error).__name__}: {error}")

    def _give_up(self, doing: str, why: str) -> None:
        with self._lock:
            if self._abandoned:
                return
            self._abandoned = True
            self._run = None
        logger.warning(
            "W&B could not %s (%s); the run goes on without it, metrics.jsonl has everything",
            doing,
            why,
        )


def _prompt_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)
