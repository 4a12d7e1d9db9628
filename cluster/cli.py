"""The `cohort` command."""

from __future__ import annotations

import asyncio
import json
import locale
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cohort.cluster.signals import Stopped, leave_at_once_on_signals

# Before the imports that take the command's first seconds.
leave_at_once_on_signals()

import typer  # noqa: E402

from cohort.actors.errors import CohortError  # noqa: E402
from cohort.cluster.config import SECTIONS, ConfigError, all_keys  # noqa: E402
from cohort.cluster.config_file import load_config  # noqa: E402
from cohort.cluster.errors import RunError  # noqa: E402
from cohort.cluster.values import written  # noqa: E402

EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="cohort",
    help="GRPO for language models on Ray, vLLM and DeepSpeed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigArgument = Annotated[Path, typer.Argument(help="A YAML file, e.g. from deploy/configs/.")]


@contextmanager
def errors_shown() -> Iterator[None]:
    """End the command with the message of an error that is meant for people, and its exit code."""
    try:
        yield
    except CohortError as error:
        first, *others = str(error).splitlines() or [repr(error)]
        for line in (f"error: {first}", *(f"       {line}" for line in others)):
            typer.echo(line, err=True)
        raise typer.Exit(error.exit_code) from None
    except Stopped as stopped:
        typer.echo(f"{stopped}: stopped", err=True)
        raise typer.Exit(stopped.exit_code) from None


@app.command(context_settings=EXTRA)
@errors_shown()
def train(
    context: typer.Context,
    config: ConfigArgument,
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Start the run again when its driver is lost.")
    ] = False,
) -> None:
    """Train. Any config key can be given after the file: `key=value` or `--key value`.

    Example: cohort train deploy/configs/addition.yaml run.steps=10 actors.count=2
    """
    resolved = load_config(config, context.args)
    if supervise:
        from cohort.cluster.supervise import supervise as run_supervised

        raise typer.Exit(run_supervised(config, context.args, resolved))
    from cohort.cluster.commands.train import run_training

    raise typer.Exit(asyncio.run(run_training(resolved)))


@app.command(context_settings=EXTRA)
@errors_shown()
def check(
    context: typer.Context,
    config: ConfigArgument,
    generate: Annotated[
        bool, typer.Option(help="Start the engines and score what they generate.")
    ] = True,
    prompts: Annotated[
        int, typer.Option(min=1, help="Prompts that completions are generated for.")
    ] = 8,
) -> None:
    """Try everything that a run needs and say what to change; exit code 1 if it could not work.

    Nothing is trained and nothing is written to run.dir.
    """
    resolved = load_config(config, context.args)
    from cohort.cluster.commands.check.run import check as check_run

    raise typer.Exit(check_run(resolved, typer.echo, prompts if generate else 0))


@app.command("eval", context_settings=EXTRA)
@errors_shown()
def evaluate(
    context: typer.Context,
    target: Annotated[
        Path,
        typer.Argument(help="A run directory (its last checkpoint), or a config (its model.path)."),
    ],
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face folder to score instead.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the report as JSON here.")
    ] = None,
) -> None:
    """Score a model or a checkpoint on the task's held-out prompts: greedy and pass@k."""
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ConfigError(f"--output {output}: not a file in a folder that exists")
    is_run = target.is_dir()
    if is_run and not (target / "config.yaml").is_file():
        raise RunError(f"{target} is not a run directory: it holds no config.yaml")
    resolved = load_config(target / "config.yaml" if is_run else target, context.args)
    from cohort.cluster.commands.evaluate import checkpoint_model
    from cohort.cluster.commands.evaluate import evaluate as run_evaluation
    from cohort.cluster.observe.console import Console

    folder = model or (checkpoint_model(target) if is_run else None)
    with Console(1, "plain") as console:
        report = asyncio.run(run_evaluation(resolved, folder, console))
    typer.echo(f"model            {report.model}")
    typer.echo(f"held-out prompts {report.prompts}")
    typer.echo(
        f"greedy           solved {report.greedy_solved:.3f}  reward {report.greedy_reward:.3f}"
    )
    typer.echo(f"sampled x {report.samples:<6} reward {report.sampled_reward:.3f}")
    for k, value in report.pass_at.items():
        typer.echo(f"pass@{k:<11} {value:.3f}")
    for name, value in report.task_greedy.items():
        typer.echo(
            f"{name:<22} greedy {value:.3f}  sampled {report.task_sampled.get(name, math.nan):.3f}"
        )
    if report.failed_scores:
        typer.echo(f"{report.failed_scores} scores failed and count as unsolved", err=True)
    if output is not None:
        output.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")


@app.command(context_settings=EXTRA)
@errors_shown()
def warmup(
    context: typer.Context,
    config: ConfigArgument,
    out: Annotated[Path, typer.Argument(help="The folder to make; must not exist or be empty.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Demonstrations of one step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    examples: Annotated[
        int, typer.Option(min=0, help="Training rows that they come from. 0: all.")
    ] = 0,
) -> None:
    """Teach a model the task's demonstrations; OUT is a model folder to train from.

    Example: cohort warmup deploy/configs/travel.yaml runs/warm --steps 60 learner.workers=2
    """

    from cohort.cluster.commands.warmup import WarmUp, check_overrides, run_warmup

    check_overrides(context.args)
    given = WarmUp(steps, batch_size, learning_rate, examples)
    raise typer.Exit(asyncio.run(run_warmup(load_config(config, context.args), given, out)))


@app.command()
@errors_shown()
def export(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Argument(help="The folder to make; must not exist or be empty.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write the adapter of model.lora alone, for PEFT.")
    ] = False,
) -> None:
    """Write the last checkpoint as a Hugging Face folder for transformers and vLLM.

    Adapters (model.lora) are merged into its weights, or with --adapter written alone.
    """

    from cohort.learner.checkpoint import export as export_checkpoint

    what = "adapter" if adapter else "model"
    typer.echo(f"{what} written to {export_checkpoint(run_dir, out, adapter)}")


