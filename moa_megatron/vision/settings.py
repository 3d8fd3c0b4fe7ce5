"""Flags of masked autoencoders, what follows from them, and which combinations cannot be."""

from __future__ import annotations

import argparse
from collections.abc import Collection

from moa_megatron.config import MoAConfig
from moa_megatron.vision.masking import visible_count
from moa_megatron.vision.scaling import IMAGENET

# Megatron's parallelism and modules that the model does not have: destination, value that is fine.
_UNSERVED = {
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "num_experts": None,
    "mtp_num_layers": None,
    "sequence_parallel": False,
    "train_samples": None,
    "rampup_batch_size": None,
    "tokens": None,
    "full_validation": False,
    "multiple_validation_sets": False,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "data_path": None,
    "test_data_path": None,
    "data_args_path": None,
    "per_split_data_args_path": None,
}
_REASONS = {
    "pipeline_model_parallel_size": "the model is small and has two depths: use data and tensor "
    "parallelism",
    "context_parallel_size": "images have no long context: use data and tensor parallelism",
    "sequence_parallel": "197 and 50 tokens do not divide: leave it out",
    "use_megatron_fsdp": "pictures are drawn by some ranks only: use --use-distributed-optimizer",
    "use_torch_fsdp2": "pictures are drawn by some ranks only: use --use-distributed-optimizer",
    "tokens": "images are counted in epochs: use --epochs",
    "train_samples": "use --train-iters or --epochs",
    "data_path": "use --train-data-path and --valid-data-path",
}


def add_vision_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``--moa-model mae``; sizes of images are Megatron's ``--img-h`` ff."""
    group = parser.add_argument_group("masked autoencoder (--moa-model mae)")
    add = group.add_argument
    add("--mae-mask-ratio", type=float, default=0.75, help="share of patches that are hidden")
    add("--mae-decoder-layers", type=int, default=8, help="blocks of the decoder (8)")
    add("--mae-decoder-width", type=int, default=512, help="width of the decoder (512)")
    add("--mae-decoder-heads", type=int, default=16, help="attention heads of the decoder (16)")
    add("--mae-decoder-ffn", type=int, help="FFN width of the decoder (int(8/3 width), ungated 4)")
    add(
        "--mae-crop-scale",
        type=float,
        nargs=2,
        default=[0.2, 1.0],
        metavar=("LOW", "HIGH"),
        help="share of the image's area that a random crop takes (0.2 1.0)",
    )
    add(
        "--mae-flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror half of the training images (default: yes)",
    )
    add(
        "--mae-eval-crop",
        type=float,
        default=0.875,
        metavar="F",
        help="centred crop of evaluation, as a share of the short side (0.875)",
    )
    for name, usual in (("mean", IMAGENET.mean), ("std", IMAGENET.std)):
        add(
            f"--mae-pixel-{name}",
            type=float,
            nargs=3,
            default=list(usual),
            metavar=("R", "G", "B"),
            help=f"{name} that pixels in [0, 1] are normalised by (ImageNet's: "
            f"{' '.join(map(str, usual))})",
        )
    add(
        "--mae-pictures",
        type=int,
        default=8,
        metavar="N",
        help="images whose reconstruction is drawn at each evaluation; 0: none (8)",
    )
    add(
        "--epochs",
        type=float,
        metavar="E",
        help="train for so many passes over the images; warm-up and decay keep the recipe's "
        "proportions (default: the recipe's train_iters)",
    )
    add(
        "--moa-grey-images",
        action="store_true",
        help="take grey images, as RGB; they are left out otherwise",
    )
    add(
        "--moa-max-bad-images",
        type=float,
        default=0.01,
        metavar="F",
        help="share of images that may be left out because they are damaged or not RGB (0.01)",
    )
    add(
        "--moa-image-threads",
        type=int,
        default=0,
        metavar="N",
        help="DALI's threads of each rank that reads images (default: this rank's share of cores)",
    )


