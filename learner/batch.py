"""Micro-batches -> tensors: the tokens of planned rows, and who attends to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cohort.actors.records import ScoredGroup
from cohort.learner.attention import RowShape, Tree
from cohort.learner.plan import MicroBatch


@dataclass(frozen=True)
class BatchTensors:
    """One micro-batch. N tokens in all its rows, one after another; T of them of completions.

    input_ids_N, position_ids_N: int64. tree: which tokens attend to which.
    predict_T: which of the N tokens has the hidden state that predicts token t; target_T: token t.
    behaviour_T, advantage_T, weight_T: float32. sequence_T: int64, which completion of the
    micro-batch token t belongs to, in the order of rows and pieces.
    """

    input_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    tree: Tree
    predict_T: torch.Tensor
    target_T: torch.Tensor
    behaviour_T: torch.Tensor
    advantage_T: torch.Tensor
    weight_T: torch.Tensor
    sequence_T: torch.Tensor

    def to(self, device: torch.device) -> BatchTensors:
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return BatchTensors(**moved)


def build_micro_batch(batch: MicroBatch, groups: Mapping[str, ScoredGroup]) -> BatchTensors:
    """The tensors of a micro-batch; without rows, one token of weight 0 that predicts itself.

    Raises ValueError when a group or completion is missing or has another length than planned.
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
    input_ids: list[torch.Tensor] = []
    position_ids: list[torch.Tensor] = []
    predict: list[torch.Tensor] = []
    target: list[torch.Tensor] = []
    behaviour: list[torch.Tensor] = []
    advantage: list[torch.Tensor] = []
    weight: list[torch.Tensor] = []
    start = 0
    for row in batch.rows:
        if row.group_id not in groups:
            raise ValueError(f"group {row.group_id} is planned on this rank but was not sent to it")
        group = groups[row.group_id].group
        by_id = {completion.id: completion for completion in group.completions}
        prompt = row.prompt_tokens
        if len(group.prompt.token_ids) != prompt:
            raise ValueError(
                f"group {row.group_id}: prompt of {len(group.prompt.token_ids)} tokens, "
                f"{prompt} were planned"
            )
        input_ids.append(torch.tensor(group.prompt.token_ids))
        position_ids.append(torch.arange(prompt))
        first = start
        start += prompt
        for piece in row.pieces:
            if piece.completion_id not in by_id:
                raise ValueError(f"completion {piece.completion_id} is not in group {row.group_id}")
            completion = by_id[piece.completion_id]
            n = piece.tokens
            if len(completion.token_ids) != n:
                raise ValueError(
                    f"completion {completion.id}: {len(completion.token_ids)} tokens, "
                    f"{n} were planned"
                )
            ids = torch.from_numpy(completion.token_ids.astype("int64"))
            input_ids.append(ids)
            position_ids.append(torch.arange(prompt, prompt + n))
            # A token is predicted by the one before it; the first of a completion by the last of
            # the prompt, wherever in the row the completion lies.
            before = torch.arange(start - 1, start + n - 1)
            before[0] = first + prompt - 1
            predict.append(before)
            target.append(ids)
            behaviour.append(torch.from_numpy(completion.logprobs.astype("float32")))
            advantage.append(torch.full((n,), piece.advantage))
            weight.append(torch.full((n,), piece.weight))
            start += n
    return BatchTensors(
        input_ids_N=torch.cat(input_ids),
        position_ids_N=torch.cat(position_ids),
        tree=Tree(
            tuple(
                RowShape(row.prompt_tokens, tuple(piece.tokens for piece in row.pieces))
                for row in batch.rows
            )
        ),
        predict_T=torch.cat(predict),
        target_T=torch.cat(target),
        behaviour_T=torch.cat(behaviour),
        advantage_T=torch.cat(advantage),
        weight_T=torch.cat(weight),
        sequence_T=torch.repeat_interleave(
            torch.tensor([piece.tokens for row in batch.rows for piece in row.pieces])
        ),
    )
