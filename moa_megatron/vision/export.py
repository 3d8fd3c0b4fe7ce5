"""Pretrained weights out of a run's checkpoint, and encoders as safetensors files.

Nothing here needs a process group or the machine the run was trained on: checkpoints of any layout
are read as whole tensors by torch's own reader.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moa_megatron import runstate
from moa_megatron.config import MoAConfig, moa_config_from_args
from moa_megatron.recipes import RefusedError
from moa_megatron.vision.conversion import from_megatron
from moa_megatron.vision.reference import MAE, Encoder, MAEShape

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_STACKED = re.compile(r"(encoder|decoder)\.layers\.(?!\d)")


@dataclass(frozen=True)
class Pretrained:
    """A model as a run has saved it; ``args`` are Megatron's of that run."""

    model: MAE
    args: argparse.Namespace
    step: int


def read_run(run: Path, step: int | None = None) -> Pretrained:
    """The masked autoencoder of a run, in float32.

    Args:
        run: its folder, or the folder of its checkpoints.
        step: which checkpoint; None: the newest complete one.

    Raises:
        RefusedError: no such checkpoint, none of a masked autoencoder, or tensors in it that the
            plain model has no place for.
    """
    folder = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    step = _choose(folder, step)
    checkpoint = folder / f"iter_{step:07d}"
    args = _read_args(checkpoint)
    try:
        shape, moa = shape_from_args(args), moa_config_from_args(args)
        state = from_megatron(_unstacked(read_tensors(checkpoint)), shape)
        model = MAE(shape, moa)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except (ValueError, RuntimeError) as error:  # RuntimeError: missing names, other shapes
        raise RefusedError(f"{checkpoint} cannot be read as a plain model: {error}") from error
    return Pretrained(model.eval(), args, step)


def shape_from_args(args: argparse.Namespace) -> MAEShape:
    """Sizes in Megatron's namespace.

    Raises:
        ValueError: for settings that the plain model does not have, all of them.
    """
    gated = args.moa_mixing != "fixed" or args.swiglu
    expected = {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": False}
    problems = [
        f"{name}={getattr(args, name)}: the plain model has {value} only"
        for name, value in expected.items()
        if getattr(args, name, value) != value
    ]
    if not gated:
        problems.append("swiglu=False: of fixed feedforward layers the plain model has SwiGLU only")
    if problems:
        raise ValueError("; ".join(problems))
    return MAEShape(
        image=(args.img_h, args.img_w),
        patch=args.patch_dim,
        channels=args.num_channels,
        width=args.hidden_size,
        layers=args.num_layers,
        heads=args.num_attention_heads,
        ffn=args.ffn_hidden_size,
        decoder_width=args.mae_decoder_width,
        decoder_layers=args.mae_decoder_layers,
        decoder_heads=args.mae_decoder_heads,
        decoder_ffn=args.mae_decoder_ffn,
        eps=args.layernorm_epsilon,
        bias=args.add_bias_linear,
        pixel_mean=args.mae_pixel_mean,
        pixel_std=args.mae_pixel_std,
    )


def export_encoder(pretrained: Pretrained, path: Path) -> None:
    """Writes the encoder, atomically; its metadata tells shape, MoA settings and step.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    encoder = pretrained.model.encoder
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    metadata = {
        "format": "pt",
        "shape": json.dumps(dataclasses.asdict(encoder.shape)),
        "moa": encoder.moa.encoded,
        "step": str(pretrained.step),
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(save(tensors, metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_encoder(path: Path) -> tuple[Encoder, MAEShape]:
    """The encoder of ``export_encoder``, ready for ``features``, and its shape.

    Raises:
        ValueError: a file that is no such export.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shape = MAEShape(**json.loads(metadata["shape"]))
        encoder = Encoder(shape, MoAConfig.decode(metadata["moa"]))
        encoder.load_state_dict(state, assign=True)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no encoder exported by export_encoder: {error}") from error
    return encoder.eval(), shape


def _choose(folder: Path, step: int | None) -> int:
    try:
        newest = runstate.checkpoint_step(folder)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if newest is None:
        raise RefusedError(
            f"{folder} holds no complete checkpoint: train a masked autoencoder first"
        )
    known = sorted({*runstate.complete_steps(folder), newest})
    if step is not None and step not in known:
        raise RefusedError(f"--step {step}: {folder} has {', '.join(map(str, known))}")
    return newest if step is None else step


def _read_args(checkpoint: Path) -> argparse.Namespace:
    """Megatron's arguments of the run that wrote the checkpoint."""
    with _quiet():
        from megatron.core.dist_checkpointing import load_common_state_dict
        from megatron.core.dist_checkpointing.core import CheckpointingException

    try:
        with _quiet():
            args = load_common_state_dict(str(checkpoint))["args"]
    except (CheckpointingException, KeyError) as error:
        raise RefusedError(
            f"{checkpoint} is no distributed checkpoint of a run: {error}"
        ) from error
    if getattr(args, "moa_model", None) != "mae":
        raise RefusedError(
            f"{checkpoint} holds a {getattr(args, 'moa_model', 'plain Megatron')} model, no masked "
            "autoencoder"
        )
    return args  # type: ignore[no-any-return]


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The model's tensors, whole, whatever the layout they were saved from."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(checkpoint))
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not _OPTIMIZER.match(name)
    }
    with _quiet():
        load(state, storage_reader=reader, no_dist=True)
    return state


def _unstacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers apart: Megatron saves equal layers of a block as one tensor with a leading axis."""
    apart = {}
    for name, tensor in state.items():
        match = _STACKED.match(name)
        if match is None:
            apart[name] = tensor
            continue
        for index, layer in enumerate(tensor):
            apart[f"{match[0]}{index}.{name[match.end() :]}"] = layer
    return apart


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without remarks on what reading a file does not need: a process group, fused optimisers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", module=r"megatron\.core")
        yield
