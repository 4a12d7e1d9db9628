"""The policy as a scorer: log-probabilities and entropies of chosen tokens.

Prompt positions never meet the output layer, and the output layer runs in parts: at any time the
logits of one part exist, in the forward and in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cohort.learner import attention as tree_attention
from cohort.learner import flash, flex, norm
from cohort.learner.attention import TREE, Tree, TreeAttention
from cohort.learner.output_layer import LogitScale, TokenScores
from cohort.learner.shapes import LENGTH_MULTIPLE, padded_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows up to this length: where a mask is needed on a CPU, plain matrix products beat the fused
# kernel, whose strength is that it never writes the L x L scores.
EAGER_ROW_LENGTH = 512
# The output layer is run on a multiple of this many tokens.
SCORE_MULTIPLE = 64
Kernel = Literal["tree", "flash", "flex", "masked"]
# What `learner.attention` may become, best first; "masked" where none can be used.
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "tree": ("tree",), "flash": ("flash", "flex"), "flex": ("flex",)
}  # fmt: skip
# What auto is, by device; others: sdpa.
AUTO = {"cpu": "tree", "cuda": "flash"}
# A layer is compiled anew for gradients or none, for each kind of attention, of layer and of mask;
# torch stops at eight, without an error.
COMPILED_VARIANTS = 32
Mask = TypeVar("Mask")


class UnsupportedModel(Exception):
    """The architecture does something with its logits or masks that this learner does not know."""


@dataclass(frozen=True)
class ModelInputs:
    """What a forward pass computes: N tokens of some rows, T of which are scored.

    Attributes:
        input_ids_N: int64, the tokens of all rows, one row after another.
        position_ids_N: int64, along each completion's own sequence.
        tree: Which tokens attend to which.
        predict_T: int64, which of the N tokens has the hidden state that predicts token t.
        target_T: int64, token t itself.
    """

    input_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    tree: Tree
    predict_T: torch.Tensor
    target_T: torch.Tensor


class PolicyModel(nn.Module):
    """A Hugging Face causal language model as a scorer of tokens.

    Always in evaluation mode, with gradients: dropout would make the learner's policy differ from
    the engine's.

    Args:
        model: The causal language model.
        attention: `learner.attention`.
        gradient_checkpointing: Recompute decoder layers in the backward pass.

    Attributes:
        can_tree: Whether `TreeAttention` may be used; `self_check` finds out.
        can_flash: Whether `cohort.learner.flash` may be used; `self_check` finds out.
        can_flex: Whether `cohort.learner.flex` may be used; `self_check` finds out.
        shares_prompts: Whether several completions may follow one prompt; `self_check` finds out.

    Raises:
        UnsupportedModel: The model caps its attention scores, which this attention leaves out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: Literal["auto", "tree", "flash", "flex", "sdpa", "eager"] = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.attention = attention
        config = model.config.get_text_config().to_dict()
        if config.get("attn_logit_softcapping") is not None:
            # The fused kernel leaves the cap of attention scores out; engines apply it.
            if attention in ("tree", "flash", "flex", "sdpa"):
                raise UnsupportedModel(
                    f"{type(model).__name__} caps its attention scores, which "
                    f"learner.attention={attention} leaves out: use eager or auto"
                )
            self.attention = "eager"
        # Gemma caps its logits, Granite divides and Cohere multiplies them; see `self_check`.
        self.scale = LogitScale(
            factor=(config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0),
            cap=config.get("final_logit_softcapping"),
        )
        self.window: int | None = config.get("sliding_window")
        self.can_tree = self.attention in ("auto", "tree")
        self.can_flash = self.attention in ("auto", "flash")
        self.can_flex = self.attention in ("auto", "flash", "flex")
        self.shares_prompts = True
        self.fuses_scores = False
        tree_attention.register()
        flash.register()
        flex.register()
        norm.use_blocks(self.model)
        self.layer_types = frozenset(config.get("layer_types") or ())
        if gradient_checkpointing:
            _enable_gradient_checkpointing(model)

    def forward(
        self, inputs: ModelInputs, temperature: float, chunks: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the target tokens, and entropies where they were sampled.

        Args:
            inputs: N tokens, T of which are scored.
            temperature: Logits are divided by it.
            chunks: In how many parts the output layer runs.

        Returns:
            ([T] float32, [T] float32), both with gradient, in nats, of
            softmax(logits / temperature).
        """
        hidden_TH = self.hidden(inputs)
        parts = list(
            zip(hidden_TH.tensor_split(chunks), inputs.target_T.tensor_split(chunks), strict=True)
        )
        done = []
        for i, (hidden, target) in enumerate(parts):
            # The backward pass starts with the last part: its logits may as well stay.
            if i < len(parts) - 1 and torch.is_grad_enabled():
                done.append(
                    checkpoint(self._score, hidden, target, temperature, use_reentrant=False)
                )
            else:
                done.append(self._score(hidden, target, temperature))
        return torch.cat([part[0] for part in done]), torch.cat([part[1] for part in done])

    def _score(
        self, hidden_NH: torch.Tensor, target_N: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Shapes that come back: see cohort.learner.shapes.LENGTH_MULTIPLE.
        padding = -len(hidden_NH) % SCORE_MULTIPLE
        padded_PH = nn.functional.pad(hidden_NH, (0, 0, 0, padding))
        # Padding and all: the gradient of a slice would be a copy of all logits.
        logits_PV = self.model.get_output_embeddings()(padded_PH)
        logprobs_N, entropy_N = TokenScores.apply(
            logits_PV, target_N, self.scale, temperature, self.fuses_scores
        )
        return logprobs_N, entropy_N

    def hidden(self, inputs: ModelInputs) -> torch.Tensor:
        """The last hidden states of the tokens `inputs.predict_T`, [T, H]."""
        input_ids_N, position_ids_N = inputs.input_ids_N, inputs.position_ids_N
        tree, predict_T = inputs.tree, inputs.predict_T
        device = input_ids_N.device
        window_bites = self._window_bites(position_ids_N)
        kernel = self.kernel(device, window_bites)
        if kernel != "masked":
            multiple = LENGTH_MULTIPLE if kernel == "tree" else flex.FLEX_MULTIPLE
            length = padded_length(len(input_ids_N), multiple)
            padding = (0, length - len(input_ids_N))
            ids_1N, position_1N = (
                nn.functional.pad(x, padding)[None] for x in (input_ids_N, position_ids_N)
            )
            name, how = self._attention(kernel, tree, length, window_bites, device)
            hidden_1NH = self._base(ids_1N, name, position_ids=position_1N, **how)
            return hidden_1NH[0].index_select(0, predict_T)
        # Padding is never looked at: lengths alone decide what counts.
        length = padded_length(tree.longest)
        places_N = tree.places(length, device)
        ids_BL, position_BL = (
            x.new_zeros(len(tree.rows) * length).index_copy_(0, places_N, x).view(-1, length)
            for x in (input_ids_N, position_ids_N)
        )
        if self.shares_prompts:
            implementation = self._masked_attention(device, length)
            masks = self._masks(tree.mask(length, device), position_BL, implementation)
            hidden_BLH = self._base(
                ids_BL, implementation, position_ids=position_BL, attention_mask=masks
            )
        else:
            # Every row is one sequence, padded behind its end: what the model does by itself.
            hidden_BLH = self._base(ids_BL, None)
        return hidden_BLH.flatten(0, 1).index_select(0, places_N[predict_T])

    def _base(
        self, input_ids_BL: torch.Tensor, attention: str | None, **where: object
    ) -> torch.Tensor:
        """The model without its output layer: [B, L, H]. attention: None keeps the model's own."""
        if attention is not None and self.model.config._attn_implementation != attention:
            self.model.set_attn_implementation(attention)
        output = self.model.base_model(input_ids=input_ids_BL, use_cache=False, **where)
        return output.last_hidden_state

    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def _attention(
        self, kernel: Kernel, tree: Tree, length: int, window_bites: bool, device: torch.device
    ) -> tuple[str, dict[str, object]]:
        """The name that transformers knows it by, and what all layers have in common."""
        if kernel == "flash":
            parts = flash.Parts.of(tree, length, device)
            return flash.FLASH, {"parts": (parts.places, parts.sizes)}
        if kernel == "flex":
            intervals = flex.Intervals.of(tree, length)
            masks = self._by_layer(
                lambda window: flex.block_mask(intervals, device, window), window_bites
            )
            return flex.FLEX, {"attention_mask": masks}
        like = torch.empty(0, dtype=self._dtype(), device=device)
        return TREE, {"tree": TreeAttention(tree, like)}

    def kernel(self, device: torch.device, window_bites: bool = False) -> Kernel:
        """How attention is computed on this device; "masked": under a mask of L x L.

        Where a window hides something, only flex leaves out what is hidden.
        """
        wanted = AUTO.get(device.type, "sdpa") if self.attention == "auto" else self.attention
        can = {"tree": self.can_tree, "flash": self.can_flash, "flex": self.can_flex}
        for kernel in KERNELS.get(wanted, ()):
            if can[kernel] and (kernel == "flex" or not window_bites):
                return kernel
        return "masked"

    def compile_parts(self, backend: Any = "inductor") -> None:
        """Compile the decoder layers, once for all of them and all lengths, and fuse the scores.

        Args:
            backend: torch.compile's.
        """
        torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
        for layer in _decoder_layers(self.model):
            layer.compile(dynamic=True, backend=backend)
        self.fuses_scores = True

    def compile_nothing(self) -> None:
        """Undo `compile_parts`."""
        for layer in _decoder_layers(self.model):
            layer._compiled_call_impl = None
        self.fuses_scores = False

    def use_what_works_for(self, policy: PolicyModel) -> None:
        """Take over what `self_check` found out of a policy of the same architecture."""
        self.can_tree, self.can_flex = policy.can_tree, policy.can_flex
        self.can_flash = policy.can_flash
        self.shares_prompts = policy.shares_prompts

    def _by_layer(
        self, make: Callable[[int | None], Mask], window_bites: bool
    ) -> Mask | dict[str, Mask]:
        """A mask, or one for each kind of layer. make: from the window, None: there is none."""
        if not window_bites:
            return make(None)
        sliding = make(self.window)
        if not self.layer_types:
            return sliding
        masks = {"full_attention": make(None), "sliding_attention": sliding}
        return {kind: masks[kind] for kind in sorted(self.layer_types)}

    def _masked_attention(self, device: torch.device, length: int) -> str:
        if self.attention in ("sdpa", "eager"):
            return self.attention
        return "eager" if device.type == "cpu" and length <= EAGER_ROW_LENGTH else "sdpa"

    def _window_bites(self, position_ids: torch.Tensor) -> bool:
        return self.window is not None and int(position_ids.max()) >= self.window

    def _masks(
        self, mask_B1LL: torch.Tensor, position_ids_BL: torch.Tensor, implementation: str
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask in the form the model takes: four-dimensional masks are used as they are."""

        def make(window: int | None) -> torch.Tensor:
            if window is None:
                return self._mask(mask_B1LL, implementation)
            # Positions count along the completion's own sequence: differences are distances.
            distance_BLL = position_ids_BL[:, :, None] - position_ids_BL[:, None, :]
            return self._mask(mask_B1LL & (distance_BLL < window)[:, None], implementation)

        return self._by_layer(make, self._window_bites(position_ids_BL))

    def _mask(self, mask_B1LL: torch.Tensor, implementation: str) -> torch.Tensor:
        if implementation == "sdpa":
            return mask_B1LL
        bias_B1LL = torch.zeros_like(mask_B1LL, dtype=self._dtype())
        return bias_B1LL.masked_fill_(~mask_B1LL, torch.finfo(bias_B1LL.dtype).min)


def _enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute decoder layers in the backward pass, with dropout still off.

    transformers checkpoints only layers in training mode; the flag is set on the layers themselves
    and not on what is inside them, where dropout is.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in _decoder_layers(model):
        layer.training = True


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
