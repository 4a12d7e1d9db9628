"""A checkpoint of other ranks, or of another ZeRO stage, put together and divided anew.

DeepSpeed's files hold what each rank had: parts of float32 weights and moments, laid end to end.
From the files of all ranks each parameter is put together, and every rank takes from it the part
that it is to hold. Each rank reads all files: 12 bytes a parameter in main memory while it loads.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

import torch

from cohort.learner.checkpoint import CheckpointError
from cohort.learner.weights import whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cohort.learner.state import LossScaler, RankState

WEIGHT = "fp32"
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")


class Fragment(Protocol):
    """Where a part of a parameter lies in a rank's flat tensor."""

    start: int
    numel: int


class Placed(Protocol):
    """DeepSpeed's note: which part of a parameter (lp) lies where in a flat tensor (hp)."""

    param_group_index: int
    lp_fragment_address: Fragment
    hp_fragment_address: Fragment


class AdamState(TypedDict):
    """The moments of one flat tensor, and the updates done."""

    step: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


# A kind (weights or a moment) -> one flat tensor for each group of parameters.
Flat = dict[str, list[torch.Tensor]]


@dataclass
class WholeState:
    """What all ranks together hold.

    Attributes:
        parameters: Name -> kind -> the numbers, flat, float32.
        updates: That the optimizer has done, as it counts them.
        loss_scaler: Of float16; in other precisions None, or one that does nothing.
    """

    updates: float
    loss_scaler: LossScaler | None
    parameters: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def gather(folder: Path, ranks: int, stage: int) -> WholeState:
    """Put the files of a checkpoint together.

    Args:
        folder: Where DeepSpeed's files lie.
        ranks: How many wrote it.
        stage: The ZeRO stage that wrote it, 1 to 3.

    Raises:
        CheckpointError: A file is missing.
    """
    parts = [
        _load(folder, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for rank in range(ranks)
    ]
    states = [part["optimizer_state_dict"] for part in parts]
    if stage < 3:
        base = [state["base_optimizer_state"]["state"] for state in states]
        weights = [state["single_partition_of_fp32_groups"] for state in states]
    else:
        base = [state["optimizer_state_dict"]["state"] for state in states]
        weights = [state["fp32_flat_groups"] for state in states]
    found = WholeState(float(base[0][0]["step"]), states[0].get("loss_scaler"))
    flat = [_flat(own, of_rank) for own, of_rank in zip(weights, base, strict=True)]
    if stage < 3:
        _join_fragments(found, flat, [state["param_slice_mappings"] for state in states])
    else:
        model = _load(folder, "zero_pp_rank_0_mp_rank_00_model_states.pt")
        _join_equal_parts(
            found, flat, [shapes for group in model["param_shapes"] for shapes in group.items()]
        )
    return found


def _load(folder: Path, pattern: str) -> dict:
    files = sorted(folder.glob(pattern))
    if not files:
        raise CheckpointError(f"{folder} holds no {pattern}")
    return torch.load(files[0], map_location="cpu")


def _flat(weights: Sequence[torch.Tensor], states: Mapping[int, AdamState]) -> Flat:
    return {
        WEIGHT: list(weights),
        "exp_avg": [states[group]["exp_avg"] for group in range(len(weights))],
        "exp_avg_sq": [states[group]["exp_avg_sq"] for group in range(len(weights))],
    }


def _join_fragments(
    found: WholeState, flat: Sequence[Flat], mappings: Sequence[Sequence[Mapping[str, Fragment]]]
) -> None:
    """ZeRO-1 and 2: one long tensor, cut where it may be; a parameter's parts are in rank order."""
    parts: dict[str, dict[str, list[torch.Tensor]]] = {}
    for of_rank, groups in zip(flat, mappings, strict=True):
        for group, fragments in enumerate(groups):
            for name, place in fragments.items():
                own = parts.setdefault(name, {kind: [] for kind in KINDS})
                for kind in KINDS:
                    own[kind].append(of_rank[kind][group].narrow(0, place.start, place.numel))
    for name, kinds in parts.items():
        found.parameters[name] = {kind: torch.cat(pieces) for kind, pieces in kinds.items()}


def _join_equal_parts(
    found: WholeState, flat: Sequence[Flat], shapes: Sequence[tuple[str, torch.Size]]
) -> None:
    """ZeRO-3: every parameter in equal parts, the last filled up, laid end to end."""
    joined = [{kind: torch.cat(of_rank[kind]) for kind in KINDS} for of_rank in flat]
    offset = 0
    for name, shape in shapes:
        numbers = torch.Size(shape).numel()
        part = -(-numbers // len(flat))
        found.parameters[name] = {
            kind: torch.cat([of_rank[kind].narrow(0, offset, part) for of_rank in joined])[:numbers]
            for kind in KINDS
        }
        offset += part


def fill(state: RankState, saved: WholeState) -> None:
    """Have this rank take its part; all ranks take theirs together.

    Raises:
        CheckpointError: The checkpoint is of another model.
    """
    named = {n: p for n, p in state.policy.named_parameters() if p.requires_grad}
    if different := sorted(named.keys() ^ saved.parameters.keys()):
        raise CheckpointError(f"the checkpoint is of another model: {different[0]}")
    zero = state.engine.optimizer
    stage3 = state.spec.learner.zero_stage == 3
    flats = zero.fp32_partitioned_groups_flat if stage3 else _flats(zero.optimizer)
    # AdamW makes its state in its first update; this one had it somewhere else.
    for flat in flats:
        zero.optimizer.state[flat] = {
            "step": torch.tensor(saved.updates),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    for name, parameter in named.items():
        own = {kind: value.to(state.device) for kind, value in saved.parameters[name].items()}
        if stage3:
            _fill_part(parameter, own, state.spec.rank, state.spec.world_size)
        else:
            _fill_fragment(parameter, own, flats, zero.optimizer)
        # The weights that are computed with, in the model's precision.
        with whole([parameter], modifier_rank=0) if stage3 else nullcontext(), torch.no_grad():
            parameter.copy_(own[WEIGHT].view(parameter.shape))
    if saved.loss_scaler is not None and state.spec.dtype == "float16":
        zero.loss_scaler = saved.loss_scaler


def _flats(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [group["params"][0] for group in optimizer.param_groups]


def _fill_part(
    parameter: torch.nn.Parameter, own: dict[str, torch.Tensor], rank: int, ranks: int
) -> None:
    """ZeRO-3: each rank takes an equal part of a parameter, the last one filled up with zeros."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    for kind, value in own.items():
        filled = torch.nn.functional.pad(value, (0, -value.numel() % ranks))
        part = filled.chunk(ranks)[rank]
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)


def _fill_fragment(
    parameter: torch.nn.Parameter,
    own: dict[str, torch.Tensor],
    flats: Sequence[torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """ZeRO-1 and 2: a rank takes what of a parameter lies in its part of the long tensor."""
    mapping: Placed | None = vars(parameter)["_hp_mapping"]
    if mapping is None:
        return
    flat = flats[mapping.param_group_index]
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    for kind, value in own.items():
        target = flat if kind == WEIGHT else optimizer.state[flat][kind]
        with torch.no_grad():
            target.narrow(0, there.start, there.numel).copy_(
                value.narrow(0, here.start, here.numel)
            )
