"""What a rank really allocates for weights, gradients and optimiser, on Megatron's own path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.training.training import get_megatron_optimizer_config, wrap_model_chunks_with_ddp

from moa_megatron import models
from moa_megatron.costs.memory import states
from moa_megatron.costs.parameters import weights
from moa_megatron.layout import Layout
from tests.helpers import models as tiny
from tests.helpers.cases import Layout as Groups
from tests.unit.test_costs import prepared

Bytes = tuple[int, int, int]


def allocated_and_predicted(words: list[str], layout: Layout) -> tuple[Bytes, Bytes]:
    """Bytes of weights, gradients and optimiser after one step, here and by ``costs``."""
    rank = str(torch.distributed.get_rank())
    world = {"WORLD_SIZE": str(layout.world_size), "RANK": rank, "LOCAL_RANK": rank}
    with mock.patch.dict(os.environ, world):
        run = prepared(*words, "--micro-batch-size", "1")
    groups = Groups(
        tp=layout.tp,
        pp=layout.pp,
        cp=layout.cp,
        ep=layout.ep,
        etp=layout.etp,
        data=layout.dp,
    )
    with tiny.model_parallel(groups):
        chunk, optimizer = _trained_once(run)
        parameters = list(chunk.parameters())
        buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
        found = (
            _bytes(parameters),
            sum(_size(buffer.grad_data) for buffer in buffers),
            _bytes(_optimizer_tensors(optimizer), without=parameters),
        )
    stage = int(rank) // (layout.world_size // layout.pp)
    mine = weights(run.args, run.moa, run.args.padded_vocab_size, layout, stage)
    expected = states(run.args, layout, mine)
    return found, (expected.weights, expected.gradients, expected.optimizer)


def _trained_once(run: Any) -> tuple[Any, Any]:
    """The wrapped model and its optimiser, whose state exists only after a step."""
    args, config = run.args, models.model_config(run.args, run.moa)
    pg = ProcessGroupCollection.use_mpu_process_groups()
    model = config.get_builder_cls()(config).build_model(pg)
    if args.bf16:
        model = Float16Module(config.transformer, model)
    for parameter in model.parameters():
        tiny.tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=args.use_distributed_optimizer,
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
    )
    (chunk,) = wrap_model_chunks_with_ddp(
        [model],
        config.transformer,
        ddp,
        use_layer_wise_distributed_optimizer=args.use_layer_wise_distributed_optimizer,
    )
    settings, overrides = get_megatron_optimizer_config(args)
    optimizer = get_megatron_optimizer(
        settings, [chunk], config_overrides=overrides, use_gloo_process_groups=False
    )
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(1e-3)
    optimizer.step()
    return chunk, optimizer


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    if hasattr(optimizer, "chained_optimizers"):
        for part in optimizer.chained_optimizers:
            yield from _optimizer_tensors(part)
        return
    for group in optimizer.optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.optimizer.state.values():
        yield from (t for t in state.values() if torch.is_tensor(t) and t.dim())


def _bytes(tensors: Iterable[torch.Tensor], without: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the storages, each once."""
    ours = {t.untyped_storage().data_ptr() for t in without}
    sizes = {
        t.untyped_storage().data_ptr(): _size(t)
        for t in tensors
        if t.untyped_storage().data_ptr() not in ours
    }
    return sum(sizes.values())


def _size(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()
