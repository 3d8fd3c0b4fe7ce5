"""Muon's update against its formula: W1 and W2 apart, gates and the like on AdamW."""

from typing import Any

import pytest
import torch

from tests.helpers import isolated
from tests.helpers.cases import Layout, Model, moa

LR, DECAY, MOMENTUM = 0.01, 0.01, 0.95


def update(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The weight after one step from zero momentum, method.md's multiplier 0.2 sqrt(max(m, n))."""
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    momentum = (1 - MOMENTUM) * gradient
    nesterov = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
    step = 0.2 * max(weight.shape) ** 0.5 * newton_schulz(nesterov, 5, "quintic")
    return weight * (1 - LR * DECAY) - LR * step


def stepped(model: Model, marked: bool = True) -> dict[str, tuple[torch.Tensor, ...]]:
    """Name -> weight before, gradient, weight after one step of a tiny model on one rank."""
    from moa_megatron import host, patches

    host.install()
    patches.apply()
    import torch.distributed as dist

    from tests.helpers import models, training

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with models.model_parallel(Layout()):
        chunks = models.build(model, Layout())
        if not marked:
            for parameter in chunks[0].parameters():
                parameter.is_qkv = False  # type: ignore[attr-defined]
        optimizer = models.optimizer(model, Layout(), chunks)
        optimizer.config.clip_grad = 0.0
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            part.config.clip_grad = 0.0
        chunks[0].zero_grad_buffer()
        training.forward_backward(chunks, Layout(), 0)
        named = dict(chunks[0].named_parameters())
        before = {n: (p.detach().clone(), p.main_grad.clone()) for n, p in named.items()}
        optimizer.step()
        return {n: (*before[n], p.detach().clone()) for n, p in named.items()}


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-6)


def check_two_matrices(model: Model) -> None:
    found = {n: t for n, t in stepped(model).items() if "linear_fc1.weight" in n}
    assert found
    for name, (weight, gradient, after) in found.items():
        halves = zip(weight.chunk(2), gradient.chunk(2), strict=True)
        expected = torch.cat([update(w, g) for w, g in halves])
        assert close(after, expected), name
        assert not close(after, update(weight, gradient)), "as one matrix it is another update"


def check_dense() -> None:
    check_two_matrices(Model(optimizer="muon"))


def check_experts() -> None:
    check_two_matrices(Model(moe=True, moa=moa(variant="qd"), optimizer="muon"))


def check_without_the_marks_it_is_one_matrix() -> None:
    for name, (weight, gradient, after) in stepped(Model(optimizer="muon"), marked=False).items():
        if "linear_fc1.weight" in name:
            assert close(after, update(weight, gradient)), name


def check_others_are_whole_or_on_adamw() -> None:
    for name, (weight, gradient, after) in stepped(Model(optimizer="muon")).items():
        if "linear_fc2.weight" in name or "linear_proj.weight" in name:
            assert close(after, update(weight, gradient)), name
        elif any(part in name for part in ("moa_gate", "embedding", "output_layer", "norm")):
            # Adam's first step with the tests' epsilon.
            decay = DECAY if weight.dim() > 1 else 0.0
            expected = weight * (1 - LR * decay) - LR * gradient / (gradient.abs() + 1e-2)
            assert close(after, expected), name


def prepared(*words: str) -> Any:
    from moa_megatron import host

    host.install()
    from moa_megatron import launch, patches, recipes

    patches.apply()
    argv = ["tiny-moe", "--run-dir", "runs/never-made", "--mock-data", *words]
    return launch.prepare(recipes.parse_command_line(argv), host.HOST_ARGS)


def check_flags() -> None:
    from moa_megatron import muon
    from moa_megatron.recipes import RefusedError

    hooks = prepared("--optimizer", "muon").config.pre_wrap_hooks
    assert muon.split_fc1 in hooks
    assert (
        muon.split_fc1
        in prepared("--optimizer", "muon", "--moa-mixing", "fixed").config.pre_wrap_hooks
    )
    for words in (
        ("--optimizer", "adam"),
        ("--optimizer", "muon", "--moa-variant", "type1"),
        ("--optimizer", "muon", "--muon-no-split-qkv", "--no-moa-muon-split-fc1"),
    ):
        assert muon.split_fc1 not in prepared(*words).config.pre_wrap_hooks, words
    interleaved = ("--moa-mixing", "fixed", "--moe-mlp-glu-interleave-size", "4")
    for words in (("--muon-no-split-qkv",), interleaved):
        with pytest.raises(RefusedError, match="--no-moa-muon-split-fc1"):
            prepared("--optimizer", "muon", *words)


CHECKS = [n for n in globals() if n.startswith("check_") and n != "check_two_matrices"]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_muon(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
