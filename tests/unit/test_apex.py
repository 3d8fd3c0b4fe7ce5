"""Beside NVIDIA's Apex local modules build, and train as they do without it.

A stand-in in plain PyTorch is what one of two processes finds as Apex. Both have the norms of a
machine with a GPU and without Transformer Engine, which host mode would replace, and choose their
modules as a run does: of Apex these are LayerNorm and the fused accumulation of gradients.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import tensors
from tests.helpers.cases import ONE_RANK
from tests.helpers.parity import BOUND
from tests.helpers.pool import Pool

NAME = "apex_layer_norm"
FUSED_PRODUCTS = "from tests.fake_gpu.fused_weight_gradient_mlp_cuda import *\n"
STANDIN = {
    "apex/__init__.py": "",
    "apex/multi_tensor_apply/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": "from tests.unit.test_apex import *\n",
    "fused_weight_gradient_mlp_cuda.py": FUSED_PRODUCTS,
}
GPT = ("--moa-model", "gpt")
CASES = {
    "gpt-dense": ("tiny-dense", *GPT),
    "gpt-dense-fixed": ("tiny-dense", *GPT, "--moa-mixing", "fixed"),
    "gpt-moe": ("tiny-moe", *GPT),
    "gpt-moe-grouped": ("tiny-moe", *GPT, "--moe-grouped-gemm"),
    "gpt-mtp": ("tiny-dense", *GPT, "--mtp-num-layers", "1"),
    "gpt-layer-norm": ("tiny-dense", *GPT, "--normalization", "LayerNorm"),
    "hybrid-moe": ("tiny-moe",),
}
STEPS = 2


class FusedLayerNormAffineFunction(torch.autograd.Function):
    """Apex's function of this name."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shape: torch.Size,
        eps: float,
        memory_efficient: bool = False,
    ) -> Tensor:
        out, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, mean, scale, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        backward = torch.ops.aten.native_layer_norm_backward
        found = backward(grad, x, rest[2].shape, *rest, [True, True, True])
        return (*found, None, None, None)


@dataclass
class Outcome:
    """What a process says of a model: its norms, flags, losses, and gradients of the first step."""

    norms: set[str]
    fused_accumulation: bool
    losses: list[float] = field(default_factory=list)
    gradients: tensors.Tensors = field(default_factory=dict)


