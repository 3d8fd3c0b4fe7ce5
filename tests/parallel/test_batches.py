"""The product's own batches, loss and datasets, through Megatron's data loaders and schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.cases import GLOBAL_BATCH, ONE_RANK, SEQUENCE, Layout, Model
from tests.helpers.parity import BOUND, Bench
from tests.helpers.tensors import Tensors, assemble, relative_error, relative_errors

_CASES = "tests.helpers.real_batches:"
# Ranks hold unequal numbers of counted tokens, so nothing but the sum over all may divide.
_PER_TOKEN = ("calculate_per_token_loss", True)
HYBRID = Model(options=(_PER_TOKEN,))
GPT = Model(family="gpt", options=(_PER_TOKEN,))
MTP = Model(family="gpt", options=(_PER_TOKEN, ("mtp_num_layers", 1)))
# Embedding, four decoder layers, then prediction and loss on stages of their own.
MTP_ALONE = Model(
    family="gpt", options=(*MTP.options, ("pipeline_model_parallel_layout", "Ett|t|tm|L"))
)
Data = dict[str, Any]
Reference = Callable[[Model], tuple[Tensors, Tensors, dict[str, list[float]]]]


@pytest.fixture(scope="module")
def data(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Arguments that blend two small corpora three to one."""
    folder = tmp_path_factory.mktemp("corpora")
    bench.pool.run(_CASES + "write_corpora", folder=str(folder))
    blend = ["0.75", str(folder / "low"), "0.25", str(folder / "high")]
    return {"data_path": blend, "split": "80,20,0", "data_cache_path": str(folder / "index")}


def _pass(
    bench: Bench, model: Model, layout: Layout, **kwargs: Any
) -> tuple[Tensors, Tensors, dict[str, list[float]]]:
    """Initial weights, gradients, and [loss sum, token count] of training and validation."""
    case = _CASES + "train_and_evaluate"
    runs = bench.pool.run(case, layout.ranks, model=model, layout=layout, **kwargs)
    parts = []
    for kind in ("initial", "gradients"):
        whole, conflicts = assemble(shard for run in runs for shard in getattr(run, kind))
        assert not conflicts, f"replicas differ: {conflicts}"
        parts.append(whole)
    sums = {}
    for kind in ("train", "valid"):
        seen = {tuple(getattr(run, kind)) for run in runs} - {()}
        assert len(seen) == 1, f"ranks of the last stage disagree on {kind}: {seen}"
        sums[kind] = list(seen.pop())
    return parts[0], parts[1], sums


@pytest.fixture(scope="module")
def reference(bench: Bench, data: Data) -> Reference:
    return functools.cache(lambda model: _pass(bench, model, ONE_RANK, data=data))


_LAYOUTS = {
    "hybrid-tp2_sp": (HYBRID, HYBRID, Layout(tp=2, sp=True)),
    "hybrid-cp2": (HYBRID, HYBRID, Layout(cp=2)),
    "hybrid-pp2": (HYBRID, HYBRID, Layout(pp=2)),
    "hybrid-vpp2": (HYBRID, HYBRID, Layout(pp=2, vpp=2)),
    "hybrid-dp2": (HYBRID, HYBRID, Layout(data=2)),
    "gpt-tp2_cp2": (GPT, GPT, Layout(tp=2, cp=2)),
    "gpt-tp2_sp_pp2": (GPT, GPT, Layout(tp=2, sp=True, pp=2)),
    "mtp-tp2_sp_pp2": (MTP, MTP, Layout(tp=2, sp=True, pp=2)),
    "mtp-cp2_pp2": (MTP, MTP, Layout(cp=2, pp=2)),
    "mtp-alone_pp4": (MTP_ALONE, MTP, Layout(pp=4)),
}


