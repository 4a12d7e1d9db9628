"""How many rollout actors and reward workers a run has, looked at between two steps.

They change in three ways: somebody asks (`cohort scale`), somebody edits `config.yaml` in the run
directory, or the run itself keeps its learner busy between `actors.min_count` and
`actors.max_count`. No group is lost: newcomers join when they have the newest weights, leavers end
what they have begun or hand it back.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from cohort.actors.demand import Demand
from cohort.cluster.config import Config, ConfigError, expand
from cohort.cluster.config_file import load_config
from cohort.cluster.files import write_atomically
from cohort.cluster.placement import (
    connected_cluster,
    fitting,
    request_nodes,
    several_machines,
    this_machine,
)
from cohort.cluster.run import Run
from cohort.cluster.run_dir import SCALE_ANSWER, SCALE_REQUEST
from cohort.cluster.scaling import Answer, Request, read_message, why_not


class Sizing:
    """Changes how many actors and workers a run has.

    Args:
        config: The run's, as it was started.
    """

    def __init__(self, config: Config) -> None:
        actors = config.actors
        self._folder = expand(config.run.dir)
        self._file = self._folder / "config.yaml"
        self._written = _counts(config)
        self._changed_at = self._change_time()
        self._asked_for = 0
        # More actors than groups at once would have nothing to do.
        groups = config.task.prompts_per_step * (actors.max_staleness + 1)
        self._demand: Demand | None = None
        if actors.elastic:
            self._demand = Demand(actors.fewest, max(actors.fewest, min(actors.most, groups)))

    async def adjust(self, run: Run, step_s: float, waited_s: float) -> None:
        """Do what is asked for, and what the last step shows.

        Args:
            run: Between two steps.
            step_s: Seconds that the last one took.
            waited_s: Of them, those that the learner waited for its groups.
        """
        if several_machines() and not run.publisher.remote:
            # A machine has joined. What is published from now on reaches it.
            return
        if (request := self._asked(run)) is not None:
            answer = await self._take_up(run, request)
            try:
                write_atomically(self._folder / SCALE_ANSWER, json.dumps(asdict(answer)))
            except OSError as error:
                # What was asked for is done; a full disk ends no run.
                run.console.note(f"the answer to `cohort scale` could not be written: {error}")
        if (request := self._edited(run)) is not None:
            await self._take_up(run, request)
        if self._demand is not None:
            await self._follow(run, self._demand, step_s, waited_s)

    def _asked(self, run: Run) -> Request | None:
        """What `cohort scale` has left in the run directory."""
        file = self._folder / SCALE_REQUEST
        if not file.is_file():
            return None
        request = read_message(file, Request)
        file.unlink(missing_ok=True)
        if request is None:
            run.console.note(f"{file} held no request of `cohort scale`, and was removed")
        return request

    def _edited(self, run: Run) -> Request | None:
        """What somebody has changed in the run's config.yaml since it was written."""
        changed_at = self._change_time()
        if changed_at in (None, self._changed_at):
            return None
        self._changed_at = changed_at
        try:
            counts = _counts(load_config(self._file, []))
        except ConfigError as error:
            run.console.note(f"{self._file} was edited and is not followed: {error}")
            return None
        before, self._written = self._written, counts
        if counts == before:
            run.console.note(
                f"{self._file} was edited: while a run goes on, it follows actors.count and "
                "rewards.workers alone"
            )
            return None
        actors, rewards = counts
        return Request(
            "edited",
            actors if actors != before[0] else None,
            rewards if rewards != before[1] else None,
        )

    def _change_time(self) -> int | None:
        try:
            return self._file.stat().st_mtime_ns
        except OSError:
            return None

    async def _take_up(self, run: Run, request: Request) -> Answer:
        refusal = _refusal(run, request)
        answer = Answer(request.id, not refusal, refusal or await _scale(run, request))
        run.console.note(answer.text)
        return answer

    async def _follow(self, run: Run, demand: Demand, step_s: float, waited_s: float) -> None:
        """Have as many actors as keep the learner busy, as far as the machines hold them."""
        fleet = run.actors.pool.fleet
        have = len(fleet.staying)
        joining = not all(slot.ready for slot in fleet.staying)
        wanted = demand.after(step_s, waited_s, have, joining)
        granted = wanted
        if wanted > have:
            granted = min(wanted, have + fitting(run.actors.placement.rollout))
            if _refusal(run, Request("demand", actors=granted)):
                granted = have
        self._tell_autoscaler(run, wanted)
        if granted != have:
            run.console.note(
                f"the learner waited {waited_s / step_s:.0%} of step {run.progress.step}"
            )
            await self._take_up(run, Request("demand", actors=granted))

    def _tell_autoscaler(self, run: Run, wanted: int) -> None:
        """Ask Ray's autoscaler, where the cluster has one, for nodes that hold so many actors.

        It counts what the cluster has in all, so the rest of the run is asked for as well. What it
        does shows in the cluster's free resources some steps later.
        """
        if wanted != self._asked_for:
            self._asked_for = wanted
            placement, ranks = run.actors.placement, run.config.learner.workers
            request_nodes(
                [placement.rollout] * wanted
                + [placement.learner] * ranks
                + [placement.reward] * run.actors.rewards.count
            )


def _counts(config: Config) -> tuple[int, int]:
    return config.actors.count, config.rewards.workers


async def _scale(run: Run, request: Request) -> str:
    """Begin what was asked for; what that is, in words."""
    said = []
    fleet, rewards = run.actors.pool.fleet, run.actors.rewards
    if request.actors is not None:
        said.append(f"rollout actors {len(fleet.staying)} -> {request.actors}")
        fleet.scale(request.actors)
    if request.rewards is not None:
        said.append(f"reward workers {rewards.count} -> {request.rewards}")
        await rewards.scale(request.rewards)
    return f"after step {run.progress.step}: {', '.join(said)}"


def _refusal(run: Run, request: Request) -> str:
    """Why the run cannot have it; empty when it can."""
    actors = run.config.actors
    within = request.actors is None or actors.fewest <= request.actors <= actors.most
    if actors.elastic and not within:
        return (
            f"not scaled: actors={request.actors} is not within actors.min_count={actors.fewest} "
            f"and actors.max_count={actors.most}, between which this run scales itself"
        )
    more = 0 if request.actors is None else request.actors - len(run.actors.pool.fleet.staying)
    return why_not(
        run.config,
        request,
        more,
        run.actors.placement.device,
        connected_cluster(),
        run.learner.facts.parameters,
        None if run.publisher.remote else this_machine().memory,
    )
