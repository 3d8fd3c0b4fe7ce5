"""A masked autoencoder in plain PyTorch: what the Megatron model must agree with.

Vision transformers with pre-norm blocks, LayerNorm and fixed position embeddings, whose feedforward
layers are those of ``moa_megatron.reference``. Source: MAE (He et al. 2022), sections 3 and A.1.

Shapes: b images, c channels, L patches of p x p pixels, v of them visible, T = 1 + v or 1 + L
tokens with the class token first, d width, D FFN width, P = D (Type-I) or 2D (Type-II).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_megatron.config import MoAConfig
from moa_megatron.reference import mixture_reference
from moa_megatron.vision.patches import normalised_targets, patchify
from moa_megatron.vision.positions import sincos_positions
from moa_megatron.vision.scaling import IMAGENET, Scaling

Pooling = Literal["moments", "mean", "class"]


@dataclass(frozen=True)
class MAEShape:
    """Sizes of encoder and decoder, and how their images are normalised.

    ``bias`` is of the linear layers inside the blocks; ``pixel_mean`` and ``pixel_std`` are of
    ``scaling.Scaling``.

    Raises:
        ValueError: with every violation, each naming the field, its value and the fix.
    """

    image: tuple[int, int]
    patch: int
    width: int
    layers: int
    heads: int
    ffn: int
    decoder_width: int
    decoder_layers: int
    decoder_heads: int
    decoder_ffn: int
    channels: int = 3
    eps: float = 1e-6
    bias: bool = True
    pixel_mean: tuple[float, float, float] = IMAGENET.mean
    pixel_std: tuple[float, float, float] = IMAGENET.std

    def __post_init__(self) -> None:
        for name in ("image", "pixel_mean", "pixel_std"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        problems = [
            f"image={self.image}: {size} does not divide by patch={self.patch}; choose a multiple"
            for size in self.image
            if size % self.patch
        ]
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}width"), getattr(self, f"{prefix}heads")
            if width % heads:
                problems.append(f"{prefix}width={width}: does not divide by {prefix}heads={heads}")
            if width % 4:
                problems.append(f"{prefix}width={width}: position embeddings need a multiple of 4")
        if problems:
            raise ValueError("MAE settings: " + "; ".join(problems))

    @property
    def scaling(self) -> Scaling:
        """Of the pixels."""
        return Scaling(self.pixel_mean, self.pixel_std)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """p*p*c."""
        return self.patch * self.patch * self.channels


class Attention(nn.Module):
    """Bidirectional multi-head attention; ``qkv`` holds the rows of all queries, keys, values."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x_bTd: Tensor) -> Tensor:
        b, T, d = x_bTd.shape
        q, k, v = self.qkv(x_bTd).reshape(b, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [b, heads, T, d / heads]
        return self.proj(mixed.transpose(1, 2).reshape(b, T, d))


class FeedForward(nn.Module):
    """SwiGLU (``mixing="fixed"``), LA or MoA; ``coefficients`` as ``reference.ffn`` takes them."""

    def __init__(self, width: int, ffn: int, bias: bool, moa: MoAConfig) -> None:
        super().__init__()
        self.moa = moa
        fixed = moa.mixing == "fixed"
        self.w_in = nn.Linear(width, 2 * ffn if fixed or moa.gated else ffn, bias=bias)
        self.w_out = nn.Linear(ffn, width, bias=bias)
        self.coefficients: nn.Parameter | None = None
        if not fixed:
            size = (moa.num_coefficients,)
            self.coefficients = nn.Parameter(
                torch.empty(size if moa.mixing == "la" else (*size, width))
            )

    def forward(self, x_bTd: Tensor) -> Tensor:
        preact_bTP = self.w_in(x_bTd)
        if self.coefficients is None:
            y_bTD, z_bTD = preact_bTP.chunk(2, dim=-1)
            return self.w_out(F.silu(y_bTD) * z_bTD)
        moa = self.moa.mixing == "moa"
        logits = x_bTd @ self.coefficients.T if moa else self.coefficients
        return self.w_out(mixture_reference(preact_bTP, logits, self.moa))


class Block(nn.Module):
    """x + attention(norm(x)), then x + FFN(norm(x))."""

    def __init__(
        self, width: int, heads: int, ffn: int, bias: bool, eps: float, moa: MoAConfig
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.ffn = FeedForward(width, ffn, bias, moa)

    def forward(self, x_bTd: Tensor) -> Tensor:
        x_bTd = x_bTd + self.attention(self.norm1(x_bTd))
        return x_bTd + self.ffn(self.norm2(x_bTd))


class Encoder(nn.Module):
    """The vision transformer that pretraining is for."""

    positions: Tensor  # [L, d]

    def __init__(self, shape: MAEShape, moa: MoAConfig) -> None:
        super().__init__()
        self.shape, self.moa = shape, moa
        d = shape.width
        self.patch_embedding = nn.Linear(shape.patch_values, d)
        self.class_token = nn.Parameter(torch.empty(d))
        self.register_buffer("positions", sincos_positions(*shape.grid, d), persistent=False)
        self.blocks = nn.ModuleList(
            Block(d, shape.heads, shape.ffn, shape.bias, shape.eps, moa)
            for _ in range(shape.layers)
        )
        self.norm = nn.LayerNorm(d, eps=shape.eps)

    def forward(self, patches: Tensor, visible: Tensor | None = None) -> Tensor:
        """Encodes visible patches.

        Args:
            patches: [b, L, p*p*c].
            visible: [b, v] int64, the visible patches in the order in which they enter; None: all.

        Returns:
            [b, 1 + v, d] after the final norm, the class token first; it has no position.
        """
        x_bvd = self.patch_embedding(patches) + self.positions
        if visible is not None:
            x_bvd = x_bvd.gather(1, visible.unsqueeze(-1).expand(-1, -1, x_bvd.shape[-1]))
        x_bTd = torch.cat([self.class_token.expand(len(x_bvd), 1, -1), x_bvd], dim=1)
        for block in self.blocks:
            x_bTd = block(x_bTd)
        return self.norm(x_bTd)

    def features(self, images: Tensor, pooling: Pooling = "mean") -> Tensor:
        """Features of whole images.

        Args:
            images: [b, c, h, w], normalised; nothing is masked.
            pooling: ``mean`` of the patch tokens; ``moments``, their mean and standard deviation
                side by side; ``class``, the class token.

        Returns:
            [b, d], for ``moments`` [b, 2d].
        """
        x_bTd = self(patchify(images, self.shape.patch))
        if pooling == "class":
            return x_bTd[:, 0]
        mean_bd = x_bTd[:, 1:].mean(dim=1)
        if pooling == "mean":
            return mean_bd
        return torch.cat([mean_bd, x_bTd[:, 1:].std(dim=1)], dim=1)


class Decoder(nn.Module):
    """The small transformer that predicts pixels; thrown away after pretraining."""

    positions: Tensor  # [L, dd]

    def __init__(self, shape: MAEShape, moa: MoAConfig) -> None:
        super().__init__()
        dd = shape.decoder_width
        self.embedding = nn.Linear(shape.width, dd)
        self.mask_token = nn.Parameter(torch.empty(dd))
        self.register_buffer("positions", sincos_positions(*shape.grid, dd), persistent=False)
        self.blocks = nn.ModuleList(
            Block(dd, shape.decoder_heads, shape.decoder_ffn, shape.bias, shape.eps, moa)
            for _ in range(shape.decoder_layers)
        )
        self.norm = nn.LayerNorm(dd, eps=shape.eps)
        self.head = nn.Linear(dd, shape.patch_values)

    def forward(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """[b, 1 + v, d] of the encoder and ``visible`` [b, v] -> predictions [b, L, p*p*c]."""
        x_bTd = self.embedding(encoded)
        b, _, dd = x_bTd.shape
        filled = self.mask_token.expand(b, len(self.positions), dd).scatter(
            1, visible.unsqueeze(-1).expand(-1, -1, dd), x_bTd[:, 1:]
        )
        x_bTd = torch.cat([x_bTd[:, :1], filled + self.positions], dim=1)
        for block in self.blocks:
            x_bTd = block(x_bTd)
        return self.head(self.norm(x_bTd)[:, 1:])


class MAE(nn.Module):
    """Encoder, decoder and the loss of pretraining."""

    def __init__(self, shape: MAEShape, moa: MoAConfig) -> None:
        super().__init__()
        self.shape, self.moa = shape, moa
        self.encoder, self.decoder = Encoder(shape, moa), Decoder(shape, moa)
        initialise(self)

    def predict(self, images: Tensor, visible: Tensor) -> Tensor:
        """[b, c, h, w] and ``visible`` [b, v] -> normalised pixels [b, L, p*p*c]."""
        return self.decoder(self.encoder(patchify(images, self.shape.patch), visible), visible)

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """The loss: mean squared error against normalised pixels, over masked patches only.

        Args:
            images: [b, c, h, w], already normalised.
            visible: [b, v] int64, v < L, the visible patches.
        """
        targets, _, _ = normalised_targets(patchify(images, self.shape.patch))
        error_bL = (self.predict(images, visible) - targets).square().mean(dim=-1)
        masked_bL = torch.ones_like(error_bL).scatter(1, visible, 0.0)
        return (error_bL * masked_bL).sum() / masked_bL.sum()


def initialise(module: nn.Module, seed: int | None = None, std: float = 0.02) -> None:
    """Fresh weights: matrices and tokens N(0, std²), biases 0; norms are 1 from the start.

    Gates N(0, gate_init_std²), learned activations 1 (method paper, section 5).

    Args:
        seed: None draws from torch's global generator.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, Encoder):
            nn.init.normal_(part.class_token, std=std, generator=generator)
        elif isinstance(part, Decoder):
            nn.init.normal_(part.mask_token, std=std, generator=generator)
        elif isinstance(part, FeedForward) and part.coefficients is not None:
            if part.moa.mixing == "la":
                nn.init.ones_(part.coefficients)
            else:
                nn.init.normal_(part.coefficients, std=part.moa.gate_init_std, generator=generator)
