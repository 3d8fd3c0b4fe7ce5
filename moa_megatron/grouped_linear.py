"""Matrices of several experts in one module: products, gates, sharded state.

Each expert's matrix is a parameter of its own, ``weight0`` to ``weight{N-1}`` as Transformer
Engine names them: Muon takes matrices only, and tools that reshard look for these names.

Shape suffixes: T tokens of this rank, sorted by expert, N local experts, d and f the input and
output width of a linear layer, n coefficients.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moa_megatron.config import MoAConfig
from moa_megatron.gates import MoAGate, gate_logits
from moa_megatron.op import resolve_backend

logger = logging.getLogger(__name__)
_Offsets = tuple[tuple[int, int, int], ...]


class MoAGroupedGate(nn.Module):
    """The gates of this rank's routed experts: one ``MoAGate`` of scope ``expert`` for each.

    They start from the same numbers, carry the same marks and get the same gradients as gates of
    sequential experts, and are saved under the same keys.

    Args:
        input_size: d, width of the experts' input.
        groups: with ``ep``, ``expt_tp`` and ``expt_dp``.
        seeds: one random stream for each local expert, see ``draw_expert_seeds``.

    Others as ``MoAGate``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        moa: MoAConfig,
        input_size: int,
        groups: ProcessGroupCollection,
        seeds: Sequence[int],
    ) -> None:
        super().__init__()
        self.moa, self.groups, self.num_experts = moa, groups, len(seeds)
        self.on_two_streams = config.moe_shared_expert_overlap
        for index, seed in enumerate(seeds):
            gate = MoAGate(config, moa, "expert", input_size, groups.expt_tp, seed)
            self.register_parameter(f"weight{index}", gate.weight)

    def forward(self, x_Td: Tensor, tokens_per_expert: Sequence[int]) -> Tensor:
        """Coefficients of every token's expert.

        Args:
            x_Td: dispatched tokens, those of the first local expert first.
            tokens_per_expert: how many rows each local expert has; zeros are fine.

        Returns:
            MoA: float32 logits [T, n]; LA: [N, n], the scalars of each expert.
        """
        # Backward of the copy completes the gradients over the expert TP group, all in one sum.
        weights = torch.stack([getattr(self, f"weight{i}") for i in range(self.num_experts)])
        weights = copy_to_tensor_model_parallel_region(weights, group=self.groups.expt_tp)
        if self.moa.mixing == "la":
            return weights
        if resolve_backend(self.moa.backend, x_Td.device.type, x_Td.dtype) == "triton":
            from moa_megatron.kernels import triton_gates

            if x_Td.dtype == weights.dtype:
                return triton_gates.grouped_logits(x_Td, weights, tokens_per_expert)
        # torch's grouped product would round the logits to bfloat16.
        parts = zip(x_Td.split(list(tokens_per_expert)), weights, strict=True)
        engine = not self.on_two_streams  # as MoAGate
        return torch.cat([gate_logits(x, weight, engine) for x, weight in parts])

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: _Offsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Replicated over expert TP, one slice of an axis of experts each."""
        states = [{"weight": getattr(self, f"weight{i}")} for i in range(self.num_experts)]
        return shard_experts(states, {}, prefix, sharded_offsets, metadata or {}, self.groups)


class GroupedLinear(nn.Module):
    """The linear layers of all local experts as one, without any communication.

    Takes over the parameters of Megatron's own parallel layers, with their initial values and the
    attributes by which gradients are routed. The token dispatcher sums over expert TP.

    Args:
        layers: one ColumnParallelLinear or RowParallelLinear for each local expert.
        shard_axes: the axis of ``weight`` and ``bias`` that expert TP divides.
        groups: as ``MoAGroupedGate``.
        adds_bias: whether ``forward`` adds the bias or returns it.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        shard_axes: Mapping[str, int],
        groups: ProcessGroupCollection,
        adds_bias: bool,
    ) -> None:
        super().__init__()
        self.shard_axes, self.groups, self.adds_bias = dict(shard_axes), groups, adds_bias
        self.num_experts, self.has_bias = len(layers), layers[0].bias is not None
        for index, layer in enumerate(layers):
            self.register_parameter(f"weight{index}", layer.weight)
            if self.has_bias:
                self.register_parameter(f"bias{index}", layer.bias)
        self._register_load_state_dict_pre_hook(_drop_extra_states)

    def _all(self, name: str) -> list[Tensor]:
        return [getattr(self, f"{name}{index}") for index in range(self.num_experts)]

    def forward(
        self, x_Td: Tensor, tokens_per_expert: Sequence[int]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """[T, d] -> [T, f], and the bias [f] of each expert where it is not added here."""
        biases = self._all("bias") if self.has_bias else None
        added = biases if self.adds_bias else None
        output = grouped_linear(x_Td, self._all("weight"), tokens_per_expert, added)
        return output, None if self.adds_bias else biases

    def backward_dw(self) -> None:
        """Nothing is left to do: weight gradients are not delayed."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: _Offsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As the layers one by one would, extra state included: other experts' classes load it."""
        names = ["weight", "bias"] if self.has_bias else ["weight"]
        states: list[dict[str, Any]] = [
            {name: getattr(self, f"{name}{index}") for name in names} | {"_extra_state": None}
            for index in range(self.num_experts)
        ]
        return shard_experts(
            states, self.shard_axes, prefix, sharded_offsets, metadata or {}, self.groups
        )


def grouped_linear(
    x_Td: Tensor,
    weights: Sequence[Tensor],
    tokens_per_expert: Sequence[int],
    biases: Sequence[Tensor] | None = None,
) -> Tensor:
    """Rows of expert i times the transpose of ``weights[i]`` [f, d]; returns [T, f].

    One kernel where torch has it (bfloat16 on Hopper and later), else one product per expert.
    """
    if not _has_grouped_kernel(x_Td, weights[0]):
        parts = zip(x_Td.split(list(tokens_per_expert)), weights, strict=True)
        added: Sequence[Tensor | None] = biases or [None] * len(weights)
        return torch.cat([F.linear(*part, bias) for part, bias in zip(parts, added, strict=True)])
    counts = torch.tensor(tokens_per_expert, dtype=torch.int32)
    ends = counts.cumsum(0, dtype=torch.int32).to(x_Td.device, non_blocking=True)
    output: Tensor = _GroupedProduct.apply(x_Td, ends, *weights)
    if biases is not None:
        counts = counts.to(x_Td.device, non_blocking=True)
        rows = torch.stack(list(biases)).repeat_interleave(counts, 0, output_size=len(x_Td))
        output = output + rows
    return output


class _GroupedProduct(torch.autograd.Function):
    """``grouped_mm`` that keeps the experts' own matrices for its gradients, not the copy it reads.

    torch's own rule would keep that copy: all routed experts of a layer a second time.
    """

    @staticmethod
    def forward(ctx: Any, x_Td: Tensor, ends_N: Tensor, *weights_fd: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_Td, ends_N, *weights_fd)
        return F.grouped_mm(x_Td, torch.stack(weights_fd).transpose(1, 2), offs=ends_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Tf: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_Td, ends_N, *weights_fd = ctx.saved_tensors
        grad_Tf, grad_x = grad_Tf.contiguous(), None
        grad_weights: Sequence[Tensor | None] = [None] * len(weights_fd)
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad_Tf, torch.stack(weights_fd), offs=ends_N)
        if any(ctx.needs_input_grad[2:]):
            grad_weights = F.grouped_mm(grad_Tf.T, x_Td, offs=ends_N).unbind()
        return grad_x, None, *grad_weights


def _has_grouped_kernel(x_Td: Tensor, weight_fd: Tensor) -> bool:
    """Elsewhere ``grouped_mm`` is a loop, too, and refuses rows that are not whole 16 bytes."""
    if not x_Td.is_cuda or not x_Td.numel():
        return False
    if x_Td.dtype != torch.bfloat16 or weight_fd.dtype != torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(x_Td.device)[0] < 9:
        return False
    if any(size % 8 for size in weight_fd.shape):
        _say_loop(tuple(weight_fd.shape))
        return False
    return True


@functools.cache
def _say_loop(shape: tuple[int, ...]) -> None:
    logger.warning(
        "experts of %d x %d are multiplied one after the other: a grouped product needs widths "
        "that are multiples of 8; --moa-align 64 rounds them up",
        *shape,
    )


def shard_experts(
    states: Sequence[Mapping[str, Any]],
    shard_axes: Mapping[str, int],
    prefix: str,
    sharded_offsets: _Offsets,
    metadata: Mapping[str, Any],
    groups: ProcessGroupCollection,
) -> dict[str, Any]:
    """Sharded state of a grouped module, with the global keys that sequential experts have.

    Args:
        states: for each local expert its tensors by name.
        shard_axes: axis that expert TP divides, by name; others are replicated.
        metadata: with ``dp_cp_group``; ``singleton_local_shards`` gives each expert its own keys.

    Returns:
        ``{prefix}{name}{i}`` for local expert i: a piece of the whole ``{prefix}{name}``.
    """
    whole = groups.ep.size() * len(states)
    sharded: dict[str, Any] = {}
    for index, state in enumerate(states):
        expert = groups.ep.rank() * len(states) + index
        if metadata.get("singleton_local_shards", False):
            key, place = f"{expert}.{prefix}", sharded_offsets
        else:
            key, place = prefix, (*sharded_offsets, (len(sharded_offsets), expert, whole))
        pieces = make_sharded_tensors_for_checkpoint(
            dict(state),
            key,
            dict(shard_axes),
            place,
            tp_group=groups.expt_tp,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name in state:
            piece = pieces[key + name]
            # Replicas of an expert are the expert data-parallel ranks only.
            piece.replica_id = (*piece.replica_id[:2], groups.expt_dp.rank())
            sharded[f"{prefix}{name}{index}"] = piece
    return sharded


def _drop_extra_states(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Megatron's layers have an empty extra state, for the sake of TE's; here nobody takes it."""
    for key in [key for key in state_dict if key.startswith(f"{prefix}_extra_state")]:
        del state_dict[key]
