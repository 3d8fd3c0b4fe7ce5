"""Classes of device activity: by kernel name, refined by the NVTX range that launched it."""

from __future__ import annotations

import functools
import re

NCCL, OTHER_COMM = "communication: NCCL", "communication: dispatcher, other"
MIXTURE, GATES = "MoA mixture kernels", "MoA gates"
GEMM, ATTENTION, NORM, ROUTER = "GEMM", "attention", "norm", "router, permute"
OPTIMIZER, ELEMENTWISE, OTHER = "optimizer", "elementwise", "other kernels"
GRAPH, COPY, SET = "CUDA graph, not opened", "memcpy", "memset"

COMMUNICATION = (NCCL, OTHER_COMM)
MOA = (MIXTURE, GATES)
NOT_COMPUTE = (*COMMUNICATION, COPY, SET)
# In the order of tables and legends, each with its colour: warm for MoA, violet for communication.
COLOURS: dict[str, str] = {
    GEMM: "#3b6ea5",
    ATTENTION: "#2a9d8f",
    MIXTURE: "#e4572e",
    GATES: "#f3a712",
    NORM: "#7fb069",
    ROUTER: "#8d6b94",
    ELEMENTWISE: "#9fb4c7",
    OPTIMIZER: "#b08968",
    OTHER: "#c9cdd2",
    GRAPH: "#6b7280",
    NCCL: "#6a4c93",
    OTHER_COMM: "#b185db",
    COPY: "#f28ba8",
    SET: "#e8c5ce",
}

# First match wins: attention kernels carry the names of the GEMM library that they are built on,
# and NCCL's and the mixture's names are their own. mixture_* are the functions of
# moa_megatron/kernels/triton_kernels.py, by which Triton names its kernels.
_BY_NAME: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        (NCCL, r"^nccl|ncclKernel|ncclDevKernel"),
        (OTHER_COMM, r"deep_ep|deepep|hybrid_ep|nvshmem|userbuffers|ubuf|nccl_ep|symm_mem"),
        (MIXTURE, r"^mixture_(forward|backward)"),
        (ATTENTION, r"flash|fmha|sdpa|attention|attn|scaled.*softmax|rope|rotary"),
        (NORM, r"(layer|rms|batch|group)_?norm|ln_(fwd|bwd)|rmsnorm"),
        (ROUTER, r"permute|topk|top_k|router|moe_|_moe|radix.?sort|sort_?pairs|histogram|bincount"),
        (OPTIMIZER, r"adam|lamb(?!da)|muon|newton|multi_tensor|multitensor|l2norm"),
        (GEMM, r"gemm|cutlass|cublas|nvjet|xmma|split_?k|grouped_mm|matmul|^mm_|_mm_"),
        (ELEMENTWISE, r"elementwise|reduce_kernel|CatArray|copy_|fill|softmax|cast|index"),
    )
)
_MOE_RANGES = {"moe.router", "moe.dispatch", "moe.routed", "moe.combine"}


@functools.lru_cache(maxsize=65536)
def kernel_class(name: str, ranges: tuple[str, ...]) -> str:
    """The class of a kernel.

    Args:
        name: short or full kernel name.
        ranges: NVTX ranges around its launch, outermost first, without steps' numbers; of a
            backward kernel those of the forward operation. Empty where unknown.
    """
    found = next((kind for kind, pattern in _BY_NAME if pattern.search(name)), OTHER)
    if found in (NCCL, OTHER_COMM, MIXTURE):
        return found
    if any(part.startswith("Optimizer.step") for part in ranges):
        return OPTIMIZER
    ours = [part for part in ranges if part.startswith(("moa.", "moe."))]
    if ours and ours[-1] == "moa.gate":
        return GATES
    if ours and ours[-1] in _MOE_RANGES and found in (ELEMENTWISE, OTHER, GEMM):
        return ROUTER
    return found
