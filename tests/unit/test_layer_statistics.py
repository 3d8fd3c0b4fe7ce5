"""Statistics of one layer against plain PyTorch; what is left out; what is written where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moa_megatron import observing
from moa_megatron.config import MoAConfig
from tests.helpers import isolated
from tests.helpers.cases import Layout, Model, moa

WIDTH = 32


@contextmanager
def chunk(**options: Any) -> Iterator[Any]:
    """A tiny model of one rank, in host mode."""
    from moa_megatron import host, patches

    host.install()
    patches.apply()
    import torch.distributed as dist

    from tests.helpers import models

    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    settings, moe = options.pop("moa", moa()), options.pop("moe", False)
    with models.model_parallel(Layout()):
        model = Model(moe=moe, moa=settings, options=tuple(options.items()))
        yield models.build(model, Layout())[0]


def ffns(model: Any) -> list[Any]:
    from moa_megatron.grouped import MoATEGroupedMLP
    from moa_megatron.mlp import MoAMLP

    return [m for m in model.modules() if isinstance(m, MoAMLP | MoATEGroupedMLP)]


def forward(model: Any, step: int = 1) -> None:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(64, (1, 16), generator=generator)
    model(tokens, torch.arange(16)[None], None, labels=tokens)


def inputs_of(module: Any, found: list[Tensor]) -> Any:
    return module.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))


def logged(model: Any, settings: MoAConfig, steps: int = 1) -> dict[str, float]:
    """The scalars of one step of ``steps`` micro-batches."""
    from moa_megatron.layer_statistics import LayerStatistics

    written: dict[str, float] = {}
    statistics = LayerStatistics(settings, 1, lambda scalars, _: written.update(scalars))
    for step in range(steps):
        with statistics.watching(1):
            forward(model, step)
    statistics.finish([model])
    return written


def check_dense_layer_against_plain_pytorch() -> None:
    """Two micro-batches; everything is computed anew from the FFN's input and weights."""
    from moa_megatron.reference import mixture_reference

    settings = moa(gate="tanh")
    with chunk(moa=settings) as model:
        module, x = ffns(model)[1], []
        hook = inputs_of(module, x)
        scalars = logged(model, settings, steps=2)
        hook.remove()
        x_Td = torch.cat([batch.reshape(-1, WIDTH) for batch in x])
        u_nd = module.moa_gate.weight.detach()
        pi_Tn = torch.tanh(x_Td @ u_nd.T)
        preact = x_Td @ module.linear_fc1.weight.detach().T
        hidden = mixture_reference(preact, x_Td @ u_nd.T, settings)
        expected = {
            f"gate_mean/{name.replace(':', '_')}": pi_Tn[:, k].mean()
            for k, name in enumerate(settings.coefficient_names())
        }
        expected["gate_saturated"] = (pi_Tn.abs() > 0.98).float().mean()
        expected["gate_weight_norm"] = u_nd.norm()
        expected["preact_amax"], expected["hidden_amax"] = preact.abs().max(), hidden.abs().max()
        assert expected["gate_saturated"] > 0
        found = {
            tag.removeprefix("moa/layer_02/"): value
            for tag, value in scalars.items()
            if tag.startswith("moa/layer_02/")
        }
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert math.isclose(found[name], value.item(), rel_tol=1e-5), name
        assert scalars["moa/hidden_amax"] >= found["hidden_amax"]


