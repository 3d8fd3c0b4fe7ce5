"""Host mode: when it acts, what it redirects, and that its attention and norm are exact."""

import sys
from types import SimpleNamespace

import pytest
import torch

from moa_megatron import host
from tests.helpers import isolated


def test_inactive_where_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.empty, torch.Tensor.to, torch.cuda.current_device, list(sys.meta_path)
    assert host.install() is False
    assert (torch.empty, torch.Tensor.to, torch.cuda.current_device, sys.meta_path) == before
    assert not host.active()


def test_refuses_after_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "megatron", SimpleNamespace())
    with pytest.raises(RuntimeError, match=r"before .*megatron.* is imported"):
        host.install()
    assert not host.active()


def check_redirects_devices() -> None:
    assert host.install()
    installed = torch.empty
    assert host.install() and torch.empty is installed, "a second install must change nothing"
    assert not torch.cuda.is_available(), "the truth about the device must remain visible"
    x = torch.zeros(2, 3, device="cuda", pin_memory=True)
    for device in ("cuda", "cuda:1", torch.device("cuda", 0), torch.cuda.current_device()):
        for made in (torch.ones(2, device=device), torch.empty_like(x, device=device)):
            assert made.device.type == "cpu"
        assert x.new_full((2,), 1.0, device=device).device.type == "cpu"
        assert x.to(device).device.type == "cpu"
        assert x.to(device=device, dtype=torch.bfloat16).dtype is torch.bfloat16
    assert torch.empty(2, device="meta").device.type == "meta"
    assert x.cuda() is x and x.pin_memory() is x
    assert x.type() == "torch.cuda.FloatTensor"
    assert x.type("torch.cuda.HalfTensor").dtype is torch.float16
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def check_redirects_streams_and_random_state() -> None:
    host.install()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    end.record()
    assert start.elapsed_time(end) >= 0
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] == 0
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(drawn, torch.rand(3))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def check_hides_transformer_engine() -> None:
    host.install()
    import importlib.util

    assert importlib.util.find_spec("transformer_engine") is None
    from megatron.core.extensions import transformer_engine

    assert not transformer_engine.HAVE_TE


def check_leaves_megatron_eager_and_compiles_ours() -> None:
    host.install()
    from megatron.core.fusions import fused_bias_dropout, fused_bias_swiglu
    from megatron.core.jit import jit_fuser

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x

    assert jit_fuser(plain) is plain
    fused = (fused_bias_swiglu.swiglu, fused_bias_dropout.bias_dropout_add_fused_train)
    assert all(type(function) is type(plain) for function in fused)
    x = torch.randn(4)
    made = torch.compile(
        lambda x: x.to(torch.float64) + torch.zeros_like(x, device="cuda"),
        backend="eager",
        fullgraph=True,
    )(x)
    assert torch.equal(made, x.double())


def check_forks_random_state() -> None:
    host.install()
    import logging

    from megatron.core.tensor_parallel import random

    tracker = random.CudaRNGStatesTracker()
    tracker.add("a", 11)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    warnings: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = warnings.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    with tracker.fork("a"):
        first = torch.rand(2)
    with tracker.fork("a"):
        second = torch.rand(2)
    logging.getLogger().removeHandler(handler)
    assert torch.equal(torch.rand(2), expected), "the outer stream must go on undisturbed"
    torch.manual_seed(11)
    assert torch.equal(torch.rand(2), first) and torch.equal(torch.rand(2), second)
    assert not warnings


def check_norms_carry_sequence_parallel() -> None:
    host.install()
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer import TransformerConfig

    for normalization, kind in (("LayerNorm", torch.nn.LayerNorm), ("RMSNorm", torch.nn.RMSNorm)):
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, normalization=normalization
        )
        config.sequence_parallel = True
        norm = LocalSpecProvider().layer_norm(rms_norm=True)(config=config, hidden_size=8, eps=1e-3)
        assert type(norm) is kind and norm.eps == 1e-3
        assert all(parameter.sequence_parallel for parameter in norm.parameters())
    config.layernorm_zero_centered_gamma = True
    with pytest.raises(ValueError, match="layernorm_zero_centered_gamma"):
        LocalSpecProvider().layer_norm(rms_norm=True)(config=config, hidden_size=8, eps=1e-3)


def check_local_hybrid_stack_saves_norms_under_upstream_names() -> None:
    host.install()
    from moa_megatron.local_specs import local_hybrid_stack_spec

    layers = local_hybrid_stack_spec().submodules
    keys = {
        name: getattr(layers, name).submodules.sharded_state_dict_keys_map
        for name in ("attention_layer", "mlp_layer", "moe_layer")
    }
    assert keys == {
        "attention_layer": {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        "mlp_layer": {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        "moe_layer": {},
    }


SINGLE = [
    "check_redirects_devices",
    "check_redirects_streams_and_random_state",
    "check_hides_transformer_engine",
    "check_leaves_megatron_eager_and_compiles_ours",
    "check_forks_random_state",
    "check_norms_carry_sequence_parallel",
    "check_local_hybrid_stack_saves_norms_under_upstream_names",
]


@pytest.fixture(scope="module")
def single() -> dict[str, str]:
    return isolated.outcomes(__file__, SINGLE, fresh=True)


@pytest.mark.parametrize("check", SINGLE)
def test_host(single: dict[str, str], check: str) -> None:
    assert not single[check], single[check]


def check_gathers_unequal_sizes() -> None:
    import torch.distributed as dist

    from moa_megatron.host import collectives

    rank = dist.get_rank()
    mine = torch.full((1 + 2 * rank, 2), float(rank))
    with pytest.raises(RuntimeError, match="invalid tensor size"):
        collectives._all_gather([torch.empty(1, 2), torch.empty(3, 2)], mine)
    dist.barrier()
    host.install()
    gathered = torch.empty(4, 2)
    dist.all_gather(list(gathered.split([1, 3])), mine)
    assert torch.equal(gathered, torch.tensor([0.0, 1, 1, 1])[:, None].expand(4, 2))


def check_context_parallel_attention_is_exact() -> None:
    host.install()
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from moa_megatron.host.attention import zigzag_positions

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    mine = zigzag_positions(8, 2, dist.get_rank())

    def run(cp: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, attention_dropout=0.0
        )
        config.context_parallel_size = cp
        attention = LocalSpecProvider().core_attention()(
            config, 1, AttnMaskType.causal, "self", pg_collection=groups
        )
        inputs = [t.detach().requires_grad_() for t in tensors]
        output = attention(*inputs, None)
        upstream = weight if cp == 1 else weight[mine]
        (output * upstream).sum().backward()
        return output, [t.grad for t in inputs]

    torch.manual_seed(0)
    query, key, value = (torch.randn(8, 2, 2, 4) for _ in range(3))
    weight = torch.randn(8, 2, 8)
    whole, whole_grads = run(1, query, key, value)
    part, part_grads = run(2, query[mine], key[mine], value[mine])
    torch.testing.assert_close(part, whole[mine])
    for got, expected in zip(part_grads, whole_grads, strict=True):
        torch.testing.assert_close(got, expected[mine])
    host.shutdown()
    assert not dist.is_initialized()


PAIR = ["check_gathers_unequal_sizes", "check_context_parallel_attention_is_exact"]


@pytest.fixture(scope="module")
def pair() -> dict[str, str]:
    return isolated.outcomes(__file__, PAIR, ranks=2)


@pytest.mark.parametrize("check", PAIR)
def test_two_hosts(pair: dict[str, str], check: str) -> None:
    assert not pair[check], pair[check]
