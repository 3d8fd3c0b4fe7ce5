"""Each upstream patch repairs a defect that is there without it, and knows its Megatron."""

import dataclasses
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests.helpers import isolated
from tests.unit import test_apex

ROOT = Path(__file__).parents[2]


@contextmanager
def patched(name: str) -> Iterator[None]:
    from moa_megatron import patches

    assert patches.apply([name]) == [name]
    try:
        yield
    finally:
        assert patches.undo([name]) == [name]


def fails(expected: type[BaseException], action: Callable[[], Any]) -> None:
    with pytest.raises(expected):
        action()


def check_pins_hold() -> None:
    from moa_megatron.patches import PATCHES, _registry

    moved = [
        f"{patch.name}: {symbol}"
        for patch in PATCHES.values()
        for symbol, pinned in patch.pins.items()
        if _registry.source_hash(symbol) != pinned
    ]
    assert not moved, f"upstream changed; read it, then repin or drop: {moved}"


def check_apply_is_idempotent_and_undone() -> None:
    from moa_megatron import patches
    from moa_megatron.patches import _registry

    symbols = [symbol for patch in patches.PATCHES.values() for symbol in patch.replace]
    before = [getattr(*_registry.locate(symbol)) for symbol in symbols]
    assert patches.apply() == list(patches.PATCHES), "all apply on a host"
    once = [getattr(*_registry.locate(symbol)) for symbol in symbols]
    assert patches.apply() == list(patches.PATCHES)
    assert [getattr(*_registry.locate(symbol)) for symbol in symbols] == once
    check_pins_hold()
    patches.undo()
    assert [getattr(*_registry.locate(symbol)) for symbol in symbols] == before
    with pytest.raises(ValueError, match="choose among compile_helpers"):
        patches.apply(["compile_helper"])


def check_unknown_upstream_is_left_alone() -> None:
    from moa_megatron.patches import PATCHES, _registry

    patch = PATCHES["compile_helpers"]
    changed = dataclasses.replace(patch, name="changed", pins=dict.fromkeys(patch.pins, "0"))
    newer = dataclasses.replace(patch, name="newer", versions=">=99")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    _registry.logger.addHandler(handler)
    for unknown in (changed, newer, changed):
        assert not _registry.put(unknown)
    _registry.logger.removeHandler(handler)
    messages = [record.getMessage() for record in records if record.levelno == logging.WARNING]
    assert len(messages) == 2, "one warning for each patch"
    assert "changed not applied: the source of megatron.core.datasets" in messages[0]
    assert "newer not applied: megatron-core" in messages[1]


def check_compile_helpers() -> None:
    from megatron.core.datasets import utils

    fails((SystemExit, FileNotFoundError), lambda: utils.compile_helpers())
    with patched("compile_helpers"):
        utils.compile_helpers()


def _layernorm_recompute_gradient(recompute: bool) -> torch.Tensor:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    x = torch.linspace(-1, 2, 12).view(3, 4).requires_grad_()
    weight = torch.linspace(0, 1, 8).view(2, 4)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x * x, (4,))

    if recompute:
        checkpoint = CheckpointWithoutOutput()
        normed = checkpoint.checkpoint(norm, x)
        out = torch.nn.functional.linear(normed, weight.requires_grad_())
        checkpoint.discard_output_and_register_recompute(out)
        assert normed.untyped_storage().nbytes() == 0
    else:
        out = torch.nn.functional.linear(norm(x), weight.requires_grad_())
    out.square().sum().backward()
    return torch.cat([x.grad.flatten(), weight.grad.flatten()])


def check_checkpoint_without_output() -> None:
    fails(NameError, lambda: _layernorm_recompute_gradient(True))
    with patched("checkpoint_without_output"):
        recomputed = _layernorm_recompute_gradient(True)
    assert torch.equal(recomputed, _layernorm_recompute_gradient(False))


def check_hybrid_moe_metrics() -> None:
    from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
    from megatron.training import global_vars

    class Tracker(MoEMetricsTracker):
        def _sync_metrics(self, *args: Any, **kwargs: Any) -> None:
            """Alone: what is tested is the size of what would be reduced."""

    def size_on_a_stage_without_routers() -> int:
        tracker = Tracker()
        moe_layers = args.hybrid_layer_pattern.count("E")
        tracker.report(1.0, 1, force_initialize=True, track_names="z_loss", num_layers=moe_layers)
        return tracker.metrics["z_loss"].values.numel()

    args = Namespace(hybrid_layer_pattern="*-*-|*E*E", num_layers=8)
    global_vars._GLOBAL_ARGS = args
    try:
        router = Tracker()
        router.record("z_loss", torch.ones(()), 6, args.num_layers)
        recorded = router.metrics["z_loss"].values.numel()
        assert size_on_a_stage_without_routers() != recorded, "upstream has mended it"
        with patched("hybrid_moe_metrics"):
            assert size_on_a_stage_without_routers() == recorded
    finally:
        global_vars._GLOBAL_ARGS = None


