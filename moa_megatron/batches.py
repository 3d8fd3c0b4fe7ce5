"""Batches, loss and datasets of language-model pretraining, as Megatron's training loop wants them.

Megatron's own GPT entry script is not part of the installed package; this fills the same slots:
``forward_step``, ``datasets_provider`` and ``embedding_ranks``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from moa_megatron import layer_statistics, ranges

_SPIKE = 10  # times the largest loss seen so far, as in Megatron's GPT entry
_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None,
    model: Any,
    return_schedule_plan: bool = False,
) -> tuple[Any, partial[tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """One micro-batch: model output and the function that turns it into a loss."""
    # Megatron marks no steps in a profile; evaluation belongs to none.
    number = getattr(get_args(), "curr_iteration", -1) + 1
    with ranges.step(number) if model.training else nullcontext():
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        batch = _batch(data_iterator, model)
        timers("batch-generator").stop()
        inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
        keywords = {"labels": batch["labels"], "loss_mask": batch["loss_mask"]}
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **keywords)
        else:
            with layer_statistics.watching(number if model.training else 0):
                output = model(*inputs, **keywords)
    return output, partial(_checked_loss, batch["loss_mask"])


def _checked_loss(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss, under the watch of Megatron's rerun machine where the user asked for it."""
    result = loss_function(loss_mask, output)
    args, machine = get_args(), get_rerun_state_machine()
    checks: list[tuple[Any, str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks += [(torch.isnan, "NaN in the loss", True), (torch.isinf, "Inf in the loss", True)]
    if args.check_for_spiky_loss:
        spiky = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        checks.append((spiky, "a spike in the loss", False))
    for rejection, message, fatal in checks:
        machine.validate_result(
            result=result[0],
            rejection_func=rejection,
            message=message,
            tolerance=0.0,
            fatal=fatal,
        )
    return result


def loss_function(loss_mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses, number of tokens, and both for the log, on the last stage.

    Args:
        loss_mask: [b, s / cp], 1 where a token counts.
        output: [b, s / cp], cross-entropy of each token, nats.
    """
    mask = loss_mask.reshape(-1).float()
    loss = (output.reshape(-1).float() * mask).sum()
    num_tokens = mask.sum().detach().to(torch.int)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def _batch(data_iterator: Iterator[dict[str, Tensor]] | None, model: Any) -> dict[str, Any]:
    """This rank's part: read on TP rank 0, broadcast over TP, cut over CP."""
    args = get_args()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    config = get_attr_wrapped_model(model, "config")
    first = mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    mtp = _mtp_here(config, vp_stage)
    if not (first or last or mtp):
        return dict.fromkeys(_KEYS)
    batch: dict[str, Any] = {}
    tp_rank = mpu.get_tensor_model_parallel_rank()
    if tp_rank == 0:
        assert data_iterator is not None
        sample = next(data_iterator)
        batch = {
            key: sample[key].cuda(non_blocking=True) if key in sample else None for key in _KEYS
        }
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size if model.training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=first,
        is_pipeline_last_stage=last,
    )
    batch["cu_seqlens"] = None
    part = {key: batch[key] for key in (*_KEYS, "cu_seqlens")}
    return get_batch_on_this_cp_rank(  # type: ignore[no-any-return]
        part, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, ...]:
    """Train, validation and test datasets of this rank (None where it reads no data)."""
    args = get_args()
    _finish_evaluation(args)
    config = dataset_config(args)
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(  # type: ignore[no-any-return]
        kind, num_samples, partial(_reads_data, vp_stage), config
    ).build()


def _finish_evaluation(args: argparse.Namespace) -> None:
    """Skips the rest of an evaluation that a signal cut short before the checkpoint to resume from.

    The next evaluation then reads what it would have read without the stop.
    """
    if args.full_validation or args.multiple_validation_sets or not args.eval_iters:
        return
    size = args.eval_iters * (args.eval_global_batch_size or args.global_batch_size)
    args.consumed_valid_samples = -(-args.consumed_valid_samples // size) * size


# Megatron asks every rank, and the builder shares the work among them.
datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def _reads_data(vp_stage: int | None) -> bool:
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    return bool(
        mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        or mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        or _mtp_here(_model_config(), vp_stage)
    )


def _mtp_here(config: Any, vp_stage: int | None) -> bool:
    layout = config.pipeline_model_parallel_layout
    return bool(
        mtp_on_this_rank(layout, config.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)
    )


_transformer_config: Any = None


def set_model_config(config: Any) -> None:
    """Tells the dataset provider, which Megatron calls without it, where MTP layers live."""
    global _transformer_config
    _transformer_config = config


def _model_config() -> Any:
    assert _transformer_config is not None, "set_model_config comes before pretrain"
    return _transformer_config


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Megatron's dataset settings from its arguments."""
    blend, blend_per_split = (None, None)
    if not args.mock_data:
        blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split if blend is not None else None,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Pipeline ranks with a copy of the word embeddings: first, MTP, and a tied output layer.

    A rank too many is no harmless one: Megatron sums embedding gradients over this group.
    """
    ranks = {pp_ranks[0], *get_mtp_ranks(pp_ranks, _model_config())}
    if not get_args().untie_embeddings_and_output_weights:
        ranks.add(pp_ranks[-1])
    return sorted(ranks)
