"""Builds the FFNs that --layer times, through Megatron, and its work as contenders.

Shape suffixes of ``Shape``: N tokens, d model width, D FFN width, n mixing coefficients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_megatron.config import MoAConfig
from moa_megatron.reference import mixture_reference
from tools.benchmarks import report, swiglu
from tools.benchmarks.timing import CheckFailed, Contender, relative_rms

# Largest relative RMS error of output and gradients against float64. Products of rounded factors:
# wider than the op's.
BOUNDS = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
CHECKED_ROWS = 64
_PADDING = 64  # to a multiple of which many rows GEMM kernels like their weights


@dataclass(frozen=True)
class Shape:
    """What is timed: kind of FFN, element type, tokens N, model width d, FFN width D."""

    kind: str
    dtype: str
    rows: int
    hidden_size: int
    width: int

    def __str__(self) -> str:
        return f"{self.kind} {self.dtype} {self.rows} x {self.hidden_size} x {self.width}"


@dataclass
class Inputs:
    """Tokens [N, 1, d], for an expert [N, d] and routing weights [N]; gradient of the output."""

    x: Tensor
    scale: Tensor | None
    grad: Tensor


@contextmanager
def megatron(device: torch.device) -> Iterator[None]:
    """One process with Megatron's groups and random streams; host mode for the CPU."""
    from moa_megatron import host, patches

    # Upstream warns of every optional package that is absent.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    if device.type == "cpu":
        host.install(force=True)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    patches.apply()
    torch.distributed.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(1234)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        host.shutdown(barrier=False)


def transformer_config(shape: Shape, gated: bool) -> Any:
    """Megatron's config: no biases, SwiGLU fused as upstream does it."""
    from megatron.core.transformer import TransformerConfig

    dtype = report.DTYPES[shape.dtype]
    return TransformerConfig(
        num_layers=1,
        hidden_size=shape.hidden_size,
        num_attention_heads=1,
        ffn_hidden_size=shape.width,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        bias_activation_fusion=gated,
        add_bias_linear=False,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )


def _submodules() -> Any:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.mlp import MLPSubmodules

    backend = LocalSpecProvider()
    return MLPSubmodules(backend.column_parallel_linear(), backend.row_parallel_linear())


def moa_layers(
    shape: Shape, configs: dict[str, MoAConfig], device: torch.device
) -> dict[str, nn.Module]:
    """MoA's FFNs by name; an expert owns its gate."""
    from moa_megatron.mlp import MoAMLP

    words: dict[str, Any] = {"is_expert": shape.kind == "expert", "ffn_hidden_size": shape.width}
    return {
        name: MoAMLP(
            transformer_config(shape, config.gated), _submodules(), moa=config, **words
        ).to(device)
        for name, config in configs.items()
    }


def fixed_layers(shape: Shape, gated: bool, device: torch.device) -> dict[str, Any]:
    """Megatron's MLP as it runs here (host mode: eager), and with a compiled activation."""
    from megatron.core.transformer.mlp import MLP

    class CompiledMLP(MLP):
        """Megatron's MLP around the activation of the compiled baseline."""

        activation: swiglu.Activation

        def forward(
            self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
        ) -> tuple[Tensor, None]:
            preact = self.linear_fc1(hidden_states)[0]
            return self.linear_fc2(self.activation(preact, per_token_scale))[0], None

    config = transformer_config(shape, gated)
    words: dict[str, Any] = {"is_expert": shape.kind == "expert", "ffn_hidden_size": shape.width}
    built: dict[str, Any] = {"megatron": MLP(config, _submodules(), **words).to(device)}
    activation = _compiled_activation(built["megatron"], shape, device, gated)
    if activation is not None:
        built["compiled"] = CompiledMLP(config, _submodules(), **words).to(device)
        built["compiled"].activation = activation
    return built


def _compiled_activation(
    mlp: Any, shape: Shape, device: torch.device, gated: bool
) -> swiglu.Activation | None:
    """The fixed activation under torch.compile, for pre-activations as ``mlp`` gives them."""
    inputs = make_inputs(shape, device)
    with torch.no_grad():
        preact = mlp.linear_fc1(inputs.x)[0]
    plain = swiglu.swiglu if gated else swiglu.gelu
    return swiglu.compiled(plain, preact.requires_grad_(), inputs.scale)


def make_inputs(shape: Shape, device: torch.device) -> Inputs:
    """Normal tokens and gradients; an expert's routing weights lie between 0 and 1."""
    generator = torch.Generator(device).manual_seed(0)
    middle = () if shape.kind == "expert" else (1,)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    dtype = report.DTYPES[shape.dtype]
    x, grad = (normal(shape.rows, *middle, shape.hidden_size).to(dtype) for _ in range(2))
    scale = normal(shape.rows).sigmoid_().requires_grad_() if shape.kind == "expert" else None
    return Inputs(x.requires_grad_(), scale, grad)


