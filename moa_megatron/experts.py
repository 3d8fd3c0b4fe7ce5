"""MoA in the experts of Megatron's MoE layer: one gate per expert, or one for the whole layer."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moa_megatron import ranges
from moa_megatron.config import MoAConfig
from moa_megatron.gates import MoAGate, draw_expert_seeds
from moa_megatron.grouped import MoAGroupedMLP, MoATEGroupedMLP
from moa_megatron.mlp import MoAMLP, MoASharedExpertMLP


class MoASequentialMLP(SequentialMLP):
    """Routed experts one after the other, each a ``MoAMLP``; the rest is ``SequentialMLP``."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
        *,
        moa: MoAConfig,
    ) -> None:
        # Upstream's constructor builds plain MLPs; with no experts it still sets groups and config.
        super().__init__(0, config, submodules, pg_collection, name)
        self.num_local_experts = num_local_experts
        for index, seed in enumerate(draw_expert_seeds(self.ep_group, num_local_experts)):
            expert = MoAMLP(
                self.config,
                submodules,
                is_expert=True,
                ffn_hidden_size=self.config.moe_ffn_hidden_size,
                tp_group=self.tp_group,
                name=f"{name}.local_experts.{index}" if name is not None else None,
                moa=moa,
                gate_seed=seed,
                owns_gate=moa.gate_scope == "expert",
            )
            self.local_experts.append(expert)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As ``SequentialMLP``, in a range."""
        with ranges.EXPERTS:
            return super().forward(*args, **kwargs)


class RangedMoELayer(MoELayer):
    """``MoELayer`` whose stages profilers can tell apart; upstream pushes no range for them.

    Each method is upstream's in a range; they are also what its overlapped schedule calls.
    """

    def route(self, *args: Any, **kwargs: Any) -> Any:
        """Probabilities and routing map."""
        with ranges.ROUTER:
            return super().route(*args, **kwargs)

    def shared_experts_compute(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """Output of the shared experts, or None."""
        with ranges.SHARED_EXPERTS:
            return super().shared_experts_compute(*args, **kwargs)

    def preprocess(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens and probabilities as the dispatcher wants them."""
        with ranges.DISPATCH:
            return super().preprocess(*args, **kwargs)

    def dispatch(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens and probabilities on the ranks of their experts."""
        with ranges.DISPATCH:
            return super().dispatch(*args, **kwargs)

    def routed_experts_compute(self, *args: Any, **kwargs: Any) -> Any:
        """Output of this rank's experts, ready to go back."""
        with ranges.ROUTED:
            return super().routed_experts_compute(*args, **kwargs)

    def combine(self, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs on the ranks of their tokens."""
        with ranges.COMBINE:
            return super().combine(*args, **kwargs)

    def postprocess(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        with ranges.COMBINE:
            return super().postprocess(*args, **kwargs)


class MoALayer(RangedMoELayer):
    """A MoE layer that owns one gate and lends it to its shared and routed experts.

    With ``gate_scope='expert'`` every FFN owns its gate instead, and this is ``MoELayer``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
        *,
        moa: MoAConfig,
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        if moa.gate_scope == "expert":
            return
        if config.moe_latent_size:
            raise ValueError(
                f"gate_scope='layer' with moe_latent_size={config.moe_latent_size}: routed experts "
                "see latent vectors, shared experts do not; use --moa-gate-scope expert"
            )
        self.moa_gate = MoAGate(config, moa, "layer", config.hidden_size, self.attn_tp_group)
        for module in self.modules():
            if isinstance(module, (MoAMLP, MoATEGroupedMLP)):
                # Shared experts read every token once, so they show what the gate does.
                shows = module is self.shared_experts or self.shared_experts is None
                module.share_gate(self.moa_gate, shows)


def build_experts(
    num_local_experts: int,
    config: TransformerConfig,
    submodules: MLPSubmodules,
    pg_collection: ProcessGroupCollection | None = None,
    name: str | None = None,
    *,
    moa: MoAConfig,
) -> MoASequentialMLP | MoAGroupedMLP:
    """Builder in the place of ``SequentialMLP``, all that specifications without TE know.

    They ignore ``moe_grouped_gemm``, which the config still holds when the model is built. Linear
    layers of another kind (TE's, where a specification asks for them one by one) stay sequential.
    """
    ours = submodules.linear_fc1 is ColumnParallelLinear
    kind = MoAGroupedMLP if config.moe_grouped_gemm and ours else MoASequentialMLP
    return kind(num_local_experts, config, submodules, pg_collection, name, moa=moa)


def build_shared_experts(
    *,
    config: TransformerConfig,
    pg_collection: ProcessGroupCollection | None,
    gate: bool,
    submodules: MLPSubmodules,
    moa: MoAConfig,
    name: str | None = None,
) -> MoASharedExpertMLP:
    """Builder with the signature of ``moe_module_specs._build_shared_experts``."""
    owns_gate = moa.gate_scope == "expert"
    return MoASharedExpertMLP(
        config, submodules, gate, pg_collection, name, moa=moa, owns_gate=owns_gate
    )
