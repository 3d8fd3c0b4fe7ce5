"""Statistics of layers are the same at every layout, however often a rank computes its tokens.

What one rank writes is held against plain PyTorch in tests/unit/test_layer_statistics.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest

from tests.helpers.cases import GLOBAL_BATCH, ONE_RANK, SEQUENCE, Layout, Model, moa
from tests.helpers.parity import BOUND, Bench
from tests.helpers.pool import CaseFailed
from tests.helpers.tensors import Tensors, assemble

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE_ACT = {"recompute_granularity": "selective", "recompute_modules": ("moe_act",)}

DENSE = Model()
DENSE_GPT = Model(family="gpt", moa=moa(variant="qd", gate="softmax"))
LAYER = Model(moe=True)
EXPERT = Model(moe=True, moa=moa(gate_scope="expert"))
EXPERT_LA = Model(moe=True, moa=moa(gate_scope="expert", mixing="la"))
MTP = Model(family="gpt", options=(("mtp_num_layers", 1),))

TP2_SP = Layout(tp=2, sp=True)
EP2 = Layout(ep=2, data=2)
PP2_VPP2 = Layout(pp=2, vpp=2)


def options(model: Model, **changes: Any) -> Model:
    return dataclasses.replace(model, options=(*model.options, *changes.items()))


@dataclass
class Found:
    """What the writing ranks got, and how many times a gate was counted, by row, over all ranks."""

    scalars: list[dict[str, float]]
    tokens: list[float]


@contextmanager
def _wrong(mutation: str | None) -> Iterator[None]:
    from moa_megatron import layer_statistics, observing

    with ExitStack() as stack:
        if mutation == "recomputation counts":  # as if recording were on for the whole step
            stack.enter_context(observing.recording())
            keep = mock.patch.object(layer_statistics.LayerStatistics, "watching", _keep_recording)
            stack.enter_context(keep)
        if mutation == "ranks are not summed":
            stack.enter_context(mock.patch.object(layer_statistics.dist, "all_reduce"))
        if mutation == "maxima are summed":
            op = layer_statistics.dist.ReduceOp.SUM
            stack.enter_context(mock.patch.object(layer_statistics.dist.ReduceOp, "MAX", op))
        yield


@contextmanager
def _keep_recording(statistics: Any, step: int) -> Iterator[None]:
    statistics.step = step
    yield


def case(model: Model, layout: Layout, initial: Tensors | None, mutation: str | None) -> Any:
    """One step on one rank, its forward watched as ``batches.forward_step`` does it."""
    from moa_megatron.layer_statistics import LayerStatistics, finishing
    from tests.helpers import models, training

    found = Found([], [])

    class Kept(LayerStatistics):
        def _scalars(self, sums: list[list[float]], peaks: list[list[float]]) -> dict[str, float]:
            found.tokens += [row[-3] for row in sums]
            return super()._scalars(sums, peaks)

    with models.model_parallel(layout):
        chunks = models.build(model, layout)
        if initial is not None:
            training.load(chunks, initial)
        else:
            training._vary_scalars(chunks)
        weights = training.shards(chunks)
        statistics = Kept(model.moa, 1, lambda scalars, step: found.scalars.append(scalars))
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finishing(statistics)
        forward = training._forward_step

        def watched(data: Any, chunk: Any) -> Any:
            with statistics.watching(1):
                return forward(data, chunk)

        with mock.patch.object(training, "_forward_step", watched), _wrong(mutation):
            training.forward_backward(chunks, layout, 0)
        training._release(chunks)
        return found, weights


def run(bench: Bench, model: Model, layout: Layout, **kwargs: Any) -> tuple[list[Found], Any]:
    wanted = {"initial": None, "mutation": None, **kwargs}
    name = f"{__name__}:case"
    ranks = bench.pool.run(name, layout.ranks, model=model, layout=layout, **wanted)
    return [found for found, _ in ranks], [shard for _, shards in ranks for shard in shards]


def check(bench: Bench, model: Model, layout: Layout, mutation: str | None = None) -> None:
    """Against one rank without recomputation, from the same weights."""
    drop = {name for name, _ in (*FULL.items(), *MOE_ACT.items())}
    plain = tuple(pair for pair in model.options if pair[0] not in drop)
    reference = dataclasses.replace(model, options=plain)
    (expected,), shards = run(bench, reference, ONE_RANK)
    initial, _ = assemble(iter(shards))
    found, _ = run(bench, model, layout, initial=initial, mutation=mutation)
    (scalars,) = expected.scalars
    for rank in found:  # all get the same, and one of them writes
        (own,) = rank.scalars
        assert own.keys() == scalars.keys()
        for tag, value in scalars.items():
            assert own[tag] == pytest.approx(value, rel=BOUND, abs=BOUND), tag
        # Tensor parallel ranks that hold the same tokens count them alike.
        copies = {a / b for a, b in zip(rank.tokens, expected.tokens, strict=True) if b}
        assert copies <= {1.0, float(layout.tp)}, copies


CASES: dict[str, tuple[Model, Layout]] = {
    "dense-full_recompute": (options(DENSE, **FULL), ONE_RANK),
    "dense-tp2_sp": (DENSE, TP2_SP),
    "dense-tp2_sp-full_recompute": (options(DENSE, **FULL), TP2_SP),
    "dense-pp2_data2": (DENSE, Layout(pp=2, data=2)),
    "dense-softmax-gpt-pp2_vpp2": (DENSE_GPT, PP2_VPP2),
    "dense-hybrid-pp2_vpp2": (DENSE, PP2_VPP2),
    "dense-cp2": (DENSE, Layout(cp=2)),
    "mtp-pp2": (MTP, Layout(pp=2)),
    "layer-ep2": (LAYER, EP2),
    "layer-tp2_sp_etp1-full_recompute": (options(LAYER, **FULL), Layout(tp=2, sp=True, etp=1)),
    "expert-ep2-full_recompute": (options(EXPERT, **FULL), EP2),
    "expert-grouped-tp2_sp_etp2-moe_act": (
        options(EXPERT, moe_grouped_gemm=True, **MOE_ACT),
        Layout(tp=2, sp=True, etp=2),
    ),
    "expert-la-grouped-ep2": (options(EXPERT_LA, moe_grouped_gemm=True), EP2),
}


@pytest.mark.parametrize(("model", "layout"), CASES.values(), ids=CASES)
def test_equal_those_of_one_rank(bench: Bench, model: Model, layout: Layout) -> None:
    check(bench, model, layout)


WRONG: dict[str, tuple[Model, Layout]] = {
    "recomputation counts": (options(DENSE, **FULL), ONE_RANK),
    "ranks are not summed": (DENSE, Layout(pp=2)),
    "maxima are summed": (DENSE, Layout(data=2)),
}


@pytest.mark.parametrize("mutation", WRONG)
def test_mistakes_are_detected(bench: Bench, mutation: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check(bench, *WRONG[mutation], mutation=mutation)
    assert not isinstance(caught.value, CaseFailed), "it must train, and log something else"
    print(caught.value)


def test_tags_name_layers_as_recipes_count_them(bench: Bench) -> None:
    """HybridModel numbers attention and FFNs together: its FFNs are layers 2 and 4."""
    for model, layers in ((DENSE, ("01", "02")), (MTP, ("01", "02", "03", "04"))):
        (found,), _ = run(bench, model, ONE_RANK)
        expected = {f"layer_{number}" for number in layers} | (
            {"mtp_01"} if model is MTP else set()
        )
        (scalars,) = found.scalars
        assert {tag.split("/")[1] for tag in scalars if tag.count("/") > 1} == expected
        assert set(found.tokens) == {float(GLOBAL_BATCH * SEQUENCE)}
    (found,), _ = run(bench, LAYER, ONE_RANK)
    kinds = {tag.split("/", 2)[2] for tag in found.scalars[0] if tag.startswith("moa/layer_01/")}
    parts = {
        f"{part}/{what}_amax" for part in ("shared", "routed") for what in ("hidden", "preact")
    }
    assert parts <= kinds and {"gate_saturated", "gate_mean/y_silu", "gate_weight_norm"} <= kinds
    assert len(found.scalars[0]) == 2 * (14 + 2 + 4) + 3