def check_routed_and_shared_experts_apart() -> None:
    """Routed: the largest over all experts, weighted; gates: of each token's expert, by pass."""
    settings = moa(gate_scope="expert")
    for grouped in (False, True):
        with chunk(moa=settings, moe=True, moe_grouped_gemm=grouped) as model:
            from moa_megatron.mlp import MoASharedExpertMLP

            layer = [m for m in model.modules() if type(m).__name__ == "MoALayer"][0]
            down: list[Tensor] = []
            experts = layer.experts
            linears = (
                [experts.linear_fc2]
                if grouped
                else [expert.linear_fc2 for expert in experts.local_experts]
            )
            hooks = [inputs_of(linear, down) for linear in linears]
            shared: list[Tensor] = []
            hooks.append(inputs_of(layer.shared_experts.linear_fc2, shared))
            scalars = logged(model, settings)
            for hook in hooks:
                hook.remove()
            peak = max(float(t.abs().max()) for t in down if t.numel())
            assert math.isclose(scalars["moa/layer_01/routed/hidden_amax"], peak, rel_tol=1e-6)
            peak = float(shared[0].abs().max())
            assert math.isclose(scalars["moa/layer_01/shared/hidden_amax"], peak, rel_tol=1e-6)
            gates = [p.detach() for n, p in experts.named_parameters() if "moa_gate" in n]
            norm = (sum(float(g.square().sum()) for g in gates) / len(gates)) ** 0.5
            found = scalars["moa/layer_01/routed/gate_weight_norm"]
            assert math.isclose(found, norm, rel_tol=1e-6)
            assert "moa/layer_01/shared/gate_mean/y_silu" in scalars
            assert isinstance(layer.shared_experts, MoASharedExpertMLP)


def check_sequential_and_grouped_experts_show_the_same() -> None:
    """Also with experts that get no token: a router of zeros sends all to the same two."""
    for scope in ("layer", "expert"):
        settings, found = moa(gate_scope=scope), []
        for grouped in (False, True):
            with chunk(moa=settings, moe=True, moe_grouped_gemm=grouped) as model:
                counts: list[Tensor] = []
                for name, module in model.named_modules():
                    if name.endswith("router"):
                        module.weight.data.zero_()
                    if name.endswith("mlp.experts"):
                        module.register_forward_pre_hook(
                            lambda _, args, to=counts: to.append(args[1])
                        )
                found.append(logged(model, settings))
                assert all(int((count == 0).sum()) == len(count) - 2 for count in counts)
                assert len(counts) == 2
        assert found[0].keys() == found[1].keys()
        for tag, value in found[0].items():
            assert math.isclose(found[1][tag], value, rel_tol=1e-5), tag


def check_learned_coefficients_are_shown_themselves() -> None:
    for options in ({}, {"moe": True}, {"moe": True, "moe_grouped_gemm": True}):
        for scope in ("layer", "expert"):
            settings = moa(mixing="la", gate_scope=scope, variant="one")
            with chunk(moa=settings, **options) as model:
                for module in model.modules():
                    if hasattr(module, "moa_gate"):
                        for parameter in module.moa_gate.parameters():
                            parameter.data = torch.arange(7.0)
                scalars = logged(model, settings)
            part = "/routed" if options and scope == "expert" else ""
            names = settings.coefficient_names()
            for k, name in enumerate(names):
                tag = f"moa/layer_01{part}/coefficient/{name.replace(':', '_')}"
                assert scalars[tag] == k, tag
            assert not [tag for tag in scalars if "gate" in tag]


def check_evaluation_and_other_steps_show_nothing() -> None:
    from moa_megatron import host

    host.install()
    from moa_megatron import layer_statistics

    with chunk() as model:
        statistics = layer_statistics.LayerStatistics(moa(), 5, None)
        with (
            mock.patch.object(observing, "record") as record,
            mock.patch.object(statistics, "_own") as reduce,
        ):
            for step in (0, 1, 4, 6):  # 0 stands for evaluation
                with statistics.watching(step):
                    forward(model)
                statistics.finish([model])
            assert not record.called and not reduce.called
        with mock.patch.object(observing, "record") as record:
            with statistics.watching(5):
                forward(model)
            assert record.call_count == 2
            forward(model)  # a recomputed forward lies outside
            assert record.call_count == 2