@pytest.fixture(scope="module")
def beside_apex(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("site")
    for name, text in STANDIN.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pool = Pool(1, "tests.unit.test_apex:start", {"PYTHONPATH": str(folder)})
    yield pool
    pool.stop()


@pytest.fixture(scope="module")
def alone() -> Iterator[Pool]:
    pool = Pool(1, "tests.unit.test_apex:start", {"PYTHONPATH": ""})
    yield pool
    pool.stop()


def start() -> None:
    """As a process on a GPU starts: with Apex in sight, and norms that host mode leaves alone."""
    from moa_megatron import host, patches
    from moa_megatron.host import modules

    folder = os.environ["PYTHONPATH"]
    if folder:
        sys.path.insert(0, folder)  # a spawned process has the path of its parent instead
        hidden: Any = tuple(name for name in host._HIDDEN if name != "apex")
        host._HIDDEN = hidden
    else:  # an image may have the real one
        sys.modules["fused_weight_gradient_mlp_cuda"] = None  # type: ignore[assignment]
    for name in [name for name in modules.HOOKS if name.endswith(("torch_norm", "hybrid_block"))]:
        del modules.HOOKS[name]
    host.install()
    patches.apply()


def train(words: tuple[str, ...]) -> Outcome:
    """Two steps of the model that the entry point would build; runs in a process of the pool."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    from moa_megatron import launch, models, recipes
    from tests.helpers.models import model_parallel

    argv = [*words, "--run-dir", "runs/never-made", "--mock-data"]
    run = launch.prepare(recipes.parse_command_line(argv), ["--distributed-backend", "gloo"])
    destroy_moe_metrics_tracker()  # it has the size of the model before
    with model_parallel(ONE_RANK):
        config = models.model_config(run.args, run.moa)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        built = config.get_builder_cls()(config).build_model(groups, True, True)
        model = DistributedDataParallel(config.transformer, DistributedDataParallelConfig(), built)
        names = {type(module).__name__ for module in built.modules()}
        norms = {name for name in names if name.endswith("Norm")}
        outcome = Outcome(norms, run.args.gradient_accumulation_fusion)
        for step in range(STEPS):
            outcome.losses.append(_step(model, step))
            if step == 0:
                outcome.gradients = {
                    name: parameter.main_grad.numpy().copy()
                    for name, parameter in built.named_parameters()
                }
        return outcome


def _step(model: Any, step: int) -> float:
    """Gradient descent on one batch; its loss."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(64, (2, 33), generator=generator)
    model.zero_grad_buffer()
    losses = model(tokens[:, :-1], torch.arange(32)[None], None, labels=tokens[:, 1:])
    losses.mean().backward()
    model.finish_grad_sync()
    for parameter in model.parameters():
        parameter.data -= 0.1 * parameter.main_grad
    return float(losses.mean())


@pytest.mark.parametrize("name", CASES)
def test_trains_as_without_apex(beside_apex: Pool, alone: Pool, name: str) -> None:
    case = functools.partial(Pool.run, case="tests.unit.test_apex:train", words=CASES[name])
    (found,), (expected,) = case(beside_apex), case(alone)
    assert found.fused_accumulation and not expected.fused_accumulation
    with_layer_norm = name == "gpt-layer-norm"
    assert found.norms == ({"FusedLayerNorm"} if with_layer_norm else {"RMSNorm"})
    assert expected.norms == ({"LayerNorm"} if with_layer_norm else {"RMSNorm"})
    assert found.losses == pytest.approx(expected.losses, rel=BOUND)
    errors = tensors.relative_errors(found.gradients, expected.gradients)
    print(found.losses, expected.losses, max(errors.values()))
    assert max(errors.values()) < BOUND, max(errors, key=errors.__getitem__)


def test_the_patch_is_needed(beside_apex: Pool) -> None:
    beside_apex.run("tests.unit.test_apex:check_apex_layer_norm")


def check_apex_layer_norm() -> None:
    """Runs in a process of the pool."""
    from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
    from megatron.core.models import backends
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer import transformer_block

    from moa_megatron import patches
    from tests.helpers import tiny

    spec = backends.LocalSpecProvider()

    def in_use() -> list[Any]:
        return [gpt_layer_specs.LNImpl, transformer_block.LayerNormImpl, spec.layer_norm()]

    def build(norm: Any, kind: str) -> Any:
        return norm(config=tiny.config(normalization=kind), hidden_size=8, eps=1e-5)

    assert patches.undo([NAME]) == [NAME]
    for norm in in_use():
        with pytest.raises(AssertionError, match="RMSNorm.* is not supported in FusedLayerNorm"):
            build(norm, "RMSNorm")
    spec.layer_norm(rms_norm=True)
    assert spec.layer_norm() is not FusedLayerNorm, "upstream has mended it"
    backends.LNImpl = FusedLayerNorm
    assert patches.apply([NAME]) == [NAME]
    assert spec.layer_norm(rms_norm=True) is backends.WrappedTorchNorm
    for norm in in_use():
        assert type(build(norm, "RMSNorm")) is torch.nn.RMSNorm
        assert type(build(norm, "LayerNorm")) is FusedLayerNorm


def test_the_stand_in_passes_for_nvidias(beside_apex: Pool, alone: Pool) -> None:
    case = "tests.unit.test_apex:what_is_there"
    assert beside_apex.run(case) == [(True, True, None)]
    assert alone.run(case) == [(False, False, None)]


def what_is_there() -> tuple[bool, bool, str | None]:
    """Runs in a process of the pool."""
    from megatron.core.models import backends

    from moa_megatron import packages

    return backends.HAVE_APEX, packages.importable("apex"), packages.apex_problem()
