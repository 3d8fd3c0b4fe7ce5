"""Parameters and FLOPs of a masked autoencoder, from its arguments alone.

Held against the model that is built (tests/unit/test_costs.py).
"""

from __future__ import annotations

import argparse

from moa_megatron.config import MoAConfig
from moa_megatron.costs.parameters import Parameters
from moa_megatron.vision.masking import visible_count


def parameters(args: argparse.Namespace, moa: MoAConfig) -> Parameters:
    """Parameters of the model; ``active`` are the encoder's, which are kept after training."""
    pixels = args.patch_dim**2 * args.num_channels
    width, narrow = args.hidden_size, args.mae_decoder_width
    bias = 1  # the layers around the blocks always have one
    encoder = (pixels + bias) * width + width  # patch embedding, class token
    encoder += args.num_layers * _block(args, moa, width, args.ffn_hidden_size)
    encoder += _norm(args, width)
    decoder = (width + bias) * narrow + narrow  # embedding, mask token
    decoder += args.mae_decoder_layers * _block(args, moa, narrow, args.mae_decoder_ffn)
    decoder += _norm(args, narrow) + (narrow + bias) * pixels
    gates = args.num_layers * _gates(moa, width) + args.mae_decoder_layers * _gates(moa, narrow)
    return Parameters(total=encoder + decoder, active=encoder, gates=gates)


def flops(args: argparse.Namespace, moa: MoAConfig) -> float:
    """Of one image's training step: matrix products forward and backward, thrice the forward's.

    A multiplication and its addition are two. The encoder works on the visible patches and the
    class token, the decoder on all patches and the class token; attention is not causal.
    """
    pixels = args.patch_dim**2 * args.num_channels
    width, narrow = args.hidden_size, args.mae_decoder_width
    patches = args.seq_length - 1
    seen = visible_count(patches, args.mae_mask_ratio) + 1
    products = patches * pixels * width  # all patches are embedded, then the visible ones taken
    products += seen * width * narrow + patches * narrow * pixels
    products += args.num_layers * _products(args, moa, width, args.ffn_hidden_size, seen)
    decoder = _products(args, moa, narrow, args.mae_decoder_ffn, patches + 1)
    products += args.mae_decoder_layers * decoder
    return 3.0 * 2.0 * products


def _block(args: argparse.Namespace, moa: MoAConfig, width: int, ffn: int) -> int:
    bias = int(args.add_bias_linear)
    ups = _branches(args, moa)
    attention = (width + bias) * 3 * width + (width + bias) * width
    feedforward = (width + bias) * ups * ffn + (ffn + bias) * width
    return attention + feedforward + 2 * _norm(args, width) + _gates(moa, width)


def _branches(args: argparse.Namespace, moa: MoAConfig) -> int:
    gated = bool(args.swiglu) if moa.mixing == "fixed" else moa.gated
    return 2 if gated else 1


def _norm(args: argparse.Namespace, width: int) -> int:
    return width if args.normalization == "RMSNorm" else 2 * width


def _gates(moa: MoAConfig, width: int) -> int:
    if moa.mixing == "fixed":
        return 0
    return moa.num_coefficients * (width if moa.mixing == "moa" else 1)


def _products(args: argparse.Namespace, moa: MoAConfig, width: int, ffn: int, tokens: int) -> int:
    """Multiplications of a block on ``tokens`` tokens."""
    linear = 4 * width * width + (_branches(args, moa) + 1) * width * ffn
    if moa.mixing == "moa":
        linear += moa.num_coefficients * width
    return tokens * linear + 2 * tokens * tokens * width
