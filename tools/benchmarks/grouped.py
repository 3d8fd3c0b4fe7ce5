"""Builds the experts that --experts times and the GPU suite tests, and what they should compute.

Shape suffixes: T tokens of this rank, sorted by expert, d model width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_megatron.config import MoAConfig
from moa_megatron.reference import mixture_reference
from tools.benchmarks import report
from tools.benchmarks.ffn import BOUNDS
from tools.benchmarks.timing import CheckFailed, Contender, relative_rms

# Formats by recipe: forward in e4m3; blocks have it in the backward pass too.
FP8 = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
# Two products of numbers of 4 (output) and 3 (gradients) bits: a sanity bound, no measure.
FP8_BOUND = 0.3
TF32_BOUND = 5e-3  # in which Transformer Engine multiplies float32
KINDS = ("sequential", "grouped", "engine")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Element type, tokens T, model width d, width of an expert, and how many there are."""

    dtype: str
    rows: int
    hidden_size: int
    width: int
    experts: int

    def __str__(self) -> str:
        return (
            f"{self.dtype} {self.rows} x {self.hidden_size} x {self.width}, {self.experts} experts"
        )


@dataclasses.dataclass
class Inputs:
    """Tokens [T, d] sorted by expert, counts per expert, routing weights [T], upstream gradient."""

    x: Tensor
    counts: Tensor
    probs: Tensor
    grad: Tensor


def has_engine() -> bool:
    """Whether Transformer Engine's layers can run here."""
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    return True


def recipes() -> list[str]:
    """FP8 recipes that Transformer Engine has for this GPU."""
    if not has_engine():
        return list(FP8)
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager as manager

    tensors, blocks, micro = (
        asked()[0]
        for asked in (
            manager.is_fp8_available,
            manager.is_fp8_block_scaling_available,
            manager.is_mxfp8_available,
        )
    )
    have = {"delayed": tensors, "tensorwise": tensors, "blockwise": blocks, "mxfp8": micro}
    return [name for name in FP8 if have[name]]


def make_inputs(shape: Shape, device: torch.device, counts: Sequence[int] | None = None) -> Inputs:
    """Normal tokens; without ``counts``, loads that differ by up to a factor of three."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    if counts is None:
        share = 0.5 + torch.rand(shape.experts, generator=torch.Generator().manual_seed(0))
        ends = (share.cumsum(0) / share.sum() * shape.rows).round().long()
        loads = ends.diff(prepend=ends.new_zeros(1))
    else:
        loads = torch.tensor(counts)
    dtype = report.DTYPES[shape.dtype]
    x, grad = (normal(int(loads.sum()), shape.hidden_size).to(dtype) for _ in range(2))
    probs = normal(len(x)).sigmoid_().requires_grad_()
    return Inputs(x.requires_grad_(), loads, probs, grad)


def transformer_config(shape: Shape, gated: bool, fp8: str | None) -> Any:
    """Megatron's config of one MoE layer without biases, SwiGLU fused as upstream does it."""
    from megatron.core.transformer import TransformerConfig

    dtype = report.DTYPES[shape.dtype]
    eight_bits = {"fp8": FP8[fp8], "fp8_recipe": fp8} if fp8 else {}
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden_size,
        num_attention_heads=1,
        ffn_hidden_size=shape.width,
        moe_ffn_hidden_size=shape.width,
        num_moe_experts=shape.experts,
        moe_grouped_gemm=True,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        bias_activation_fusion=gated,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        **eight_bits,
    )


def build(
    kind: str, shape: Shape, moa: MoAConfig | None, device: torch.device, fp8: str | None = None
) -> Any:
    """Experts of one of ``KINDS``, with MoA or fixed; call inside ``ffn.megatron``."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP

    from moa_megatron.experts import MoAGroupedMLP, MoASequentialMLP, MoATEGroupedMLP

    backend: Any = LocalSpecProvider()
    if kind == "engine":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        backend = TESpecProvider()
    submodules = backend.grouped_mlp_modules(True).keywords["submodules"]
    config = transformer_config(shape, moa is None or moa.gated, fp8)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if moa is None:
        fixed = {"sequential": SequentialMLP, "engine": TEGroupedMLP}[kind]
        return fixed(shape.experts, config, submodules, groups).to(device)
    ours = {"sequential": MoASequentialMLP, "grouped": MoAGroupedMLP, "engine": MoATEGroupedMLP}
    experts = ours[kind](shape.experts, config, submodules, groups, moa=moa).to(device)
    if moa.gate_scope == "layer":
        _lend_gate(experts, config, moa, groups, device)
    return experts


def _lend_gate(experts: Any, config: Any, moa: MoAConfig, groups: Any, device: Any) -> None:
    """The gate that the MoE layer would own; kept beside the experts' own parameters."""
    from moa_megatron.gates import MoAGate

    gate = MoAGate(config, moa, "layer", config.hidden_size, groups.tp).to(device)
    for module in getattr(experts, "local_experts", [experts]):
        module.share_gate(gate, True)
    experts.register_parameter("lent", gate.weight)