def check_forward_step_watches_training_only() -> None:
    from moa_megatron import host

    host.install()
    from moa_megatron import batches, layer_statistics

    model, args = mock.Mock(), SimpleNamespace(curr_iteration=9)
    with (
        mock.patch.object(batches, "get_args", lambda: args),
        mock.patch.object(batches, "get_timers", mock.MagicMock),
        mock.patch.object(batches, "_batch", lambda *_: mock.MagicMock()),
        mock.patch.object(layer_statistics, "_installed", mock.MagicMock()) as installed,
    ):
        for training in (True, False):
            model.training = training
            batches.forward_step(None, model)
    assert installed.watching.call_args_list == [mock.call(10), mock.call(0)]


def check_installation_and_writers() -> None:
    from moa_megatron import host

    host.install()
    from moa_megatron import layer_statistics

    config = SimpleNamespace(finalize_model_grads_func=None)
    for interval, settings in ((0, MoAConfig()), (10, MoAConfig(mixing="fixed"))):
        layer_statistics.install(config, settings, interval)
        assert config.finalize_model_grads_func is None
        with layer_statistics.watching(10):
            assert not observing.active
    tensorboard, wandb = mock.Mock(), mock.Mock()
    with (
        mock.patch.object(layer_statistics, "get_tensorboard_writer", lambda: tensorboard),
        mock.patch.object(layer_statistics, "get_wandb_writer", lambda: wandb),
    ):
        layer_statistics.install(config, MoAConfig(), 10)
        with layer_statistics.watching(9):
            assert not observing.active
        with layer_statistics.watching(10):
            assert observing.active
        layer_statistics.to_writers({"moa/hidden_amax": 2.0}, 10)
    tensorboard.add_scalar.assert_called_once_with("moa/hidden_amax", 2.0, 10)
    wandb.log.assert_called_once_with({"moa/hidden_amax": 2.0}, 10)
    with (
        mock.patch.object(layer_statistics, "finalize_model_grads") as upstream,
        mock.patch.object(layer_statistics.LayerStatistics, "finish") as finish,
    ):
        config.finalize_model_grads_func(["chunk"], 7, pg_collection=None)
    upstream.assert_called_once_with(["chunk"], 7, pg_collection=None)
    finish.assert_called_once_with(["chunk"])


def check_nan_is_written_as_infinite() -> None:
    settings = moa()
    with chunk(moa=settings) as model:
        ffns(model)[0].linear_fc1.weight.data[0, 0] = math.nan
        scalars = logged(model, settings)
    assert scalars["moa/layer_01/hidden_amax"] == scalars["moa/hidden_amax"] == math.inf


def check_flags_say_where_statistics_cannot_be() -> None:
    from moa_megatron import host

    host.install()
    from moa_megatron import arguments, derive, flags, recipes

    def parsed(*words: str) -> Any:
        line = ["tiny-moe", "--run-dir", "unused", *words]
        found = arguments.parse(recipes.parse_command_line(line), host.HOST_ARGS)
        return found.args, found.moa

    args, settings = parsed()
    assert args.moa_log_interval == derive.LOG_INTERVAL and not flags.problems(args, settings)
    graphs = ("--cuda-graph-impl", "transformer_engine")
    args, settings = parsed(*graphs)
    assert args.moa_log_interval == 0 and not flags.problems(args, settings)
    args, settings = parsed(*graphs, "--moa-log-interval", "5")
    (problem,) = flags.problems(args, settings)
    assert "--moa-log-interval" in problem and "--cuda-graph-impl" in problem
    args, settings = parsed("--moa-log-interval", "0")
    assert args.moa_log_interval == 0
    with pytest.raises(recipes.RefusedError, match="--moa-log-interval -1"):
        parsed("--moa-log-interval", "-1")


CHECKS = [name for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return isolated.outcomes(__file__, CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_layers(failures: dict[str, str], name: str) -> None:
    assert not failures[name], failures[name]
