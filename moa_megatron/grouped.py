"""MoA in grouped experts: all routed experts of a rank in one pass, with or without TE.

The order of operations is ``TEGroupedMLP``'s. What differs is the activation, which here reads the
experts' input as well, through the gates.

Shape suffixes: T tokens of this rank, sorted by expert (padding rows included), d model width, P
width of fc1's output, D of the hidden vector, N local experts, n coefficients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.moe.moe_utils import skip_routed_expert_padding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moa_megatron import flags, observing, ranges
from moa_megatron.config import MoAConfig
from moa_megatron.gates import MoAGate, draw_expert_seeds
from moa_megatron.grouped_linear import GroupedLinear, MoAGroupedGate
from moa_megatron.mlp import check_gated, recomputes, save_input_once
from moa_megatron.op import mixture

# Settings under which upstream's forward is another one than the one replaced here.
_UNSUPPORTED = (
    "use_transformer_engine_op_fuser",
    "moe_apply_probs_on_input",
    "moe_mlp_glu_interleave_size",
)


class MoATEGroupedMLP(TEGroupedMLP):
    """Routed experts on Transformer Engine's grouped linear layers.

    Parameters, checkpoint keys and initial gates are those of sequential experts; ``moa_gate``
    holds a gate for each expert, or the MoE layer lends one for all (``share_gate``).

    Args:
        moa: settings of the method.

    Others as ``megatron.core.transformer.moe.experts.TEGroupedMLP``.

    Raises:
        ValueError: where the config asks for what the mixture cannot do.
    """

    shows_gate = True  # in statistics, see MoAMLP

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: GroupedMLPSubmodules,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        *,
        moa: MoAConfig,
    ) -> None:
        check_gated(config, moa)
        refused = [flag for flag in _UNSUPPORTED if getattr(config, flag)]
        if config.fine_grained_activation_offloading:
            inside = set(flags.OFFLOADED_INSIDE).intersection(config.offload_modules)
            refused += [f"offload_modules={name}" for name in sorted(inside)]
        if refused:
            raise ValueError(f"MoA in grouped experts does not work with {', '.join(refused)}")
        # First, as sequential experts do: linear layers may draw from the same generator.
        seeds = draw_expert_seeds(pg_collection.ep, num_local_experts)
        super().__init__(num_local_experts, config, submodules, pg_collection, name)
        self.moa = moa
        if moa.gate_scope == "expert":
            width = config.moe_latent_size or config.hidden_size
            self.moa_gate = MoAGroupedGate(config, moa, width, pg_collection, seeds)
        # Not in other recipes: it would turn Transformer Engine's grouped product for MXFP8 off.
        per_tensor_or_block = config.fp8_recipe in (Fp8Recipe.tensorwise, Fp8Recipe.blockwise)
        keeps_input = moa.mixing == "moa" and not recomputes(config, "moe")
        if config.fp8 and per_tensor_or_block and keeps_input:
            save_input_once(config, self.linear_fc1)

    def share_gate(self, gate: MoAGate, shows: bool) -> None:
        """Use the gate of the MoE layer; it stays that layer's parameter, not this module's."""
        self._lent_gate, self.shows_gate = (gate,), shows

    @property
    def gate_in_use(self) -> MoAGate | MoAGroupedGate:
        """Its own gate, or the layer's."""
        own: MoAGroupedGate | None = getattr(self, "moa_gate", None)
        return own if own is not None else self._lent_gate[0]

    def forward(
        self,
        permuted_local_hidden_states: Tensor,
        tokens_per_expert: Tensor,
        permuted_probs: Tensor,
        output_buffer: Tensor | None = None,
        grad_input_buffer: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """The experts' outputs, weighted.

        Args:
            permuted_local_hidden_states: [T, d], tokens of the first local expert first.
            tokens_per_expert: [N], their counts; any may be zero.
            permuted_probs: [T], routing weights.

        Returns:
            [T, d], the bias included, and None.

        Raises:
            ValueError: for the buffers, which only upstream's fused experts fill.
        """
        if output_buffer is not None or grad_input_buffer is not None:
            raise ValueError("MoA experts take no communication buffers; use another dispatcher")
        counts: list[int] = tokens_per_expert.tolist()
        padding = (self.config.fp8 or self.config.fp4) and not skip_routed_expert_padding(
            self.config
        )
        x_Td, probs_T1, padded = permuted_local_hidden_states, permuted_probs.unsqueeze(-1), counts
        if padding:
            x_Td, padded = self.quantization_padding(x_Td, counts)
            probs_T1, _ = self.quantization_padding(probs_T1, counts)

        with ranges.EXPERTS:
            preact_TP, coefficients = self._up(x_Td, padded)
            output = self._mix_and_down(preact_TP, coefficients, probs_T1, padded)
        return self.quantization_unpadding(output, counts) if padding else output, None

    def _up(self, x_Td: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
        """Pre-activations and coefficients, which both come from ``x_Td``."""
        with ranges.GATE:
            if hasattr(self, "moa_gate"):
                coefficients = self.moa_gate(x_Td, counts)
            else:
                coefficients = self._lent_gate[0](x_Td, routed=True)
        with ranges.FC1:
            preact_TP, _ = self.linear_fc1(x_Td, counts)  # which adds its bias itself
        return preact_TP, coefficients

    def _mix_and_down(
        self, preact_TP: Tensor, coefficients: Tensor, probs_T1: Tensor, counts: list[int]
    ) -> Tensor:
        """The mixture, recomputed in the backward pass where asked, and fc2 with its bias."""
        mix = partial(_mix, config=self.moa, tokens_per_expert=counts)
        recompute = CheckpointWithoutOutput() if self.activation_recompute else None
        # Everything differentiable is an argument: a closure's gradient would be lost.
        operands = (preact_TP, coefficients, probs_T1)
        hidden_TD = recompute.checkpoint(mix, *operands) if recompute else mix(*operands)
        if observing.active:
            observing.record(self, preact_TP, hidden_TD, coefficients, probs_T1)
        with ranges.FC2:
            output, bias = self.linear_fc2(hidden_TD, counts)
        if recompute:
            recompute.discard_output_and_register_recompute(output)
        return self._apply_bias(output, bias, counts, probs_T1)


class MoAGroupedMLP(MoATEGroupedMLP):
    """Grouped experts without Transformer Engine: torch's grouped product, or one per expert.

    The base class around ``GroupedLinear``; every expert's matrices come from the linear layers
    that a sequential expert would have, in the same order, and thus start the same.

    Args:
        submodules: the linear layers of one expert, Megatron's own.

    Others as ``MoATEGroupedMLP``.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
        *,
        moa: MoAConfig,
    ) -> None:
        experts: list[MLP] = []
        # MLP reads the width of its second layer from here; sequential experts do the same.
        expert_config = copy.copy(config)
        expert_config.ffn_hidden_size = config.moe_ffn_hidden_size

        def first(*_: Any, **__: Any) -> GroupedLinear:
            for _index in range(num_local_experts):
                expert = MLP(
                    expert_config,
                    submodules,
                    is_expert=True,
                    ffn_hidden_size=expert_config.ffn_hidden_size,
                    tp_group=pg_collection.expt_tp,
                )
                experts.append(expert)
            layers = [expert.linear_fc1 for expert in experts]
            return GroupedLinear(layers, {"weight": 0, "bias": 0}, pg_collection, adds_bias=True)

        def second(*_: Any, **__: Any) -> GroupedLinear:
            layers = [expert.linear_fc2 for expert in experts]
            return GroupedLinear(layers, {"weight": 1}, pg_collection, adds_bias=False)

        grouped = GroupedMLPSubmodules(linear_fc1=first, linear_fc2=second)
        super().__init__(num_local_experts, config, grouped, pg_collection, name, moa=moa)


def _mix(
    preact_TP: Tensor,
    coefficients: Tensor,
    probs_T1: Tensor,
    *,
    config: MoAConfig,
    tokens_per_expert: Sequence[int],
) -> Tensor:
    """Hidden vectors [T, D], times the routing weights.

    Args:
        coefficients: logits [T, n], or LA's scalars: [n] of a layer, [N, n] of each expert.
    """
    probs_T = probs_T1.squeeze(-1)
    with ranges.MIXTURE:
        if config.mixing == "moa" or coefficients.dim() == 1:
            return mixture(preact_TP, coefficients, config, probs_T)
        # The op takes one set of scalars a call; it sums their gradients over all of its rows.
        counts = list(tokens_per_expert)
        pieces = zip(preact_TP.split(counts), coefficients, probs_T.split(counts), strict=True)
        return torch.cat([mixture(preact, n, config, probs) for preact, n, probs in pieces])
