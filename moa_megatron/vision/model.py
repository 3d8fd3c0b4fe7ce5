"""The masked autoencoder out of Megatron's transformer blocks.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022): the encoder sees the visible
patches only; a narrower decoder gets a mask token in the place of each hidden one and predicts
pixels. Tensor-parallel ranks split the blocks; everything else they hold alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moa_megatron.layer_statistics import DECODER_DEPTH
from moa_megatron.vision.patches import patchify
from moa_megatron.vision.positions import sincos_positions


@dataclass(frozen=True)
class ImageShape:
    """Sizes of what the model reads, in pixels: ``height`` and ``width`` divide by ``patch``."""

    height: int
    width: int
    patch: int
    channels: int = 3

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.height // self.patch, self.width // self.patch

    @property
    def patches(self) -> int:
        """L, patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def pixels(self) -> int:
        """Numbers in a patch."""
        return self.patch**2 * self.channels


class MAEModel(VisionModule):
    """Encoder, decoder and the small layers around them.

    Args:
        config: of the encoder; Megatron's training loop reads it as the model's.
        decoder_config: of the decoder.
        encoder_spec: block of the encoder, with bidirectional attention.
        decoder_spec: block of the decoder.
        image: sizes of the images.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        decoder_config: TransformerConfig,
        encoder_spec: Any,
        decoder_spec: Any,
        image: ImageShape,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.image, self.pg_collection, self.vp_stage = image, pg_collection, None
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder
        width, narrow = config.hidden_size, decoder_config.hidden_size
        self.patch_embedding = nn.Linear(image.pixels, width)
        self.class_token = nn.Parameter(torch.empty(width))
        self.encoder = TransformerBlock(config, encoder_spec, pg_collection=pg_collection)
        self.decoder_embedding = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.empty(narrow))
        self.decoder = TransformerBlock(decoder_config, decoder_spec, pg_collection=pg_collection)
        self.decoder.statistics_depth = DECODER_DEPTH
        self.head = nn.Linear(narrow, image.pixels)
        for name, size in (("encoder_positions", width), ("decoder_positions", narrow)):
            positions = sincos_positions(*image.grid, size)
            self.register_buffer(name, positions, persistent=False)
        self._initialise(config)

    def _initialise(self, config: TransformerConfig) -> None:
        """As the blocks' own matrices; all ranks share the default generator's stream."""
        for layer in (self.patch_embedding, self.decoder_embedding, self.head):
            layer.to(config.params_dtype)
            if config.perform_initialization:
                assert config.init_method is not None
                config.init_method(layer.weight)
                nn.init.zeros_(layer.bias)
        for token in (self.class_token, self.mask_token):
            token.data = token.data.to(config.params_dtype)
            if config.perform_initialization:
                nn.init.normal_(token, std=config.init_method_std)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules call it; there are no pipeline stages to receive from."""

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """Predicted patches.

        Args:
            images: [b, c, h, w], normalised.
            visible: int64 [b, v], indices of the visible patches.

        Returns:
            [b, L, pixels of a patch], of visible patches too.
        """
        encoded = self.encode(images, visible)
        return self.decode(encoded, visible)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Normalised encoder output, class token first: [b, 1 + v, d]."""
        tokens = self.patch_embedding(patchify(images, self.image.patch))
        tokens = tokens + self.encoder_positions.to(tokens.dtype)
        tokens = tokens.gather(1, visible.unsqueeze(-1).expand(-1, -1, tokens.size(-1)))
        first = self.class_token.expand(len(tokens), 1, -1)
        return _through(self.encoder, torch.cat([first, tokens], dim=1))

    def decode(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """Predicted patches [b, L, pixels] from the encoder's output."""
        tokens = self.decoder_embedding(encoded)
        batch, _, width = tokens.shape
        places = visible.unsqueeze(-1).expand(-1, -1, width)
        masked = self.mask_token.expand(batch, self.image.patches, width)
        patches = masked.scatter(1, places, tokens[:, 1:])
        patches = patches + self.decoder_positions.to(tokens.dtype)
        decoded = _through(self.decoder, torch.cat([tokens[:, :1], patches], dim=1))
        return self.head(decoded[:, 1:])  # type: ignore[no-any-return]


def _through(block: TransformerBlock, tokens: Tensor) -> Tensor:
    """[b, s, d] through a block, which works on [s, b, d]."""
    hidden: Tensor = block(tokens.transpose(0, 1).contiguous(), attention_mask=None)
    return hidden.transpose(0, 1)
