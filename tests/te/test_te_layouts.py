"""MoA on Transformer Engine's modules trains at every layout as on local modules on one rank.

Losses, every gradient and the weights after two steps, from the same weights; around emulated
kernels (tests/fake_gpu), which multiply float32 as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers import te
from tests.helpers.cases import ONE_RANK, Layout, Model, moa
from tests.helpers.parity import BOUND, Bench, Parity, compare
from tests.helpers.pool import Pool

SETUP = "tests.helpers.pool:megatron_on_host"
SP = Layout(tp=2, sp=True)
EP2 = Layout(ep=2, data=2)
ETP2 = Layout(tp=2, sp=True, etp=2)
EP2_ETP1 = Layout(tp=2, sp=True, ep=2, etp=1)
ALL = Layout(tp=2, sp=True, pp=2)
SHARDED = Layout(pp=2, ep=2, data=2, sharded_optimizer=True)
DENSE, LAYER = Model(), Model(moe=True, moa=moa(variant="qd"))
EXPERT = Model(moe=True, moa=moa(gate_scope="expert"))
MUON = dataclasses.replace(LAYER, optimizer="muon")  # what moe-2b is
CASES = {
    "hybrid-dense-1": (DENSE, ONE_RANK),
    "hybrid-dense-tp2_sp_pp2": (DENSE, ALL),
    "hybrid-dense-pp2_vpp2": (DENSE, Layout(pp=2, vpp=2)),
    "hybrid-dense-muon-sp": (Model(optimizer="muon"), SP),
    "hybrid-dense-la-sp": (Model(moa=moa(mixing="la")), SP),
    "gpt-dense-sp": (Model(family="gpt", moa=moa(variant="one")), SP),
    "gpt-dense-mtp": (Model(family="gpt", options=(("mtp_num_layers", 1),)), SP),
    "hybrid-layer-1": (LAYER, ONE_RANK),
    "hybrid-layer-ep2_etp1": (LAYER, EP2_ETP1),
    "gpt-layer-ep2": (Model(family="gpt", moe=True), EP2),
    "hybrid-expert-ep2_etp1": (EXPERT, EP2_ETP1),
    "hybrid-layer-muon-ep2": (MUON, EP2),
    "hybrid-layer-muon-ep2_etp1": (MUON, EP2_ETP1),
    "hybrid-expert-pp2_ep2_sharded": (dataclasses.replace(EXPERT, optimizer="adam"), SHARDED),
}


@pytest.fixture(scope="module")
def local() -> Iterator[Bench]:
    pool = Pool(1, SETUP)
    yield Bench(pool)
    pool.stop()


@pytest.fixture(scope="module")
def engine() -> Iterator[Bench]:
    pool = Pool(4, SETUP, te.fake_gpu())
    yield Bench(pool)
    pool.stop()


def on_engine(model: Model, **options: Any) -> Model:
    """The same model on Transformer Engine's modules."""
    return dataclasses.replace(model, engine=True, options=(*model.options, *options.items()))


def parity(
    local: Bench,
    engine: Bench,
    model: Model,
    layout: Layout,
    *,
    grouped: bool,
    mutation: str | None = None,
    **options: Any,
) -> Parity:
    reference = local.reference(model)
    options |= {"moe_grouped_gemm": True} if grouped else {}
    words = {"initial": reference.initial, "mutation": mutation}
    run = engine.train(on_engine(model, **options), layout, **words)
    found = compare(run, reference)
    print(found.summary())
    return found


@pytest.mark.parametrize("name", CASES)
def test_trains_as_local_modules_do(local: Bench, engine: Bench, name: str) -> None:
    model, layout = CASES[name]
    parity(local, engine, model, layout, grouped=model.moe).check()


def test_sequential_experts(local: Bench, engine: Bench) -> None:
    parity(local, engine, LAYER, EP2_ETP1, grouped=False).check()


