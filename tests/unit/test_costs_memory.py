"""Predicted activations against the tensors that autograd really saves, on one rank.

float32 and bfloat16 models on Megatron's local modules, whose attention keeps its scores and whose
norms, torch's on a CPU, keep two float32 copies; what Transformer Engine keeps differs in these
(``costs.activations.Modules``) and cannot run here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.helpers import isolated
from tests.unit.test_costs import prepared

FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform")
TOLERANCE = 0.02


def selective(*modules: str) -> tuple[str, ...]:
    return ("--recompute-granularity", "selective", "--recompute-modules", *modules)


@contextmanager
def saved_storages(model: torch.nn.Module) -> Iterator[dict[int, Any]]:
    """Storages that autograd saves inside, by address, those of parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Holding the tensor keeps its address from being given away again.
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def built(run: Any) -> torch.nn.Module:
    """The model of a run with memory, in its precision."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module

    from moa_megatron import models

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = models.model_config(run.args, run.moa)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_model(
        groups, pre_process=True, post_process=True
    )
    for hook in config.pre_wrap_hooks:
        (model,) = hook([model])
    return Float16Module(config.transformer, model) if run.args.bf16 else model


def saved_and_predicted(recipe: str, *words: str) -> tuple[float, float]:
    """Bytes of a forward pass with labels."""
    from moa_megatron.costs.activations import HOST, activations
    from moa_megatron.layout import Layout

    run = prepared(recipe, *words)
    args = run.args
    model = built(run)
    tokens = torch.randint(0, 64, (args.micro_batch_size, args.seq_length))
    positions = torch.arange(args.seq_length).expand_as(tokens)
    with saved_storages(model) as kept:
        loss = model(tokens, positions, None, labels=tokens)
    # Recomputation empties storages that it has saved: sizes count after the pass.
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    expected = activations(args, run.moa, Layout(), 0, 1, HOST)
    del loss
    return float(found), expected.total - expected.working


def assert_close(recipe: str, *words: str) -> None:
    found, expected = saved_and_predicted(recipe, "--vocab-size", "512", *words)
    error = expected / found - 1
    print(recipe, *words, f"saved {found:,.0f} predicted {expected:,.0f} ({error:+.2%})")
    assert abs(error) < TOLERANCE, (words, found, expected, error)


def check_dense() -> None:
    for words in (
        (),
        ("--bf16",),
        ("--bf16", "--moa-mixing", "fixed"),
        ("--moa-variant", "qd", "--bf16", "--num-layers", "2"),
        ("--moa-variant", "type1", "--bf16"),
        ("--moa-mixing", "la", "--bf16"),
        ("--bf16", "--group-query-attention", "--num-query-groups", "2"),
        ("--bf16", "--moa-model", "gpt"),
        ("--bf16", "--mtp-num-layers", "1"),
    ):
        assert_close("tiny-dense", *words)


def check_experts() -> None:
    for words in (
        (),
        ("--bf16",),
        ("--bf16", "--moa-mixing", "fixed"),
        ("--bf16", "--moa-gate-scope", "expert", "--moa-variant", "one"),
        ("--bf16", "--moe-layer-freq", "2", "--moe-router-topk", "4"),
        ("--bf16", "--moe-grouped-gemm"),
    ):
        assert_close("tiny-moe", *words)


def check_recompute() -> None:
    for recipe, words in (
        ("tiny-dense", (*FULL, "--recompute-num-layers", "1")),
        ("tiny-dense", (*FULL, "--recompute-num-layers", "2", "--bf16")),
        ("tiny-dense", (*FULL, "--recompute-num-layers", "1", "--moa-model", "gpt")),
        ("tiny-dense", (*FULL[:2], "--recompute-method", "block", "--recompute-num-layers", "3")),
        ("tiny-moe", (*FULL, "--recompute-num-layers", "1", "--bf16")),
        ("tiny-dense", selective("core_attn")),
        ("tiny-dense", (*selective("mlp"), "--bf16")),
        ("tiny-dense", selective("layernorm")),
        ("tiny-moe", (*selective("moe"), "--bf16")),
        ("tiny-moe", (*selective("shared_experts"), "--bf16")),
        ("tiny-moe", (*selective("moe_act"), "--bf16", "--moe-grouped-gemm")),
    ):
        assert_close(recipe, *words)


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_activations(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