@app.command(context_settings=EXTRA)
@errors_shown()
def scale(
    context: typer.Context,
    run_dir: Annotated[Path, typer.Argument(help="The run directory, from any machine.")],
    wait: Annotated[float, typer.Option(min=0, help="Longest wait for the answer, seconds.")] = 600,
    address: Annotated[
        str | None,
        typer.Option(help="Job server to ask from, where RUN_DIR can be read on its cluster only."),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="With --address: the folder that is sent, as by `submit`.")
    ] = Path("."),
) -> None:
    """Change how many rollout actors and reward workers a run has, while it runs.

    It does so at the end of its step. New actors join when they have the newest weights; those
    that leave end their groups first, or hand them back.

    Example: cohort scale runs/mine actors=3 rewards=2
    """
    from cohort.cluster.scaling import ask, parse_counts

    request = parse_counts(context.args)
    if address is None:
        return ask(run_dir, request, wait, typer.echo)
    from cohort.cluster.commands.submit import run_job

    words = ["scale", str(run_dir), *context.args, "--wait", f"{wait:g}"]
    raise typer.Exit(run_job(words, address, working_dir))


@app.command()
@errors_shown()
def replay(
    run_dir: Annotated[Path, typer.Argument(help="A run directory that no driver uses now.")],
    steps: Annotated[
        str, typer.Option(help="A:B, as 10:20 for the steps 10 to 19. Empty: all of them.")
    ] = "",
) -> None:
    """Train a run's steps again from its journal and compare the weights, bit for bit.

    No engine is started. Exit code 1 when the weights of a step are not those that were recorded.
    """
    if not (run_dir / "config.yaml").is_file():
        raise RunError(f"{run_dir} is not a run directory: it holds no config.yaml")
    from cohort.cluster.commands.replay import Range, run_replay
    from cohort.cluster.observe.console import Console

    asked = Range.parse(steps or ":")
    with Console(1, "plain") as console:
        code = asyncio.run(run_replay(run_dir, asked, console, typer.echo))
    raise typer.Exit(code)


@app.command()
@errors_shown()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run directory, also of a run in progress.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page. Empty: RUN_DIR/report.html.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps, evenly spread, whose completions are shown.")
    ] = 40,
    groups: Annotated[int, typer.Option(min=1, help="Groups shown of each of these steps.")] = 4,
    prompts: Annotated[
        int,
        typer.Option(
            min=0, help="Prompts shown at several steps. 0: none; fewer files are read then."
        ),
    ] = 6,
    max_mb: Annotated[
        float,
        typer.Option(min=0.1, help="Largest size of the page; long texts are truncated to fit."),
    ] = 10.0,
) -> None:
    """Write a page about a run: curves, completions with rewards and advantages, times.

    One HTML file that needs no network and no server.
    """

    from cohort.cluster.observe.report.completions import ReportLimits
    from cohort.cluster.observe.report.page import write_report

    limits = ReportLimits(steps=steps, groups=groups, prompts=prompts)
    page = write_report(run_dir, out, limits, max_mb, datetime.now(UTC))
    typer.echo(f"page written to {page}")


@app.command(context_settings=EXTRA)
@errors_shown()
def submit(
    context: typer.Context,
    config: ConfigArgument,
    address: Annotated[
        str,
        typer.Option(
            help="The job server, e.g. http://head:8265.", envvar="RAY_API_SERVER_ADDRESS"
        ),
    ],
    working_dir: Annotated[
        Path, typer.Option(help="The folder that is packed and sent, with the config in it.")
    ] = Path("."),
    follow: Annotated[
        bool, typer.Option(help="Stream the job's log and return its exit code.")
    ] = True,
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Start the run again when its driver is lost.")
    ] = False,
) -> None:
    """Run the same training as a Ray job on a cluster; returns the job's exit code."""

    from cohort.cluster.commands.submit import submit as submit_job

    raise typer.Exit(
        submit_job(
            config,
            address,
            context.args,
            working_dir=working_dir,
            follow=follow,
            supervise=supervise,
        )
    )


@app.command()
def keys() -> None:
    """List every config key with its default, as it can be given, and what it means."""
    for dotted in all_keys():
        section, name = dotted.split(".", 1)
        info = SECTIONS[section].model_fields[name]
        default = info.get_default(call_default_factory=True)
        shown = "(required)" if info.is_required() else written(default)
        typer.echo(f"{dotted}={shown}\n    {info.description}")


def _speak_utf8() -> None:
    """Restart with UTF-8 for files, arguments and output where the locale is another.

    Paths, prompts and completions hold any character; child processes inherit the setting.
    """
    if not sys.flags.utf8_mode and locale.getencoding().lower().replace("-", "") != "utf8":
        environment = {**os.environ, "PYTHONUTF8": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def main() -> None:
    """Entry point of the `cohort` command."""
    _speak_utf8()
    # The working folder's own modules come first, as with `python -m`.
    sys.path.insert(0, "")
    app()


if __name__ == "__main__":
    main()