def test_latent_experts(engine: Bench) -> None:
    """Upstream has their projections on Transformer Engine alone."""
    model = on_engine(EXPERT, moe_grouped_gemm=True, moe_latent_size=8)
    engine.parity(model, EP2).check()


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OPTIONS: dict[str, tuple[Model, Layout, dict[str, Any]]] = {
    "fused residual and norm": (DENSE, SP, {"fused_residual_rmsnorm": True}),
    "full recomputation": (EXPERT, EP2_ETP1, FULL),
    **{
        f"recomputation of {module}": (
            *((DENSE, SP) if module in ("mlp", "layernorm") else (EXPERT, EP2_ETP1)),
            {"recompute_granularity": "selective", "recompute_modules": (module,)},
        )
        for module in ("mlp", "layernorm", "moe", "moe_act", "shared_experts")
    },
    "overlapped shared experts": (LAYER, EP2_ETP1, {"moe_shared_expert_overlap": True}),
    "overlapped shared experts of their own": (EXPERT, SP, {"moe_shared_expert_overlap": True}),
    "fused accumulation, dense": (DENSE, ALL, {"gradient_accumulation_fusion": True}),
    "fused accumulation, experts": (EXPERT, EP2_ETP1, {"gradient_accumulation_fusion": True}),
}


RECOMPUTES_GATES = {
    "full recomputation",
    *(f"recomputation of {module}" for module in ("mlp", "moe", "shared_experts")),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_change_nothing(local: Bench, engine: Bench, name: str) -> None:
    model, layout, options = OPTIONS[name]
    found = parity(local, engine, model, layout, grouped=model.moe, **options)
    found.check()
    if "recomputation" in name:
        plain = parity(local, engine, model, layout, grouped=model.moe)
        assert (found.gate_calls > plain.gate_calls) == (name in RECOMPUTES_GATES)


MTP = dataclasses.replace(LAYER, options=(("mtp_num_layers", 1),))
OVERLAP = {"overlap_moe_expert_parallel_comm": True}
OVERLAPPED = {
    "layer": (LAYER, EP2, {}),
    "expert": (EXPERT, EP2, {}),
    "weight gradients apart": (EXPERT, EP2, {"delay_wgrad_compute": True}),
    "interleaved stages": (LAYER, Layout(pp=2, vpp=2, ep=2, data=2), {}),
    "recomputation of moe_act": (
        EXPERT,
        EP2,
        {"recompute_granularity": "selective", "recompute_modules": ("layernorm", "moe_act")},
    ),
    "multi-token prediction": (MTP, EP2, {}),
}


@pytest.mark.parametrize("name", OVERLAPPED)
def test_overlap_of_expert_communication(local: Bench, engine: Bench, name: str) -> None:
    """Upstream's schedule runs layers of two microbatches in turn."""
    model, layout, options = OVERLAPPED[name]
    model = dataclasses.replace(model, family="gpt")
    parity(local, engine, model, layout, grouped=True, **OVERLAP, **options).check()


@pytest.mark.parametrize(
    ("model", "layout", "mutation"),
    [(DENSE, SP, "dense_no_sequence_sum"), (EXPERT, ETP2, "grouped_no_copy")],
)
def test_wrong_reductions_are_seen(
    local: Bench, engine: Bench, model: Model, layout: Layout, mutation: str
) -> None:
    found = parity(local, engine, model, layout, grouped=model.moe, mutation=mutation)
    assert max(found.of_gates().values()) > 1000 * BOUND


def test_overlapped_shared_experts_read_their_gates(local: Bench, engine: Bench) -> None:
    mutation = {"mutation": "shared_stages_without_gate", "moe_shared_expert_overlap": True}
    found = parity(local, engine, EXPERT, SP, grouped=True, **mutation)  # type: ignore[arg-type]
    assert max(found.of_gates().values()) > 1000 * BOUND


def test_the_modules_are_those_of_transformer_engine(engine: Bench) -> None:
    case = "tests.te.test_te_layouts:kinds"
    (found,) = engine.pool.run(case, model=on_engine(DENSE))
    assert {"TEColumnParallelLinear", "TERowParallelLinear", "RMSNorm", "MoAMLP"} <= found
    (found,) = engine.pool.run(case, model=on_engine(EXPERT, moe_grouped_gemm=True))
    assert {"TEColumnParallelGroupedLinear", "MoATEGroupedMLP"} <= found


def kinds(model: Model) -> set[str]:
    """Names of the classes of a model's modules; runs in a process of the pool."""
    from tests.helpers import models

    with models.model_parallel(ONE_RANK):
        chunks = models.build(model, ONE_RANK)
    return {type(module).__name__ for chunk in chunks for module in chunk.modules()}