def whole(module: nn.Module, inputs: Inputs) -> Contender:
    """The layer's forward pass, and gradients of its input and of all its parameters."""
    scale = [] if inputs.scale is None else [inputs.scale]
    return Contender(
        lambda: module(inputs.x, *scale)[0],
        [inputs.x, *scale, *module.parameters()],
        inputs.grad,
    )


def check(module: Any, shape: Shape, inputs: Inputs) -> dict[str, float]:
    """Relative RMS errors of output, input gradient and routing gradient on a slice of the rows.

    Raises:
        CheckFailed: naming configuration, tensor, error and bound.
    """
    scale = [] if inputs.scale is None else [inputs.scale]
    output = module(inputs.x, *scale)[0]
    actual = [output, *torch.autograd.grad(output, [inputs.x, *scale], inputs.grad)]
    rows = torch.linspace(0, shape.rows - 1, min(CHECKED_ROWS, shape.rows)).round().long()
    rows = rows.to(inputs.x.device)
    exact = [t.detach()[rows].double().requires_grad_() for t in (inputs.x, *scale)]
    gate, w_in, w_out = (
        owner.weight.detach().double()
        for owner in (module.moa_gate, module.linear_fc1, module.linear_fc2)
    )
    hidden = mixture_reference(exact[0] @ w_in.T, exact[0] @ gate.T, module.moa, *exact[1:])
    expected = hidden @ w_out.T
    grads = torch.autograd.grad(expected, exact, inputs.grad[rows].double())
    errors = {}
    names = ("output", "grad_input", "grad_routing")
    for name, one, two in zip(names, actual, [expected, *grads]):
        errors[name], bound = relative_rms(one[rows], two), BOUNDS[shape.dtype]
        if not errors[name] <= bound:
            raise CheckFailed(
                f"{module.moa.variant} {shape}: relative RMS error of {name} {errors[name]:.1e}, "
                f"bound {bound:.0e}"
            )
    return errors


def parts(module: Any, inputs: Inputs) -> dict[str, Contender]:
    """Gate logits, mixture and the two linear layers, each by itself on the layer's tensors."""
    from moa_megatron import op

    leaf: Callable[[Tensor], Tensor] = lambda t: t.detach().requires_grad_()  # noqa: E731
    x, scale = inputs.x, inputs.scale
    logits = leaf(module.moa_gate(x, routed=module.is_expert))
    preact = leaf(module.linear_fc1(x)[0])
    hidden = leaf(op.mixture(preact, logits, module.moa, scale))
    weights = [] if scale is None else [scale]

    def linear(layer: Any, value: Tensor, grad: Tensor) -> Contender:
        return Contender(lambda: layer(value)[0], [value, layer.weight], grad)

    def like(value: Tensor) -> Tensor:
        return torch.randn_like(value, requires_grad=False)

    return {
        "gate": Contender(
            lambda: module.moa_gate(x, routed=module.is_expert),
            [x, module.moa_gate.weight],
            like(logits),
        ),
        "mixture": Contender(
            lambda: op.mixture(preact, logits, module.moa, scale),
            [preact, logits, *weights],
            like(hidden),
        ),
        "fc1": linear(module.linear_fc1, x, like(preact)),
        "fc2": linear(module.linear_fc2, hidden, inputs.grad),
    }


def folding(module: Any, inputs: Inputs) -> dict[str, Contender]:
    """Gate and W1 as two products, and as one whose weight holds the gate's rows too.

    The folded forms are the most that folding could win: gradients arrive in one tensor already,
    and logits rounded to the layer's dtype are taken as they are.
    """
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    x = inputs.x.detach().flatten(0, -2).requires_grad_()
    gate, w_in = (
        owner.weight.detach().clone().requires_grad_()
        for owner in (module.moa_gate, module.linear_fc1)
    )

    def one(padding: int) -> Contender:
        rows = len(w_in) + len(gate)
        weight = w_in.new_zeros(-(-rows // padding) * padding, x.shape[1])
        weight.data[:rows] = torch.cat([w_in.detach(), gate.detach()])
        weight.requires_grad_()
        return Contender(lambda: x @ weight.T, [x, weight], x.new_ones(len(x), len(weight)))

    return {
        "separate": Contender(
            lambda: (x @ w_in.T, router_gating_linear(x, gate, None, torch.float32)),
            [x, w_in, gate],
            (x.new_ones(len(x), len(w_in)), torch.ones(len(x), len(gate), device=x.device)),
        ),
        "folded": one(1),
        "padded": one(_PADDING),
    }
