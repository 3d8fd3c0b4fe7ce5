"""Attention and norm of local specs under layouts for which Megatron expects Transformer Engine."""

import copy
from typing import Any

import torch


def zigzag_order(length: int, cp: int) -> torch.Tensor:
    """Index into the gathered sequence of each position of the natural one.

    Rank r of context parallelism holds chunks r and 2*cp-1-r, which balances causal attention.
    """
    chunk = length // (2 * cp)
    held = [piece for rank in range(cp) for piece in (rank, 2 * cp - 1 - rank)]
    positions = torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in held])
    return torch.argsort(positions)


def zigzag_positions(length: int, cp: int, rank: int) -> torch.Tensor:
    """Positions, in a sequence of `length`, of the tokens that this rank holds."""
    chunk = length // (2 * cp)
    pieces = (rank, 2 * cp - 1 - rank)
    return torch.cat([torch.arange(c * chunk, (c + 1) * chunk) for c in pieces])


def host_attention(base: type) -> type:
    """A DotProductAttention which gathers keys and values over context-parallel ranks.

    Exact rather than economical: host runs check numbers, they do not save memory.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    class HostDotProductAttention(base):  # type: ignore[misc, valid-type]
        """Upstream's attention, with context parallelism."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            cp = config.context_parallel_size
            if cp > 1 and config.window_size is not None:
                raise ValueError(
                    "window_size: sliding-window attention has no host variant under "
                    f"context_parallel_size={cp}; set context_parallel_size to 1"
                )
            single = copy.copy(config)
            single.context_parallel_size = 1
            super().__init__(single, *args, **kwargs)
            self.config = config

        def forward(
            self,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            cp = self.config.context_parallel_size
            if cp == 1:
                return super().forward(query, key, value, attention_mask, *args, **kwargs)
            group = getattr(self.pg_collection, "cp", None)
            group = group or parallel_state.get_context_parallel_group()
            length = key.size(0) * cp
            order = zigzag_order(length, cp)
            key, value = (
                gather_from_sequence_parallel_region(t.contiguous(), group=group)[order]
                for t in (key, value)
            )
            if attention_mask is None and self.attn_mask_type.name == "causal":
                rows = zigzag_positions(length, cp, group.rank())
                attention_mask = rows[:, None] < torch.arange(length)[None, :]
            return super().forward(query, key, value, attention_mask, *args, **kwargs)

    return HostDotProductAttention


class HostNorm:
    """torch's LayerNorm or RMSNorm, also under sequence parallelism.

    Upstream's wrapper refuses sequence parallelism, although a token-wise norm only lacks the
    mark by which Megatron sums its gradients over tensor-parallel ranks. The two flags it refuses
    besides choose between CUDA kernels and do not change the result.
    """

    def __new__(
        cls,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> Any:
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "layernorm_zero_centered_gamma=True: torch's norms have no such weight; "
                "drop --apply-layernorm-1p on a host"
            )
        norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in norms:
            raise ValueError(
                f"normalization={config.normalization!r}: a host runs {' or '.join(norms)}"
            )
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