@pytest.mark.parametrize(("model", "like", "layout"), _LAYOUTS.values(), ids=_LAYOUTS)
def test_equals_one_rank(
    bench: Bench, data: Data, reference: Reference, model: Model, like: Model, layout: Layout
) -> None:
    initial, expected_gradients, expected = reference(like)
    _, gradients, sums = _pass(bench, model, layout, data=data, initial=initial)
    for kind in ("train", "valid"):
        assert 0 < expected[kind][1] < GLOBAL_BATCH * SEQUENCE, "no token is masked"
        assert sums[kind][1] == expected[kind][1]
        assert relative_error(*map(np.float64, (sums[kind][0], expected[kind][0]))) <= BOUND
    if layout.cp > 1 and model is MTP:
        return  # Megatron weighs the loss of MTP by the tokens of each context-parallel rank.
    errors = relative_errors(gradients, expected_gradients)
    wrong = {key: error for key, error in errors.items() if not error <= BOUND}
    assert not wrong, f"gradients differ: {wrong}"


ALL, NONE = (True, True, False), (False, False, False)


@pytest.mark.parametrize(
    ("model", "layout", "expected"),
    [
        pytest.param(HYBRID, Layout(tp=2), [[ALL], [NONE]], id="tp2"),
        pytest.param(HYBRID, Layout(tp=2, data=2), [[ALL], [NONE]] * 2, id="tp2_dp2"),
        pytest.param(HYBRID, Layout(cp=2), [[ALL], [ALL]], id="cp2"),
        pytest.param(HYBRID, Layout(pp=4), [[ALL], [NONE], [NONE], [ALL]], id="pp4"),
        pytest.param(HYBRID, Layout(pp=2, vpp=2), [[ALL, NONE], [NONE, ALL]], id="vpp2"),
        pytest.param(MTP, Layout(tp=2, pp=2), [[ALL], [NONE]] * 2, id="mtp_tp2_pp2"),
        pytest.param(MTP_ALONE, Layout(pp=4), [[ALL], [NONE], [ALL], [ALL]], id="mtp_alone"),
    ],
)
def test_reads_only_where_needed(
    bench: Bench, data: Data, model: Model, layout: Layout, expected: list[Any]
) -> None:
    case = _CASES + "readers"
    assert bench.pool.run(case, layout.ranks, model=model, layout=layout, data=data) == expected


def test_blend(bench: Bench, data: Data) -> None:
    (found,) = bench.pool.run(_CASES + "contents", data=data, sizes=[16, 4, 4])
    assert found == {"train": (12, 4), "valid": (3, 1), "test": None}


def test_paths_per_split(bench: Bench, data: Data) -> None:
    _, low, _, high = data["data_path"]
    paths = {"data_path": None, "train_data_path": [low], "valid_data_path": [high], "split": None}
    (found,) = bench.pool.run(_CASES + "contents", data={**data, **paths}, sizes=[16, 4, 4])
    assert found["test"] is None
    train, valid = found["train"], found["valid"]
    assert train[0] >= 16 and train[1] == 0
    assert valid[0] == 0 and valid[1] >= 4


def test_mock_data(bench: Bench, tmp_path: Path) -> None:
    mock = {"mock_data": True, "split": None, "data_cache_path": str(tmp_path)}
    (found,) = bench.pool.run(_CASES + "readers", model=HYBRID, layout=ONE_RANK, data=mock)
    assert found == [(True, True, True)]


def test_masked_tokens_do_not_count(bench: Bench) -> None:
    mask = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    output = [[0.5, 100.0, 2.0], [100.0, 100.0, 4.0]]
    (found,) = bench.pool.run(_CASES + "loss", mask=mask, output=output)
    assert found == [[6.5], [3.0], [6.5, 3.0]]


@pytest.mark.parametrize(
    ("model", "tied", "stages"),
    [
        pytest.param(HYBRID, False, [0], id="untied"),
        pytest.param(HYBRID, True, [0, 3], id="tied"),
        pytest.param(MTP, False, [0, 3], id="mtp"),
        pytest.param(MTP_ALONE, False, [0, 2], id="mtp_alone"),
        pytest.param(MTP_ALONE, True, [0, 2, 3], id="mtp_alone_tied"),
    ],
)
def test_embedding_ranks(bench: Bench, model: Model, tied: bool, stages: list[int]) -> None:
    """An untied output layer is no copy: to add it to the embedding would spoil both."""
    pp_ranks = [5, 6, 7, 8]
    (found,) = bench.pool.run(
        _CASES + "embedding_ranks", model=model, layout=Layout(pp=4), pp_ranks=pp_ranks, tied=tied
    )
    assert found == [pp_ranks[stage] for stage in stages]
