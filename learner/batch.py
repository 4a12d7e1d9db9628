"""Micro-batches -> tensors: the tokens of planned rows, and who attends to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from actors.records import ScoredGroup
from learner.attention import RowShape, Tree
from learner.plan import MicroBatch


@dataclass(frozen=True)
class BatchTensors:
    """One micro-batch. B rows, L tokens in the longest, T completion tokens in all rows.

    input_ids_BL, position_ids_BL: int64. tree: which tokens attend to which.
    predict_T: index into the flattened B*L positions whose hidden state predicts token t;
    target_T: that token. behaviour_T, advantage_T, weight_T: float32. sequence_T: int64, which
    completion of the micro-batch token t belongs to, in the order of rows and pieces.
    """

    input_ids_BL: torch.Tensor
    position_ids_BL: torch.Tensor
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
    rows, length = batch.rows, batch.length
    if not rows:
        one = torch.zeros(1)
        return BatchTensors(
            input_ids_BL=torch.zeros(1, 1, dtype=torch.long),
            position_ids_BL=torch.zeros(1, 1, dtype=torch.long),
            tree=Tree((RowShape(1),), 1),
            predict_T=torch.zeros(1, dtype=torch.long),
            target_T=torch.zeros(1, dtype=torch.long),
            behaviour_T=one,
            advantage_T=one,
            weight_T=one,
            sequence_T=torch.zeros(1, dtype=torch.long),
        )
    shape = (len(rows), length)
    # The value of padding is never looked at: lengths alone decide what counts.
    input_ids_BL = torch.zeros(shape, dtype=torch.long)
    position_ids_BL = torch.zeros(shape, dtype=torch.long)
    predict: list[torch.Tensor] = []
    target: list[torch.Tensor] = []
    behaviour: list[torch.Tensor] = []
    advantage: list[torch.Tensor] = []
    weight: list[torch.Tensor] = []
    for b, row in enumerate(rows):
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
        input_ids_BL[b, :prompt] = torch.tensor(group.prompt.token_ids)
        position_ids_BL[b, :prompt] = torch.arange(prompt)
        start = prompt
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
            end = start + n
            ids = torch.from_numpy(completion.token_ids.astype("int64"))
            input_ids_BL[b, start:end] = ids
            position_ids_BL[b, start:end] = torch.arange(prompt, prompt + n)
            # A token is predicted by the one before it; the first of a completion by the last of
            # the prompt, wherever in the row the completion lies.
            before = torch.arange(start - 1, end - 1)
            before[0] = prompt - 1
            predict.append(b * length + before)
            target.append(ids)
            behaviour.append(torch.from_numpy(completion.logprobs.astype("float32")))
            advantage.append(torch.full((n,), piece.advantage))
            weight.append(torch.full((n,), piece.weight))
            start = end
    return BatchTensors(
        input_ids_BL=input_ids_BL,
        position_ids_BL=position_ids_BL,
        tree=Tree(
            tuple(RowShape(row.prompt_tokens, tuple(p.tokens for p in row.pieces)) for row in rows),
            length,
        ),
        predict_T=torch.cat(predict),
        target_T=torch.cat(target),
        behaviour_T=torch.cat(behaviour),
        advantage_T=torch.cat(advantage),
        weight_T=torch.cat(weight),
        sequence_T=torch.repeat_interleave(
            torch.tensor([piece.tokens for row in rows for piece in row.pieces])
        ),
    )
