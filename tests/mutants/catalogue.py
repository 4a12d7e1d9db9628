"""The mutants. `old` occurs exactly once in its file: who changes such a line changes it here."""

from __future__ import annotations

from tests.mutants.runner import Mutant

LOOP = "tests/harness/test_loop.py"
RESUME = "tests/harness/test_resume.py"
CHAOS = "tests/harness/test_chaos.py"
DURABLE = "tests/harness/test_durable.py"
COSTS = "tests/harness/test_costs.py"
ADMISSION = "tests/actors/test_admission.py"
RECOVERY = "tests/actors/test_recovery.py"
POOL = "tests/actors/test_pool.py"
WATCH = "tests/actors/test_watch.py"
WEIGHTS = "tests/harness/test_weights.py"
BATCH = "tests/learner/test_batch.py"
GRPO = "tests/learner/test_grpo.py"
GROUP = "tests/learner/test_group.py"
EPISODES = "tests/learner/test_episodes.py"
TURN_CREDIT = "tests/learner/test_turn_credit.py"
RESCUE = "tests/harness/test_rescue.py"
DEATHS = "tests/harness/test_learner_deaths.py"
COPIES = "tests/learner/test_copies.py"
BEHIND = "tests/harness/test_saving_behind.py"
EVALUATION = "tests/harness/test_evaluation.py"
RUN_DIR = "tests/cluster/test_run_dir.py"
SAVED = "tests/learner/test_saved.py"
TEMPLATES = "tests/rewards/test_templates.py"
CONTINUATION = "tests/rewards/test_continuation.py"
FINAL_PART = "tests/rewards/test_final_part.py"
LAYOUTS = "tests/rewards/test_layouts.py"
LENGTHS = "tests/cluster/test_lengths.py"
REWARD_POOL = "tests/rewards/test_reward_pool.py"
LOADING = "tests/rewards/test_reward_loading.py"
NUMBERS = "tests/rewards/test_reward_numbers.py"
RESUMED = "tests/cluster/test_resume.py"
FOLDERS = "tests/cluster/test_model_folder.py"
RAY_START = "tests/cluster/test_ray_start.py"
LOST = "tests/harness/test_lost_groups.py"
JOURNAL = "tests/harness/test_journal.py"
SEGMENTS = "tests/cluster/journal/test_segments.py"
HISTORY = "tests/cluster/journal/test_history.py"
VALUES = "tests/cluster/test_values.py"
ENVIRONMENTS = "tests/rewards/test_environments.py"
AGENTS = "tests/rewards/test_agents.py"
TALKS = "tests/harness/test_episodes.py"
BAD_EPISODES = "tests/rewards/test_bad_episodes.py"
SANDBOX_TOOLS = "tests/rewards/test_sandbox_tools.py"
MCP_TOOLS = "tests/rewards/test_mcp_tools.py"
SUPERVISE = "tests/cluster/test_supervise.py"
RAY_WATCH = "tests/cluster/test_ray_watch.py"
RAY_LOST = "tests/harness/test_ray_lost.py"
WAITING = "tests/cluster/test_waiting.py"

