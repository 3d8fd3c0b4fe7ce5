"""Cases that train on Megatron's own data pipeline through ``moa_megatron.batches``."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.timers import Timers
from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer
from megatron.training import global_vars
from megatron.training.arguments import add_megatron_arguments
from megatron.training.training import build_train_valid_test_data_loaders

from moa_megatron import batches
from tests.helpers import models, training
from tests.helpers.cases import GLOBAL_BATCH, SEQUENCE, VOCABULARY, Layout, Model
from tests.helpers.tensors import Shard, Tensors

# Unequal, so that buffers of the one would not fit the other.
TRAIN_MICRO_BATCH, EVAL_MICRO_BATCH = 2, 1
_END_OF_DOCUMENT = VOCABULARY - 1
_SPLITS = ("train", "valid", "test")


@dataclass
class Pass:
    """One rank's part; loss sum and token count are known to the last pipeline stage only."""

    train: list[float] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)
    initial: list[Shard] = field(default_factory=list)
    gradients: list[Shard] = field(default_factory=list)


def write_corpora(folder: str) -> None:
    """Two token files, "low" and "high", whose vocabularies share the end of document only."""
    generator = np.random.default_rng(0)
    middle = VOCABULARY // 2
    for name, low, high in (("low", 0, middle), ("high", middle, _END_OF_DOCUMENT)):
        builder = IndexedDatasetBuilder(str(Path(folder, f"{name}.bin")), dtype=np.uint16)
        for _ in range(40):
            tokens = generator.integers(low, high, generator.integers(3, 30))
            document = torch.tensor([*tokens, _END_OF_DOCUMENT])
            builder.add_document(document, [len(document)])
        builder.finalize(str(Path(folder, f"{name}.idx")))


@functools.cache
def _defaults() -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    return vars(add_megatron_arguments(parser).parse_args([]))


@contextmanager
def _globals(layout: Layout, **changes: Any) -> Iterator[None]:
    """Within, Megatron's arguments, timers and tokenizer are those of a run of one step."""
    values: dict[str, Any] = {
        "seq_length": SEQUENCE,
        "micro_batch_size": TRAIN_MICRO_BATCH,
        "global_batch_size": GLOBAL_BATCH,
        "eval_micro_batch_size": EVAL_MICRO_BATCH,
        "eval_global_batch_size": GLOBAL_BATCH,
        "context_parallel_size": layout.cp,
        "pipeline_model_parallel_size": layout.pp,
        "data_parallel_size": layout.data,
        "untie_embeddings_and_output_weights": True,
        "train_iters": 1,
        "eval_iters": 1,
        "eval_interval": 2,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "dataloader_type": "single",
        "num_workers": 0,
        # Some tokens do not count, and their number differs between ranks.
        "eod_mask_loss": True,
    }
    args = argparse.Namespace(**{**_defaults(), **values, **changes})
    with (
        mock.patch.object(global_vars, "_GLOBAL_ARGS", args),
        mock.patch.object(global_vars, "_GLOBAL_TIMERS", Timers(2, "minmax")),
        mock.patch.object(global_vars, "_GLOBAL_TOKENIZER", NullTokenizer(VOCABULARY)),
        mock.patch.object(batches, "_transformer_config", None),
        mock.patch.object(parallel_state, "default_embedding_ranks", batches.embedding_ranks),
    ):
        yield


def _providers(layout: Layout) -> list[Any]:
    """One provider for each chunk, made as Megatron's ``pretrain`` makes it."""
    if layout.vpp == 1:
        return [batches.datasets_provider]
    providers = []
    for stage in range(layout.vpp):
        provider: Any = functools.partial(batches.datasets_provider, vp_stage=stage)
        provider.is_distributed = batches.datasets_provider.is_distributed  # type: ignore[attr-defined]
        providers.append(provider)
    return providers


