"""The cases that the pool runs: train a tiny model and report its tensors, shard by shard.

A shard carries its place in the whole tensor as ``sharded_state_dict`` states it, which is thereby
tested too: the parent puts the shards together, see ``tensors``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from moa_megatron.vision.model import MAEModel
from tests.helpers import mae, models, mutations
from tests.helpers.cases import GLOBAL_BATCH, SEQUENCE, STEPS, VOCABULARY, Layout, Model
from tests.helpers.tensors import Run, Shard, Tensors

Chunks = list[DistributedDataParallel]


def train(
    model: Model,
    layout: Layout,
    initial: Tensors | None = None,
    mutation: str | None = None,
    steps: int = STEPS,
) -> Run:
    """Train from ``initial`` weights, or from fresh ones.

    The gradients reported are those of the first step, reduced over all ranks.
    """
    with models.model_parallel(layout), mutations.applied(mutation):
        chunks = models.build(model, layout)
        if initial is None:
            _vary_scalars(chunks)
        else:
            load(chunks, initial)
        optimizer = models.optimizer(model, layout, chunks)
        run = Run(initial=shards(chunks))
        _count_gate_calls(chunks, run)
        for step in range(steps):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            losses = forward_backward(chunks, layout, step)
            if step == 0:
                gather_gradients(chunks, layout)
                with gradients_as_weights(chunks):
                    run.gradients = shards(chunks)
            _, norm, _ = optimizer.step()
            run.losses.append(_mean_loss(losses))
            run.norms.append(float(norm))
        run.weights = shards(chunks)
        _release(chunks)
        return run


def fresh(model: Model, layout: Layout) -> Run:
    """The weights that a layout starts from when none are given."""
    with models.model_parallel(layout):
        return Run(initial=shards(models.build(model, layout)))


def forward_backward(chunks: Chunks, layout: Layout, step: int) -> list[Tensor]:
    """One pass of Megatron's own schedule; the losses of this rank's microbatches."""
    images = isinstance(chunks[0].module, MAEModel)
    microbatches: list[Any] = mae.microbatches(step) if images else _microbatches(step)
    run = get_forward_backward_func()
    return run(
        forward_step_func=mae.forward_step if images else _forward_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        seq_length=SEQUENCE,
        micro_batch_size=1,
    )


def _microbatches(step: int) -> list[Tensor]:
    """This data-parallel rank's sequences of the step; the global batch is the same everywhere."""
    generator = torch.Generator().manual_seed(100 + step)
    batch = torch.randint(VOCABULARY, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    first = parallel_state.get_data_parallel_rank()
    return list(batch[first :: parallel_state.get_data_parallel_world_size()].split(1))


def _forward_step(
    data: Iterator[Tensor], chunk: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    sequence = next(data)
    batch = {
        "tokens": sequence[:, :-1],
        "labels": sequence[:, 1:],
        "positions": torch.arange(SEQUENCE).unsqueeze(0),
    }
    group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    run = chunk.build_schedule_plan if return_schedule_plan else chunk
    return run(batch["tokens"], batch["positions"], None, labels=batch["labels"]), _loss


def _loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int)
    return total, count, (total / count).detach()


def _mean_loss(losses: list[Tensor]) -> float:
    """Mean over microbatches and data- and context-parallel ranks; NaN where there is none."""
    if not losses:
        return float("nan")
    mean = torch.stack(losses).mean()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(mean, group=group)
    return mean.item() / group.size()


def gather_gradients(chunks: Chunks, layout: Layout) -> None:
    """The distributed optimizer leaves each rank its part of the reduced gradients: exchange."""
    if not layout.sharded_optimizer:
        return
    for chunk in chunks:
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                part = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, part, group=ranks)