def check_throughput() -> None:
    """Both families in full: tests/unit/test_costs_flops.py."""
    from megatron.training import training

    from moa_megatron import patches
    from moa_megatron.costs.flops import missing_from_megatron
    from tests.unit.test_costs import prepared

    run = prepared("tiny-dense")
    patches.undo()  # preparing a run applies all of them
    upstream = training.num_floating_point_operations(run.args, 8)
    with patched("throughput"):
        found = training.num_floating_point_operations(run.args, 8)
    missing = missing_from_megatron(run.args, run.moa)
    assert missing > 0 and found == upstream + 8 * run.args.seq_length * missing


def check_hybrid_final_norm() -> None:
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, normalization="RMSNorm"
    )

    def build_final_norm() -> Any:
        return hybrid_block.TENorm(config=config, hidden_size=8, eps=1e-5)

    on_a_host = hybrid_block.TENorm
    hybrid_block.TENorm = TENorm
    fails(Exception, build_final_norm)
    with patched("hybrid_final_norm"):
        assert isinstance(build_final_norm(), torch.nn.RMSNorm)
    hybrid_block.TENorm = on_a_host


def _model_and_optimizer() -> tuple[Any, Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        gradient_accumulation_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    gpt = GPTModel(config, get_gpt_layer_local_spec(), vocab_size=16, max_sequence_length=4)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    model = DistributedDataParallel(config, ddp, gpt)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=0.1, use_distributed_optimizer=True), [model]
    )
    return model, optimizer


def _step(model: Any, optimizer: Any) -> None:
    tokens = torch.tensor([[3, 1, 4, 1]])
    model.zero_grad_buffer()
    model(tokens, torch.arange(4)[None], None, labels=tokens).sum().backward()
    model.finish_grad_sync()
    optimizer.step()


def _resume(path: str, sharding: dict[str, str]) -> tuple[Any, Any]:
    from megatron.core import dist_checkpointing

    model, optimizer = _model_and_optimizer()
    shards = model.module.sharded_state_dict()
    asked = {
        "model": shards,
        "optimizer": optimizer.sharded_state_dict(shards, True, metadata=sharding),
    }
    loaded = dist_checkpointing.load(asked, path)
    model.module.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return model, optimizer


def _resumes_exactly(sharding: dict[str, str]) -> None:
    from megatron.core import dist_checkpointing

    model, optimizer = _model_and_optimizer()
    _step(model, optimizer)
    _step(model, optimizer)
    with TemporaryDirectory() as path:
        shards = model.module.sharded_state_dict()
        optimizer_shards = optimizer.sharded_state_dict(shards, metadata=sharding)
        dist_checkpointing.save({"model": shards, "optimizer": optimizer_shards}, path)
        fails(AssertionError, lambda: _resume(path, sharding))
        with patched("distributed_optimizer"):
            resumed, resumed_optimizer = _resume(path, sharding)
    _step(model, optimizer)
    _step(resumed, resumed_optimizer)
    for (name, went_on), again in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(went_on, again), f"{sharding}: {name}"


def check_distributed_optimizer() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    for kind in ("dp_reshardable", "fully_reshardable"):
        _resumes_exactly({"distrib_optim_sharding_type": kind})


CHECKS = [
    "check_pins_hold",
    "check_apply_is_idempotent_and_undone",
    "check_unknown_upstream_is_left_alone",
    "check_compile_helpers",
    "check_checkpoint_without_output",
    "check_hybrid_moe_metrics",
    "check_hybrid_final_norm",
    "check_throughput",
    "check_distributed_optimizer",
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return isolated.outcomes(__file__, ["install_host", *CHECKS], fresh=True)


def install_host() -> None:
    from moa_megatron import host

    assert host.install()


@pytest.mark.parametrize("check", CHECKS)
def test_patches(outcomes: dict[str, str], check: str) -> None:
    assert not outcomes[check], outcomes[check]


def test_every_patch_is_tested_and_documented() -> None:
    modules = {path.stem for path in (ROOT / "patches").glob("[!_]*.py")}
    tested = {name.removeprefix("check_") for name in CHECKS} | {test_apex.NAME}
    table = (ROOT / "patches" / "README.md").read_text()
    assert modules <= tested, f"no test fails without {modules - tested}"
    assert all(f"`{module}`" in table for module in modules)
