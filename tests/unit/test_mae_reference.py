"""The plain masked autoencoder against its definition: patches, positions, attention, loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moa_megatron.config import MoAConfig
from moa_megatron.reference import ffn, fixed_ffn
from moa_megatron.vision.conversion import from_megatron, unpack_heads
from moa_megatron.vision.patches import normalised_targets, patchify, unpatchify
from moa_megatron.vision.positions import sincos_positions
from moa_megatron.vision.reference import MAE, Attention, FeedForward, initialise
from tests.helpers.plain_mae import SHAPE, VARIANTS, megatron_state


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three images and two visible patches of each, in no order."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(3, 3, *SHAPE.image, generator=generator, dtype=torch.float64)
    order = torch.rand(3, SHAPE.num_patches, generator=generator).argsort(dim=1)
    return images, order[:, :2]


def model(moa: MoAConfig, std: float = 0.3) -> MAE:
    mae = MAE(SHAPE, moa).double()
    initialise(mae, seed=1, std=std)
    return mae


def test_patches_are_pixels_row_by_row_channels_last_and_go_back() -> None:
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    # Patch 4 is the second of the second row; its pixel (1, 2), channel 1.
    assert patches[1, 4, (1 * 4 + 2) * 3 + 1] == images[1, 1, 4 + 1, 4 + 2]
    assert torch.equal(unpatchify(patches, 4, 2, 3, 3), images)
    with pytest.raises(ValueError, match="8 x 12 pixels .* patches of 5"):
        patchify(images, 5)


def test_targets_have_mean_0_and_unbiased_variance_1() -> None:
    patches = 3.0 + 2.0 * torch.randn(2, 5, 48, dtype=torch.float64)
    targets, mean, std = normalised_targets(patches)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 5, dtype=torch.float64))
    expected = patches.var(-1) / (patches.var(-1) + 1e-6)
    torch.testing.assert_close(targets.var(-1), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(targets * std + mean, patches)
    assert normalised_targets(torch.full((1, 1, 48), 0.7))[0].abs().max() < 1e-3  # one colour


def test_positions_by_hand() -> None:
    positions = sincos_positions(2, 3, 8)
    assert positions.shape == (6, 8) and positions.dtype == torch.float32

    def code(place: int) -> list[float]:
        return [f(place * w) for f in (math.sin, math.cos) for w in (1.0, 0.01)]

    for row in range(2):
        for column in range(3):
            expected = torch.tensor(code(row) + code(column))
            torch.testing.assert_close(positions[row * 3 + column], expected)
    with pytest.raises(ValueError, match="width=10: .* such as 12"):
        sincos_positions(2, 2, 10)


def test_heads_are_unpacked_as_megatron_packs_them() -> None:
    heads, size, d = 3, 4, 12
    q, k, v = (torch.randn(heads, size, d) for _ in range(3))
    packed = torch.cat([part[h] for h in range(heads) for part in (q, k, v)])
    attention = Attention(d, heads, bias=False)
    attention.qkv.weight.data = unpack_heads(packed, heads)
    attention.proj.weight.data = torch.eye(d)
    x = torch.randn(2, 5, d)
    queries, keys, values = (torch.einsum("btd,hsd->bhts", x, part) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(queries, keys, values)
    expected = mixed.transpose(1, 2).reshape(2, 5, d)
    torch.testing.assert_close(attention(x), expected)
    bias = torch.arange(18.0)
    # Head 0 holds rows 0..5: q 0 1, k 2 3, v 4 5.
    assert unpack_heads(bias, 3)[:6].tolist() == [0, 1, 6, 7, 12, 13]


@pytest.mark.parametrize("moa", VARIANTS, ids=lambda c: f"{c.mixing}-{c.variant}")
def test_feedforward_is_the_methods(moa: MoAConfig) -> None:
    layer = FeedForward(16, 24, False, moa)
    initialise(layer, seed=3, std=0.5)
    x = torch.randn(2, 5, 16)
    if layer.coefficients is None:
        expected = fixed_ffn(x, layer.w_in.weight, layer.w_out.weight, "silu", gated=True)
    else:
        expected = ffn(x, layer.w_in.weight, layer.w_out.weight, layer.coefficients, moa)
    torch.testing.assert_close(layer(x), expected)


def test_loss_counts_masked_patches_only() -> None:
    mae = model(MoAConfig())
    images, visible = batch()
    targets, _, _ = normalised_targets(patchify(images, SHAPE.patch))
    errors = (mae.predict(images, visible) - targets).square().mean(-1)
    masked = [
        errors[i, j]
        for i in range(3)
        for j in range(SHAPE.num_patches)
        if j not in visible[i].tolist()
    ]
    assert len(masked) == 3 * (SHAPE.num_patches - 2)
    torch.testing.assert_close(mae(images, visible), torch.stack(masked).mean())


def test_encoder_sees_visible_patches_only_and_their_order_is_free() -> None:
    mae = model(MoAConfig(variant="qd"))
    images, visible = batch()
    hidden = torch.ones(3, SHAPE.num_patches, dtype=torch.bool).scatter(1, visible, False)
    patches = patchify(images, SHAPE.patch)
    changed = torch.where(hidden.unsqueeze(-1), torch.randn_like(patches), patches)
    other = unpatchify(changed, SHAPE.patch, *SHAPE.grid, 3)
    expected = mae.predict(images, visible)
    assert torch.equal(mae.predict(other, visible), expected)
    torch.testing.assert_close(mae.predict(images, visible.flip(1)), expected)
    assert not torch.allclose(mae.predict(images, (visible + 1) % SHAPE.num_patches), expected)


@pytest.mark.parametrize("pooling", ["moments", "mean", "class"])
def test_features_follow_the_images_and_see_places(pooling: str) -> None:
    encoder = model(MoAConfig(mixing="la", variant="one")).encoder
    images, _ = batch()
    features = encoder.features(images, pooling)  # type: ignore[arg-type]
    first, *others = encoder(patchify(images, SHAPE.patch)).unbind(dim=1)
    mean = sum(others) / SHAPE.num_patches
    square = sum((other - mean) ** 2 for other in others) / (SHAPE.num_patches - 1)
    moments = torch.cat([mean, square.sqrt()], dim=1)
    expected = {"class": first, "mean": mean, "moments": moments}[pooling]
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(encoder.features(images.flip(0), pooling).flip(0), features)  # type: ignore[arg-type]
    # The same patches at other places.
    moved = unpatchify(patchify(images, SHAPE.patch).flip(1), SHAPE.patch, *SHAPE.grid, 3)
    assert not torch.allclose(encoder.features(moved, pooling), features)  # type: ignore[arg-type]


def test_hidden_patches_are_told_apart_by_their_places() -> None:
    images, visible = batch()
    predicted = model(MoAConfig()).predict(images, visible)[0]
    hidden = [place for place in range(SHAPE.num_patches) if place not in visible[0].tolist()]
    assert not torch.allclose(predicted[hidden[0]], predicted[hidden[1]])


def test_every_parameter_gets_a_gradient() -> None:
    mae = model(MoAConfig())
    images, visible = batch()
    mae(images, visible).backward()
    for name, parameter in mae.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_fresh_weights_are_reproducible() -> None:
    mae = MAE(SHAPE, MoAConfig(gate_init_std=0.1))
    initialise(mae, seed=5)
    first = {name: value.clone() for name, value in mae.state_dict().items()}
    initialise(mae, seed=5)
    assert all(torch.equal(value, first[name]) for name, value in mae.state_dict().items())
    assert abs(first["encoder.blocks.0.ffn.coefficients"].std() - 0.1) < 0.02
    assert abs(first["encoder.patch_embedding.weight"].std() - 0.02) < 0.002
    assert not first["decoder.blocks.1.ffn.w_in.bias"].any()
    assert bool((first["encoder.blocks.0.norm1.weight"] == 1).all())


def test_wrong_sizes_are_told_at_once() -> None:
    with pytest.raises(ValueError) as error:
        dataclasses.replace(SHAPE, image=(10, 8), width=18, heads=4, decoder_heads=5)
    for text in ("image=(10, 8)", "width=18: does not divide", "multiple of 4", "decoder_heads=5"):
        assert text in str(error.value)


@pytest.mark.parametrize("moa", VARIANTS, ids=lambda c: f"{c.mixing}-{c.variant}")
@pytest.mark.parametrize("fused_norms", [False, True])
def test_megatrons_weights_fit(moa: MoAConfig, fused_norms: bool) -> None:
    state = megatron_state(SHAPE, moa, fused_norms)
    plain = from_megatron(state, SHAPE)
    mae = MAE(SHAPE, moa)
    mae.load_state_dict(plain)
    found = mae.state_dict()["decoder.blocks.1.ffn.w_out.weight"]
    assert torch.equal(found, state["decoder.layers.1.mlp.linear_fc2.weight"])
    assert torch.equal(mae.encoder.norm.bias, state["encoder.final_layernorm.bias"])


def test_a_tensor_without_a_place_is_refused() -> None:
    state = megatron_state(SHAPE, MoAConfig())
    for name in ("encoder.layers.0.mlp.router.weight", "encoder.extra", "encoder.norms.weight"):
        with pytest.raises(ValueError, match=name):
            from_megatron({**state, name: torch.zeros(2)}, SHAPE)
    # One norm under both of its names.
    twice = "encoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    with pytest.raises(ValueError, match=twice):
        from_megatron({**state, twice: torch.zeros(SHAPE.width)}, SHAPE)