def derive(
    args: argparse.Namespace, moa: MoAConfig, given: Collection[str], gated_recipe: bool
) -> None:
    """Fills in what Megatron wants to know and the image sizes decide.

    Args:
        args: changed in place.
        moa: settings of the method.
        given: destinations that the user has set; they stay.
        gated_recipe: whether the recipe's widths are meant for gated FFNs.
    """
    decoder = args.mae_decoder_width
    gated = bool(args.swiglu)
    ungated = moa.mixing != "fixed" and gated_recipe and not gated and not args.use_checkpoint_args
    if args.mae_decoder_ffn is None or (ungated and "mae_decoder_ffn" not in given):
        args.mae_decoder_ffn = int(8 * decoder / 3) if gated else 4 * decoder
    args.mae_decoder_ffn = -(-args.mae_decoder_ffn // args.moa_align) * args.moa_align
    if args.patch_dim > 0:
        # One class token besides the patches: what Megatron's logs count as a sequence.
        args.seq_length = (args.img_h // args.patch_dim) * (args.img_w // args.patch_dim) + 1
        args.max_position_embeddings = args.seq_length
    args.position_embedding_type = "none"
    args.dataloader_type = "external"
    args.tokenizer_type, args.vocab_size, args.padded_vocab_size = "NullTokenizer", 1, 1


def problems(args: argparse.Namespace) -> list[str]:
    """All violations that concern the masked autoencoder alone."""
    found = []
    for name, fine in _UNSERVED.items():
        value = getattr(args, name, fine)
        if value != fine and value not in (None, False, []):
            flag = "--" + name.replace("_", "-")
            why = _REASONS.get(name, "leave it out")
            found.append(f"{flag} {value} is not served with --moa-model mae; {why}")
    return found + _shape_problems(args) + _data_problems(args)


def _shape_problems(args: argparse.Namespace) -> list[str]:
    found = []
    patch = args.patch_dim
    for name in ("img_h", "img_w"):
        size = getattr(args, name)
        if patch < 1 or size % patch or size < patch:
            found.append(
                f"--{name.replace('_', '-')} {size} does not divide into patches of --patch-dim "
                f"{patch}; choose a multiple"
            )
    if args.num_channels != 3:
        found.append(f"--num-channels {args.num_channels}: images are read as RGB; use 3")
    tp = args.tensor_model_parallel_size
    for name in ("mae_decoder_heads", "mae_decoder_ffn"):
        value = getattr(args, name)
        if value < 1 or value % tp:
            found.append(
                f"--{name.replace('_', '-')} {value} does not divide by "
                f"--tensor-model-parallel-size {tp}; choose a multiple"
                + (" or add --moa-align 64" if name.endswith("ffn") else "")
            )
    widths = (("hidden_size", args.hidden_size), ("mae_decoder_width", args.mae_decoder_width))
    for name, width in widths:
        if width is not None and width % 4:
            found.append(
                f"--{name.replace('_', '-')} {width}: position embeddings need a multiple of 4"
            )
    if args.mae_decoder_heads > 0 and args.mae_decoder_width % args.mae_decoder_heads:
        found.append(
            f"--mae-decoder-heads {args.mae_decoder_heads} does not divide --mae-decoder-width "
            f"{args.mae_decoder_width}"
        )
    patches = args.seq_length - 1
    if not 0 < args.mae_mask_ratio < 1 or not visible_count(patches, args.mae_mask_ratio):
        found.append(
            f"--mae-mask-ratio {args.mae_mask_ratio} leaves no patch of {patches} visible, or "
            "hides none; 0.75 is usual"
        )
    return found


def _data_problems(args: argparse.Namespace) -> list[str]:
    found = []
    low, high = args.mae_crop_scale
    if not 0 < low <= high <= 1:
        found.append(f"--mae-crop-scale {low} {high}: must be 0 < LOW <= HIGH <= 1, as 0.2 1.0")
    if not 0 < args.mae_eval_crop <= 1:
        found.append(f"--mae-eval-crop {args.mae_eval_crop}: must be in (0, 1], such as 0.875")
    if not all(std > 0 for std in args.mae_pixel_std):
        found.append(f"--mae-pixel-std {args.mae_pixel_std}: must be positive, such as 0.5 0.5 0.5")
    if not 0 <= args.moa_max_bad_images <= 1:
        found.append(
            f"--moa-max-bad-images {args.moa_max_bad_images}: must be from 0 to 1, such as 0.01"
        )
    if args.epochs is not None and args.epochs <= 0:
        found.append(f"--epochs {args.epochs}: must be positive")
    return found
