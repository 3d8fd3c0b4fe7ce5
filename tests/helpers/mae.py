"""A tiny masked autoencoder and its batches, in a process of the pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from moa_megatron.specs import with_moa
from moa_megatron.vision import building
from moa_megatron.vision.masking import visible_patches
from moa_megatron.vision.model import ImageShape, MAEModel
from moa_megatron.vision.patches import patchify
from moa_megatron.vision.training import LOSS, loss_function
from tests.helpers.cases import GLOBAL_BATCH, Model

IMAGE = ImageShape(height=12, width=8, patch=2)  # not square: rows and columns must not be mixed up
MASK_RATIO = 0.75
SEED = 1234
DECODER = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 12}


def build(case: Model, config: TransformerConfig) -> MAEModel:
    """The Megatron model of a case."""
    decoder = dataclasses.replace(config, kv_channels=None, num_query_groups=None, **DECODER)
    spec = with_moa(building.layer_spec(local=True), case.moa)
    whole = building.MAEModelConfig(
        transformer=config, decoder=decoder, layer_spec=spec, image=IMAGE
    )
    return building.build_model(whole)


def microbatches(step: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's images of a step and their positions in the run."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (GLOBAL_BATCH, 3, IMAGE.height, IMAGE.width)
    images = torch.randn(shape, generator=generator)
    samples = torch.arange(GLOBAL_BATCH) + step * GLOBAL_BATCH
    first = parallel_state.get_data_parallel_rank()
    part = slice(first, None, parallel_state.get_data_parallel_world_size())
    return list(zip(images[part].split(1), samples[part].split(1)))


def forward_step(data: Iterator[tuple[Tensor, Tensor]], chunk: Any) -> tuple[Tensor, Any]:
    """As the entry point's, without Megatron's global arguments."""
    images, samples = next(data)
    visible = visible_patches(SEED, samples.numpy(), IMAGE.patches, MASK_RATIO)
    patches = patchify(images, IMAGE.patch)

    def loss(predicted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, count, report = loss_function(patches, visible, predicted)
        return total, count, report[LOSS][0] / report[LOSS][1]

    return chunk(images, visible), loss
