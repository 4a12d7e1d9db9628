"""Micro-batches -> tensors: the tokens of planned rows, and who attends to whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cohort.actors.records import ScoredGroup
from cohort.learner.attention import Tree
from cohort.learner.grpo import LossInputs
from cohort.learner.logprobs import ModelInputs
from cohort.learner.packing import MicroBatch
from cohort.learner.shapes import RowShape


@dataclass(frozen=True)
class BatchTensors(ModelInputs):
    """One micro-batch: N tokens in all its rows, T of them of completions.

    Attributes:
        behaviour_T: float32, the engine's log-probs.
        advantage_T: float32, of the token's completion.
        weight_T: float32, of the token in the loss.
        sequence_T: int64, which completion of the micro-batch token t belongs to, in the order of
            rows and segments.
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
        ValueError: A group or completion is missing, or has another length than planned.
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
        for segment in row.segments:
            if segment.completion_id not in by_id:
                raise ValueError(
                    f"completion {segment.completion_id} is not in group {row.group_id}"
                )
            completion = by_id[segment.completion_id]
            n = segment.tokens
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
            advantage.append(torch.full((n,), segment.advantage))
            weight.append(torch.full((n,), segment.weight))
            start += n
    return BatchTensors(
        input_ids_N=torch.cat(input_ids),
        position_ids_N=torch.cat(position_ids),
        tree=Tree(tuple(row.shape for row in batch.rows)),
        predict_T=torch.cat(predict),
        target_T=torch.cat(target),
        behaviour_T=torch.cat(behaviour),
        advantage_T=torch.cat(advantage),
        weight_T=torch.cat(weight),
        sequence_T=torch.repeat_interleave(
            torch.tensor([segment.tokens for segment in batch.segments])
        ),
    )
