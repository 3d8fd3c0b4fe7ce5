"""Whether Megatron takes a layout: its own validation, the model built, one step trained."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training.training import get_megatron_optimizer_config, wrap_model_chunks_with_ddp

from moa_megatron import layout, models, preflight
from moa_megatron.recipes import RefusedError
from tests.helpers import models as tiny
from tests.helpers.cases import Layout as Groups
from tests.unit.test_costs import prepared

Verdict = tuple[list[str], str, str]


def attempt(words: list[str], train: bool = True) -> Verdict:
    """Our refusals, how far the run came without them, and what stopped it.

    Args:
        words: recipe and flags.
        train: go beyond Megatron's validation.

    Returns:
        problems of ``layout``; ``parsed``, ``validated``, ``built`` or ``trained``; the error.
    """
    rank, world = str(torch.distributed.get_rank()), str(torch.distributed.get_world_size())
    ours: list[str] = []

    def record(args: Any, moa: Any) -> list[str]:
        ours.extend(layout.problems(args))
        return []

    reached = "parsed"
    variables = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    try:
        with mock.patch.dict(os.environ, variables), mock.patch.object(preflight, "check", record):
            run = prepared(*words)
        reached = "validated"
        if not train:
            return ours, reached, ""
        with _groups(run.args):
            chunks = _build(run)
            reached = "built"
            _step(run, chunks)
            reached = "trained"
    except Exception as error:
        if reached == "parsed" and not ours and isinstance(error, RefusedError):
            # Before ours comes the parser's, such as virtual stages that divide nothing.
            refused = str(error)
            return ([] if refused.startswith("Megatron") else [refused]), reached, refused
        return ours, reached, f"{type(error).__name__}: {error}"
    finally:
        # A failure while groups are made leaves some behind.
        parallel_state.destroy_model_parallel()
    return ours, reached, ""


@contextlib.contextmanager
def _groups(args: Any) -> Iterator[None]:
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    sizes = Groups(
        tp=tp,
        pp=pp,
        vpp=args.virtual_pipeline_model_parallel_size or 1,
        cp=args.context_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
    )
    with tiny.model_parallel(sizes):
        yield


def _build(run: Any) -> list[Any]:
    args, config = run.args, models.model_config(run.args, run.moa)
    config.transformer.finalize_model_grads_func = finalize_model_grads
    groups = ProcessGroupCollection.use_mpu_process_groups()
    parts = args.virtual_pipeline_model_parallel_size or 1
    chunks = []
    for part in range(parts):
        stage = part if parts > 1 else None
        chunk = config.get_builder_cls()(config).build_model(
            groups,
            pre_process=parallel_state.is_pipeline_first_stage(False, stage),
            post_process=parallel_state.is_pipeline_last_stage(False, stage),
            vp_stage=stage,
        )
        for parameter in chunk.parameters():
            tiny.tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunks.append(chunk)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=args.use_distributed_optimizer)
    return list(wrap_model_chunks_with_ddp(chunks, config.transformer, ddp))


def _step(run: Any, chunks: list[Any]) -> None:
    args = run.args
    settings, overrides = get_megatron_optimizer_config(args)
    optimizer = get_megatron_optimizer(
        settings, chunks, config_overrides=overrides, use_gloo_process_groups=False
    )
    ranks = parallel_state.get_data_parallel_world_size()
    count = args.global_batch_size // (args.micro_batch_size * ranks)
    losses = get_forward_backward_func()(
        forward_step_func=_forward,
        data_iterator=[iter([args] * count) for _ in chunks],
        model=chunks,
        num_microbatches=count,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
    )
    assert all(torch.isfinite(loss).all() for loss in losses), losses
    succeeded, norm, _ = optimizer.step()
    assert succeeded and norm > 0, (succeeded, norm)


def _forward(data: Iterator[Any], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    args = next(data)
    tokens = torch.randint(64, (args.micro_batch_size, args.seq_length))
    positions = torch.arange(args.seq_length).expand_as(tokens)
    batch = {"tokens": tokens, "labels": tokens, "positions": positions}
    group = parallel_state.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)

    def mean(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total = losses.float().sum()
        number = torch.tensor(losses.numel(), dtype=torch.int)
        return total, number, (total / number).detach()

    return chunk(batch["tokens"], batch["positions"], None, labels=batch["labels"]), mean
