"""Micro-batches -> tensors: the tokens of planned rows, and who attends to whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from cohort.actors.records import Completion, Group, ScoredGroup
from cohort.learner.attention import Tree
from cohort.learner.episodes import Layout
from cohort.learner.grpo import LossInputs
from cohort.learner.logprobs import ModelInputs
from cohort.learner.packing import MicroBatch, PackedRow, Segment
from cohort.learner.shapes import RowShape


@dataclass(frozen=True)
class BatchTensors(ModelInputs):
    """One micro-batch: N tokens in all its rows, T of them sampled ones that are trained.

    The T tokens of a segment lie together, in the order of its turns.

    Attributes:
        behaviour_T: float32, the engine's log-probs.
        advantage_T: float32, of the token's completion or turn.
        weight_T: float32, of the token in the loss.
        sequence_T: int64, which completion of the micro-batch token t belongs to, in the order of
            rows and segments. An episode is one completion.
    """

    behaviour_T: torch.Tensor
    advantage_T: torch.Tensor
    weight_T: torch.Tensor
    sequence_T: torch.Tensor

    def to(self, device: torch.device) -> BatchTensors:
        """A copy on this device."""
        return BatchTensors(
            self.input_ids_N.to(device),
            self.position_ids_N.to(device),
            self.tree,
            self.predict_T.to(device),
            self.target_T.to(device),
            self.behaviour_T.to(device),
            self.advantage_T.to(device),
            self.weight_T.to(device),
            self.sequence_T.to(device),
        )

    def loss_inputs(
        self,
        logprobs_T: torch.Tensor,
        entropy_T: torch.Tensor | None = None,
        old_T: torch.Tensor | None = None,
        reference_T: torch.Tensor | None = None,
    ) -> LossInputs:
        """What the loss is computed from, with the policy's log-probs; see `LossInputs`."""
        return LossInputs(
            logprobs_T,
            self.behaviour_T,
            self.advantage_T,
            self.weight_T,
            self.sequence_T,
            entropy_T,
            old_T,
            reference_T,
        )


def build_micro_batch(batch: MicroBatch, groups: Mapping[str, ScoredGroup]) -> BatchTensors:
    """The tensors of a micro-batch; without rows, one token of weight 0 that predicts itself.

    Args:
        batch: The planned rows.
        groups: The groups of these rows, by id.

    Raises:
        ValueError: A group or completion is missing, or has other sizes than planned.
    """
    if not batch.rows:
        one = torch.zeros(1)
        return BatchTensors(
            input_ids_N=torch.zeros(1, dtype=torch.long),
            position_ids_N=torch.zeros(1, dtype=torch.long),
            tree=Tree((RowShape(1),)),
            predict_T=torch.zeros(1, dtype=torch.long),
            target_T=torch.zeros(1, dtype=torch.long),
            behaviour_T=one,
            advantage_T=one,
            weight_T=one,
            sequence_T=torch.zeros(1, dtype=torch.long),
        )
    parts = _Parts()
    for row in batch.rows:
        if row.group_id not in groups:
            raise ValueError(f"group {row.group_id} is planned on this rank but was not sent to it")
        parts.add_row(row, groups[row.group_id].group)
    # An episode can lie in several rows: its tokens are one sequence all the same.
    sequences: dict[str, int] = {}
    sequence = [sequences.setdefault(s.completion_id, len(sequences)) for s in batch.segments]
    return BatchTensors(
        input_ids_N=torch.cat(parts.input_ids),
        position_ids_N=torch.cat(parts.position_ids),
        tree=Tree(tuple(row.shape for row in batch.rows)),
        predict_T=torch.cat(parts.predict),
        target_T=torch.cat(parts.target),
        behaviour_T=torch.cat(parts.behaviour),
        advantage_T=torch.cat(parts.advantage),
        weight_T=torch.cat(parts.weight),
        sequence_T=torch.repeat_interleave(
            torch.tensor(sequence), torch.tensor([segment.tokens for segment in batch.segments])
        ),
    )


