"""Checkpoints between Transformer Engine's modules, local ones and fused baselines."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import isolated, te, tiny
from tests.helpers.families import FAMILIES, FIXED, assert_same, by_saved_name, model, perturb

HOST_FOLDER = "MOA_TE_TEST_HOST_CHECKPOINTS"
FROM_BASELINE: list[tuple[str, dict[str, Any]]] = [
    ("gpt", {}),
    ("hybrid", {}),
    *(
        (family, {"moe_grouped_gemm": on})
        for family in ("gpt moe", "hybrid moe")
        for on in (False, True)
    ),
]


def check_checkpoints_move_between_local_and_engine() -> None:
    tiny.start()
    for family in FAMILIES:
        for to_engine in (True, False):
            with tempfile.TemporaryDirectory() as folder:
                source = perturb(model(family, engine=not to_engine))
                tiny.save(source, Path(folder, "checkpoint"))
                target = model(family, engine=to_engine)
                tiny.load(target, Path(folder, "checkpoint"))
            assert_same(by_saved_name(target), by_saved_name(source))


def check_fused_baseline_loads_into_moa() -> None:
    """All but the gates, whose entries a baseline lacks."""
    tiny.start()
    from megatron.core import dist_checkpointing

    for family, settings in FROM_BASELINE:
        baseline = perturb(model(family, engine=True, moa=FIXED, **settings))
        ours = model(family, engine=True, **settings)
        with tempfile.TemporaryDirectory() as folder:
            tiny.save(baseline, Path(folder, "checkpoint"))
            wanted = {k: v for k, v in tiny.sharded(ours).items() if "moa_gate" not in k}
            state = dist_checkpointing.load(wanted, str(Path(folder, "checkpoint")))
        missing, unexpected = ours.load_state_dict(state, strict=False)
        assert missing and all(name.endswith("moa_gate.weight") for name in missing), family
        assert not unexpected, family
        new = {k: v for k, v in by_saved_name(ours).items() if "moa_gate" not in k}
        assert_same(new, by_saved_name(baseline))


def check_checkpoint_of_a_host_loads() -> None:
    """Written by another process, in host mode, where Transformer Engine cannot be imported."""
    tiny.start()
    import torch

    for family in FAMILIES:
        folder = Path(os.environ[HOST_FOLDER], family.replace(" ", "_"))
        built = model(family, engine=True)
        tiny.load(built, folder / "checkpoint")
        assert_same(by_saved_name(built), torch.load(folder / "weights.pt"))


def save_on_host() -> None:
    from moa_megatron import host, patches

    host.install()
    tiny.start()
    patches.apply()
    import torch

    for family in FAMILIES:
        folder = Path(os.environ[HOST_FOLDER], family.replace(" ", "_"))
        built = perturb(model(family, engine=False))
        tiny.save(built, folder / "checkpoint")
        torch.save(by_saved_name(built), folder / "weights.pt")


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    variables = te.needed()
    folder = {HOST_FOLDER: str(tmp_path_factory.mktemp("host"))}
    saved = isolated.outcomes(__file__, ["save_on_host"], variables=folder)
    assert not saved["save_on_host"], saved["save_on_host"]
    return isolated.outcomes(__file__, CHECKS, variables={**variables, **folder})


@pytest.mark.parametrize("name", CHECKS)
def test_checkpoints(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
