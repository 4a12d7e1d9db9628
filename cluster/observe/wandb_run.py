"""Weights & Biases, on the side: its first failure is one warning, and the run goes on."""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from cohort.actors.records import Messages
from cohort.cluster.config import Config
from cohort.cluster.files import write_atomically
from cohort.cluster.observe.metrics_file import MetricRow
from cohort.cluster.observe.rollouts import RolloutRow, transcript

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger(__name__)

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
    return "online" if setting == "online" or has_key(environ) else "offline"


def has_key(environ: Mapping[str, str]) -> bool:
    """Whether W&B would find credentials. Asking W&B itself starts a service whose end may hang."""
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


def run_id(file: Path, known: str | None) -> str:
    """The W&B run id, kept in `file`: `known` (a checkpoint's), else the file's, else a new one."""
    if known is None and file.exists():
        known = file.read_text(encoding="utf-8").strip() or None
    if known is None:
        known = secrets.token_hex(4)
    write_atomically(file, known + "\n")
    return known


class WandbRun:
    """One W&B run that cannot stop ours: its start and its finish are bounded, errors are warnings.

    Args:
        run_dir: Where W&B keeps its files; its name is the run's where tracking.name is empty.
        config: The whole config, which W&B shows.
        mode: See `wandb_mode`.
        run_id: The same for a run and those that continue it.
    """

    def __init__(self, run_dir: Path, config: Config, mode: Mode, run_id: str) -> None:
        self._mode = mode
        self._run_id = run_id
        self._dir = run_dir
        self._run: Run | None = None
        self._lock = threading.Lock()
        self._abandoned = False
        if mode == "online" and not has_key(os.environ):
            # W&B would ask for the key on the terminal.
            self._give_up(
                "start",
                "tracking.wandb=online, but there is no API key: set WANDB_API_KEY or run "
                "`wandb login`",
            )
            return
        # In a thread: an unreachable server must not hold up the run longer than this.
        self._bounded("start", lambda: self._start(config), WANDB_START_S)

    def _start(self, config: Config) -> None:
        import wandb

        # The login speaks before the settings of `init` count.
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
        """One line for people: where the data goes."""
        if self._run is None:
            return "W&B: not available, metrics.jsonl has everything"
        if self._mode == "offline":
            return f"W&B: offline, upload with `wandb sync {self._dir}/wandb/offline-run-*`"
        return f"W&B: {self._run.url}"

    def log(self, row: MetricRow) -> None:
        """Log the metrics of a step that have a value."""
        if (run := self._run) is not None:
            known = {key: value for key, value in row.items() if value is not None}
            self._guard("log", lambda: run.log(known))

    def table(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Log completions of a step as a table."""
        if (run := self._run) is not None:
            self._guard("log", lambda: _log_table(run, step, rows))

    def finish(self, exit_code: int) -> None:
        """End the run, uploading what is left. May be called twice."""
        run, self._run = self._run, None
        if run is not None:
            # Above W&B's own bound, after which it keeps on disk what it could not upload.
            self._bounded("finish", lambda: run.finish(exit_code), WANDB_FINISH_S + 10)

    def _bounded(self, doing: str, action: Callable[[], object], timeout_s: float) -> None:
        thread = threading.Thread(target=self._guard, args=(doing, action), daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive():
            self._give_up(doing, f"no answer in {timeout_s:.0f} s")

    def _guard(self, doing: str, action: Callable[[], object]) -> None:
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


def _log_table(run: Run, step: int, rows: Sequence[RolloutRow]) -> None:
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
                transcript(row),
                row["reward"],
                *(row["by_function"].get(name) for name in functions),
                row["tokens"],
                row["finish_reason"],
            ]
            for row in rows
        ],
        allow_mixed_types=True,
    )
    run.log({"step": step, "rollout/samples": table})


def _prompt_text(content: Messages | str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)