@contextmanager
def gradients_as_weights(chunks: Chunks) -> Iterator[None]:
    """Within, every parameter holds its gradient, so that the weights' sharding describes it."""
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    weights = [p.data for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.view(parameter.shape)
    try:
        yield
    finally:
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data = weight


def sharded_state(chunks: Chunks) -> dict[str, Any]:
    """The model part of a checkpoint, as Megatron's training loop asks for it."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group}
    return {
        f"model{index}": chunk.module.sharded_state_dict(metadata=dict(metadata))
        for index, chunk in enumerate(chunks)
    }


def _sharded_tensors(chunks: Chunks) -> list[ShardedTensor]:
    state = sharded_state(chunks)
    apply_factories(state)
    tensors, _ = extract_matching_values(
        state, lambda item: isinstance(item, ShardedTensor), return_lists_as_dicts=True
    )
    return list(_leaves(tensors))


def _leaves(node: Any) -> Iterator[ShardedTensor]:
    if isinstance(node, ShardedTensor):
        yield node
    elif isinstance(node, dict):
        for child in node.values():
            yield from _leaves(child)


def shards(chunks: Chunks) -> list[Shard]:
    """Copies of all tensors of this rank's model; every parameter must be among them."""
    tensors = _sharded_tensors(chunks)
    missing = unsaved(chunks, tensors)
    assert not missing, f"not in the sharded state: {missing}"
    return [
        Shard(t.key, t.global_shape, t.global_slice(), t.data.detach().clone().numpy())
        for t in tensors
    ]


def unsaved(chunks: Chunks, tensors: list[ShardedTensor]) -> list[str]:
    """Names of parameters that a checkpoint would lose, wholly or in part."""
    held = {t.data.data_ptr(): t.data.numel() for t in tensors}
    missing = []
    for name, parameter in (item for chunk in chunks for item in chunk.named_parameters()):
        first, size = parameter.data_ptr(), parameter.numel() * parameter.element_size()
        covered = sum(n for start, n in held.items() if first <= start < first + size)
        if covered != parameter.numel():
            missing.append(name)
    return missing


def load(chunks: Chunks, tensors: Tensors) -> None:
    """Set every tensor of the model from whole ones, in place."""
    with torch.no_grad():
        for t in _sharded_tensors(chunks):
            t.data.copy_(torch.from_numpy(tensors[t.key][t.global_slice()]))


def _count_gate_calls(chunks: Chunks, run: Run) -> None:
    def count(*_: Any) -> None:
        run.gate_calls += 1

    for gate in models.gates(chunks):
        gate.register_forward_pre_hook(count)


def _release(chunks: Chunks) -> None:
    """Drop what the token dispatchers keep of the last pass: its graph holds the model and its
    process groups, threads included, in a cycle that Python's collector does not see."""
    for module in (m for chunk in chunks for m in chunk.modules()):
        state = vars(getattr(module, "token_dispatcher", module))
        for name, value in list(state.items()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                state[name] = None


def _vary_scalars(chunks: Chunks) -> None:
    """Learned coefficients start at 1, where a permutation of them would go unnoticed."""
    for gate in models.gates(chunks):
        if gate.moa.mixing == "la":
            for scalars in gate.parameters():
                torch.nn.init.normal_(scalars.data, mean=1.0, std=0.3)


def save(model: Model, layout: Layout, initial: Tensors, path: str) -> list[str]:
    """Write a checkpoint with these weights; the names of its tensors."""
    with models.model_parallel(layout):
        chunks = models.build(model, layout)
        load(chunks, initial)
        dist_checkpointing.save(sharded_state(chunks), path)
        dist.barrier()
        return sorted(dist_checkpointing.load_tensors_metadata(path))


def restore(model: Model, layout: Layout, path: str) -> Run:
    """The weights of a fresh model after it has loaded a checkpoint, which must fit exactly."""
    with models.model_parallel(layout):
        chunks = models.build(model, layout)
        state = dist_checkpointing.load(
            sharded_state(chunks), path, strict=StrictHandling.RAISE_ALL
        )
        for index, chunk in enumerate(chunks):
            chunk.module.load_state_dict(state[f"model{index}"])
        return Run(initial=shards(chunks))


def lost_in_checkpoint(model: Model, mutation: str | None) -> list[str]:
    """Parameters that the sharded state leaves out."""
    with models.model_parallel(Layout()), mutations.applied(mutation):
        chunks = models.build(model, Layout())
        return unsaved(chunks, _sharded_tensors(chunks))
