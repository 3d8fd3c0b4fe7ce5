"""Muon takes W1 and W2 of a gated FFN as two matrices, as the method paper defines them.

Megatron keeps both in one fc1 matrix, W1 over W2 on each tensor-parallel rank, and orthogonalises
that as a whole. Its Muon can split a matrix by rows, which it does for Q, K and V: parameters
marked ``is_qkv`` with ``qkv_split_shapes`` (``TensorParallelMuon.orthogonalize``). The same marks
serve here; main copies and sharded optimisers inherit them.
"""

from __future__ import annotations

import argparse
import re

from torch import nn

_FC1 = re.compile(r"\.linear_fc1\.weight\d*$")


# What would make the halves of fc1 other things than W1 and W2.
_INTERLEAVED = (
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "tensor_parallel_num_weight_shards",
    "expert_tensor_parallel_num_weight_shards",
)


def problems(args: argparse.Namespace) -> list[str]:
    """Where the split that was asked for could not happen, or would cut elsewhere."""
    if not splits_fc1(args):
        return []
    cure = "leave it out, or add --no-moa-muon-split-fc1"
    found = []
    if not args.muon_split_qkv:
        found.append(
            "--muon-no-split-qkv also turns off the mechanism by which W1 and W2 are told apart; "
            + cure
        )
    found += [
        f"--{name.replace('_', '-')} {getattr(args, name)}: the halves of fc1 are not W1 and W2 "
        f"then, which Muon takes apart; {cure}"
        for name in _INTERLEAVED
        if (getattr(args, name, None) or 0) > 1
    ]
    return found


def splits_fc1(args: argparse.Namespace) -> bool:
    """Whether this run has W1 and W2 in one matrix, and Muon takes them apart."""
    muon = args.optimizer in ("muon", "dist_muon", "adaptive_muon")
    gated = args.swiglu or args.quick_geglu
    return bool(muon and gated and args.moa_muon_split_fc1)


def split_fc1(chunks: list[nn.Module]) -> list[nn.Module]:
    """Marks the fc1 of every FFN and expert, also those of sequential and grouped experts.

    A hook for ``megatron.training.models.ModelConfig.pre_wrap_hooks``; gated FFNs only.
    """
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if _FC1.search(name) and weight.dim() == 2:
                width = weight.shape[0] // 2
                weight.is_qkv = True  # type: ignore[attr-defined]
                weight.qkv_split_shapes = [width, width]  # type: ignore[attr-defined]
    return chunks
