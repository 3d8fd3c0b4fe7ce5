"""The tiny masked autoencoder against the same in plain PyTorch, in a process of the pool."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from moa_megatron.config import MoAConfig
from moa_megatron.vision.conversion import from_megatron
from moa_megatron.vision.masking import visible_patches
from moa_megatron.vision.patches import patchify
from moa_megatron.vision.reference import MAE, MAEShape
from moa_megatron.vision.training import loss_function
from tests.helpers import mae, models
from tests.helpers.cases import MAE_OPTIONS, Layout, Model
from tests.helpers.mae import DECODER, IMAGE, MASK_RATIO


def errors_against_plain(moa: MoAConfig, mutation: str | None = None) -> dict[str, float]:
    """Relative errors of loss and gradients against the plain model, in float64.

    Args:
        moa: settings of the method.
        mutation: a way to be wrong, which must show: ``masks`` or ``positions``.
    """
    case = Model(family="mae", moa=moa, options=MAE_OPTIONS)
    with models.model_parallel(Layout()):
        config = models.transformer_config(case, Layout())
        config.params_dtype = torch.float64
        ours = mae.build(case, config).double()
        generator = torch.Generator().manual_seed(5)
        for parameter in ours.parameters():  # biases and norms start at values that hide mistakes
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.1 * noise
        plain = MAE(_shape(config), moa).double()
        state = {name: p.detach() for name, p in ours.named_parameters()}
        plain.load_state_dict(from_megatron(state, plain.shape))
        images = torch.randn(3, 3, IMAGE.height, IMAGE.width, generator=generator).double()
        visible = visible_patches(7, np.arange(3), IMAGE.patches, MASK_RATIO)
        predicted = ours(images, visible)
        counted = visible.flip(0) if mutation == "masks" else visible
        total, count, _ = loss_function(patchify(images, IMAGE.patch), counted, predicted)
        (total / count).backward()
        if mutation == "positions":
            plain.encoder.positions = plain.encoder.positions.roll(1, 0)
        expected = plain(images, visible)
        expected.backward()
        grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        assert len(grads) == len(state), f"without gradient: {sorted(set(state) - set(grads))}"
        found = from_megatron(grads, plain.shape)
        errors = {"loss": _error(total / count, expected)}
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            errors[name] = _error(found[name], parameter.grad)
        return errors


def _shape(config: TransformerConfig) -> MAEShape:
    assert config.ffn_hidden_size is not None
    return MAEShape(
        image=(IMAGE.height, IMAGE.width),
        patch=IMAGE.patch,
        width=config.hidden_size,
        layers=config.num_layers,
        heads=config.num_attention_heads,
        ffn=config.ffn_hidden_size,
        decoder_width=DECODER["hidden_size"],
        decoder_layers=DECODER["num_layers"],
        decoder_heads=DECODER["num_attention_heads"],
        decoder_ffn=DECODER["ffn_hidden_size"],
    )


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
