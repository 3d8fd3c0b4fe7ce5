"""MoA in Megatron's dense MLP, as shared expert, and as the body of a sequential expert."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions.transformer_engine import set_save_original_input
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moa_megatron import observing, ranges
from moa_megatron.config import MoAConfig
from moa_megatron.gates import MoAGate, Scope
from moa_megatron.layers import refuse_norm_in_fc1
from moa_megatron.op import mixture


class MoAMLP(MLP):
    """fc1, mixture, fc2; linears, names and checkpoint layout are ``MLP``'s, plus ``moa_gate``.

    Args:
        moa: settings of the method.
        gate_seed: random stream of the gate, see ``MoAGate``.
        owns_gate: False where the MoE layer lends its gate (``share_gate``).

    Others as ``megatron.core.transformer.mlp.MLP``.
    """

    moa: MoAConfig
    shows_gate = True  # in statistics: a gate that several modules read is shown by one of them

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        is_expert: bool = False,
        input_size: int | None = None,
        ffn_hidden_size: int | None = None,
        tp_group: ProcessGroup | None = None,
        name: str | None = None,
        *,
        moa: MoAConfig | None = None,
        gate_seed: int | None = None,
        owns_gate: bool | None = None,
    ) -> None:
        moa = moa if moa is not None else self.moa
        check_gated(config, moa)
        width = ffn_hidden_size if ffn_hidden_size is not None else config.ffn_hidden_size
        super().__init__(config, submodules, is_expert, input_size, width, tp_group, name)
        if hasattr(self.linear_fc1, "layer_norm_weight"):
            raise refuse_norm_in_fc1(type(self.linear_fc1).__name__)
        if moa.mixing == "moa" and not self._recomputes_input(is_expert):
            save_input_once(config, self.linear_fc1)
        self.moa, self.is_expert = moa, is_expert
        if owns_gate is None:
            owns_gate = getattr(self, "_owns_gate", True)
        if owns_gate:
            scope: Scope = "expert" if is_expert else "dense"
            gate_input = config.moe_latent_size if is_expert else None
            self.moa_gate = MoAGate(
                config, moa, scope, gate_input or self.input_size, self.tp_group, seed=gate_seed
            )

    @classmethod
    def as_mlp_submodule(
        cls,
        submodules: MLPSubmodules,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool,
        is_expert: bool = False,
        input_size: int | None = None,
        ffn_hidden_size: int | None = None,
        name: str | None = None,
        *,
        moa: MoAConfig | None = None,
    ) -> MoAMLP:
        """Builds the ``mlp`` of a TransformerLayer or MLPLayer."""
        del is_mtp_layer
        return cls(
            config,
            submodules,
            is_expert=is_expert,
            input_size=input_size,
            ffn_hidden_size=ffn_hidden_size,
            tp_group=pg_collection.tp,
            name=name,
            moa=moa,
        )

    def _recomputes_input(self, is_expert: bool) -> bool:
        """Whether selective recomputation drops the FFN input, so that nothing keeps it."""
        return recomputes(self.config, "moe" if is_expert else "mlp")

    def share_gate(self, gate: MoAGate, shows: bool) -> None:
        """Use the gate of the MoE layer; it stays that layer's parameter, not this module's."""
        self._lent_gate, self.shows_gate = (gate,), shows

    @property
    def gate_in_use(self) -> MoAGate:
        """Its own gate, or the layer's."""
        own: MoAGate | None = getattr(self, "moa_gate", None)
        return own if own is not None else self._lent_gate[0]

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[..., d] -> [..., d] and an output bias; ``per_token_scale`` [...]: routing weights."""
        with ranges.GATE:
            coefficients = self.gate_in_use(hidden_states, routed=self.is_expert)
        with ranges.FC1:
            preact, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            preact = preact + bias
        hidden = self._mix(preact, coefficients, per_token_scale)
        with ranges.FC2:
            output, output_bias = self.linear_fc2(hidden)
        if per_token_scale is not None and output_bias is not None:
            # The bias of a routed expert is weighted like its output, and added here.
            output = output + output_bias * per_token_scale.unsqueeze(-1).to(output.dtype)
            output_bias = None
        return output, output_bias

    def _mix(
        self, preact: Tensor, coefficients: Tensor, per_token_scale: Tensor | None = None
    ) -> Tensor:
        with ranges.MIXTURE:
            hidden = mixture(preact, coefficients, self.moa, per_token_scale)
        if observing.active:
            observing.record(self, preact, hidden, coefficients, per_token_scale)
        return hidden


class MoASharedExpertMLP(SharedExpertMLP, MoAMLP):
    """Megatron's shared expert around ``MoAMLP``; the method resolution order does the work.

    With ``--moe-shared-expert-overlap`` the dispatcher calls upstream's stages in the place of
    ``forward``, on a stream of their own. The first also reads the gates here. That of fc1 calls
    ``activation_func`` where ``use_te_activation_func`` is set, which is the mixture here.
    """

    _coefficients: tuple[Tensor, ...] = ()  # in a tuple: they may be a parameter of another module

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        *,
        moa: MoAConfig,
        owns_gate: bool = True,
    ) -> None:
        # SharedExpertMLP calls the next constructor with its own arguments only.
        self.moa, self._owns_gate = moa, owns_gate
        super().__init__(
            config=config,
            submodules=submodules,
            gate=gate,  # type: ignore[call-arg]
            pg_collection=pg_collection,
            name=name,
        )
        if self.config.moe_shared_expert_overlap:
            self.config.use_te_activation_func = True  # of this module's own copy
            self.activation_func = self._mix_overlapped

    def pre_forward_comm(self, input: Tensor, wait_current_stream: bool = True) -> None:
        """As upstream; and the coefficients of ``input`` [s/p, b, d], or of its tokens [t, d]."""
        if wait_current_stream:
            self.wait_current_stream()
        with torch.cuda.stream(self.stream), ranges.GATE:
            self._coefficients = (self.gate_in_use(input),)
        # Megatron waits for gathered parameters on the stream that reads them first, once: routed
        # experts read a lent gate on the other one.
        torch.cuda.current_stream().wait_stream(self.stream)
        super().pre_forward_comm(input, wait_current_stream=False)

    def _mix_overlapped(self, preact: Tensor) -> Tensor:
        """Pre-activations [..., P] -> hidden vectors [..., D]."""
        (coefficients,), self._coefficients = self._coefficients, ()
        return self._mix(preact, coefficients)

    def _recomputes_input(self, is_expert: bool) -> bool:
        del is_expert
        return recomputes(self.config, "shared_experts")


def recomputes(config: TransformerConfig, module: str) -> bool:
    """Whether ``module`` is recomputed selectively."""
    return config.recompute_granularity == "selective" and module in (
        config.recompute_modules or ()
    )


def save_input_once(config: TransformerConfig, linear: nn.Module) -> None:
    """Lets fc1 keep the high-precision input that the gates keep anyway, not a quantised copy too.

    As Megatron does for shared experts, whose input its router keeps. Transformer Engine refuses
    it under delayed scaling.
    """
    quantises = bool(config.fp8) and config.fp8_recipe != Fp8Recipe.delayed
    if (quantises or config.fp4) and hasattr(linear, "save_original_input"):
        set_save_original_input(linear)


def check_gated(config: TransformerConfig, moa: MoAConfig) -> None:
    """Raises ValueError where the width of fc1 does not fit the variant."""
    if config.gated_linear_unit != moa.gated:
        raise ValueError(
            f"variant={moa.variant!r} needs gated_linear_unit={moa.gated}, the model has "
            f"{config.gated_linear_unit}: {'add' if moa.gated else 'remove'} --swiglu"
        )
