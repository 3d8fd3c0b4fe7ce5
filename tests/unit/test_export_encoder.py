"""Encoders out of checkpoints: nothing lost, nothing guessed, and read back without Megatron."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moa_megatron.config import MoAConfig
from moa_megatron.vision.conversion import from_megatron
from moa_megatron.vision.export import load_encoder, read_run
from moa_megatron.vision.reference import MAE
from moa_megatron.vision.scaling import Scaling
from tests.helpers.mae_checkpoint import namespace, write_run
from tests.helpers.plain_mae import SHAPE, VARIANTS, megatron_state
from tools import export_encoder

ROOT = Path(__file__).parents[2]
QD = MoAConfig(variant="qd")


def run_of(
    folder: Path, moa: MoAConfig = QD, extra: dict[str, Tensor] | None = None, **others: object
) -> Path:
    state = {**megatron_state(SHAPE, moa, fused_norms=True), **(extra or {})}
    args = namespace(SHAPE, moa)
    vars(args).update(others)
    return write_run(folder, state, args)


@pytest.mark.parametrize("moa", VARIANTS, ids=lambda c: f"{c.mixing}-{c.variant}")
def test_round_trip(tmp_path: Path, moa: MoAConfig, capsys: pytest.CaptureFixture[str]) -> None:
    state = megatron_state(SHAPE, moa, fused_norms=True)
    run = write_run(tmp_path / "run", state, namespace(SHAPE, moa))
    assert export_encoder.main([str(run)]) == 0
    assert "encoder of step 7" in capsys.readouterr().out
    encoder, shape, scaling = load_encoder(run / "encoder.safetensors")
    assert scaling == Scaling((0.5, 0.4, 0.3), (0.25, 0.5, 0.75))
    assert shape == SHAPE and encoder.moa == moa and not encoder.training
    mae = MAE(SHAPE, moa)
    mae.load_state_dict(from_megatron(state, SHAPE))
    images = torch.randn(2, 3, *SHAPE.image)
    assert torch.equal(encoder.features(images), mae.encoder.features(images))
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "encoder.safetensors"]


def test_16_bit_checkpoints_become_float32(tmp_path: Path) -> None:
    state = {name: value.bfloat16() for name, value in megatron_state(SHAPE, QD).items()}
    model = read_run(write_run(tmp_path, state, namespace(SHAPE, QD))).model
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    expected = state["decoder.layers.1.mlp.linear_fc2.weight"].float()
    assert torch.equal(model.state_dict()["decoder.blocks.1.ffn.w_out.weight"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": {"encoder.layers.0.mlp.router.weight": torch.zeros(2)}}, "mlp.router.weight"),
        ({"extra": {"projector.weight": torch.zeros(2)}}, "projector.weight"),
        ({"moa": MoAConfig(), "moa_variant": "qd"}, "ffn.coefficients"),
        ({"moa": MoAConfig(mixing="la"), "moa_mixing": "fixed"}, "ffn.coefficients"),
        ({"num_layers": 3}, "blocks.2"),
        ({"normalization": "RMSNorm"}, "normalization=RMSNorm"),
        ({"moa": MoAConfig(mixing="fixed"), "swiglu": False}, "swiglu=False"),
        ({"moa_model": "hybrid"}, "hybrid model"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, **change)  # type: ignore[arg-type]
    assert export_encoder.main([str(run)]) == 78
    printed = capsys.readouterr().err
    assert printed.startswith("refused: ") and message in printed
    assert not (run / "encoder.safetensors").exists()


def test_steps_and_folders_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_encoder.main([str(tmp_path / "absent")]) == 78
    assert "no complete checkpoint" in capsys.readouterr().err
    run = run_of(tmp_path / "run")
    write_run(run, megatron_state(SHAPE, QD), namespace(SHAPE, QD), step=12)
    assert read_run(run).step == 12 and read_run(run / "checkpoints", 7).step == 7
    assert export_encoder.main([str(run), "--step", "8"]) == 78
    assert "has 7, 12" in capsys.readouterr().err
    assert export_encoder.main([str(run), "--out", str(run / "no" / "file")]) == 78
    assert "cannot be written" in capsys.readouterr().err
    assert export_encoder.main([str(run), "--steps", "7"]) == 78


def test_a_file_that_is_no_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no encoder exported"):
        load_encoder(tmp_path / "file")


def test_loading_needs_no_megatron(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert export_encoder.main([str(run)]) == 0
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from pathlib import Path; from moa_megatron.vision.export import load_encoder\n"
        f"print(load_encoder(Path({str(run / 'encoder.safetensors')!r}))[1].width)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(SHAPE.width), done.stderr


def test_shape_travels_whole(tmp_path: Path) -> None:
    odd = dataclasses.replace(SHAPE, bias=False, eps=1e-5)
    state = {
        name: value
        for name, value in megatron_state(odd, QD).items()
        if not (".layers." in name and name.endswith(".bias") and ".linear_" in name)
    }
    run = write_run(tmp_path, state, namespace(odd, QD))
    assert export_encoder.main([str(run)]) == 0
    assert load_encoder(run / "encoder.safetensors")[1] == odd
