"""Gate vectors and learned coefficients: initialisation, gradient reduction, sharded state.

Each tensor-parallel rank owns D/p columns of an FFN, so the gradient that reaches its mixing
coefficients is a partial sum over those columns. Where the sum over ranks happens depends on where
the gate lives, which is what ``Scope`` names:

=========  ============================  ==================================================
scope      owner                         what completes the gradient
=========  ============================  ==================================================
dense      a dense or shared-expert MLP  backward of copy (or of the sequence gather) on logits
layer      a MoE layer, for all its FFNs sum over TP (sequence_parallel) and DP, in Megatron's
                                         finalize_model_grads; logits of routed tokens are local
expert     one routed expert             backward of copy on the weight, over the expert TP group
=========  ============================  ==================================================

A wrong choice trains silently: see tests/parallel/test_negative_controls.py.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moa_megatron.config import MoAConfig
from moa_megatron.op import resolve_backend

Scope = Literal["dense", "layer", "expert"]


class MoAGate(nn.Module):
    """Mixing coefficients of one FFN, or of all FFNs of a MoE layer.

    ``weight`` is [n, d], the gate vectors (MoA), or [n], the scalars (LA); identical on all ranks
    of its tensor-parallel group. Method paper: equations 3-10 and section 5 (initialisation).

    Args:
        config: Megatron's transformer config.
        moa: settings of the method.
        scope: who owns the gate, see the table above.
        input_size: d, width of the FFN input.
        tp_group: tensor-parallel group of the owner (of the experts for scope ``expert``).
        seed: own random stream for this gate; None draws from torch's CPU generator, which all
            ranks of a pipeline stage share.
    """

    def __init__(
        self,
        config: TransformerConfig,
        moa: MoAConfig,
        scope: Scope,
        input_size: int,
        tp_group: ProcessGroup,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.moa, self.scope, self.tp_group = moa, scope, tp_group
        self.sequence_parallel = config.sequence_parallel
        self.on_two_streams = config.moe_shared_expert_overlap
        expert_parallel = config.expert_model_parallel_size > 1
        self._reduce_over_expert_tp = tp_group.size() > 1 or expert_parallel
        shape = (
            (moa.num_coefficients,) if moa.mixing == "la" else (moa.num_coefficients, input_size)
        )
        self.weight = nn.Parameter(torch.empty(shape))
        if config.perform_initialization and not self.weight.is_meta:
            self._initialise(seed)
        self.weight.data = self.weight.data.to(config.params_dtype)
        self._mark(config, tp_group, expert_parallel)

    def _initialise(self, seed: int | None) -> None:
        if self.moa.mixing == "la":
            nn.init.ones_(self.weight)
            return
        # Not Megatron's model-parallel RNG: its streams differ between tensor-parallel ranks.
        generator = None if seed is None else torch.Generator("cpu").manual_seed(seed)
        nn.init.normal_(self.weight, std=self.moa.gate_init_std, generator=generator)

    def _mark(
        self, config: TransformerConfig, tp_group: ProcessGroup, expert_parallel: bool
    ) -> None:
        """Attributes by which Megatron routes gradients, buffers and optimisers."""
        sums_over_sequence = self.scope == "layer" or (
            self.scope == "dense" and self.moa.mixing == "moa"
        )
        marks: dict[str, Any] = {
            "sequence_parallel": config.sequence_parallel and sums_over_sequence,
            # Routes a matrix to AdamW under Muon (both of Megatron's predicates read it); its other
            # effect, --decoupled-lr, is refused together with gates.
            "is_embedding_or_output_parameter": True,
        }
        if self.scope == "expert":
            # Same rule as Megatron's expert linears: which data-parallel group reduces.
            same_layout = tp_group.size() == config.tensor_model_parallel_size
            marks["allreduce"] = same_layout and not expert_parallel
        for name, value in marks.items():
            setattr(self.weight, name, value)

    def forward(self, x: Tensor, routed: bool = False) -> Tensor:
        """Coefficients that ``mixture`` takes for the FFN input ``x``.

        Args:
            x: [..., d]; with sequence parallelism the local part of the sequence.
            routed: ``x`` holds tokens dispatched to experts.

        Returns:
            MoA: float32 logits [..., n] for every token that the FFN's fc1 sees; LA: [n].
        """
        if self.moa.mixing == "la":
            return self._scalars()
        if self.scope == "expert":
            weight = self.weight
            if self._reduce_over_expert_tp:
                weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
            return self._logits(x, weight)
        logits = self._logits(x, self.weight)
        if routed:
            return logits
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(
                logits, tensor_parallel_output_grad=True, group=self.tp_group
            )
        return copy_to_tensor_model_parallel_region(logits, group=self.tp_group)

    def _logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """``gate_logits``, without Transformer Engine where its products may run beside this one.

        Those of a device share one workspace, whatever their stream (``get_cublas_workspace``).
        """
        if not self.on_two_streams:
            return gate_logits(x, weight)
        backend = resolve_backend(self.moa.backend, x.device.type, x.dtype)
        if backend == "triton" and x.dtype == weight.dtype and x.numel():
            from moa_megatron.kernels import triton_gates

            rows = x.flatten(0, -2)
            logits = triton_gates.grouped_logits(rows, weight.unsqueeze(0), [len(rows)])
            return logits.view(*x.shape[:-1], -1)
        return gate_logits(x, weight, engine=False)

    def _scalars(self) -> Tensor:
        if self.scope == "layer":
            return self.weight
        return copy_to_tensor_model_parallel_region(self.weight, group=self.tp_group)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Replicated over TP; the parent's offsets place it among layers and experts."""
        key = f"{prefix}weight"
        return {
            key: make_sharded_tensor_for_checkpoint(
                self.weight,
                key,
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
        }


def gate_logits(x: Tensor, weight: Tensor, engine: bool = True) -> Tensor:
    """x U^T in float32 (float64 for float64 input), whatever the parameters' dtype.

    Args:
        engine: by Transformer Engine's product where it is, as Megatron's routers; else by torch's.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not x.numel():
        # An expert without tokens: upstream's function fails to shape its logits.
        return (x @ weight.T).to(dtype)
    if not engine:
        return x.to(dtype) @ weight.to(dtype).T
    return router_gating_linear(x, weight, None, dtype)


def draw_expert_seeds(ep_group: ProcessGroup, num_local_experts: int) -> list[int]:
    """One stream per expert of this rank: ranks share torch's CPU generator, experts must differ.

    One draw whatever the layout; a global expert gets the same seed at all of them.
    """
    seed = int(torch.randint(2**62, (1,)).item())
    first = ep_group.rank() * num_local_experts
    return [(seed + first + index) % 2**63 for index in range(num_local_experts)]