MUTANTS = (
    Mutant(
        "actors/engine.py",
        "if not await self._answer(self._llm.reset_prefix_cache(reset_running_requests=True)):",
        "if not True:",
        "prompts are never read from a cache that older weights filled",
        (f"{LOOP}::test_the_prefix_cache_is_reset_at_every_update",),
    ),
    Mutant(
        "actors/admission.py",
        "return steps_done + max_staleness",
        "return steps_done + max_staleness + 1",
        "no completion is older than actors.max_staleness",
        (f"{ADMISSION}::test_both_uses_of_the_formula_agree",),
    ),
    Mutant(
        "cluster/prepare.py",
        "        and not bfloat16_on_this_cpu()\n",
        "        and False\n",
        "a CPU without bfloat16 arithmetic trains in float32",
        ("tests/cluster/test_precision.py::test_auto_is_bfloat16_where_that_is_fast",),
    ),
    Mutant(
        "actors/process.py",
        "@functools.cache\ndef _start_sweeper_of",
        "def _start_sweeper_of",
        "a process has one sweeper, however many runs it makes",
        ("tests/harness/test_ends.py::test_a_run_leaves_nothing_open_in_its_process",),
    ),
    Mutant(
        "cluster/run.py",
        "progress.cursor = finished.batch.cursor",
        "progress.cursor = self.stream.cursor",
        "a checkpoint holds its own step's place in the data, not the stream's",
        (f"{RESUME}::test_every_checkpoint_of_an_overlapped_run_holds_its_own_steps_cursor",),
    ),
    Mutant(
        "cluster/publishing.py",
        "        gap = await self.pool.sync(info, replace(self.probe, logprobs=logprobs))\n",
        "        gap = 0.0\n"
        "        if info.version == 0:\n"
        "            gap = await self.pool.sync(info, replace(self.probe, logprobs=logprobs))\n",
        "every step's weights are published before the next generation",
        (f"{LOOP}::test_every_step_generates_with_the_weights_of_the_step_before",),
    ),
    Mutant(
        "actors/rollout.py",
        "if info.version < self._newest:",
        "if False:",
        "an actor refuses weights older than its own",
        (f"{LOOP}::test_an_actor_refuses_weights_older_than_its_own",),
    ),
    Mutant(
        "cluster/requests.py",
        'seed=derive_seed(config.run.seed, "rollout", step, prompt.id),',
        'seed=derive_seed(config.run.seed, "rollout", prompt.id),',
        "a group's seed is its own in every step",
        (f"{LOOP}::test_a_groups_seed_is_its_own_in_every_step_and_for_every_prompt",),
    ),
    Mutant(
        "learner/checkpoint.py",
        "        for path in files:\n            _sync(path)\n",
        "",
        "a checkpoint's files are on the disk before it is complete",
        (f"{DURABLE}::test_every_file_and_folder_is_written_through_before_the_marker",),
    ),
    # The journal.
    Mutant(
        "cluster/loop.py",
        "            await run.journal.before(batch)\n"
        "            return batch, await run.learner.step(batch.groups)\n",
        "            result = await run.learner.step(batch.groups)\n"
        "            await run.journal.before(batch)\n"
        "            return batch, result\n",
        "a step is in the journal before it is trained",
        (f"{JOURNAL}::test_a_step_is_on_the_disk_before_it_is_trained",),
    ),
    Mutant(
        "cluster/journal/actor.py",
        "            writer.append(record)\n            writer.sync()\n",
        "            writer.append(record)\n",
        "a step is on the disk before it is trained",
        (f"{JOURNAL}::test_a_step_is_on_the_disk_before_it_is_trained",),
    ),
    Mutant(
        "cluster/stream.py",
        "first = self._ahead.pop(step, self.cursor)",
        "first = self.cursor",
        "prompts that were drawn ahead are drawn again by a resumed run",
        (f"{JOURNAL}::test_prompts_drawn_ahead_are_neither_seen_again_nor_left_out",),
    ),
    Mutant(
        "cluster/run.py",
        "        progress.ahead = self.stream.ahead()\n",
        "",
        "a checkpoint holds what was drawn ahead when its step was done",
        (f"{JOURNAL}::test_prompts_drawn_ahead_are_neither_seen_again_nor_left_out",),
    ),
    Mutant(
        "cluster/journal/journal.py",
        "return dict(ahead.failed).get(name) or dict(ahead.groups).get(name)",
        "return dict(ahead.groups).get(name)",
        "a group that failed in a step that was trained fails in it again",
        (f"{HISTORY}::test_a_group_is_put_back_for_the_very_request_it_answers",),
    ),
    Mutant(
        "cluster/journal/records.py",
        "return not self.scores.errors and not any(e.failure for e in self.meta.episodes)",
        "return True",
        "what could not be scored is tried again by a resumed run",
        (f"{HISTORY}::test_what_could_not_be_scored_is_tried_again_unless_its_step_was_trained",),
    ),
    Mutant(
        "cluster/journal/history.py",
        "        return all(number in self.steps for number in range(step, last + 1))\n",
        "        return True\n",
        "groups of a past that will not come again are not used",
        (f"{HISTORY}::test_a_journal_goes_on_from_a_checkpoint_only_without_a_gap",),
    ),
    Mutant(
        "cluster/journal/opening.py",
        'if _staleness(before["config"]) > config.actors.max_staleness:',
        "if False:",
        "what was journaled under a larger actors.max_staleness is not too old",
        (f"{JOURNAL}::test_fewer_steps_of_staleness_do_not_train_what_is_too_old",),
    ),
    Mutant(
        "cluster/journal/retention.py",
        "too_much = total > limit_bytes and last_steps[number] < checkpoints[-1]",
        "too_much = total > limit_bytes",
        "what a resume needs is never removed",
        (f"{SEGMENTS}::test_what_a_resume_needs_is_never_removed",),
    ),
    Mutant(
        "cluster/journal/format.py",
        "            raise DamagedError(offset)\n",
        "            return\n",
        "damage in the middle of the journal is an error",
        (f"{SEGMENTS}::test_damage_is_found_wherever_it_is",),
    ),
    Mutant(
        "cluster/journal/writer.py",
        "            os.ftruncate(self._descriptor, self._end)\n",
        "",
        "a record without room leaves nothing",
        (f"{SEGMENTS}::test_a_record_without_room_leaves_nothing_and_the_next_goes_on",),
    ),
    # The rollout actors and their pool.
    Mutant(
        "actors/fleet.py",
        "if slot.repair is None and slot.pulling is None:",
        "if slot.pulling is None:",
        "an actor in repair is left alone by an update",
        (
            f"{RECOVERY}::test_an_update_leaves_an_actor_in_repair_alone_and_it_comes_up_with_the_newest",
        ),
    ),
    Mutant(
        "actors/fleet.py",
        "if any(other is not slot for other in self.staying):",
        "if False:",
        "a slot that keeps failing is retired and the run goes on with the others",
        (f"{POOL}::test_a_slot_that_keeps_failing_is_retired_and_the_run_goes_on_down_to_one",),
    ),
    Mutant(
        "actors/fleet.py",
        "                    self._give_up_in_time(slot, why)\n",
        "",
        "a run without an actor that can start ends",
        (f"{POOL}::test_an_actor_that_keeps_failing_ends_the_run_with_its_last_words",),
    ),
    Mutant(
        "actors/fleet.py",
        "if not pulling or now >= until:",
        "if not pulling:",
        "an update waits for no engine that is not needed",
        (f"{RECOVERY}::test_an_update_waits_for_no_engine_that_the_next_step_does_not_need",),
    ),
    Mutant(
        "actors/slot.py",
        "(self.version >= oldest or self.updating)",
        "True",
        "a group goes to an engine whose weights are new enough",
        (f"{RECOVERY}::test_an_update_waits_for_no_engine_that_the_next_step_does_not_need",),
    ),
    Mutant(
        "actors/rollout.py",
        "self._version == UNSYNCED or self._version >= oldest",
        "True",
        "a group is never begun with weights older than it asks for",
        (f"{RECOVERY}::test_a_group_is_never_begun_with_weights_older_than_it_asks_for",),
    ),
    Mutant(
        "actors/pool.py",
        "elif isinstance(meta, NotSynced):",
        "elif False:",
        "an actor without weights is waited for, not replaced",
        (f"{RECOVERY}::test_not_synced_is_a_reason_to_wait_not_to_replace",),
    ),
    Mutant(
        "actors/fleet.py",
        "if not gap <= limit:",
        "if gap > limit:",
        "a probe that is not a number proves nothing",
        (f"{POOL}::test_nan_in_the_probe_is_not_within_tolerance",),
    ),
    Mutant(
        "actors/fleet.py",
        "if stale(probe, self._probe_before, logprobs, usual):",
        "if False:",
        "an engine that stayed at the version before is noticed by the probe",
        (f"{RECOVERY}::test_an_engine_that_stays_at_the_version_before_ends_the_run",),
    ),
    Mutant(
        "actors/slot.py",
        "if watch.late(since, max(limit_s, pause)):",
        "if watch.late(since, 100 * max(limit_s, pause)):",
        "an engine that makes no progress is replaced after its timeout",
        (f"{RECOVERY}::test_one_that_stands_still_is_replaced_soon",),
    ),
    Mutant(
        "actors/slot.py",
        "                if watch.frozen:\n",
        "                if False:\n",
        "a frozen engine is found in 15 seconds",
        (f"{COSTS}::test_a_frozen_engine_is_found_in_15_seconds",),
    ),
    Mutant(
        "actors/watch.py",
        "(load is not None and not look.awake)",
        "True",
        "what wants to compute on a busy machine is not frozen",
        (f"{WATCH}::test_slow_and_healthy_is_never_frozen",),
    ),
    Mutant(
        "actors/slot.py",
        "                    watch.beat(elapsed, told.progress, look, told.working)",
        "                    watch.beat(elapsed)",
        "an engine that is slow and healthy is never replaced",
        (f"{COSTS}::test_a_slow_engine_is_not_a_dead_one",),
    ),
    Mutant(
        "actors/dispatch.py",
        "heapq.heappush(self.queue, (job.priority, job, future))",
        "heapq.heappush(self.queue, ((0, job.order), job, future))",
        "what waits is served oldest step first",
        (f"{RECOVERY}::test_what_waits_is_served_oldest_step_first_also_what_was_lost",),
    ),
    Mutant(
        "actors/pool.py",
        "slot.failures = 0",
        "pass",
        "failures far apart do not add up to a run that ends",
        (f"{POOL}::test_failures_far_apart_do_not_add_up",),
    ),
    Mutant(
        "actors/rollout.py",
        "        self._version = UNSYNCED\n        await engine.update",
        "        await engine.update",
        "an actor whose update failed does not generate",
        (f"{RECOVERY}::test_an_actor_whose_update_failed_says_not_synced_and_takes_the_next",),
    ),
    Mutant(
        "actors/rollout.py",
        "        await engine.prove(path, info.version)\n",
        "",
        "an update that an engine ignores is caught at that update",
        (f"{WEIGHTS}::test_an_update_that_an_engine_ignores_ends_the_run_at_that_update",),
    ),
    Mutant(
        "actors/rollout.py",
        "if self._version == UNSYNCED:\n                return",
        "if False:\n                return",
        "nothing is generated before weights were pulled",
        (f"{POOL}::test_an_actor_refuses_to_generate_before_it_has_pulled_weights",),
    ),
    Mutant(
        "actors/errors.py",
        "if isinstance(error, (RayError, TimeoutError, ConnectionError, MemoryError)):",
        "if isinstance(error, (TimeoutError, ConnectionError, MemoryError)):",
        "every loss that Ray reports is the machine's fault, to be tried elsewhere",
        (
            "tests/actors/test_errors.py"
            "::test_every_error_of_ray_is_infra_but_those_that_a_program_makes",
        ),
    ),
    Mutant(
        "actors/machine.py",
        'for name in ("memory.max", "memory.high"):',
        'for name in ("memory.max",):',
        "a container's memory limits are heeded",
        ("tests/actors/test_machine.py::test_version_2",),
    ),
    # The learner.
    Mutant(
        "learner/credit.py",
        "    by_task = _values(scores, task_rewards(meta, scores), algorithm, 1.0)",
        "    longest = max(meta.completion_tokens)\n    by_task = _values("
        "scores, shaped_rewards(meta, scores, algorithm, longest), algorithm, 1.0)",
        "a length penalty alone is no signal",
        (f"{BATCH}::test_a_length_penalty_is_no_signal",),
    ),
    Mutant(
        "learner/plan.py",
        "            sum(sizes[start::count]),\n",
        "            sum(sizes[: len(credit.groups)][start::count]),\n",
        "a constant normaliser is over all completions, trained or not",
        (f"{BATCH}::test_a_constant_is_over_all_completions",),
    ),
    Mutant(
        "learner/credit.py",
        "        None if tokens == 0 else reward\n",
        "        reward\n",
        "a completion without tokens is not trained",
        (f"{BATCH}::test_plan_invariants",),
    ),
    Mutant(
        "learner/advantages.py",
        '    alone = algorithm.scale == "group" and all_equal(rewards)\n',
        "    alone = False\n",
        "a KL off equal rewards is not brought to full size",
        (f"{GRPO}::test_a_kl_off_the_reward",),
    ),
    Mutant(
        "learner/objectives.py",
        "ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_T",
        "ratio_T.clamp(1.0 - clip_low, 1.0 + clip_low) * advantages_T",
        "the upper clip bound is its own",
        (f"{GRPO}::test_clipped_objective",),
    ),
    Mutant(
        "learner/corrections.py",
        "weight_T = w_T.clamp(max=algorithm.correction_cap)",
        "weight_T = torch.ones_like(w_T)",
        "the engine's mismatch is corrected",
        (f"{GRPO}::test_token_corrections",),
    ),
    Mutant(
        "learner/batch.py",
        "                before[:1] = last[place.branch]\n",
        "                pass\n",
        "a completion's first token is predicted by the prompt's last, wherever it lies in the row",
        (f"{BATCH}::test_tensors_against_brute_force",),
    ),
    # Episodes.
    Mutant(
        "learner/episodes.py",
        "        if parent is not None and turn.kept == joins",
        "        if False and parent is not None and turn.kept == joins",
        "turns that extend each other are one branch",
        (f"{EPISODES}::test_turns_that_extend_each_other_are_one_branch",),
    ),
    Mutant(
        "learner/episodes.py",
        "    return Join(branch, kept)\n",
        "    return Join(branch, kept - (branch is not None))\n",
        "a fork sees exactly the tokens that it kept",
        (f"{EPISODES}::test_a_plan_conserves_tokens_and_every_token_sees_its_own_sequence",),
    ),
    Mutant(
        "learner/shapes.py",
        "        taken = min(tokens, stop - start)\n",
        "        taken = min(tokens, stop)\n",
        "a branch does not see what comes after its fork",
        (f"{EPISODES}::test_every_sampled_token_is_scored_and_trained_as_in_its_own_sequence",),
    ),
    Mutant(
        "learner/attention.py",
        "        kept = [0, *row.kept()]\n",
        "        kept = [0, *(row.prompt for _ in row.branches)]\n",
        "a branch that is computed by itself attends causally behind what it continues",
        (f"{EPISODES}::test_every_sampled_token_is_scored_and_trained_as_in_its_own_sequence",),
    ),
    Mutant(
        "learner/attention.py",
        "                for first, last in history:\n",
        "                for first, last in [(0, row.prompt)]:\n",
        "under a mask, a branch attends to the branches that it continues",
        (f"{EPISODES}::test_every_sampled_token_is_scored_and_trained_as_in_its_own_sequence",),
    ),
    Mutant(
        "learner/batch.py",
        "self.position_ids.append(torch.arange(kept, kept + tokens))",
        "self.position_ids.append(torch.arange(row.prompt_tokens, row.prompt_tokens + tokens))",
        "positions count along a turn's own sequence",
        (f"{EPISODES}::test_a_plan_conserves_tokens_and_every_token_sees_its_own_sequence",),
    ),
    Mutant(
        "learner/batch.py",
        "sequences.setdefault(s.completion_id, len(sequences)) for s in batch.segments",
        "i for i, _ in enumerate(batch.segments)",
        "an episode in several rows is one sequence",
        (f"{TURN_CREDIT}::test_an_episode_has_one_ratio_and_one_kl",),
    ),
    Mutant(
        "learner/step.py",
        "before = found.get(segment.completion_id, 0.0)",
        "before = 0.0",
        "the KL of an episode is summed over all its rows",
        (f"{TURN_CREDIT}::test_an_episode_has_one_ratio_and_one_kl",),
    ),
    Mutant(
        "learner/packing.py",
        "        if tokens := sum(segment.turns[place.turn].sampled for place in places):\n",
        "        if tokens := segment.tokens:\n",
        "without sharing, a row trains the tokens of its own branch only",
        (f"{EPISODES}::test_a_plan_conserves_tokens_and_every_token_sees_its_own_sequence",),
    ),
    Mutant(
        "learner/learner.py",
        "            whole_completions=self.spec.algorithm.judges_completions,\n",
        "            whole_completions=False,\n",
        "ratios of whole completions see all rows of one",
        (f"{GROUP}::test_completions_are_kept_whole_where_their_loss_needs_it",),
    ),
    Mutant(
        "learner/advantages.py",
        "tuple(accumulate(reversed(own)))[::-1]",
        "tuple(accumulate(own))",
        "a turn is credited with what comes after it",
        (f"{TURN_CREDIT}::test_advantages_of_turns_the_long_way",),
    ),
    Mutant(
        "learner/credit.py",
        "            rest = reward - (own if valid(own) else 0.0)\n",
        "            rest = reward\n",
        "the environment's rewards count once",
        (f"{TURN_CREDIT}::test_what_is_not_the_environments_counts_to_the_last_turn",),
    ),
    Mutant(
        "learner/credit.py",
        "all_equal(_flat(turn_rewards(scores, rewards)))",
        "False",
        "a KL off equal turn rewards is not brought to full size",
        (f"{TURN_CREDIT}::test_a_kl_off_equal_turn_rewards_keeps_its_size",),
    ),
    Mutant(
        "learner/weights.py",
        "            fingerprint = xxhash.xxh3_128(view).hexdigest()",
        "            fingerprint = xxhash.xxh3_128(header).hexdigest()",
        "a torn weight file is noticed by its fingerprint",
        ("tests/learner/test_weights.py::test_file_is_the_model",),
    ),
    # Rewards.
    Mutant(
        "rewards/environment.py",
        "    known = name in NAMES or (name.startswith(PREFIXES) and not SECRET.search(name))",
        "    known = not SECRET.search(name)",
        "reward code sees only variables that are known to be harmless",
        ("tests/rewards/test_environment.py::test_only_harmless_variables_pass",),
    ),
    # Config.
    Mutant(
        "cluster/values.py",
        'NULLS = frozenset({"", "~", "null", "Null", "NULL"})',
        'NULLS = frozenset({"", "~", "null", "Null", "NULL", "no"})',
        "a text key gets its value as it is written",
        ("tests/cluster/test_values.py::test_texts_of_the_command_line_stay_what_they_are",),
    ),
    # A run's life: start, stop, saving, reporting.
    Mutant(
        "cluster/loop.py",
        "        await rescue(run, error)\n",
        "",
        "what was learned is saved before an error ends the run",
        (f"{RESCUE}::test_a_learner_that_lives_is_saved_before_an_error_ends_the_run",),
    ),
    Mutant(
        "cluster/saving.py",
        "await run.learner.save(folder, after_skipped=True)",
        "await run.learner.save(folder)",
        "a last step that is not finite loses nothing",
        (f"{RESCUE}::test_a_last_step_that_is_not_finite_loses_nothing",),
    ),
    Mutant(
        "cluster/saving.py",
        "    while error := await _try_to_save(run, run.saves.best):\n",
        "    if error := await _try_to_save(run, run.saves.best):\n",
        "a full disk at the end of a run is waited for",
        (f"{RESCUE}::test_a_full_disk_at_the_end_is_waited_for",),
    ),
    Mutant(
        "cluster/saving.py",
        "history.as_dict(before=run.progress.step)",
        "history.as_dict()",
        "outcomes of a step that was not trained are not saved",
        (f"{RESCUE}::test_pass_rates_of_a_step_that_was_not_trained_are_not_saved",),
    ),
    Mutant(
        "learner/saving.py",
        "    if not everywhere(finite, device):\n",
        "    if False:\n",
        "weights that are not finite are never saved",
        (f"{SAVED}::test_weights_that_are_not_finite_are_found",),
    ),
    Mutant(
        "learner/saving.py",
        "_plain_settings(settings, own)",
        "settings",
        "generation settings that transformers refuses to write are copied",
        (f"{SAVED}::test_generation_settings_are_copied_as_they_are",),
    ),
    Mutant(
        "learner/checkpoint.py",
        "            # A torn one, or the same step of an earlier attempt.\n"
        "            self._aside.move(final)\n",
        "            shutil.rmtree(final)\n",
        "a complete checkpoint of another history is never overwritten",
        ("tests/learner/test_checkpoint.py::test_a_complete_checkpoint_is_never_overwritten",),
    ),
    Mutant(
        "cluster/observe/tracking.py",
        "                aside.move(file)\n",
        "                file.unlink()\n",
        "completions after the checkpoint that is resumed from are kept",
        ("tests/cluster/test_tracking.py::test_what_a_resume_drops_is_kept_elsewhere",),
    ),
    Mutant(
        "cluster/run_dir.py",
        "        if locked is False:\n",
        "        if False:\n",
        "one driver at a time uses a run directory",
        (f"{RUN_DIR}::test_the_claim_itself_refuses_whatever_was_looked_at_before",),
    ),
    Mutant(
        "cluster/run_dir.py",
        "                if self._beaten() != before:\n",
        "                if False:\n",
        "a driver on another machine that lives is not taken over",
        (f"{RUN_DIR}::test_another_machines_driver_that_goes_on_beating_is_refused",),
    ),
    Mutant(
        "cluster/observe/metrics.py",
        "lost = len(batch.failures) * (max(sizes) if sizes else 1)",
        "lost = len(batch.failures)",
        "a group that was lost counts with all its completions",
        (f"{RESCUE}::test_lost_groups_count_with_all_their_completions",),
    ),
    Mutant(
        "cluster/observe/rollouts.py",
        "                self._replace()\n",
        "                break\n",
        "a rollout writer that died is replaced",
        (f"{RESCUE}::test_a_rollout_writer_that_dies_is_replaced",),
    ),
    Mutant(
        "actors/text.py",
        "return tokenizer.decode(kept, skip_special_tokens=False,",
        "return tokenizer.decode(kept, skip_special_tokens=True,",
        "rewards see the special tokens that the model wrote",
        (f"{TEMPLATES}::test_completions_keep_every_special_token_but_the_end",),
    ),
    Mutant(
        "rewards/rendering.py",
        'return self._header(messages) + messages[-1]["content"]',
        'return self._header(messages) + messages[-1]["content"].strip()',
        "a prompt ends with exactly the words that begin the answer",
        (f"{TEMPLATES}::test_an_answer_that_the_prompt_begins_is_continued",),
    ),
    Mutant(
        "rewards/continuation.py",
        "return Extension(tuple(appended), len(old), messages, None, False)",
        "return Extension(tuple(rendered[0][1]), 0, messages, None, False)",
        "sampled ids are never rendered again",
        (f"{CONTINUATION}::test_ids_that_are_not_those_of_their_text_stay",),
    ),
    Mutant(
        "rewards/continuation.py",
        "(ids[0] == end or self._closes)",
        "ids[0] == end",
        "a turn ends once",
        (f"{CONTINUATION}::test_a_turn_ends_once",),
    ),
    Mutant(
        "rewards/continuation.py",
        "if appended is not None and ours in theirs:",
        "if appended is not None:",
        "what a template rewrites is reported, and forks where the user wants it",
        (f"{CONTINUATION}::test_thinking_that_the_prompt_opened_forks_or_stays",),
    ),
    Mutant(
        "rewards/extract.py",
        "elif opening in text or left_open(prefill) == closing:",
        "elif opening in text:",
        "an answer in thinking that the prompt has opened earns nothing",
        (f"{FINAL_PART}::test_an_answer_inside_thinking_earns_nothing",),
    ),
    Mutant(
        "rewards/row_reader.py",
        'if how == "auto" and self._prompt.rpartition(".")[2] != "prompt":',
        "if False:",
        "messages that end in the solution are not a prompt",
        (f"{LAYOUTS}::test_messages_that_end_in_the_solution_need_a_choice",),
    ),
    Mutant(
        "rewards/row_store.py",
        'if b"\\xed" in data and SURROGATE.search(data):',
        "if False:",
        "half a surrogate is refused with its row and column",
        (f"{LAYOUTS}::test_half_a_surrogate_names_its_row_and_column",),
    ),
    Mutant(
        "cluster/lengths.py",
        "renderer.max_prompt_tokens = max_length - room",
        "pass",
        "a prompt longer than the engines have room for is found when it is drawn",
        (f"{LENGTHS}::test_what_was_not_rendered_is_bounded_by_what_the_engines_have_room_for",),
    ),
    Mutant(
        "cluster/stream.py",
        "begun.overlong += len(sampled.overlong)",
        "begun.overlong = 0",
        "prompts that are left out as too long are counted",
        (
            "tests/cluster/test_stream.py::"
            "test_prompts_that_were_left_out_as_too_long_are_counted_in_their_step",
        ),
    ),
    Mutant(
        "rewards/bounded.py",
        "return max(0.0, min(by_clock, seconds - (_cpu_seconds(self._pid) - before)))",
        "return max(0.0, by_clock - (PATIENCE - 1) * seconds)",
        "a right answer is not wrong because the machine was busy",
        (
            "tests/rewards/test_bounded.py::test_waiting_for_a_core_on_a_busy_machine_is_not_too_much",
        ),
    ),
    # Reward workers.
    Mutant(
        "rewards/pool.py",
        "        for _ in range(MAX_ATTEMPTS):\n            worker = await self._idle_worker()",
        "        for _ in range(1):\n            worker = await self._idle_worker()",
        "a reward call whose worker died is made again",
        (f"{CHAOS}::test_a_reward_call_that_dies_is_made_again",),
    ),
    Mutant(
        "rewards/pool.py",
        "        worker.restarts = 0\n        await self._make_idle(worker)\n",
        "        worker.restarts = 0\n",
        "a reward worker is idle again after a call",
        (f"{CHAOS}::test_one_reward_worker_serves_every_call",),
    ),
    Mutant(
        "rewards/watching.py",
        "    if watch.frozen:\n",
        "    if False:\n",
        "a frozen reward worker is found within 15 s",
        (f"{REWARD_POOL}::test_a_frozen_worker_is_replaced",),
    ),
    Mutant(
        "rewards/watching.py",
        "if watch.look is None and watch.silent_s > unseen_s:",
        "if watch.silent_s > unseen_s:",
        "a reward worker that computes is slow and not frozen",
        (f"{REWARD_POOL}::test_a_worker_that_computes_and_cannot_answer_is_left_alone",),
    ),
    Mutant(
        "rewards/pool.py",
        "            worker.leaving = True\n            if worker in self._idle:\n",
        "            if worker in self._idle:\n",
        "a reward worker that is to leave ends its call first, and leaves",
        (f"{REWARD_POOL}::test_workers_join_and_leave_and_no_call_is_lost",),
    ),
    Mutant(
        "rewards/pool.py",
        "            call.add_done_callback(lambda _: self._closed(name, parts))\n",
        "",
        "scoring that is cancelled leaves nothing",
        (f"{REWARD_POOL}::test_scoring_that_is_cancelled_leaves_nothing",),
    ),
    Mutant(
        "rewards/worker.py",
        "per_completion if spec.whole_group is None else not spec.whole_group",
        "spec.whole_group is None or not spec.whole_group",
        "a function that may compare completions gets the whole group",
        (f"{LOADING}::test_functions_get_the_whole_group_unless_they_say_otherwise",),
    ),
    Mutant(
        "rewards/loading.py",
        "        return getattr(owner, name)\n",
        "        return vars(owner)[name]\n",
        "a module may make its names when they are asked for",
        (f"{LOADING}::test_a_module_that_makes_its_names_when_asked",),
    ),
    Mutant(
        "rewards/results.py",
        'return (number, "") if abs(number) <= MAX_SCORE else (None, wrong)',
        'return (number, "")',
        "a number out of range is a counted error",
        (f"{NUMBERS}::test_out_of_range", f"{NUMBERS}::test_what_is_no_number"),
    ),
    Mutant(
        "rewards/process.py",
        "            end_tree(self.pid, self._marker)\n",
        "            os.kill(self.pid, signal.SIGKILL)\n",
        "nothing that a reward function starts outlives it",
        (f"{NUMBERS}::test_nothing_that_a_function_starts_outlives_it",),
    ),
    Mutant(
        "cluster/continuing.py",
        "return [item for item in found if item.breaks and item.key not in allowed]",
        "return []",
        "a resumed run with other rows, schedule or objective is refused",
        (
            f"{RESUMED}::test_what_changes_rows_schedule_or_objective_is_refused_before_anything_starts",
        ),
    ),
    Mutant(
        "cluster/saving.py",
        '"fingerprint": run.saves.fingerprint,',
        '"fingerprint": {},',
        "a checkpoint holds the fingerprint of its run",
        (f"{RESUMED}::test_changed_rows_are_refused_whatever_the_file_is_called",),
    ),
    Mutant(
        "cluster/observe/metrics.py",
        "            counters.group_size = group_size\n",
        "            pass\n",
        "samples add up after a resume with another group size",
        (f"{RESUMED}::test_a_changed_group_size_adds_up_even_when_a_group_is_lost",),
    ),
    Mutant(
        "cluster/continuing.py",
        'elif key == "run.steps" and not (_ends_with_run(saved) or _ends_with_run(now)):',
        'elif key == "run.steps":',
        "the steps of a run with a schedule do not change unseen",
        (f"{RESUMED}::test_steps_may_not_change_before_the_schedule_begins_to_fall",),
    ),
    Mutant(
        "cluster/model_folder.py",
        "        compare_with_model(Path(path), weight_files(Path(path)), shapes)\n",
        "        pass\n",
        "weight files that are missing, cut short or of another model are refused at the start",
        (f"{FOLDERS}::test_a_bad_folder_is_one_message_that_names_it_in_every_command",),
    ),
    Mutant(
        "cluster/ray_start.py",
        "            address=OWN,\n",
        "            address=None,\n",
        "a Ray of our own joins no cluster that runs on the machine",
        (f"{RAY_START}::test_a_ray_of_our_own_joins_nobodys",),
    ),
    Mutant(
        "learner/config.py",
        "problems = self._unused()",
        "problems: list[str] = []",
        "a key that the algorithm does not use is refused",
        ("tests/learner/test_keys.py::test_a_key_without_effect_is_refused",),
    ),
    Mutant(
        "learner/learner.py",
        "        if self.nonfinite_in_a_row:",
        "        if False:",
        "nothing is saved as good after a step that was not finite",
        ("tests/learner/test_group.py::test_after_a_step_that_was_not_finite_nothing_is_saved",),
    ),
    Mutant(
        "learner/learner.py",
        "    if gone:\n",
        "    if False:\n",
        "groups whose objects are gone are made again",
        (f"{LOST}::test_groups_lost_before_they_are_trained_come_from_the_journal",),
    ),
    Mutant(
        "cluster/loop.py",
        "        run.actors.pool.check()\n",
        "",
        "nothing is trained once an engine was found with wrong weights",
        (
            "tests/harness/test_weights.py::test_nothing_is_trained_after_an_engine_was_found_with_wrong_weights",
        ),
    ),
    Mutant(
        "cluster/loop.py",
        "        await scale_if_asked(run)\n",
        "",
        "`cohort scale` changes a run that goes on",
        ("tests/harness/test_scaling.py::test_a_run_grows_and_shrinks_and_loses_no_group",),
    ),
    Mutant(
        "actors/spans.py",
        "            if not spans or spans[-1][0] != version:\n",
        "            if not spans:\n",
        "every token knows the weights that it came from",
        (f"{LOOP}::test_every_token_knows_the_weights_that_it_came_from",),
    ),
    Mutant(
        "actors/slot.py",
        "self.ready and not self.leaving and",
        "self.ready and",
        "an actor that is to leave gets no more groups",
        ("tests/actors/test_pool.py::test_an_actor_that_leaves_gets_no_more_groups",),
    ),
    Mutant(
        "cluster/loop.py",
        "    for _ in range(MAX_GENERATIONS - 1):",
        "    for _ in range(0):",
        "a step is tried again once its lost groups are there",
        (f"{LOST}::test_groups_lost_before_they_are_written_are_generated_again",),
    ),
    Mutant(
        "cluster/values.py",
        "    return typed(Plain(text), kind, where)",
        "    return typed(read_yaml(text), kind, where)",
        "a text on the command line stays as it was typed",
        (f"{VALUES}::test_texts_of_the_command_line_stay_what_they_are",),
    ),
    Mutant(
        "cluster/values.py",
        '    if value in NULLS or (optional and value == "None"):',
        "    if value in NULLS:",
        "every default can be typed back as Python prints it",
        (f"{VALUES}::test_every_default_can_be_typed_back",),
    ),
    Mutant(
        "cluster/placement.py",
        "memory=min(whole.available, available),",
        "memory=whole.available,",
        "a container's memory limit bounds every plan",
        ("tests/cluster/test_placement.py::test_a_container_gets_what_its_cgroup_allows",),
    ),
    Mutant(
        "learner/safe_load.py",
        '    os.environ[FORCED] = "1"',
        "    pass",
        "nothing in a checkpoint is run",
        ("tests/learner/test_safe_load.py",),
    ),
    Mutant(
        "rewards/maths.py",
        "scores.append(0.0)",
        "scores.append(None)",
        "an answer that takes too long is wrong, not left out",
        ("tests/rewards/test_maths.py::test_what_takes_too_much_is_wrong",),
    ),
    Mutant(
        "actors/engine.py",
        "if wrong is not None:",
        "if False:",
        "an engine that computes with other weights ends the run at that update",
        (f"{WEIGHTS}::test_an_update_that_an_engine_ignores_ends_the_run_at_that_update",),
    ),
    Mutant(
        "actors/watch.py",
        "moved = progress is not None and progress != self.progress",
        "moved = True",
        "an engine that stands still is noticed",
        (f"{RECOVERY}::test_one_that_stands_still_is_replaced_soon",),
    ),
    Mutant(
        "actors/play.py",
        "            made, turns = [], []\n",
        "            pass\n",
        "nothing of an episode that failed is trained",
        (f"{ENVIRONMENTS}::test_an_environment_that_fails_costs_its_own_episode",),
    ),
    Mutant(
        "actors/play.py",
        "alone=attempt > 0",
        "alone=False",
        "an environment that ends its process does not take others with it twice",
        (f"{ENVIRONMENTS}::test_an_environment_that_fails_costs_its_own_episode",),
    ),
    Mutant(
        "rewards/environments/scores.py",
        "rewards.append(None if end is None or end.failure is not None else end.reward)",
        "rewards.append(None if end is None else end.reward or 0.0)",
        "an episode that failed has no reward, not 0",
        (f"{ENVIRONMENTS}::test_an_environment_that_fails_costs_its_own_episode",),
    ),
    Mutant(
        "rewards/environments/episode.py",
        'text = text.replace(token, f"{token[0]} {token[1:]}")',
        "pass",
        "a tool cannot speak as the model",
        (f"{ENVIRONMENTS}::test_control_tokens_in_a_message_are_text",),
    ),
    Mutant(
        "rewards/environments/episode.py",
        "if turn + 1 >= self._limits.max_turns:",
        "if turn > self._limits.max_turns:",
        "an episode has no more turns than the config allows",
        (f"{ENVIRONMENTS}::test_an_episode_ends_at_a_limit_with_what_it_has_earned",),
    ),
    Mutant(
        "rewards/environments/host.py",
        "    if not math.isfinite(found):\n",
        "    if False:\n",
        "a reward that is not finite fails its episode",
        (f"{ENVIRONMENTS}::test_an_environment_that_fails_costs_its_own_episode",),
    ),
    Mutant(
        "rewards/environments/histories.py",
        "        if answered:\n",
        "        if False:\n",
        "a request that goes on continues the sampled tokens",
        (f"{AGENTS}::test_a_request_that_goes_on_continues_the_tokens_that_were_sampled",),
    ),
    Mutant(
        "rewards/environments/histories.py",
        "bool(self._turns) and not whole",
        "False",
        "an edited history is counted",
        (f"{AGENTS}::test_an_edited_history_forks_and_is_counted",),
    ),
    Mutant(
        "rewards/environments/chat_server.py",
        "session is None or not right",
        "session is None",
        "a key is compared whole",
        (f"{AGENTS}::test_keys_end_with_their_episode",),
    ),
    Mutant(
        "rewards/environments/chat_server.py",
        'self._sessions.pop(key.partition(".")[0], None)',
        "pass",
        "a key ends with its episode",
        (f"{AGENTS}::test_keys_end_with_their_episode",),
    ),
    Mutant(
        "rewards/environments/chat.py",
        "if request.temperature not in (None, temperature):",
        "if False:",
        "another temperature is refused",
        (f"{AGENTS}::test_what_cannot_be_kept_is_refused_in_words",),
    ),
    Mutant(
        "rewards/environments/agent_episode.py",
        "        if not self._rewards and self._limit is None:\n",
        "        if False:\n",
        "an agent that asks nothing has failed",
        (f"{AGENTS}::test_an_agent_that_fails_costs_its_own_episode",),
    ),
    Mutant(
        "rewards/environments/agent_episode.py",
        "        if len(self._rewards) >= limits.max_turns:\n",
        "        if False:\n",
        "an agent has no more turns than the config allows",
        (f"{AGENTS}::test_a_limit_refuses_the_request_and_names_the_episodes_end",),
    ),
    # Episodes under faults, tools, and the sandbox as tools.
    Mutant(
        "rewards/environments/handle.py",
        "                except ActorUnavailableError:",
        "                except ZeroDivisionError:",
        "a worker of environments that is started again is waited for",
        (f"{TALKS}::test_what_dies_in_an_episode_costs_none",),
    ),
    Mutant(
        "rewards/environments/handle.py",
        "ray.kill(self._actor, no_restart=False)",
        "pass",
        "a worker of environments that is frozen is replaced",
        (f"{TALKS}::test_what_dies_in_an_episode_costs_none",),
    ),
    Mutant(
        "rewards/environments/worker.py",
        "await self._close(left, tell=True)",
        "pass",
        "an environment that an engine left behind is closed",
        (f"{TALKS}::test_what_dies_in_an_episode_costs_none",),
    ),
    Mutant(
        "rewards/environments/worker.py",
        "await self._close(episode, tell=answer.failure is not None and not episode.hangs)",
        "pass",
        "a worker keeps nothing of an episode that has ended",
        (f"{TALKS}::test_every_turn_is_accounted_for",),
    ),
    Mutant(
        "rewards/environments/episode.py",
        'self.key = f"{name}#{next(_numbers)}"',
        "self.key = name",
        "what is left of an episode does not end the one that was begun again",
        (f"{TALKS}::test_what_an_engine_left_behind_does_not_end_what_was_begun_again",),
    ),
    Mutant(
        "actors/play.py",
        "ATTEMPTS = 2",
        "ATTEMPTS = 1",
        "an episode that was lost is begun again",
        (f"{TALKS}::test_what_dies_in_an_episode_costs_none",),
    ),
    Mutant(
        "actors/play.py",
        'seed=derive_seed(self._seed, "turn", number) if number else self._seed,',
        "seed=derive_seed(self._seed, name, number),",
        "an episode that is begun again has the same seeds",
        (f"{TALKS}::test_an_episode_that_was_begun_again_is_the_same",),
    ),
    Mutant(
        "actors/rollout.py",
        "return made, ends_of(made.spans, version)",
        "return made, (version, version)",
        "a turn says which weights it ended with",
        (f"{TALKS}::test_weights_may_change_between_turns_within_bounds",),
    ),
    Mutant(
        "rewards/environments/tools.py",
        "        except (Exception, SystemExit) as error:",
        "        except ValueError as error:",
        "the model is told of a tool that raises",
        (f"{BAD_EPISODES}::test_the_model_reads_what_a_tool_did",),
    ),
    Mutant(
        "rewards/environments/tools.py",
        "BEGIN_BEFORE = 0.5",
        "BEGIN_BEFORE = 5",
        "many slow calls do not look like one that hangs",
        (f"{BAD_EPISODES}::test_many_slow_calls_do_not_look_like_one_that_hangs",),
    ),
    Mutant(
        "rewards/environments/adapters/mcp.py",
        "if error.code == CONNECTION_CLOSED:",
        "if False:",
        "an MCP server that has ended fails its episode",
        (f"{MCP_TOOLS}::test_a_server_that_dies_fails_its_episode",),
    ),
    Mutant(
        "rewards/environments/sandbox_tools.py",
        "if not stopped and not _whole(packed):",
        "if False:",
        "a folder that was not packed whole is not kept",
        (f"{SANDBOX_TOOLS}::test_a_call_beyond_a_limit_harms_nothing",),
    ),
    Mutant(
        "rewards/environments/sandbox_tools.py",
        "            if not stopped:\n",
        "            if True:\n",
        "a call that was stopped leaves no trace",
        (f"{SANDBOX_TOOLS}::test_a_call_beyond_a_limit_harms_nothing",),
    ),
    Mutant(
        "rewards/environments/sandbox_tools.py",
        "kill -9 -1 2>/dev/null\n",
        "",
        "what a call leaves running does not write to the folder",
        (f"{SANDBOX_TOOLS}::test_what_a_call_leaves_running_does_not_write_to_the_folder",),
    ),
    Mutant(
        "rewards/environments/sandbox_tools.py",
        "with self._one, self._place(), contextlib",
        "with self._one, contextlib",
        "so many sandboxes run at one time",
        (f"{SANDBOX_TOOLS}::test_so_many_at_once_and_the_others_wait",),
    ),
    Mutant(
        "cluster/supervise.py",
        "self.furthest, self.lost = steps, 0",
        "self.furthest = steps",
        "progress refills the budget of new starts",
        (
            f"{SUPERVISE}::test_steps_beyond_the_furthest_refill_the_budget_and_repeated_ones_do_not",
        ),
    ),
    Mutant(
        "cluster/supervise.py",
        "if steps > self.furthest:",
        "if True:",
        "steps that are done again are no progress",
        (
            f"{SUPERVISE}::test_steps_beyond_the_furthest_refill_the_budget_and_repeated_ones_do_not",
        ),
    ),
    Mutant(
        "cluster/supervise.py",
        "if not gone:",
        "if False:",
        "an error of the run is not tried again",
        (f"{SUPERVISE}::test_an_error_of_the_run_is_passed_on",),
    ),
    Mutant(
        "cluster/supervise.py",
        "                self._clean()\n",
        "                pass\n",
        "nothing of a dead run is left",
        (f"{SUPERVISE}::test_a_killed_driver_is_started_again_and_nothing_of_it_is_left",),
    ),
    Mutant(
        "cluster/supervise.py",
        "_prctl(PR_SET_PDEATHSIG, signal.SIGTERM)",
        "pass",
        "a run whose supervisor is killed saves and leaves",
        (f"{SUPERVISE}::test_a_run_whose_supervisor_is_killed_saves_and_leaves",),
    ),
    Mutant(
        "cluster/supervise.py",
        "    child.send_signal(STACKS)\n",
        "",
        "a driver that does not end shows where it hangs",
        (f"{SUPERVISE}::test_a_run_that_does_not_save_in_its_grace_is_killed",),
    ),
    Mutant(
        "cluster/signals.py",
        "(self.caught is not None and not self._supervised)",
        "(self.caught is not None)",
        "a signal that comes twice does not end a supervised run before it has saved",
        (f"{SUPERVISE}::test_a_second_signal_does_not_end_a_supervised_run_before_it_has_saved",),
    ),
    Mutant(
        "cluster/ray_watch.py",
        "            if silent >= SILENT_LOOKS",
        "            if False",
        "a server of Ray that is silent is lost",
        (f"{RAY_WATCH}::test_a_death_is_seen_at_once_and_silence_after_some_looks",),
    ),
    Mutant(
        "cluster/ray_watch.py",
        "            loss = await _look(servers, health)\n",
        "            loss = None\n",
        "a run does not outlast Ray's own processes",
        (f"{RAY_LOST}::test_without_a_raylet_nothing_is_waited_for",),
    ),
    Mutant(
        "cluster/ray_watch.py",
        "if stop is not None and not loss.ends_actors:",
        "if False:",
        "without Ray's GCS a run still saves",
        (f"{RAY_LOST}::test_without_a_gcs_the_run_saves_what_the_learner_has_done",),
    ),
    Mutant(
        "cluster/launch.py",
        "trial, learner_threads),\n            services.servers,\n",
        "trial, learner_threads),\n            {},\n",
        "a start does not outlast Ray's own processes",
        (f"{RAY_LOST}::test_a_raylet_that_dies_during_the_start_ends_the_start",),
    ),
    Mutant(
        "cluster/waiting.py",
        "            pause_s = waited_s\n",
        "",
        "what a slow step waits for is said ever more rarely",
        (f"{WAITING}::test_a_slow_step_is_told_with_what_it_waits_for_and_ever_more_rarely",),
    ),
    Mutant(
        "learner/learner.py",
        "await self._copies.keep(self._ranks)",
        "pass",
        "a rank's death costs one step",
        (f"{DEATHS}::test_deaths_one_after_another_cost_one_step_each",),
    ),
    Mutant(
        "learner/kept.py",
        "        await self._until_unread(generation)\n",
        "",
        "a checkpoint holds the state after its step, though later steps run meanwhile",
        (f"{BEHIND}::test_a_checkpoint_written_behind_holds_what_one_in_the_foreground_holds",),
    ),
    Mutant(
        "learner/gang.py",
        "- before < IDLE_CPU_S",
        "- before < 1e9",
        "a rank that is slow to answer is not a frozen one",
        (f"{DEATHS}::test_a_rank_that_computes_without_answering_is_not_frozen",),
    ),
    Mutant(
        "learner/copies.py",
        "        marker.unlink(missing_ok=True)\n",
        "",
        "a copy that is being written does not count",
        (f"{COPIES}::test_a_copy_that_began_over_an_older_one_is_neither",),
    ),
    Mutant(
        "learner/copies.py",
        'found["generation"] == generation and all(',
        "all(",
        "an older copy is not taken for a newer",
        (f"{COPIES}::test_an_older_copy_in_the_same_place_is_not_taken_for_a_newer",),
    ),
    Mutant(
        "learner/copies.py",
        "        return self.within(view).clone()\n",
        "        return self.within(view)\n",
        "what was read does not change with the file",
        (f"{COPIES}::test_what_was_read_does_not_change_with_the_file",),
    ),
    Mutant(
        "learner/checkpoint.py",
        "                if path.name == best:\n",
        "                if False:\n",
        "the best checkpoint is kept",
        (f"{EVALUATION}::test_the_best_checkpoint_is_kept_and_named",),
    ),
)