@dataclass
class _Parts:
    """The tensors of BatchTensors in parts, row after row; start: tokens of the rows so far."""

    input_ids: list[torch.Tensor] = field(default_factory=list)
    position_ids: list[torch.Tensor] = field(default_factory=list)
    predict: list[torch.Tensor] = field(default_factory=list)
    target: list[torch.Tensor] = field(default_factory=list)
    behaviour: list[torch.Tensor] = field(default_factory=list)
    advantage: list[torch.Tensor] = field(default_factory=list)
    weight: list[torch.Tensor] = field(default_factory=list)
    start: int = 0

    def add_row(self, row: PackedRow, group: Group) -> None:
        by_id = {completion.id: completion for completion in group.completions}
        if len(group.prompt.token_ids) != row.prompt_tokens:
            raise ValueError(
                f"group {row.group_id}: prompt of {len(group.prompt.token_ids)} tokens, "
                f"{row.prompt_tokens} were planned"
            )
        for segment in row.segments:
            if segment.completion_id not in by_id:
                raise ValueError(
                    f"completion {segment.completion_id} is not in group {row.group_id}"
                )
            _check_sizes(segment, by_id[segment.completion_id])
        # The last token that each branch continues, wherever in the row it lies.
        last = iter(
            [self.start + spans[-1][1] - 1 if spans else -1 for spans in row.shape.histories()]
        )
        self.input_ids.append(_leading_ids(row, group, by_id))
        self.position_ids.append(torch.arange(row.shape.prompt))
        self.start += row.shape.prompt
        for segment in row.segments:
            layout = segment.layout(row.prompt_tokens)
            turns = turn_tokens(by_id[segment.completion_id])
            self._add_sampled(segment, layout, turns, [next(last) for _ in layout.branches])
            for place in sorted(layout.places, key=lambda place: place.branch):
                self.input_ids += [turns[place.turn].inserted, turns[place.turn].sampled]
            for tokens, (_, kept) in zip(layout.branches, layout.joins, strict=True):
                self.position_ids.append(torch.arange(kept, kept + tokens))
                self.start += tokens

    def _add_sampled(
        self, segment: Segment, layout: Layout, turns: Sequence[TurnTokens], last: Sequence[int]
    ) -> None:
        """The sampled tokens of a segment whose first branch begins at `start`.

        last: where the token lies that the first of each branch follows.
        """
        starts = [self.start, *(self.start + n for n in accumulate(layout.branches))]
        for place in layout.places:
            turn = turns[place.turn]
            n = len(turn.sampled)
            inside = place.offset + len(turn.inserted)
            at = starts[place.branch] + inside
            # A token is predicted by the one before it.
            before = torch.arange(at - 1, at + n - 1)
            if not inside:
                before[:1] = last[place.branch]
            value = segment.advantage
            if segment.turn_advantages:
                value = segment.turn_advantages[place.turn]
            self.predict.append(before)
            self.target.append(turn.sampled)
            self.behaviour.append(turn.logprobs)
            self.advantage.append(torch.full((n,), value))
            self.weight.append(torch.full((n,), segment.weight))


@dataclass(frozen=True)
class TurnTokens:
    """Tokens of one turn: int64 inserted and sampled ids, float32 log-probs of the sampled."""

    inserted: torch.Tensor
    sampled: torch.Tensor
    logprobs: torch.Tensor


def turn_tokens(completion: Completion) -> list[TurnTokens]:
    """The tokens of each turn; a completion without turns is one."""
    sampled = torch.from_numpy(completion.token_ids.astype("int64"))
    logprobs = torch.from_numpy(completion.logprobs.astype("float32"))
    if not completion.turns:
        return [TurnTokens(sampled.new_zeros(0), sampled, logprobs)]
    sizes = [turn.shape.sampled for turn in completion.turns]
    return [
        TurnTokens(torch.from_numpy(turn.inserted_ids.astype("int64")), ids, values)
        for turn, ids, values in zip(
            completion.turns, sampled.split(sizes), logprobs.split(sizes), strict=True
        )
    ]


def whole_sequence(completion: Completion, turn: int, prompt: Sequence[int]) -> torch.Tensor:
    """[L] int64: all tokens of a turn's sequence, from the prompt to its last sampled token."""
    shape = completion.turns[turn].shape
    before = torch.tensor(prompt)
    if shape.parent is not None:
        before = whole_sequence(completion, shape.parent, prompt)
    own = turn_tokens(completion)[turn]
    return torch.cat([before[: shape.kept], own.inserted, own.sampled])


def _leading_ids(row: PackedRow, group: Group, by_id: Mapping[str, Completion]) -> torch.Tensor:
    """The tokens before the segments: the prompt, or what the row's one branch continues."""
    segment = row.segments[0]
    if segment.branch is None:
        return torch.tensor(group.prompt.token_ids)
    last = segment.layout(row.prompt_tokens).places[-1]
    whole = whole_sequence(by_id[segment.completion_id], last.turn, group.prompt.token_ids)
    return whole[: row.shape.prompt]


def _check_sizes(segment: Segment, completion: Completion) -> None:
    """Raise ValueError where a completion is not the one that was planned."""
    shapes = tuple(turn.shape for turn in completion.turns)
    if shapes != segment.turns:
        raise ValueError(
            f"completion {completion.id}: turns {shapes}, {segment.turns} were planned"
        )
    for index, turn in enumerate(completion.turns):
        if len(turn.inserted_ids) != turn.shape.inserted:
            raise ValueError(
                f"completion {completion.id}: turn {index} has {len(turn.inserted_ids)} inserted "
                f"tokens, its shape {turn.shape.inserted}"
            )
    if not shapes and len(completion.token_ids) != segment.tokens:
        raise ValueError(
            f"completion {completion.id}: {len(completion.token_ids)} tokens, "
            f"{segment.tokens} were planned"
        )