def train_and_evaluate(
    model: Model, layout: Layout, data: dict[str, Any], initial: Tensors | None = None
) -> Pass:
    """One pass over a global batch with gradients, and one over a validation batch."""
    with _globals(layout, **data):
        batches.set_model_config(models.transformer_config(model, layout))
        with models.model_parallel(layout):
            chunks = models.build(model, layout)
            if initial is not None:
                training.load(chunks, initial)
            result = Pass(initial=training.shards(chunks))
            loaders = [build_train_valid_test_data_loaders(p) for p in _providers(layout)]
            for chunk in chunks:
                chunk.zero_grad_buffer()
            result.train = _sums(chunks, layout, [train for train, _, _ in loaders])
            with training.gradients_as_weights(chunks):
                result.gradients = training.shards(chunks)
            for chunk in chunks:
                chunk.eval()
            with torch.no_grad():
                result.valid = _sums(chunks, layout, [valid for _, [valid], _ in loaders])
            return result


def _sums(chunks: training.Chunks, layout: Layout, loaders: list[Any]) -> list[float]:
    """Loss sum and token count of the global batch; nothing before the last stage."""
    size = TRAIN_MICRO_BATCH if chunks[0].training else EVAL_MICRO_BATCH
    iterators = [None if loader is None else iter(loader) for loader in loaders]
    run = get_forward_backward_func()
    reports = run(
        forward_step_func=batches.forward_step,
        data_iterator=iterators if layout.vpp > 1 else iterators[0],
        model=list(chunks) if layout.vpp > 1 else chunks[0],
        num_microbatches=GLOBAL_BATCH // (size * layout.data),
        seq_length=SEQUENCE,
        micro_batch_size=size,
        forward_only=not chunks[0].training,
    )
    if not reports:
        return []
    total = torch.stack([report["lm loss"] for report in reports]).sum(0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return [float(value) for value in total]


def readers(model: Model, layout: Layout, data: dict[str, Any]) -> list[tuple[bool, ...]]:
    """For each chunk of this rank, which of its three datasets exist."""
    with _globals(layout, **data):
        batches.set_model_config(models.transformer_config(model, layout))
        with models.model_parallel(layout):
            sizes = [GLOBAL_BATCH] * len(_SPLITS)
            return [
                tuple(dataset is not None for dataset in provider(sizes))
                for provider in _providers(layout)
            ]


def contents(data: dict[str, Any], sizes: list[int]) -> dict[str, tuple[int, int] | None]:
    """Samples of each split that came from the corpora "low" and "high"."""
    layout = Layout()
    with _globals(layout, **data):
        batches.set_model_config(models.transformer_config(Model(), layout))
        with models.model_parallel(layout):
            datasets = batches.datasets_provider(sizes)
    return dict(zip(_SPLITS, map(_origins, datasets), strict=True))


def _origins(dataset: Any) -> tuple[int, int] | None:
    if dataset is None:
        return None
    samples = [dataset[index]["tokens"] for index in range(len(dataset))]
    low = sum(bool((sample < VOCABULARY // 2).any()) for sample in samples)
    middle, end = VOCABULARY // 2, _END_OF_DOCUMENT
    high = sum(bool(((sample >= middle) & (sample < end)).any()) for sample in samples)
    return low, high


def embedding_ranks(model: Model, layout: Layout, pp_ranks: list[int], tied: bool) -> list[int]:
    """Ranks of a pipeline that keep copies of the word embeddings equal."""
    with _globals(layout, untie_embeddings_and_output_weights=not tied):
        batches.set_model_config(models.transformer_config(model, layout))
        return batches.embedding_ranks(pp_ranks)


def loss(mask: list[list[float]], output: list[list[float]]) -> list[list[float]]:
    """Sum, count and report of ``loss_function``."""
    total, count, report = batches.loss_function(torch.tensor(mask), torch.tensor(output))
    assert count.dtype == torch.int and not report["lm loss"].requires_grad
    return [[float(total)], [float(count)], report["lm loss"].tolist()]
