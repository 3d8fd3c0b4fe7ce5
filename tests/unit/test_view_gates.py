"""The picture and the table of gates, from events as a run writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from moa_megatron.config import MoAConfig
from moa_megatron.telemetry import coefficient_tag
from tools import view_gates


def make_run(folder: Path, scalars: dict[str, list[float]]) -> Path:
    writer = SummaryWriter(str(folder / "tensorboard"))
    for tag, values in scalars.items():
        for step, value in enumerate(values, start=1):
            writer.add_scalar(tag, value, 10 * step)
    writer.close()
    return folder


def test_table_ranks_weights_and_keeps_experts_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scalars = {
        "moa/layer_02/gate_mean/y_silu": [0.5, 0.75],
        "moa/layer_02/gate_mean/y_id": [0.5, 0.25],
        "moa/layer_02/gate_mean/z_id": [0.5, 0.5],
        "moa/layer_02/gate_saturated": [0.0, 0.125],
        "moa/layer_02/routed/hidden_amax": [300.0, 20.0],
        "moa/layer_02/routed/preact_amax": [3.0, 2.0],
        "moa/layer_10/gate_mean/y_silu": [0.5, 0.5],
        "moa/mtp_01/hidden_amax": [float("inf"), 1.0],
        "moa/hidden_amax": [300.0, 20.0],
        "lm loss": [8.0, 7.0],
    }
    run = make_run(tmp_path / "run", scalars)
    assert view_gates.main([str(run)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:6]]
    assert rows[0][:4] == [
        "layer_02",
        "y_silu 0.750, z_id 0.500",
        "z_id 0.500, y_id 0.250",
        "12.5%",
    ]
    assert rows[1] == ["layer_02/routed", "", "", "", "", "2", "20", "300"]
    assert [row[0] for row in rows[2:]] == ["layer_10", "mtp_01"]
    assert (run / "gates.png").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["gate_mean", "coefficient"])
@pytest.mark.parametrize("variant", ["type1", "one", "bi", "qd"])
def test_every_variant_is_drawn(tmp_path: Path, variant: str, kind: str) -> None:
    names = MoAConfig(variant=variant).coefficient_names()  # type: ignore[arg-type]
    tags = [f"moa/layer_01/{coefficient_tag(kind, name)}" for name in names]
    assert len(set(tags)) == len(names) and not any(set(":*") & set(tag) for tag in tags)
    run = make_run(tmp_path / "run", dict.fromkeys(tags, [0.5, 0.6]))
    picture = tmp_path / "picture.png"
    # The folder of TensorBoard serves as well.
    assert view_gates.main([str(run / "tensorboard"), "--out", str(picture)]) == 0
    assert picture.stat().st_size > 10_000


def test_a_run_without_statistics_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", {"lm loss": [8.0]})
    assert view_gates.main([str(run)]) == 78
    assert "--moa-log-interval" in capsys.readouterr().err
    assert view_gates.main([str(tmp_path / "absent")]) == 78
    run = make_run(tmp_path / "good", {"moa/layer_01/hidden_amax": [8.0]})
    capsys.readouterr()
    assert view_gates.main([str(run), "--out", str(tmp_path / "no" / "gates.png")]) == 78
    assert "cannot be written" in capsys.readouterr().err