def forward(experts: Any, inputs: Inputs) -> Tensor:
    """The experts' weighted outputs [T, d], in the number format of their config."""
    from megatron.core.fp8_utils import get_fp8_context

    experts.set_is_first_microbatch()  # weights are cast anew, as once a step in training
    context = get_fp8_context(experts.config) if experts.config.fp8 else contextlib.nullcontext()
    with context:
        output: Tensor = experts(inputs.x, inputs.counts, inputs.probs)[0]
    return output


def whole(experts: nn.Module, inputs: Inputs) -> Contender:
    """Forward pass, and gradients of tokens, routing weights and all parameters."""
    return Contender(
        functools.partial(forward, experts, inputs),
        [inputs.x, inputs.probs, *experts.parameters()],
        inputs.grad,
    )


def matrices(experts: Any, index: int) -> dict[str, Tensor]:
    """Parameters of one expert: ``fc1``, ``fc2``, ``gate``."""
    if hasattr(experts, "local_experts"):
        owner, suffix = experts.local_experts[index], ""
    else:
        owner, suffix = experts, str(index)
    own = getattr(owner, "moa_gate", None)
    gate = experts.lent if own is None else getattr(own, f"weight{suffix}")
    first, second = (
        getattr(layer, f"weight{suffix}") for layer in (owner.linear_fc1, owner.linear_fc2)
    )
    return {"fc1": first, "fc2": second, "gate": gate}


def expected(experts: Any, inputs: Inputs, moa: MoAConfig) -> dict[str, Tensor]:
    """Output and gradients in float64, by the definition, one expert after the other.

    Keys: output, x, probs, and fc1, fc2 and gate of every expert behind its number; a gate of the
    layer is ``gate``.
    """
    x, probs = (t.detach().double().requires_grad_() for t in (inputs.x, inputs.probs))
    leaves, outputs = {"x": x, "probs": probs}, []
    counts = inputs.counts.tolist()
    for index, (rows, weights) in enumerate(zip(x.split(counts), probs.split(counts), strict=True)):
        own = {
            f"{index} {name}" if name != "gate" or moa.gate_scope == "expert" else name: matrix
            for name, matrix in matrices(experts, index).items()
        }
        for name, matrix in own.items():
            leaves.setdefault(name, matrix.detach().double().requires_grad_())
        first, second, gate = (leaves[name] for name in own)
        hidden = mixture_reference(rows @ first.T, rows @ gate.T, moa, weights)
        outputs.append(hidden @ second.T)
    output = torch.cat(outputs)
    grads = torch.autograd.grad(output, list(leaves.values()), inputs.grad.double())
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def actual(experts: Any, inputs: Inputs, moa: MoAConfig) -> dict[str, Tensor]:
    """The same from the experts themselves."""
    names = {id(inputs.x): "x", id(inputs.probs): "probs"}
    tensors = [inputs.x, inputs.probs, *experts.parameters()]
    for index in range(len(inputs.counts)):
        for name, matrix in matrices(experts, index).items():
            layers = name == "gate" and moa.gate_scope == "layer"
            names[id(matrix)] = name if layers else f"{index} {name}"
    output = forward(experts, inputs)
    grads = torch.autograd.grad(output, tensors, inputs.grad)
    found = {names[id(t)]: grad for t, grad in zip(tensors, grads, strict=True)}
    return {"output": output.detach(), **found}


def check(experts: Any, shape: Shape, inputs: Inputs, fp8: str | None = None) -> dict[str, float]:
    """Largest relative RMS error of output, x, probs, fc1, fc2 and gate against the definition.

    Raises:
        CheckFailed: naming tensor, error and bound.
    """
    # experts.moa is the layer's too; sequential experts hold it one by one.
    moa = getattr(experts, "moa", None) or experts.local_experts[0].moa
    bound = FP8_BOUND if fp8 else BOUNDS[shape.dtype]
    if shape.dtype == "fp32" and type(experts).__name__ == "MoATEGroupedMLP":
        bound = TF32_BOUND
    if fp8 == "delayed":  # it scales by the steps before
        for _ in range(2):
            actual(experts, inputs, moa)
    found, wanted = actual(experts, inputs, moa), expected(experts, inputs, moa)
    errors: dict[str, float] = {}
    for name, exact in wanted.items():
        if not exact.any():  # an expert without tokens
            error = float("inf") if found[name].any() else 0.0
        else:
            error = relative_rms(found[name], exact)
        if not error <= bound:
            raise CheckFailed(
                f"{type(experts).__name__} {moa.variant} {shape}: relative RMS error of {name} "
                f"{error:.1e}, bound {bound:.0e}"
            )
        kind = name.split()[-1]
        errors[kind] = max(errors.get(kind, 0.0), error)
    return errors
